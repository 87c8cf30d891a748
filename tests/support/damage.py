"""Runs with an oracle beside them, and ways to damage their files."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from conformance.independent_reader import Run, SpecError, open_run

from tensorstore_fmt.writing.run import create_run

Oracle = dict[tuple[str, int], Any]
"""(name, step) and the value that was logged."""

PACKAGES = Path(__file__).resolve().parents[2]

FROZEN = np.arange(90_000, dtype=np.float32).reshape(300, 300)


def values(step: int, *, seed: int = 0) -> dict[str, Any]:
    """Give what is logged at a step: inline, joined and gridded series, strings, equal payloads."""
    rng = np.random.default_rng([seed, step])
    return {
        "loss": 1.0 / (step + 1 + seed),
        "text": "é" * (step % 4),
        "middle": rng.normal(size=2000),
        "large": rng.normal(size=(300, 300)).astype(np.float32),  # two chunks
        "frozen": FROZEN,
        "counts": np.arange(step % 3 + 1, dtype=np.int32),
    }


def write_steps(run: Any, steps: Iterable[int], *, seed: int = 0, per_flush: int = 1) -> Oracle:
    """Log steps and flush; give what was logged."""
    oracle: Oracle = {}
    for i, step in enumerate(steps):
        logged = values(step, seed=seed)
        run.log(logged, step=step)
        oracle |= {(name, step): value for name, value in logged.items()}
        if (i + 1) % per_flush == 0:
            run.flush()
    run.flush()
    return oracle


def closed_run(url: str | Path, steps: int = 5, **options: Any) -> Oracle:
    """Write a run and close it."""
    with create_run(url, flush_interval_s=600, **options) as run:
        return write_steps(run, range(steps))


_KILLED = """
import os, sys
from pathlib import Path
sys.path[:0] = [{packages!r}, {tests!r}]
from support.damage import create_run, write_steps, values
run = create_run({url!r}, flush_interval_s=600)
write_steps(run, range({steps}))
run.log(values({steps}), step={steps})  # never flushed
os._exit(9)
"""


def killed_run(folder: Path, steps: int = 5) -> Oracle:
    """Write a run in a process that ends without closing it."""
    code = _KILLED.format(
        packages=str(PACKAGES), tests=str(PACKAGES / "tests"), url=str(folder), steps=steps
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 9, done.stderr
    return {(name, step): v for step in range(steps) for name, v in values(step).items()}


def live_copy(folder: Path, copy: Path, steps: int = 10, *, wait_for_merge: bool = False) -> Oracle:
    """Copy the folder of a writer that lives; the copy is that of a writer killed just then."""
    with create_run(folder, flush_interval_s=600) as run:
        oracle = write_steps(run, range(steps))
        deadline = time.monotonic() + 20
        while wait_for_merge and not merged(folder):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        shutil.copytree(folder, copy)
    return oracle


def merged(folder: Path) -> list[Path]:
    """Give segments that cover several flushes."""
    return [p for p in segments(folder) if int(p.name.split("-")[4][:12]) > 1]


def segments(folder: Path) -> list[Path]:
    """Give all segments, by last flush."""
    return sorted((folder / "index").glob("*.seg"))


def shards(folder: Path) -> list[Path]:
    """Give all shards."""
    return sorted((folder / "shards").glob("*.arrow"))


def fingerprint(folder: Path) -> Mapping[str, str]:
    """Give what every file holds."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


# --- damage -------------------------------------------------------------------------------


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Flip one bit."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def zero(path: Path, offset: int, nbytes: int = 512) -> None:
    """Make a block zero."""
    data = bytearray(path.read_bytes())
    end = min(offset + nbytes, len(data))
    data[offset:end] = bytes(end - offset)
    path.write_bytes(data)


def cut(path: Path, nbytes: int) -> None:
    """Keep the first bytes only."""
    path.write_bytes(path.read_bytes()[:nbytes])


# --- comparing ------------------------------------------------------------------------------


def same(found: object, wanted: object) -> bool:
    """Compare values bit for bit."""
    if isinstance(wanted, str):
        return found == wanted
    a, b = np.asarray(found), np.asarray(wanted)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def read_all(folder: Path, keys: Iterable[tuple[str, int]]) -> tuple[Oracle, dict[Any, str]]:
    """Read with the independent reader; give values, and codes of what cannot be read."""
    run = open_run(folder)
    read = run.read
    found: Oracle = {}
    failed: dict[Any, str] = {}
    for name, step in keys:
        try:
            found[name, step] = read(name, step)
        except SpecError as error:
            failed[name, step] = error.code
    return found, failed


def unreadable(folder: Path, oracle: Oracle) -> dict[tuple[str, int], str]:
    """Compare a run with its oracle: nothing may be wrong; give what cannot be read."""
    found, failed = read_all(folder, oracle)
    wrong = [key for key, value in found.items() if not same(value, oracle[key])]
    assert not wrong
    return failed


def reopened(folder: Path) -> Run:
    """Open with the independent reader."""
    return open_run(folder)


Damage = Callable[[Path], None]
