"""States of the disk after a power cut, built from a log of all system calls (goal C3)."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.crash_running import COUNT, new_seed, quick_folder, run_trials
from support.power_scripts import MODULE, Batch

from tensorstore_fmt.testing.forks import ForkServer

LIMIT_S = 120.0
STATES = 50  # of one recording


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as place:
        yield place


def carry_out(name: str, batches: list[Batch]) -> Counter[str]:
    met: Counter[str] = Counter()

    def one(server: ForkServer, batch: Batch) -> None:
        met.update(server.call(MODULE, "check_states", batch, timeout_s=LIMIT_S))

    begin = time.monotonic()
    wrong = run_trials([MODULE], batches, one)
    print(f"{name}: {dict(met)}, {time.monotonic() - begin:.1f} s")
    assert not wrong, f"{len(wrong)} of {len(batches)} recordings; the first:\n{wrong[0]}"
    return met


def test_power_loss(folder: Path) -> None:
    rng = random.Random(new_seed("C3"))
    batches = [
        Batch(f"{folder}/{i}", rng.randrange(2**32), STATES, resumes=i % 3 == 0)
        for i in range(max(1, round(18 * COUNT)))
    ]
    met = carry_out("C3 power loss", batches)
    assert met["states"] >= 900 * COUNT
    assert met["damaged"]
    assert met["values"] > 10 * met["states"]


def test_power_loss_after_a_failed_sync(folder: Path) -> None:
    rng = random.Random(new_seed("C3, failed syncs"))
    batches = [
        Batch(f"{folder}/{k}-{i}", rng.randrange(2**32), 10, failing_syncs=(k,), upkeep=1000)
        for i in range(max(1, round(COUNT)))
        for k in range(1, 25)
    ]
    met = carry_out("C3 power loss after a failed sync", batches)
    assert met["states"] >= 200 * COUNT
