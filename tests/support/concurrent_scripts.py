"""What runs in child processes of the concurrency tests: values that prove themselves.

A value tells its name, its step and the attempt that wrote it, so that a reader needs to know
nothing else to say whether what it got is right.
"""

from __future__ import annotations

import itertools
import os
import random
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

import tensorstore_fmt as tsf
from tensorstore_fmt.format import layout
from tensorstore_fmt.storage import Storage, local, open_storage
from tensorstore_fmt.testing.forks import Channel
from tensorstore_fmt.testing.storage import Operation, WrappedStorage
from tensorstore_fmt.testing.writers import create_test_run

MODULE: Final = __name__
NAMES: Final = ("loss", "text", "middle", "large")
_ATTEMPTS: Final = 1 << 20
_STEPS: Final = 1 << 40
_PAUSE_S: Final = 0.05


class WrongValueError(AssertionError):
    """A reader was given something that nobody wrote, or not what it has to be given."""


def value_of(name: str, step: int, attempt: int) -> Any:
    """Give what an attempt writes of a name at a step: inline, joined, in shards, text."""
    kind = name.rpartition("/")[2]
    if kind == "text":
        return f"{name} {step} {attempt}"
    told = float(step * _ATTEMPTS + attempt) + sum(name.encode()) / 4096  # exact below 2 ** 40
    if kind == "middle":
        return told + np.arange(100)
    if kind == "large":
        return told + np.arange(6000).reshape(60, 100)
    return told


def values_at(step: int, attempt: int, prefix: str = "") -> dict[str, Any]:
    """Give what is logged at a step."""
    names = NAMES if step % 5 == 0 else NAMES[:3]
    return {prefix + name: value_of(prefix + name, step, attempt) for name in names}


def attempt_in(name: str, step: int, value: Any) -> int:
    """Say which attempt wrote a value.

    Raises
    ------
    WrongValueError
        None did: it is torn, or belongs to another step or name.
    """
    if isinstance(value, str):
        attempt = int(value.rpartition(" ")[2])
    else:
        attempt = int(np.asarray(value).reshape(-1)[0]) - step * _ATTEMPTS
    wanted = np.asarray(value_of(name, step, attempt))
    found = np.asarray(value)
    if attempt < 0 or not np.array_equal(found, wanted):
        raise WrongValueError(f"{name} at {step} is {value!r:.200}")
    return attempt


# --- writers ---------------------------------------------------------------------------------


class Tally(WrappedStorage):
    """Count merges and deleted segments."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.merged = self.deleted = 0

    def before(self, operations: Sequence[Operation]) -> Sequence[int | Exception | None]:
        for each in operations:
            name = layout.parse_segment_name(each.path.rpartition("/")[2])
            self.merged += each.op == "publish" and name is not None and name.count > 1
            self.deleted += each.op == "delete" and name is not None
        return [None] * len(operations)


class Acknowledged:
    """The last attempt and step that are safe, for other processes to see at once."""

    def __init__(self, path: str) -> None:
        with open(path, "ab") as file:
            file.truncate(8)
        self._cell = np.memmap(path, np.int64, "r+", shape=(1,))

    def put(self, attempt: int, step: int) -> None:
        self._cell[0] = attempt * _STEPS + step + 1

    def get(self) -> tuple[int, int]:
        told = int(self._cell[0])
        return told // _STEPS, told % _STEPS - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How fast a writer is, and how long it keeps segments that others cover."""

    flush_every: int
    pause_s: float
    grace_s: float


def write_until_killed(
    channel: Channel, url: str, resume: int | None, attempt: int, pace: Pace
) -> None:
    """Write steps; say which are acknowledged, and how much was merged and deleted."""
    storage = Tally(open_storage(url, writable=True))
    acknowledged = Acknowledged(f"{url}.acknowledged")
    run = create_test_run(
        storage,
        resume_from=resume,
        attempt=attempt,
        clock_us=lambda: time.time_ns() // 1000,
        new_id=itertools.count(attempt * 1000 + 1).__next__,
        grace_s=pace.grace_s,
    )
    acknowledged.put(attempt, (resume or 0) - 1)
    channel.send(("open", attempt))
    for step in itertools.count(resume or 0):
        run.log(values_at(step, attempt), step=step)
        if step % pace.flush_every == 0:
            assert run.flush(durable=step % 50 == 0)
            acknowledged.put(attempt, step)
            channel.send(("acknowledged", (step, storage.merged, storage.deleted)))
        time.sleep(pace.pause_s)


# --- readers ---------------------------------------------------------------------------------


@dataclass(slots=True)
class Watch:
    """A reader that looks again and again, and what it has met."""

    url: str
    rng: random.Random
    acknowledged: Acknowledged
    met: Counter[str] = field(default_factory=Counter)
    steps: set[int] = field(default_factory=set)
    newest: int = -1

    def look(self, run: tsf.Run) -> None:
        """Refresh, and check that nothing vanished that no later attempt hides."""
        attempt, safe = self.acknowledged.get()
        run.refresh()
        self.met["refreshes"] += 1
        if run.damage:
            raise run.damage[0]
        steps = set(run.steps().tolist())
        vanished = {step for step in self.steps - steps if step < hidden_from(run, self.newest)}
        if vanished:
            raise WrongValueError(f"steps {sorted(vanished)[:9]} vanished")
        must_be = 0 <= safe < hidden_from(run, attempt)
        if run.attempts[-1] < attempt or (must_be and safe not in steps):
            raise WrongValueError(f"step {safe} of attempt {attempt} is safe, but not there")
        self.steps, self.newest = steps, run.attempts[-1]

    def read(self, run: tsf.Run) -> None:
        """Read some values, each of the attempt that is visible at its step."""
        name = self.rng.choice(NAMES)
        if name not in run:
            return
        known = run[name].steps.tolist()
        if not known:
            return
        few = min(20, len(known))
        wanted = known[-few:] if self.rng.random() < 0.5 else sorted(self.rng.sample(known, few))
        for step, value in zip(wanted, run[name].read(steps=wanted), strict=True):
            attempt = attempt_in(name, step, value)
            if attempt not in run.attempts or step >= hidden_from(run, attempt):
                raise WrongValueError(f"{name} at {step} is of attempt {attempt}, which is hidden")
        self.met["values"] += len(wanted)
        beyond = max(self.steps) + 1 + self.rng.randrange(50)
        if run.state("loss", beyond) != "not_yet":
            raise WrongValueError(f"step {beyond} is {run.state('loss', beyond)}")

    def run(self, until: float) -> None:
        """Look until the time is over; a view that is not refreshed shows what it showed."""
        run = tsf.open_run(self.url)
        while time.monotonic() < until:
            old = tsf.open_run(self.url)
            line = old["loss"].steps.tolist() if "loss" in old else []
            self.met["opens"] += 1
            for _ in range(20):
                self.look(run)
                self.read(run)
                time.sleep(_PAUSE_S)
            if line:
                if old["loss"].steps.tolist() != line:
                    raise WrongValueError("a view changed that was not refreshed")
                for step, value in zip(line, old["loss"].read(steps=line), strict=True):
                    attempt_in("loss", step, value)
                self.met["old views"] += 1
            old.close()
        run.close()


def hidden_from(run: tsf.Run, attempt: int) -> int:
    """Give the step from which later attempts hide this one."""
    view = run._session.view
    return min((view.resume_step(a) for a in run.attempts if a > attempt), default=1 << 60)


def read_until(channel: Channel, url: str, seconds: float, seed: int, threads: int) -> Counter[str]:
    """Read in several threads with readers of their own; give what was counted."""
    warnings.simplefilter("error", RuntimeWarning)  # damage, whoever meets it
    until = time.monotonic() + seconds
    acknowledged = Acknowledged(f"{url}.acknowledged")
    watches = [Watch(url, random.Random(seed + i), acknowledged) for i in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(watch.run, until) for watch in watches]:
            done.result()
    return sum((watch.met for watch in watches), Counter())


def warm_up() -> None:
    """Do once what every fork does, so that caches and lazy imports are there."""
    with tempfile.TemporaryDirectory() as folder:
        run = create_test_run(f"{folder}/run")
        for step in range(10):
            run.log(values_at(step, 0), step=step)
            run.flush(durable=True)
        run.close()
        with tsf.open_run(f"{folder}/run") as reader:
            for name in NAMES:
                reader[name].read()
    if local._pool is not None:
        local._pool.shutdown()
        local._pool = None
    assert threading.active_count() == 1, threading.enumerate()


# --- writers racing --------------------------------------------------------------------------


def wait_for_start(path: str) -> None:
    """Wait until the parent lets all go at once, by making a file."""
    while not os.path.exists(path):
        time.sleep(0.0002)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What one of several writers is to do, as soon as a file is there."""

    url: str
    start: str
    number: int
    resume: int | None
    num_workers: int = 1
    seed: int = 0


def race(channel: Channel, task: Task) -> tuple[int, str, list[int], bool]:
    """Begin to write at the same moment as others that are told the same.

    Returns
    -------
    tuple
        The attempt, the run's id, the steps that are safe, and whether the run was closed.
    """
    rng = random.Random(task.seed)
    channel.send(("ready", task.number))
    wait_for_start(task.start)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is another one is announced
        try:
            run = tsf.create_run(
                task.url, resume_from=task.resume, flush_interval_s=0.005, on_error="raise"
            )
        except tsf.RunExistsError:  # the others have finished already
            return -1, "", [], False
    safe = []
    first = task.resume or 0
    for step in range(first, first + 6):
        run.log(values_at(step, run.attempt, f"racer{task.number}/"), step=step)
        run.log({"shared": float(task.number)}, step=step)
        if rng.random() < 0.5:
            assert run.flush()
            safe = list(range(first, step + 1))
    if closes := rng.random() < 0.5:
        run.close()
        safe = list(range(first, first + 6))
    return run.attempt, run.run_id, safe, closes


def work_for(channel: Channel, task: Task) -> tuple[int, int]:
    """Be one worker of a job that starts at once, and dies; give its attempt and safe steps."""
    channel.send(("ready", task.number))
    wait_for_start(task.start)
    run = tsf.create_run(
        task.url,
        worker=task.number,
        num_workers=task.num_workers,
        resume_from=task.resume,
        flush_interval_s=0.01,
    )
    first = task.resume or 0
    steps = 8 + task.number
    for step in range(first, first + steps):
        run.log(values_at(step, run.attempt, f"worker{task.number}/"), step=step)
    assert run.flush()
    return run.attempt, first + steps
