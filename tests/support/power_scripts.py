"""What runs in child processes of the power-loss tests."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import traceback
import warnings
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from support.crash_scripts import OPTIONS, Script, play, settle, values

import tensorstore_fmt as tsf
from tensorstore_fmt.format import layout
from tensorstore_fmt.testing.forks import Channel
from tensorstore_fmt.testing.oracle import Event, Oracle, WrongDataError, check_durable
from tensorstore_fmt.testing.power_loss import DiskLog, build_state
from tensorstore_fmt.testing.system_calls import intercepted
from tensorstore_fmt.testing.writers import create_test_run, ticking_clock
from tensorstore_fmt.upkeep import recover, verify
from tensorstore_fmt.writing.segments import FANOUT

MODULE = __name__


@dataclass(frozen=True, slots=True)
class Batch:
    """States of one recording.

    Attributes
    ----------
    failing_syncs
        Which calls of fsync fail while the recording is made.
    upkeep
        Every how many states `verify`, `recover` and a next writer have their turn too; 0: never.
    while_merging
        Whether the power fails always while a merged segment has its name, but is not synced with
        it, and what may be torn then is.
    """

    folder: str
    seed: int
    states: int
    resumes: bool = False
    failing_syncs: tuple[int, ...] = ()
    upkeep: int = 50
    while_merging: bool = False


def power_script(rng: random.Random) -> Script:
    """Give a script with many flushes, some durable, a merge, and steps saved again."""
    script: list[Event | bool] = []
    version = itertools.count(1)
    for step in range(12):
        script.append(Event(step, values(step, next(version))))
        if rng.random() < 0.15 and step:
            again = rng.randrange(step)
            script.append(Event(again, values(again, next(version))))
        if rng.random() < 0.85:
            script.append(rng.random() < 0.4)
    script.append(True)
    script.append(Event(12, values(12, next(version))))
    return script


def record(
    root: str, rng: random.Random, *, resumes: bool, failing_syncs: Collection[int] = ()
) -> tuple[DiskLog, list[Event]]:
    """Write a run, and keep what reached the disk when, and what was said when."""
    log = DiskLog(root, failing_syncs=failing_syncs)
    script = power_script(rng)
    events = [action for action in script if isinstance(action, Event)]
    clock, ids = ticking_clock(), itertools.count(1)
    with intercepted(log):
        options: dict[str, Any] = {"clock_us": clock, "new_id": ids.__next__, **OPTIONS}
        run = create_test_run(f"{root}/run", **options)
        log.mark(("logging", len(events)))
        play(run, script, lambda count, is_durable: _said(log, count, is_durable=is_durable))
        report = run.close()
        if report.failures == 0:
            log.mark(("durable", len(events)))
        if resumes:
            _resume(log, root, events, options)
    return log, events


def _resume(log: DiskLog, root: str, events: list[Event], options: dict[str, Any]) -> None:
    """Go on from behind the last step, so that nothing is hidden."""
    last = max(event.step for event in events) + 1
    run = create_test_run(f"{root}/run", resume_from=last, **options)
    for step in range(last, last + 6):
        events.append(Event(step, values(step, 500 + step)))
        log.mark(("logging", len(events)))
        run.log(events[-1].values, step=step)
        is_durable = step % 3 == 1
        if run.flush(durable=is_durable):
            _said(log, len(events), is_durable=is_durable)
        settle(run)
    if run.close().failures == 0:
        log.mark(("durable", len(events)))


def _said(log: DiskLog, count: int, *, is_durable: bool) -> None:
    if is_durable:
        log.mark(("durable", count))


def check_states(channel: Channel, batch: Batch) -> dict[str, int]:
    """Record a run, build states of the disk, and check each."""
    warnings.simplefilter("ignore")
    rng = random.Random(batch.seed)
    root = f"{batch.folder}/recorded"
    shutil.rmtree(batch.folder, ignore_errors=True)
    os.makedirs(root)
    log, events = record(root, rng, resumes=batch.resumes, failing_syncs=batch.failing_syncs)
    places = _merging(log) if batch.while_merging else list(range(len(log) + 1))
    if not places:
        return {"without a merge": 1}
    met: Counter[str] = Counter(records=len(log), syncs=log.syncs)
    for number in range(batch.states):
        place = rng.choice(places)
        if number % 5 == 0 and not batch.while_merging:
            place = rng.choice(_promises(log, places) or [len(log)])
        worst: dict[str, Any] = {"tail": "holes", "names": "all"} if batch.while_merging else {}
        state = build_state(log, place, rng, **worst)
        folder = f"{batch.folder}/state"
        shutil.rmtree(folder, ignore_errors=True)
        state.write(folder)
        known = _known(log, events, place)
        try:
            met += check_state(f"{folder}/run", known)
            if batch.upkeep and number % batch.upkeep == 0:
                met += check_upkeep(f"{folder}/run", known)
        except Exception as error:
            where = f"{batch}: state {number}, behind record {place} of {len(log)}"
            raise AssertionError(f"{where}\n{traceback.format_exc()}") from error
        met["states"] += 1
    shutil.rmtree(batch.folder)
    return dict(met)


def _merging(log: DiskLog) -> list[int]:
    """Give the places at which a merged segment has its name, but was not synced since."""
    places: set[int] = set()
    for at, record in enumerate(log.records):
        names = [layout.parse_segment_name(base) for base, _ in record.change.new]
        if not any(name is not None and name.count >= FANOUT for name in names):
            continue
        ((_, file),) = record.change.new
        later = range(at + 1, len(log))
        synced = (i for i in later if log.records[i].op == "sync" and log.records[i].file == file)
        places |= set(range(at + 1, next(synced, len(log)) + 1))
    return sorted(places)


def _promises(log: DiskLog, places: list[int]) -> list[int]:
    """Give the worst times: just after something was promised."""
    marks = [place for place, what in log.marks if what != "failed" and what[0] == "durable"]  # type: ignore[index] # as it was marked
    return sorted(set(marks) & set(places))


@dataclass(frozen=True, slots=True)
class Known:
    """What was said before the power failed: see `check_durable`."""

    oracle: Oracle
    logged: int
    undropped: int | None


def _known(log: DiskLog, events: list[Event], place: int) -> Known:
    durable = logged = 0
    undropped: int | None = None
    for at, mark in log.marks:
        if at > place:
            break
        if mark == "failed":
            undropped = durable if undropped is None else undropped
        elif mark[0] == "durable":  # type: ignore[index] # as it was marked
            durable = mark[1]  # type: ignore[index] # the same
        else:
            logged = mark[1]  # type: ignore[index] # the same
    return Known(Oracle(events, durable), logged, undropped)


def check_state(url: str, known: Known) -> Counter[str]:
    """Check what a reader shows of a state."""
    oracle = known.oracle
    try:
        run = tsf.open_run(url)
    except tsf.FormatError as error:
        if oracle.acknowledged:
            raise WrongDataError("a durable flush was acknowledged") from error
        return Counter(unopened=1)
    with run:
        return Counter(
            values=check_durable(run, oracle, known.logged, undropped=known.undropped),
            acknowledged=len(oracle.state(oracle.acknowledged)),
            damaged=bool(run.damage),
        )


def check_upkeep(url: str, known: Known) -> Counter[str]:
    """Let `verify` and `recover` see a state, and a next writer go on."""
    try:
        found = verify(url)
    except tsf.FormatError:
        assert known.oracle.acknowledged == 0
        return Counter(unverified=1)
    recover(url)
    met = check_state(url, known)
    run = create_test_run(url, resume_from=1000, new_id=itertools.count(7000).__next__, **OPTIONS)
    event = Event(1000, values(1000, 3))
    run.log(event.values, step=1000)
    run.flush(durable=True)
    run.close()
    with tsf.open_run(url) as reader:
        after = Oracle([event], 1)
        for key, number in after.state(1).items():
            assert reader.state(key[0], 1000) == "here", (key, number)
        check_beside(reader, known.oracle, event)
    return Counter(recovered=1, verified_damage=not found.ok, after=met["values"])


def check_beside(reader: tsf.Run, oracle: Oracle, event: Event) -> None:
    """Check that all that was acknowledged is still there beside a later event."""
    both = Oracle([*oracle.events[: oracle.acknowledged], event], oracle.acknowledged)
    later = {key for e in oracle.events[oracle.acknowledged :] for key in e.keys}
    for key in both.state(both.acknowledged).keys() - later:
        assert reader.state(key[0], key[2], mode=key[1]) == "here", key
