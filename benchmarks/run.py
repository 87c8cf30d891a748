"""Run the benchmark suite: every case, every contestant that is installed, side by side.

``python benchmarks/run.py`` goes on where an earlier run of the same ``--out`` stopped, prints a
table for each case, and writes ``trials.jsonl``, ``results.json``, ``report.md`` and ``plots/``.
``python benchmarks/environments.py`` makes the peers' environments.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent
sys.path[0] = str(BENCHMARKS)

import datasets  # noqa: E402 (after the path)
import environments  # noqa: E402
from suite import plots, report  # noqa: E402
from suite.case import Case  # noqa: E402
from suite.pythons import Pythons  # noqa: E402
from suite.registry import all_cases  # noqa: E402
from suite.results import Results  # noqa: E402
from suite.trials import Trials  # noqa: E402


def chosen_cases(wanted: list[str]) -> list[Case]:
    """Give the cases named by name or number; all of them without any."""
    cases = all_cases()
    known = {case.name for case in cases} | {str(case.number) for case in cases}
    if unknown := set(wanted) - known:
        sys.exit(
            f"no such case: {', '.join(sorted(unknown))}; there are "
            f"{', '.join(f'{case.number} {case.name}' for case in cases)}"
        )
    return [c for c in cases if not wanted or c.name in wanted or str(c.number) in wanted]


def chosen_contestants(wanted: list[str] | None, cases: list[Case]) -> set[str] | None:
    """Check the names of contestants; None means all."""
    if wanted is None:
        return None
    known = {contestant.name for case in cases for contestant in case.contestants()}
    if unknown := set(wanted) - known:
        sys.exit(
            f"no such contestant in these cases: {', '.join(sorted(unknown))}; "
            f"there are {', '.join(sorted(known))}"
        )
    return set(wanted)


def make_data(pythons: Pythons, *, quick: bool) -> None:
    """Make the data if they are not there: the quick set here, the full one where torch is."""
    try:
        datasets.manifest(quick=quick)
    except FileNotFoundError:
        python = sys.executable if quick else pythons.of("peers")
        command = [python, str(BENCHMARKS / "datasets.py"), *(["--quick"] * quick)]
        print(f"making the data, once: {' '.join(command)}", flush=True)
        if subprocess.run(command, check=False).returncode:
            sys.exit(
                "the data could not be made; `python benchmarks/environments.py` installs torch"
            )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=[], metavar="CASE", help="names or numbers")
    parser.add_argument("--contestants", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--quick", action="store_true", help="tiny data, one round, ≤ 3 minutes")
    parser.add_argument("--repeats", type=int, help="rounds (default: per case, 5 or more)")
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "results", help="folder")
    parser.add_argument("--fresh", action="store_true", help="measure these cases anew")
    parser.add_argument("--list", action="store_true", help="show cases and contestants, and end")
    parser.add_argument("--report", action="store_true", help="only write the report anew")
    parser.add_argument(
        "--environments", type=Path, default=environments.FOLDER, help="of the peers"
    )
    parser.add_argument("--scratch", type=Path, help="where trials write (default: temporary)")
    return parser.parse_args()


def show_list(cases: list[Case], pythons: Pythons) -> None:
    """Print what could be run."""
    for case in cases:
        print(f"{case.number:>2} {case.name}: {case.question}")
        for contestant in case.contestants():
            found = pythons.find(contestant)
            print(f"     {contestant.name:24}{found if isinstance(found, str) else ''}")


def main() -> int:
    given = arguments()
    cases = chosen_cases(given.cases)
    pythons = Pythons(given.environments)
    if given.list:
        show_list(cases, pythons)
        return 0
    chosen = chosen_contestants(given.contestants, cases)
    given.out.mkdir(parents=True, exist_ok=True)
    results = Results(given.out, given.quick)
    if given.fresh:
        results.forget({case.name for case in cases})
    results.load()
    if not given.report:
        make_data(pythons, quick=given.quick)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tsf-bench-", dir=given.scratch) as scratch:
        trials = Trials(pythons, results, datasets.cache(), Path(scratch))
        for number, case in enumerate(cases if not given.report else [], 1):
            print(f"[{number}/{len(cases)}] {case.number}. {case.name}: {case.question}")
            trials.run(case, chosen, given.repeats or (1 if given.quick else case.repeats))
            for line in report.rows(case, results.tables.get(case.name)):
                print(f"  {line}")
            for verdict in (
                case.judge(results.tables[case.name]) if case.name in results.tables else ()
            ):
                print(f"  {report.MARKS[verdict.is_met]}: {verdict.must}: {verdict.measured}")
            print(f"  {time.monotonic() - begin:.0f} s so far", flush=True)
    everything = all_cases()
    results.save(everything)
    plots.draw(everything, results)
    print(f"report: {report.write(everything, results)}")
    for name, why in sorted(results.failed.items()):
        print(f"failed: {name}: {why.splitlines()[-1]}", file=sys.stderr)
    return bool(results.failed)


if __name__ == "__main__":
    sys.exit(main())
