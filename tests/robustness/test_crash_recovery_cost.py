"""After a crash little has to be read: neither to open a run, nor to recover it (goal C8)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.crash_running import quick_folder
from support.goals import record

import tensorstore_fmt as tsf
from tensorstore_fmt.upkeep import recover

STEPS = 50
WRITE = """
import os, sys
import numpy as np
import tensorstore_fmt as tsf
side = int(sys.argv[2])
run = tsf.create_run(sys.argv[1], compression="none", flush_interval_s=3600)
for step in range(60):
    run.log({"w": np.full((side, side), step, "f4"), "loss": float(step)}, step=step)
    if step % 10 == 9 and step < 50:
        run.flush()
os._exit(9)
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as place:
        yield place


def torn(url: Path, side: int) -> int:
    """Make a run whose writer died, and whose shard ends in the middle; give its bytes."""
    died = subprocess.run([sys.executable, "-c", WRITE, str(url), str(side)], check=False)
    assert died.returncode == 9
    (shard,) = (url / "shards").iterdir()
    with shard.open("ab") as file:
        file.write(b"\xff\xff\xff\xff" + bytes(range(256)) * 1000)
    return sum(file.stat().st_size for file in url.rglob("*") if file.is_file())


def read_by_process() -> int:
    """Give how many bytes this process has read so far, by whatever call."""
    with open("/proc/self/io", encoding="ascii") as file:
        return int(file.readline().split()[1])


def check(url: Path) -> None:
    with tsf.open_run(url) as run:
        assert run["loss"].read().tolist() == [float(step) for step in range(STEPS)]
        found = run["w"].read(step=41, index=np.s_[7, :4])
        assert found.tolist() == [41.0] * 4


def test_a_torn_run_opens_and_recovers_with_few_bytes(folder: Path) -> None:
    url = folder / "run"
    torn(folder / "small", 300)
    total = torn(url, 1024)
    assert total > 200_000_000
    begin = read_by_process()
    check(url)
    opened = read_by_process() - begin
    begin = read_by_process()
    recover(folder / "small")
    least = read_by_process() - begin  # what does not grow with the run
    begin = read_by_process()
    report = recover(url)
    recovered = read_by_process() - begin
    wrong = int(max(opened, recovered - least) >= total // 100)
    facts = {"to_open": opened, "to_recover": recovered, "to_recover_18_MB": least}
    record("C8", 1, nbytes=total, **facts, wrong=wrong)
    assert report.actions
    assert 0 < opened < total // 100
    assert recovered - least < total // 100
    check(url)
    with tsf.open_run(url) as run:
        assert run.is_closed
