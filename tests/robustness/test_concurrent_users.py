"""One reader for many threads and processes (N5); nothing is left open behind anybody (N7)."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.concurrent_soak import MODULE
from support.crash_running import quick_folder
from support.goals import COUNT, record, trials

from tensorstore_fmt.testing.forks import ForkServer

PROCESSES = 16
FORKED = 12 if COUNT < 5 else 16  # a spawned one takes as long to begin as a hundred forked ones
SPAWNED = 4 if COUNT < 5 else 16
MIB = 1024 * 1024

UNPICKLE = """
import pickle, sys
from support.concurrent_soak import read_ten
with pickle.load(sys.stdin.buffer) as run:
    read_ten(run, int(sys.argv[1]))
    run.refresh()
    read_ten(run, int(sys.argv[1]) + 1)
"""

DEVELOPMENT = """
import gc, sys
from support import concurrent_races, concurrent_soak
from tensorstore_fmt.testing.forks import Channel
url = sys.argv[1]
concurrent_soak.cycles(Channel(-1), url, 3)
for kind in concurrent_races.KINDS:
    getattr(concurrent_races, kind)(Channel(-1), f"{url}/{kind}", 1)
concurrent_soak.many_threads(Channel(-1), f"{url}/threads", 20)
gc.collect()
print("done")
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as place:
        yield place


@pytest.fixture
def server() -> Iterator[ForkServer]:
    with ForkServer([MODULE]) as forks:
        yield forks


def run_python(*arguments: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    path = f"import sys; sys.path[:0] = {sys.path!r}\n"
    *options, code, last = arguments
    command = [sys.executable, *options, "-c", path + code, last]
    return subprocess.run(command, input=given, capture_output=True, check=False, timeout=250)


def test_threads_share_a_reader(folder: Path, server: ForkServer) -> None:
    count = trials(500)
    done, peak, kept, wrong = server.call(
        MODULE, "many_threads", f"{folder}/run", count, timeout_s=500 * max(1.0, COUNT)
    )
    mib = {"peak_mib": peak // MIB, "kept_mib": [each // MIB for each in kept]}
    record("N5", 2 * count, kind="threads", reads=10 * done, **mib, wrong=len(wrong))
    assert not wrong, wrong[0]
    assert done == 2 * count
    assert peak < 128 * MIB + count * 2 * MIB  # each has a stack, and scratch memory while it lives
    # Heaps of many threads keep some; what each left behind would be there twice after both.
    assert max(kept) < max(96 * MIB, count * 24 * 1024)


def test_processes_share_a_reader(folder: Path, server: ForkServer) -> None:
    ends, pickled = server.call(MODULE, "fork_readers", f"{folder}/run", FORKED)
    spawned = [run_python(UNPICKLE, str(i), given=pickled) for i in range(SPAWNED)]
    failed = [each.stderr.decode() for each in spawned if each.returncode or each.stderr]
    record("N5", len(ends) + len(spawned), kind="processes", forked=FORKED, spawned=SPAWNED)
    assert ends == [0] * FORKED
    assert not failed, failed[0]
    assert pickle.loads(pickled).names()
    assert len(ends) + len(spawned) >= PROCESSES


def test_nothing_is_left_open(folder: Path) -> None:
    done = run_python("-X", "dev", "-W", "error", DEVELOPMENT, str(folder))
    record("N7", 1, said=len(done.stderr))
    assert done.stderr.decode() == ""
    assert done.stdout.decode().strip() == "done"
    assert done.returncode == 0
