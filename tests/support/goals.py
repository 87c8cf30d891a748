"""Counts and seeds of the trials behind the reliability goals, and what each came to.

``TSF_COUNT`` multiplies the trials of a change (default 1; RELIABILITY.md has the counts of the
long runs). ``TSF_SEED`` repeats a seed; without it CI takes 0 and everybody else a new one.
``TSF_RESULTS`` names a file that gets one JSON line for each thing recorded.

A test says what it did with `record`; pytest prints it all after the tests.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Iterator
from typing import Final

import pytest

COUNT: Final = float(os.environ.get("TSF_COUNT", "1"))
"""How many times the usual number of trials."""

SEED: Final = int(
    os.environ.get("TSF_SEED")
    or (0 if "CI" in os.environ else random.SystemRandom().randrange(2**32))
)
"""Where all generators begin: derive others from it."""

os.environ["TSF_SEED"] = str(SEED)  # children and other workers of this test run begin there, too

_PROPERTY: Final = "goal"
_running: list[pytest.Item] = []


def trials(per_change: int) -> int:
    """Give a number of trials, multiplied by ``TSF_COUNT``."""
    return max(1, round(per_change * COUNT))


def record(goal: str, trials: int, **facts: object) -> None:
    """Say what was tried: the goal's id, how many trials, and what else was counted."""
    entry = {"goal": goal, "trials": trials, "seed": SEED, **facts}
    sys.stdout.write(_as_text(entry) + "\n")
    if _running:
        _running[-1].user_properties.append((_PROPERTY, entry))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Know whose trials are recorded."""
    _running.append(item)
    try:
        return (yield)
    finally:
        _running.pop()


def pytest_report_header() -> str:
    """Print the seed also when nothing gets as far as recording it."""
    return f"trials: TSF_COUNT={COUNT:g} TSF_SEED={SEED}"


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print what was recorded, in the order of the goals."""
    if hasattr(config, "workerinput"):
        return  # the process that handed out the tests does it
    lines = []
    for outcome in ("passed", "failed", "xfailed", "xpassed"):
        for report in terminalreporter.stats.get(outcome, ()):
            lines += [
                {**entry, "outcome": outcome, "test": report.nodeid, "test_s": report.duration}
                for key, entry in getattr(report, "user_properties", ())
                if key == _PROPERTY and report.when == "call"
            ]
    if not lines:
        return
    lines.sort(key=lambda line: (str(line["goal"]), str(line["test"])))
    terminalreporter.section("goals")
    for line in lines:
        shown = {k: v for k, v in line.items() if k != "test"}
        terminalreporter.write_line(_as_text({**shown, "test_s": round(line["test_s"], 1)}))
    if path := os.environ.get("TSF_RESULTS"):
        when = time.strftime("%Y-%m-%d", time.gmtime())
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps({**line, "date": when}) + "\n" for line in lines)


def _as_text(entry: dict[str, object]) -> str:
    facts = ", ".join(f"{key}={value}" for key, value in entry.items() if key != "goal")
    return f"{entry['goal']}: {facts}"
