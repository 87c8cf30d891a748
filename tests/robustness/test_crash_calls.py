"""A crash, or a failure, at every single call of a fixed script (goals C2 and C4)."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from support import crash_scripts
from support.crash_running import quick_folder, run_trials
from support.crash_scripts import MODULE, Trial
from support.goals import COUNT, record

from tensorstore_fmt.testing.crash import CRASHED, ERRORS, Fault
from tensorstore_fmt.testing.forks import ChildFailedError, ForkServer

CODECS = ("auto", "none", "zstd") if COUNT >= 3 else ("auto",)
LIMIT_S = 60.0
BATCH = 16
MARGIN = 4  # threads do not come in quite the same order each time
WRITES = ("publish", "create", "append", "sync", "delete", "lock")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with quick_folder() as place:
        yield place


def calls_of(trial: Trial) -> list[str]:
    """Give the calls of the script when nothing happens."""
    with ForkServer([MODULE]) as server:
        calls: list[str] = server.call(MODULE, "write_with_fault", trial)["calls"]
    return calls


def crash(server: ForkServer, trial: Trial, met: Counter[str]) -> None:
    """Let a writer crash, and check what it left."""
    child = server.start(MODULE, "write_with_fault", trial, timeout_s=LIMIT_S)
    messages = list(child.messages())
    status = child.finish()
    if messages and messages[-1][0] == "error":
        raise ChildFailedError(messages[-1][1])
    has_ended = bool(messages) and messages[-1][0] == "result"
    assert status == (0 if has_ended else CRASHED), status
    acknowledged = max((what for kind, what in messages if kind == "acknowledged"), default=0)
    server.call(MODULE, "check_trial", trial, acknowledged, timeout_s=LIMIT_S)
    met["not reached" if has_ended else "crashed"] += 1
    shutil.rmtree(trial.url, ignore_errors=True)


def fail(server: ForkServer, trials: Sequence[Trial], met: Counter[str]) -> None:
    """Let writers meet failures, several in one child; each checks itself."""
    child = server.start(MODULE, "write_all_with_faults", trials, timeout_s=LIMIT_S)
    done = 0
    for kind, *what in child.messages():
        if kind == "wrong":
            raise ChildFailedError(f"{trials[what[0]]}: {what[1]}")
        if kind == "done":
            done += 1
            met["failed" if what[1]["reached"] else "not reached"] += 1
            met["dropped"] += what[1]["dropped"]
    assert child.finish() == 0
    assert done == len(trials), f"{trials[done]} ended its process"


def carry_out(name: str, trials: list[Trial]) -> Counter[str]:
    met: Counter[str] = Counter()
    if trials[0].crashes:
        wrong = run_trials([MODULE], trials, lambda server, trial: crash(server, trial, met))
    else:
        batches = [trials[i : i + BATCH] for i in range(0, len(trials), BATCH)]
        wrong = run_trials([MODULE], batches, lambda server, batch: fail(server, batch, met))
    record(name, len(trials), **met, wrong=len(wrong))
    assert not wrong, f"{len(wrong)} of {len(trials)} failed; the first:\n" + "\n".join(wrong[:3])
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
    calls = calls_of(Trial(place(), Fault(0), codec))
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
    calls = calls_of(Trial(place(), Fault(0), is_system_call=True))
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
    calls = calls_of(Trial(place(), Fault(0), codec))
    trials = failures(calls, place, codec)
    if COUNT < 3:  # the next writer has enough to do after crashes
        trials = [replace(t, goes_on=i % 4 == 0) for i, t in enumerate(trials)]
    met = carry_out(f"C4 every call fails, {scheme}, {codec}", trials)
    assert met["failed"]


def test_the_script_meets_every_kind_of_call(folder: Path) -> None:
    calls = set(calls_of(Trial(f"{folder}/kinds", Fault(0))))
    assert calls >= {*WRITES, "prefix", "range", "listing"}
    events = crash_scripts.events_of(crash_scripts.fixed_script())
    assert len({event.step for event in events}) < len(events)
