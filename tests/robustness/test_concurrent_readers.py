"""Readers beside a writer: also while it is killed, and while segments are merged (N2, N3)."""

from __future__ import annotations

import itertools
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.concurrent_scripts import MODULE, Pace
from support.crash_running import quick_folder
from support.goals import SEED, record, trials

from tensorstore_fmt.testing.forks import Child, ChildFailedError, ForkServer

ROUND_S = 10.0
PROCESSES = 4
THREADS = 2
WRITERS = {
    "plain": Pace(flush_every=5, pause_s=0.005, grace_s=10.0),
    "kills": Pace(flush_every=5, pause_s=0.005, grace_s=10.0),
    "merges": Pace(flush_every=1, pause_s=0.01, grace_s=0.05),
}


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as place:
        yield place


@pytest.fixture
def server() -> Iterator[ForkServer]:
    with ForkServer([MODULE]) as forks:
        yield forks


def heard(child: Child) -> dict[str, Any]:
    """Take all that a process says until its end."""
    said: dict[str, Any] = {}
    for kind, what in child.messages():
        if kind == "error":
            raise ChildFailedError(what)
        said[kind] = what
    child.finish()
    return said


def one_round(server: ForkServer, url: str, kind: str, rng: random.Random) -> Counter[str]:
    """Read for ten seconds with eight readers, while a writer lives, or one after the other."""
    met: Counter[str] = Counter()
    readers: list[Child] = []
    resume: int | None = None
    begin = time.monotonic()
    for attempt in itertools.count():
        child = server.start(
            MODULE, "write_until_killed", url, resume, attempt, WRITERS[kind], timeout_s=100.0
        )
        opened = next(iter(child.messages()))
        assert opened == ("open", attempt), opened
        for seed in [rng.randrange(1 << 30) for _ in range(0 if readers else PROCESSES)]:
            arguments = (url, ROUND_S, seed, THREADS)
            readers.append(server.start(MODULE, "read_until", *arguments, timeout_s=100.0))
        left = begin + ROUND_S - time.monotonic()
        time.sleep(max(0.0, min(left, rng.uniform(0.05, 0.6)) if kind == "kills" else left))
        child.kill()
        step, merged, deleted = heard(child).get("acknowledged", ((resume or 0) - 1, 0, 0))
        met.update(merges=merged, deleted=deleted, kills=1, safe=step + 1 - (resume or 0))
        resume = max(0, step + 1 - rng.randrange(40))
        if time.monotonic() > begin + ROUND_S:
            break
    for reader in readers:
        said = heard(reader)
        met.update(said["result"])
    return met


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRITERS)
def test_readers_beside_a_writer(folder: Path, server: ForkServer, kind: str) -> None:
    rng = random.Random(f"{SEED} {kind}")
    met: Counter[str] = Counter()
    rounds = trials(1)
    wrong: list[str] = []
    for number in range(rounds):
        try:
            met.update(one_round(server, f"{folder}/run-{number}", kind, rng))
        except ChildFailedError as error:
            wrong.append(str(error))
            break  # its processes may still run
        shutil.rmtree(f"{folder}/run-{number}")
    goal = "N3" if kind == "kills" else "N2"
    seconds = round(rounds * ROUND_S)
    record(goal, seconds, unit="s", kind=kind, readers=PROCESSES * THREADS, **met, wrong=len(wrong))
    assert not wrong, wrong[0]
    assert met["values"] > 2000 * rounds
    assert met["refreshes"] > 200 * rounds
    assert met["old views"] >= PROCESSES * THREADS * rounds
    if kind == "kills":
        assert met["kills"] > 8 * rounds
    if kind == "merges":
        assert met["merges"] > 10 * rounds
        assert met["deleted"] > 50 * rounds
