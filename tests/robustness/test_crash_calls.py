"""A crash, or a failure, at every single call of a fixed script (goals C2 and C4)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support import crash_scripts
from support.crash_running import quick_folder
from support.crash_scripts import Trial
from support.crash_trials import CrashTrials
from support.goals import COUNT

from tensorstore_fmt.testing.crash import ERRORS, Fault

CODECS = ("auto", "none", "zstd") if COUNT >= 3 else ("auto",)
HERE = CrashTrials(limit_s=60.0, batch=16)
MARGIN = 4  # threads do not come in quite the same order each time
WRITES = ("publish", "create", "append", "sync", "delete", "lock")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with quick_folder() as place:
        yield place


def carry_out(name: str, trials: list[Trial]) -> Counter[str]:
    met = HERE.carry_out(name, trials)
    assert met["not reached"] < len(trials) / 4
    return met


def places(folder: Path, scheme: str = "") -> Callable[[], str]:
    """Give a new place for a run each time."""
    numbers = iter(range(10**9))
    name = "memory://crash-" if scheme else f"{folder}/run-"
    return lambda: f"{name}{next(numbers)}"


@pytest.mark.parametrize("codec", CODECS)
def test_a_crash_before_and_after_every_call(folder: Path, codec: str) -> None:
    place = places(folder / f"crash-{codec}")
    calls = HERE.calls_of(Trial(place(), Fault(0), codec))
    trials = [
        Trial(place(), Fault(k, kind), codec)
        for k in range(1, len(calls) + MARGIN)
        for kind in ("before", "after")
        # After one read is before the next call: nothing has changed in between.
        if kind == "before" or COUNT >= 3 or (calls[k - 1 : k] or WRITES)[0] in WRITES
    ]
    carry_out(f"C2 crash at every call, {codec}", trials)


def test_a_crash_at_every_system_call(folder: Path) -> None:
    place = places(folder / "system")
    calls = HERE.calls_of(Trial(place(), Fault(0), is_system_call=True))
    trials = [
        Trial(place(), Fault(k), is_system_call=True, where=where)
        for k in range(1, len(calls) + MARGIN)
        for where in ("before", "half", "after")
        # What comes after one call is what comes before the next.
        if where == "before" or COUNT >= 3 or (calls[k - 1 : k] == ["write"] and where == "half")
    ]
    assert {"mkdir", "open", "write", "rename", "link", "fsync", "unlink"} == set(calls)
    carry_out("C2 crash at every system call", trials)


def failures(calls: list[str], place: Callable[[], str], codec: str) -> list[Trial]:
    """Give failures of all calls; the errors take turns, unless there is time for all of them."""
    trials = []
    for k in range(1, len(calls) + MARGIN):
        op = calls[k - 1] if k <= len(calls) else "publish"
        is_write = op in WRITES or COUNT >= 3
        errors = ERRORS if COUNT >= 3 else (ERRORS[k % len(ERRORS)],)
        faults = [Fault(k, "fail", error) for error in errors]
        if op == "append" or COUNT >= 3:
            faults.append(Fault(k, "short", "ENOSPC"))
        if is_write:
            faults.append(Fault(k, "unknown", "EIO"))
        if k % 3 == 1 or COUNT >= 3:
            faults.append(Fault(k, "from", ERRORS[k % len(ERRORS)]))
        trials += [Trial(place(), fault, codec) for fault in faults]
    return trials


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("scheme", ["local", "memory"])
def test_every_call_fails(folder: Path, scheme: str, codec: str) -> None:
    place = places(folder / f"fail-{codec}", "" if scheme == "local" else "memory")
    calls = HERE.calls_of(Trial(place(), Fault(0), codec))
    trials = failures(calls, place, codec)
    if COUNT < 3:  # the next writer has enough to do after crashes
        trials = [replace(t, goes_on=i % 4 == 0) for i, t in enumerate(trials)]
    met = carry_out(f"C4 every call fails, {scheme}, {codec}", trials)
    assert met["failed"]


def test_the_script_meets_every_kind_of_call(folder: Path) -> None:
    calls = set(HERE.calls_of(Trial(f"{folder}/kinds", Fault(0))))
    assert calls >= {*WRITES, "prefix", "range", "listing"}
    events = crash_scripts.events_of(crash_scripts.fixed_script())
    assert len({event.step for event in events}) < len(events)
