"""The disk is full, or the store is dead, for a while: training goes on (goal C5)."""

from __future__ import annotations

import errno
import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.goals import COUNT, SEED, record

import tensorstore_fmt as tsf
from tensorstore_fmt.storage import open_storage
from tensorstore_fmt.testing.storage import FaultyStorage, Operation
from tensorstore_fmt.testing.writers import create_test_run

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # what `log` warns of

STEPS = 60
SIZES = 20 if COUNT >= 3 else 4


def value(step: int) -> np.ndarray:
    return np.random.default_rng(step).standard_normal(20_000, "f4")


class Disk:
    """A disk of some bytes: what does not fit is cut short, as ENOSPC does it."""

    def __init__(self, nbytes: int) -> None:
        self.left = nbytes
        self.refused = 0

    def __call__(self, operation: Operation) -> int | None:
        if operation.op not in ("publish", "append"):
            return None
        wanted = operation.stop - operation.start
        fits = min(wanted, self.left)
        self.left -= fits if operation.op == "append" or fits == wanted else 0
        if fits == wanted:
            return None
        self.refused += 1
        return fits


class Dead:
    """A store that fails whatever is asked of it while it is off."""

    def __init__(self) -> None:
        self.is_off = False
        self.refused = 0

    def __call__(self, operation: Operation) -> None:
        if self.is_off and operation.op in ("publish", "append", "create", "sync"):
            self.refused += 1
            raise OSError(errno.EIO, os.strerror(errno.EIO), operation.path)


def train(
    place: str | Path, hook: Callable[[Operation], int | None], between: Callable[[int], None]
) -> tuple[tsf.CloseReport, int]:
    """Log and flush steps; give the report, and how many of them a flush acknowledged at once."""
    storage = FaultyStorage(open_storage(place, writable=True), hook)
    run = create_test_run(storage, on_error="warn", compression="none")
    safe = 0
    for step in range(STEPS):
        between(step)
        run.log({"w": value(step), "loss": float(step)}, step=step)
        safe += run.flush()
    return run.close(), safe


def check(place: str | Path, report: tsf.CloseReport) -> int:
    """Numbers are all there, tensors are there or recorded as dropped, as many as was said."""
    with tsf.open_run(place) as run:
        assert run.is_closed
        assert not run.damage
        assert run["loss"].read().tolist() == [float(step) for step in range(STEPS)]
        states = [run.state("w", step) for step in range(STEPS)]
        for step in run["w"].steps.tolist():
            assert run["w"].read(step=step).tobytes() == value(step).tobytes()
    assert set(states) <= {"here", "dropped"}
    assert states.count("dropped") == report.dropped
    return states.count("dropped")


def under_limit(place: str) -> None:
    """Train while the system itself refuses files above 50 kB, in the middle of a write."""

    def limit(step: int) -> None:
        if step in (10, 40):
            nbytes = 50_000 if step == 10 else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, resource.RLIM_INFINITY))

    report, safe = train(place, lambda operation: None, limit)
    sys.stdout.write(f"{report.dropped} {safe}\n")


def test_the_system_refuses_to_write_for_a_while(tmp_path: Path) -> None:
    program = f"import {Path(__file__).stem} as here, sys; here.under_limit(sys.argv[1])"
    folders = [str(Path(__file__).parent), *filter(None, sys.path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(tmp_path / "run")],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    dropped, safe = map(int, done.stdout.split())
    with tsf.open_run(tmp_path / "run") as run:
        assert run.is_closed
        states = [run.state("w", step) for step in range(STEPS)]
        for step in run["w"].steps.tolist():
            assert run["w"].read(step=step).tobytes() == value(step).tobytes()
        assert run["loss"].read().tolist() == [float(step) for step in range(STEPS)]
    record("C5 file size limit", 1, dropped=dropped, safe=safe, wrong=0)
    assert states.count("dropped") == dropped
    assert dropped == 30
    assert safe == STEPS - dropped  # each flush said whether anything of it was lost


def test_a_disk_is_full_for_a_while(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    dropped = refused = 0
    for number in range(SIZES):
        disk = Disk(rng.randrange(100_000, 3_000_000))
        again = rng.randrange(42, 55)

        def free(step: int, disk: Disk = disk, again: int = again) -> None:
            if step == again:
                disk.left = 10**9

        place = tmp_path / str(number)
        report, safe = train(place, disk, free)
        assert disk.refused
        assert safe >= STEPS - again
        dropped += check(place, report)
        refused += disk.refused
    record("C5 disk full", SIZES, dropped=dropped, refused=refused, wrong=0)
    assert dropped


@pytest.mark.parametrize("scheme", ["local", "memory"])
def test_a_store_is_dead_for_a_while(tmp_path: Path, scheme: str) -> None:
    rng = random.Random(SEED)
    dropped = refused = 0
    for number in range(SIZES):
        dead = Dead()
        off = rng.randrange(5, 20)
        on = off + rng.randrange(1, 30)

        def switch(step: int, dead: Dead = dead, off: int = off, on: int = on) -> None:
            dead.is_off = off <= step < on

        place = f"memory://dead-{number}" if scheme == "memory" else tmp_path / str(number)
        report, safe = train(place, dead, switch)
        assert safe == STEPS - (on - off)
        assert report.failures <= dead.refused + 1
        dropped += check(place, report)
        refused += dead.refused
    record(f"C5 dead store, {scheme}", SIZES, dropped=dropped, refused=refused, wrong=0)
    assert dropped
