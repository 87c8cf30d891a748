"""The long runs behind RELIABILITY.md: ``python tests/long_runs.py [--count N] [GOAL ...]``.

Each goal is one pytest run with its own ``TSF_COUNT``; ``--count`` takes the place of it. What the
tests record goes into a file of JSON lines, and is shown as rows of Markdown at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 4 * 3600


@dataclass(frozen=True, slots=True)
class LongRun:
    """One pytest run: which tests, and how many times their usual trials."""

    tests: str
    count: float
    chosen: str = ""


LONG_RUNS = {
    "C1": LongRun("test_crash_kill.py", 20),
    "C2-C4": LongRun("test_crash_calls.py", 3),
    "C2-C4-S3": LongRun("test_bucket_crash.py", 3),
    "C3": LongRun("test_crash_power_loss.py", 50),
    "C5": LongRun("test_crash_disk_full.py", 3),
    "C6": LongRun("test_crash_memory.py", 3),
    "C7": LongRun("test_crash_exits.py", 3),
    "D1": LongRun("test_corrupt_flips.py", 8),
    "D1-large": LongRun("test_corrupt_large.py", 500),
    "D4": LongRun("test_corrupt_blocks.py", 50, "not cut"),
    "D5": LongRun("test_corrupt_fuzz.py", 13),
    "D7": LongRun("test_upkeep_all_damage.py", 1200),
    "H4": LongRun("test_hostile_files.py", 20),
    "K1": LongRun("test_soak.py::test_soak", 60),
    "K3": LongRun("test_soak.py::test_opening_and_closing_leaves_nothing", 10),
    "N1": LongRun("test_concurrent_writers.py", 40),
    "N1-S3": LongRun("test_bucket_races.py", 100),
    "N2": LongRun("test_concurrent_readers.py", 60),
    "N4": LongRun("test_concurrent_views.py", 25),
    "N4-S3": LongRun("test_bucket_listing.py", 100),
    "N5": LongRun("test_concurrent_users.py", 20),
    "N6": LongRun("../property/test_model.py", 100),
    "S1": LongRun("test_bucket_faults.py", 67, "absence"),
    "S2": LongRun("test_bucket_answers.py", 3),
    "S4": LongRun("test_bucket_puts.py", 50, "put"),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run the long versions of the reliability tests.")
    parser.add_argument("goals", nargs="*", help=f"of {', '.join(LONG_RUNS)}; default: all")
    parser.add_argument(
        "--count", type=float, help="times the trials of a change; default: per goal"
    )
    parser.add_argument("--results", type=Path, default=Path("long_runs.jsonl"))
    given = parser.parse_args()
    if unknown := set(given.goals) - set(LONG_RUNS):
        parser.error(
            f"no such goal: {', '.join(sorted(unknown))}; there are {', '.join(LONG_RUNS)}"
        )
    return given


def run(goal: str, count: float, results: Path) -> int:
    """Run one goal's tests; give pytest's exit status."""
    long_run = LONG_RUNS[goal]
    command = [
        sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider",
        f"--timeout={TIMEOUT_S}", str(ROOT / "tests" / "robustness" / long_run.tests),
        *(["-k", long_run.chosen] if long_run.chosen else []),
    ]  # fmt: skip
    environment = {**os.environ, "TSF_COUNT": f"{count:g}", "TSF_RESULTS": str(results.resolve())}
    print(f"{goal}: TSF_COUNT={count:g} {' '.join(command[1:])}", flush=True)
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def show(results: Path, since: int) -> None:
    """Print what was recorded since that line as rows of a table."""
    for line in results.read_text().splitlines()[since:]:
        entry = json.loads(line)
        facts = {
            k: v
            for k, v in entry.items()
            if k not in {"goal", "trials", "outcome", "test", "date", "test_s"}
        }
        text = ", ".join(f"{key} {value}" for key, value in facts.items())
        print(
            f"| {entry['goal']} | {entry['trials']:,} | {entry['outcome']} | {text} | "
            f"{entry['test_s']:.0f} s | {entry['date']} |"
        )


def main() -> int:
    given = arguments()
    since = len(given.results.read_text().splitlines()) if given.results.exists() else 0
    failed = []
    for goal in given.goals or LONG_RUNS:
        begin = time.monotonic()
        count = given.count or LONG_RUNS[goal].count
        if run(goal, count, given.results):
            failed.append(goal)
        print(f"{goal}: {time.monotonic() - begin:.0f} s", flush=True)
    if given.results.exists():
        show(given.results, since)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
