"""The verbs and options of the command, as argparse knows them; imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Final, NoReturn

from tensorstore_fmt._version import __version__
from tensorstore_fmt.cli.demos import check_url, with_name
from tensorstore_fmt.cli.failures import UsageError
from tensorstore_fmt.cli.verbs import add_verbs

__all__ = ["PROGRAM", "VERBS", "parse"]

PROGRAM: Final = "tensorstore-fmt"

VERBS: Final = {
    "ls": "listing.ls",
    "info": "overview.info",
    "stat": "statistics.stat",
    "cat": "values.cat",
    "slice": "values.slice_",
    "verify": "upkeep.verify",
    "recover": "upkeep.recover",
    "compact": "upkeep.compact",
    "export": "exporting.export",
    "import": "importing.import_",
    "watch": "watch.watch",
    "demo": "demonstration.demo",
}
"""The function of each verb: module of this package and name."""

_LATE: Final = {"ls": "pattern", "info": "url", "slice": "index", "watch": "url", "demo": "url"}

_EPILOG: Final = """\
URL is a folder, or whatever fsspec can open: s3://bucket/run, memory://run, https://host/run …
Credentials come from where they always do (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ~/.aws …).

Every verb takes --json: one JSON document on stdout, strict, with "nan", "inf" and "-inf" as
strings (watch: one object a line, as things happen); a failure is
{"error": {"code": …, "message": …, "facts": {…}}}.

Exit codes: 0 fine, 1 a problem was found (not there, damaged, storage failed), 2 wrong usage.

  tensorstore-fmt ls runs/first -l
  tensorstore-fmt slice runs/first fc1.weight --step last '[:4, :4]'
  tensorstore-fmt VERB --help
"""


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing and leaving; `main` decides how it is said."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see: {self.prog} --help")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises
    ------
    UsageError
        It cannot be understood.
    SystemExit
        It asked for help or the version, which were printed.
    """
    words, is_named = list(argv), True
    if _check_verb(argv) == "demo":
        words, is_named = with_name(argv)
    defaults = argparse.Namespace(json=False, debug=False, storage_options=None)
    arguments, rest = build().parse_known_args(_with_brackets(words), defaults)
    late = _LATE.get(arguments.verb)
    if rest and late and getattr(arguments, late) is None and not rest[0].startswith("-"):
        # Before Python 3.12.7 argparse loses an optional word that stands behind an option.
        setattr(arguments, late, rest.pop(0))
    if rest:
        raise UsageError(
            f"{arguments.verb} does not know {' '.join(rest)!r}; "
            f"see: {PROGRAM} {arguments.verb} --help"
        )
    if not is_named and arguments.url is not None:
        check_url(arguments.url)
    return arguments


def _check_verb(argv: Sequence[str]) -> str | None:
    """Give the verb, None if there is none; refuse an unknown one, with the nearest ones."""
    words = iter(argv)
    for word in words:
        if word == "--storage-options":
            next(words, None)
        elif not word.startswith("-"):
            if word not in VERBS:
                from difflib import get_close_matches  # rarely needed

                near = get_close_matches(word, VERBS, n=2, cutoff=0.5)
                meant = f"did you mean {' or '.join(near)}? " if near else ""
                raise UsageError(
                    f"there is no verb {word!r}; {meant}verbs: {' '.join(VERBS)}",
                    verb=word,
                    near=near,
                )
            return word
    return None


def _with_brackets(argv: Sequence[str]) -> list[str]:
    """Keep argparse from taking an index such as ``-1,:5`` for an option."""
    return [
        f"[{word}]" if word[:1] == "-" and word[1:2].isdigit() and set(word) & set(",:") else word
        for word in argv
    ]


def build() -> argparse.ArgumentParser:
    """Make the parser."""
    common = _common()
    parser = _Parser(
        prog=PROGRAM,
        description="Look at the runs of tensorstore_fmt, look after them, and export from them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        parents=[common],
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    verbs = parser.add_subparsers(
        dest="verb", metavar="VERB", required=True, title="verbs", parser_class=_Parser
    )
    add_verbs(verbs, common)
    return parser


def _common() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    group = common.add_argument_group("common options")
    group.add_argument("--json", action="store_true", help="print one JSON document")
    group.add_argument(
        "--storage-options",
        metavar="JSON",
        help="for the fsspec file system, as a JSON object or @FILE that holds one",
    )
    group.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return common
