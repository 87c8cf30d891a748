"""The verbs and their options."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, TypeAlias

from tensorstore_fmt.cli.demos import add_demonstrations

__all__ = ["add_verbs"]

if TYPE_CHECKING:
    Verbs: TypeAlias = argparse._SubParsersAction[Any]


def add_verbs(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """Add all verbs to a parser; each also has the `common` options."""
    for add in (_add_reading, _add_upkeep, _add_export, _add_import, _add_watch, _add_demo):
        add(verbs, common)


def _add(
    verbs: Verbs,
    common: argparse.ArgumentParser,
    name: str,
    summary: str,
    more: str = "",
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        parents=[common],
    )
    return parser


def _add_selection(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where several saved the same name")
    group.add_argument("--mode", metavar="MODE", help="TRAIN, EVAL, PREDICT or NONE")
    group.add_argument("--worker", metavar="N", type=int, help="of this worker")
    group.add_argument("--attempt", metavar="N", type=int, help="of this attempt")


def _add_steps(parser: argparse.ArgumentParser, *, is_required: bool = False) -> None:
    group = parser.add_mutually_exclusive_group(required=is_required)
    group.add_argument("--step", metavar="N", help="one step: a number, 'first' or 'last'")
    group.add_argument(
        "--steps",
        metavar="A:B[:C]",
        help="step numbers from A up to, not including B, every C; saved ones count",
    )


def _add_reading(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    ls = _add(
        verbs,
        common,
        "ls",
        "list the names in a run, or the runs in a folder",
        "A pattern is quoted for the shell: tensorstore-fmt ls runs/first 'gradient/*' -l",
    )
    ls.add_argument("url", metavar="URL")
    ls.add_argument("pattern", metavar="PATTERN", nargs="?", help="as in 'gradient/*'")
    ls.add_argument(
        "-l", dest="is_long", action="store_true", help="with dtype, shape, steps and sizes"
    )
    ls.add_argument(
        "--steps",
        dest="shows_steps",
        action="store_true",
        help="with the saved steps; of the whole run if there is no PATTERN",
    )

    info = _add(verbs, common, "info", "describe a run: attributes, workers, steps, sizes, damage")
    info.add_argument("url", metavar="URL", nargs="?")
    info.add_argument(
        "--build",
        action="store_true",
        help="describe this installation instead: versions, whether the compiled kernel is used",
    )

    stat = _add(
        verbs,
        common,
        "stat",
        "show the statistics of tensors, step by step",
        "Count, NaN, infinities, zeros, least, greatest, mean, standard deviation and L2 norm were "
        "stored\nbeside the tensors; no tensor is read.",
    )
    stat.add_argument("url", metavar="URL")
    stat.add_argument("names", metavar="NAME", nargs="+", help="name or pattern")
    _add_steps(stat)
    _add_selection(stat)

    cat = _add(
        verbs,
        common,
        "cat",
        "print values: scalars one line per step, tensors summarised",
        "Without --step or --steps: all steps of a scalar, the last step of a tensor.\n"
        "With --json, tensors are printed in full.",
    )
    cat.add_argument("url", metavar="URL")
    cat.add_argument("name", metavar="NAME")
    _add_steps(cat)
    _add_selection(cat)

    part = _add(
        verbs,
        common,
        "slice",
        "read part of a tensor and print or save it",
        "EXPR is NumPy's basic indexing: integers, start:stop:step and ..., with or without [].\n"
        "Only the chunks it touches are fetched. With --steps, the steps are stacked in front.\n\n"
        "  tensorstore-fmt slice runs/first attention --step 500 '[3, 5, :20, :20]'",
    )
    part.add_argument("url", metavar="URL")
    part.add_argument("name", metavar="NAME")
    part.add_argument("index", metavar="EXPR", nargs="?", help="default: all of it")
    _add_steps(part, is_required=True)
    _add_selection(part)
    part.add_argument("--out", metavar="FILE.npy", help="save it instead of printing")
    _add_writing(part)


def _add_writing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="replace a file that exists")
    parser.add_argument(
        "--cast",
        choices=("float32", "bits"),
        help="store dtypes that the file format lacks (bfloat16 …) as float32, or as unsigned "
        "integers with the same bits; others stay as they are",
    )


def _add_upkeep(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    verify = _add(
        verbs,
        common,
        "verify",
        "check every byte of a run against its checksums",
        "Exit code 1 and a list of the damage if there is any.",
    )
    verify.add_argument("url", metavar="URL")

    recover = _add(
        verbs,
        common,
        "recover",
        "save what a crash left behind, and close the run",
        "Changes no committed byte. Refuses while a writer is alive.",
    )
    recover.add_argument("url", metavar="URL")
    recover.add_argument("--dry-run", action="store_true", help="say what would be done")
    recover.add_argument(
        "--force", action="store_true", help="where it cannot be seen whether a writer is alive"
    )

    compact = _add(
        verbs, common, "compact", "merge the index of a closed run, so that it opens faster"
    )
    compact.add_argument("url", metavar="URL")


def _add_export(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    export = _add(
        verbs,
        common,
        "export",
        "write scalars or tensors to .csv .parquet .npy .npz .safetensors",
        "The ending of OUT says the format.\n\n"
        "  scalars      tensorstore-fmt export RUN loss.csv --names loss 'acc*'\n"
        "  one name     tensorstore-fmt export RUN w.npy --names fc1.weight --step 100\n"
        "  its steps    tensorstore-fmt export RUN w.npy --names fc1.weight --steps 0:1000\n"
        "  one step     tensorstore-fmt export RUN step100.npz --step 100\n"
        "  one step     tensorstore-fmt export RUN step100.safetensors --step last --names 'fc*'",
    )
    export.add_argument("url", metavar="URL")
    export.add_argument("out", metavar="OUT", help="a file on this machine")
    export.add_argument(
        "--names", metavar="NAME", nargs="+", help="names or patterns; default: all that fit"
    )
    _add_steps(export)
    _add_selection(export)
    export.add_argument(
        "--long",
        dest="is_long",
        action="store_true",
        help="CSV with one row per name and step, instead of one column per name "
        "(Parquet is always long)",
    )
    _add_writing(export)


def _add_import(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    parser = _add(
        verbs,
        common,
        "import",
        "make a run of what another tool wrote",
        "Exit code 1 and a list of what was lost if files of SRC are damaged or missing; all that\n"
        "can be read is imported.\n\n"
        "  tensorstore-fmt import smdebug s3://bucket/job/debug-output runs/job\n"
        "  tensorstore-fmt import tensorboard logs runs/logs\n"
        "  tensorstore-fmt import safetensors checkpoints runs/checkpoints\n"
        "  tensorstore-fmt import npz out runs/out --step-pattern 'epoch=([0-9]+)'",
    )
    parser.add_argument(
        "kind",
        metavar="KIND",
        choices=("smdebug", "tensorboard", "safetensors", "npz"),
        help="smdebug (Amazon SageMaker Debugger), tensorboard, safetensors or npz",
    )
    parser.add_argument("source", metavar="SRC", help="a folder, or a URL that fsspec can list")
    parser.add_argument("url", metavar="RUN", help="the run to make; it must not exist")
    parser.add_argument(
        "--source-options",
        metavar="JSON",
        help="for the file system of SRC, as --storage-options is for that of RUN",
    )
    parser.add_argument(
        "--step-pattern",
        metavar="REGEX",
        help="safetensors, npz: finds the step in a path, as its group (default: the last number "
        "in the file's name, else in the nearest folder's)",
    )
    parser.add_argument("--mode", metavar="MODE", help="safetensors, npz: TRAIN, EVAL or PREDICT")


def _add_watch(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    parser = _add(
        verbs,
        common,
        "watch",
        "evaluate rules on a run, while it is written or afterwards",
        "Exit code 1 if a rule fired or failed, or the writer died. What is found stays in the\n"
        "run: see --alerts. It ends when the run is closed, or its writer died: on a disk the\n"
        "lock says so. In a bucket, or if the job may be restarted, give --idle-timeout.\n\n"
        "  tensorstore-fmt watch RUN --rule all_zero --rule overfit:ratio=0.2,patience=3\n"
        "  tensorstore-fmt watch RUN --rule 'exploding_tensor:names=^gradient/' --stop --wait 600\n"
        "  tensorstore-fmt watch RUN --rule my_package.rules:MyRule:limit=3 --once\n"
        "  tensorstore-fmt watch RUN --rule similar_across_runs --other RUN2 --once",
    )
    parser.add_argument("url", metavar="RUN", nargs="?")
    parser.add_argument(
        "--rule",
        metavar="NAME[:PARAMETER=VALUE,…]",
        action="append",
        help="may be given several times; also module:Class, which imports the module",
    )
    parser.add_argument("--other", metavar="RUN", action="append", help="a run to compare with")
    parser.add_argument(
        "--once", action="store_true", help="evaluate what is complete now, and leave"
    )
    parser.add_argument(
        "--wait", metavar="SECONDS", type=float, help="wait so long for the run to be created"
    )
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=float, help="leave after so long, closed or not"
    )
    parser.add_argument(
        "--idle-timeout",
        metavar="SECONDS",
        type=float,
        help="leave when nothing came for so long, dead writer or not",
    )
    parser.add_argument(
        "--poll",
        metavar="SECONDS",
        type=float,
        help="between looks; default: 0.1 to 1 on a disk, 2 to 15 elsewhere",
    )
    parser.add_argument(
        "--stop", action="store_true", help="ask the training to stop when a rule fires"
    )
    parser.add_argument("--webhook", metavar="URL", help="POST each finding as JSON")
    parser.add_argument("--log", metavar="FILE", help="append each finding as a line of JSON")
    parser.add_argument(
        "--no-record", action="store_true", help="do not write what was found to the run"
    )
    parser.add_argument(
        "--alerts", action="store_true", help="show what was found before, and evaluate nothing"
    )
    parser.add_argument(
        "--list", action="store_true", help="show the rules that are known, and their parameters"
    )


def _add_demo(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    demo = _add(
        verbs,
        common,
        "demo",
        "show what the store is for: a real training, and what can be seen of it",
        "Without a NAME: digits. A URL without a NAME before it has a slash: ./place, s3://b/run.",
    )
    add_demonstrations(demo, common)
