"""The demonstrations as the parser knows them: NAME, URL and options; imports nothing heavy.

``demo [NAME] [URL]``: a NAME is the first word behind the verb, and without one it is the default.
A URL without a NAME before it has a slash (``./place``, ``s3://bucket/run``), so that a misspelt
NAME is never taken for a folder.
"""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Sequence

from tensorstore_fmt.cli.failures import UsageError
from tensorstore_fmt.demo import DEFAULT, NAMES

__all__ = ["add_demonstrations", "check_url", "with_name"]

_FLAGS = ("--json", "--debug", "--quiet")
"""Options without a value: a NAME may stand behind them."""


def add_demonstrations(demo: ArgumentParser, common: ArgumentParser) -> None:
    """Add each demonstration with its options to the parser of the verb."""
    names = demo.add_subparsers(
        dest="demo", metavar="NAME", required=True, title="names", parser_class=type(demo)
    )

    def add(name: str, summary: str, *, folder: str, needs: str) -> ArgumentParser:
        parser: ArgumentParser = names.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=needs,
            formatter_class=RawDescriptionHelpFormatter,
            allow_abbrev=False,
            parents=[common],
        )
        parser.add_argument(
            "url", metavar="URL", nargs="?", help=f"new run; default {folder} or the next free"
        )
        parser.add_argument("--seed", metavar="N", type=int, default=0, help="of all chance (0)")
        parser.add_argument("--quiet", action="store_true", help="print failures only")
        return parser

    digits = add(
        "digits",
        "train a small network into a run and watch it from a second process",
        folder="./tensorstore-demo",
        needs="Needs scikit-learn and matplotlib: pip install 'tensorstore-fmt[demo]'",
    )
    _add_digits(digits)

    attention = add(
        "attention",
        "fine-tune a transformer, and draw what one of its attention heads looks at",
        folder="./tensorstore-attention",
        needs="A finished run of an earlier call is not trained again, only drawn.\n"
        "Needs PyTorch and the model: pip install 'tensorstore-fmt[demo-attention]'",
    )
    _add_attention(attention)

    curves = add(
        "curves",
        "compare trainings while they run; a rule stops the one whose loss diverges",
        folder="./tensorstore-curves",
        needs="Needs scikit-learn and matplotlib: pip install 'tensorstore-fmt[demo]'",
    )
    _add_curves(curves)


def _add_digits(parser: ArgumentParser) -> None:
    parser.add_argument("--steps", metavar="N", type=int, default=300, help="to train (300)")
    parser.add_argument(
        "--save-every", metavar="N", type=int, default=10, help="log tensors every N steps (10)"
    )
    parser.add_argument("--pictures", metavar="DIR", help="folder for the pictures")


def _add_curves(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--learning-rates",
        metavar="A,B,…",
        type=_rates,
        help="one training each (0.02,0.2,2, of which the last is too large)",
    )
    parser.add_argument("--steps", metavar="N", type=int, default=300, help="to train (300)")
    parser.add_argument(
        "--save-every", metavar="N", type=int, default=10, help="log tensors every N steps (10)"
    )
    parser.add_argument(
        "--no-stop", action="store_true", help="let a training go on when a rule fires"
    )
    parser.add_argument("--pictures", metavar="DIR", help="folder for pictures and page")


def _rates(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is no list of numbers, as in 0.02,0.2,2") from None


def _add_attention(parser: ArgumentParser) -> None:
    what = parser.add_argument_group("what is drawn, counted from 0")
    what.add_argument("--layer", metavar="N", type=int, default=5, help="0 to 5 (5)")
    what.add_argument("--head", metavar="N", type=int, default=8, help="of the layer, 0 to 11 (8)")
    what.add_argument("--pair", metavar="N", type=int, default=0, help="of sentences, 0 to 31 (0)")
    what.add_argument("--step", metavar="N", type=int, help="of the pictures; default the last")
    what.add_argument(
        "--token", metavar="N", type=int, help="for the neuron view; default one that looks hard"
    )
    training = parser.add_argument_group("training")
    training.add_argument("--steps", metavar="N", type=int, default=20, help="to train (20)")
    training.add_argument(
        "--save-every", metavar="N", type=int, default=2, help="look every N steps (2)"
    )
    parser.add_argument("--out", metavar="DIR", help="folder for pictures, animations and page")


def with_name(argv: Sequence[str]) -> tuple[list[str], bool]:
    """Put the NAME first behind the verb ``demo``, the default one if there is none.

    Returns
    -------
    tuple
        The words, and whether a NAME, or a call for help, was among them.
    """
    words = list(argv)
    begin = words.index("demo") + 1
    position = begin
    while position < len(words) and words[position] in _FLAGS:
        position += 1
    word = words[position] if position < len(words) else ""
    if word in {"-h", "--help"}:
        return words, True
    if word in NAMES:
        return [*words[:begin], word, *words[begin:position], *words[position + 1 :]], True
    return [*words[:begin], DEFAULT, *words[begin:]], False


def check_url(url: str) -> None:
    """Refuse a URL that stands where a NAME may, and has no slash.

    Raises
    ------
    UsageError
        It may be a misspelt NAME, or a NAME behind an option.
    """
    if "/" in url:
        return
    from difflib import get_close_matches  # rarely needed

    near = get_close_matches(url, NAMES, n=1, cutoff=0.5)
    if url in NAMES:
        what = f"the name {url!r} stands behind an option; write first: demo {url}"
    else:
        meant = f"did you mean {near[0]}? " if near else ""
        what = f"there is no demonstration {url!r}; {meant}names: {' '.join(NAMES)}"
    raise UsageError(f"{what}; for a run in a folder of that name: ./{url}", name=url, near=near)
