"""States of the disk after a power cut, built from a log of all system calls (goal C3)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.crash_running import quick_folder, run_trials
from support.goals import COUNT, SEED, record, trials
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

    wrong = run_trials([MODULE], batches, one)
    record(name, met["states"], **{k: n for k, n in met.items() if k != "states"}, wrong=len(wrong))
    assert not wrong, f"{len(wrong)} of {len(batches)} recordings; the first:\n{wrong[0]}"
    return met


def test_power_loss(folder: Path) -> None:
    rng = random.Random(SEED)
    batches = [
        Batch(f"{folder}/{i}", rng.randrange(2**32), STATES, resumes=i % 3 == 0)
        for i in range(trials(20))
    ]
    met = carry_out("C3 power loss", batches)
    assert met["states"] >= 1000 * COUNT
    assert met["damaged"]
    assert met["values"] > 10 * met["states"]


def test_power_loss_while_a_merged_segment_is_published(folder: Path) -> None:
    """Torn pages of it must not hide what the covered segments, still there and synced, hold."""
    batches = [
        Batch(f"{folder}/merging-{seed}", seed, trials(20), upkeep=0, while_merging=True)
        for seed in range(4)
    ]
    met = carry_out("C3 power loss while merging", batches)
    assert met["states"]


def test_power_loss_after_a_failed_sync(folder: Path) -> None:
    rng = random.Random(SEED)
    batches = [
        Batch(f"{folder}/{k}-{i}", rng.randrange(2**32), 8, failing_syncs=(k,), upkeep=0)
        for i in range(trials(1))
        for k in range(1, 25)
    ]
    met = carry_out("C3 power loss after a failed sync", batches)
    assert met["states"] >= 180 * COUNT
