"""What runs in child processes of the crash tests: fixed scripts, full-speed writers, checks."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import tensorstore_fmt as tsf
from tensorstore_fmt.storage import Storage, local, open_storage
from tensorstore_fmt.testing.crash import CrashStorage, Fault, crash_at
from tensorstore_fmt.testing.forks import Channel
from tensorstore_fmt.testing.oracle import Event, Oracle, Seen, check_run
from tensorstore_fmt.testing.system_calls import intercepted
from tensorstore_fmt.testing.writers import create_test_run
from tensorstore_fmt.writing.run import RunWriter, create_run

MODULE = __name__
SETTLE_S = 20.0
FROZEN = np.arange(500, dtype="f4") * 0.37

Script = Sequence[Event | bool]
"""Events to log; between them flushes: True for durable ones."""


def derived(name: str, step: int, version: int, n: int) -> np.ndarray:
    """Give a vector that tells its name, step and version."""
    seed = sum(name.encode()) * 1_000_003 + step * 7919 + version * 104_729
    return np.random.default_rng(seed).standard_normal(n, "f4")


def values(step: int, version: int) -> dict[str, Any]:
    """Give what is logged at a step: inline, joined, gridded, strings, repeated, varying shapes."""
    logged: dict[str, Any] = {
        "loss": float(step * 1000 + version),
        "text": f"é{step}.{version}" * (step % 3),
        "middle": derived("middle", step, version, 300),
        "frozen": FROZEN,
        "counts": np.arange(step % 3 + 1, dtype="i4") + 10 * version,
    }
    if step % 2 == 0:
        logged["large"] = derived("large", step, version, 3840).reshape(60, 64)
    return logged


def fixed_script(flushes: int = 9) -> Script:
    """Give a script with overwritten steps, a mode, durable flushes, and a merge of segments."""
    script: list[Event | bool] = []
    version = itertools.count(1)
    step = 0
    for group in range(flushes):
        for _ in range(1 + group % 2):
            script.append(Event(step, values(step, next(version))))
            step += 1
        if group == 2:
            script.append(Event(1, values(1, next(version))))  # saved again, published before
        if group == 4:
            last = step - 1
            script.append(Event(last, values(last, next(version))))  # again in the same flush
        if group % 4 == 1:
            script.append(Event(group, {"accuracy": float(group)}, "EVAL"))
        script.append(group in (3, flushes - 2))
    script.append(Event(step, values(step, next(version))))  # for `close`
    return script


def events_of(script: Script) -> list[Event]:
    """Give what a script logs."""
    return [action for action in script if isinstance(action, Event)]


OPTIONS: dict[str, Any] = {"chunks": {"large": (40, 64)}, "on_error": "warn"}


def settle(run: RunWriter) -> None:
    """Wait until nothing is left to merge, so that calls come in the same order each time."""
    segments = run._segments
    deadline = time.monotonic() + SETTLE_S
    while True:
        with segments._lock:
            is_busy = bool(segments._mergeable() or segments._covered)
        if not is_busy:
            break
        assert time.monotonic() < deadline, "merging hangs"
        time.sleep(0.0005)
    with segments._deleting:
        pass


def play(run: RunWriter, script: Script, acknowledge: Callable[[int, bool], None]) -> None:
    """Carry out a script; tell how many events are safe."""
    logged = 0
    for action in script:
        if isinstance(action, Event):
            run.log(action.values, step=action.step, mode=action.mode)
            logged += 1
        else:
            is_safe = run.flush(durable=action)
            settle(run)
            if is_safe:
                acknowledge(logged, action)


# --- C2 and C4: a fault at call k ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of the fixed script with a fault."""

    url: str
    fault: Fault
    compression: str = "auto"
    is_system_call: bool = False
    where: str = "before"
    goes_on: bool = True

    @property
    def crashes(self) -> bool:
        """Whether the process ends at the fault."""
        return self.is_system_call or self.fault.kind in ("before", "after")


def write_with_fault(channel: Channel, trial: Trial) -> dict[str, Any]:
    """Write the fixed script; of a trial that does not crash, check what came of it."""
    if trial.is_system_call:
        hook, calls = crash_at(trial.fault.at, trial.where)  # type: ignore[arg-type] # a literal
        with intercepted(hook):
            result = _write(channel, trial, open_storage(trial.url, writable=True))
        return result | {"calls": [call.op for call in calls]}
    storage = CrashStorage(open_storage(trial.url, writable=True), trial.fault)
    result = _write(channel, trial, storage)
    result |= {"calls": [o.op for o in storage.operations], "reached": storage.was_reached}
    if trial.fault.at and not trial.crashes:
        result |= check_trial(channel, trial, result["acknowledged"], result["report"])
    return result


def _write(channel: Channel, trial: Trial, storage: Storage) -> dict[str, Any]:
    acknowledged = 0

    def acknowledge(count: int, is_durable: bool) -> None:
        nonlocal acknowledged
        acknowledged = count
        channel.send(("acknowledged", count))

    script = fixed_script()
    try:
        run = create_test_run(storage, compression=trial.compression, **OPTIONS)
    except OSError as error:
        if trial.crashes or "made to fail" not in str(error):
            raise
        return {"acknowledged": 0, "report": None}
    play(run, script, acknowledge)
    report = run.close()
    assert (
        trial.fault.at == 0
        or trial.fault.kind != "fail"
        or not storage.is_local
        or (report.failures <= 2)
    )
    if report.failures == 0:
        acknowledged = len(events_of(script))
        channel.send(("acknowledged", acknowledged))
    return {"acknowledged": acknowledged, "report": report}


def check_trial(
    channel: Channel, trial: Trial, acknowledged: int, report: tsf.CloseReport | None = None
) -> dict[str, Any]:
    """Check the prefix rule, and that a next writer goes on without help."""
    oracle = Oracle(events_of(fixed_script()), acknowledged)
    seen = check_url(trial.url, oracle, may_drop=not trial.crashes)
    if report is not None and seen is not None:
        assert seen.dropped <= report.dropped
        assert report.stored_nbytes < 10**7
        if trial.fault.kind != "from":
            assert seen.prefix == len(oracle.events), "one failure, and not all is there"
    if trial.goes_on:
        go_on(trial.url, oracle, seen)
    return {"prefix": seen.prefix if seen else 0, "dropped": seen.dropped if seen else 0}


def check_url(url: str, oracle: Oracle, *, may_drop: bool) -> Seen | None:
    """Check a run; None: there is none, which is right only if nothing was acknowledged."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # no damage, whatever happened
        try:
            run = tsf.open_run(url)
        except tsf.NotARunError:
            assert oracle.acknowledged == 0
            return None
    with run:
        assert not run.damage
        return check_run(run, oracle, may_drop=may_drop)


def go_on(url: str, oracle: Oracle, seen: Seen | None) -> None:
    """Resume, as the next start of the job would, write and close; check that too."""
    visible = oracle.events[: seen.prefix] if seen else []
    resume = max((event.step for event in visible), default=0)
    after = oracle.resumed(len(visible), resume)
    run = create_test_run(
        url, resume_from=resume if seen else None, new_id=itertools.count(1000).__next__, **OPTIONS
    )
    for step in range(resume, resume + 2):
        after.events.append(Event(step, values(step, 77)))
        run.log(after.events[-1].values, step=step)
    run.flush()
    run.close()
    after.acknowledged = len(after.events)
    again = check_url(url, after, may_drop=bool(seen and seen.dropped))
    assert again is not None
    with tsf.open_run(url) as reader:
        assert reader.is_closed


def write_all_with_faults(channel: Channel, trials: Sequence[Trial]) -> None:
    """Carry out trials that do not crash, one after the other."""
    for number, trial in enumerate(trials):
        try:
            channel.send(("done", number, write_with_fault(_Silent(), trial)))
        except Exception:  # noqa: BLE001 - the parent gathers them
            channel.send(("wrong", number, traceback.format_exc()))
        if "://" not in trial.url:
            shutil.rmtree(trial.url, ignore_errors=True)


class _Silent(Channel):
    def __init__(self) -> None:
        super().__init__(-1)

    def send(self, message: object) -> None:
        pass


def warm_up() -> None:
    """Do once what every fork does, so that caches and lazy imports are there."""
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(f"{folder}/run", Fault(0))
        write_with_fault(_Silent(), trial)
        check_trial(_Silent(), trial, 0)
    if local._pool is not None:
        local._pool.shutdown()
        local._pool = None
    assert threading.active_count() == 1, threading.enumerate()


# --- C1: killed at any time ----------------------------------------------------------------


def stream_event(worker: int, attempt: int, resume: int, number: int) -> Event:
    """Give the event of this number of a writer that is killed some time: steps go up, or back."""
    step = resume + number
    version = attempt * 31 + worker
    if number % 10 == 9:
        step -= 3
        version += 1009
    name = f"w{worker}"
    logged: dict[str, Any] = {
        f"{name}/loss": float(step * 10_000 + version),
        "shared": float(step * 100 + worker),
        f"{name}/middle": derived("middle", step, version, 200),
    }
    if number % 4 == 0:
        logged[f"{name}/large"] = derived("large", step, version, 30_000).reshape(200, 150)
    return Event(step, logged)


def write_stream(
    channel: Channel, url: str, workers: tuple[int, int], resume: int | None, attempt: int
) -> None:
    """Write at full speed until killed; say what is about to be logged, and what is safe."""
    worker, num_workers = workers
    options = {"flush_interval_s": 0.01, "chunks": {"*/large": (64, None)}, "attempt": attempt}
    run = create_run(
        url, worker=worker, num_workers=num_workers, resume_from=resume, on_error="raise", **options
    )
    assert run.attempt == attempt
    channel.send(("open", 0))
    for number in itertools.count():
        event = stream_event(worker, attempt, resume or 0, number)
        channel.send(("logging", number + 1))
        run.log(event.values, step=event.step)
        if number % 7 == 6:
            run.flush(durable=number % 5 == 0)
            channel.send(("acknowledged", number + 1))


def check_stream(
    channel: Channel, url: str, before: dict[int, Oracle], after: dict[int, Oracle], attempt: int
) -> tuple[bool, dict[int, Seen]]:
    """Check all workers after their writers were killed.

    Parameters
    ----------
    before, after
        What is right if the attempt never began, and if it did: it hides steps then.

    Returns
    -------
    tuple
        Whether the attempt began, and what is visible of each worker.
    """
    nothing = Seen(0, 0, 0)
    try:
        run = tsf.open_run(url)
    except tsf.NotARunError:
        assert all(oracle.acknowledged == 0 for oracle in after.values())
        return False, dict.fromkeys(after, nothing)
    with run:
        assert not run.damage
        has_begun = attempt in run.attempts
        oracles = after if has_begun else before
        alone = len(oracles) == 1
        return has_begun, {
            w: check_run(run, oracle, worker=None if alone else w) for w, oracle in oracles.items()
        }
