"""An allocation of the writer fails, at any place: training goes on (goal C6)."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.crash_memory import MODULE
from support.crash_running import quick_folder, run_trials
from support.goals import COUNT, SEED, record, trials

from tensorstore_fmt.testing.forks import ForkServer

LIMIT_S = 40.0


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as place:
        yield place


@pytest.mark.parametrize("in_a_row", [1, 4])
def test_an_allocation_fails(folder: Path, in_a_row: int) -> None:
    """Once, so that it is tried again; and so often that something has to be dropped."""
    with ForkServer([MODULE]) as server:
        calls = server.call(MODULE, "write_without_memory", f"{folder}/dry", 0, 0)["calls"]
    rng = random.Random(SEED + in_a_row)
    wanted = trials(25)
    places = [*range(1, len(calls) + 1)]
    if COUNT < 3:
        places = sorted(rng.sample(places, min(wanted, len(places))))
    met: Counter[str] = Counter()

    def one(server: ForkServer, at: int) -> None:
        url = f"{folder}/{at}"
        arguments = (MODULE, "write_without_memory", url, at, in_a_row)
        found = server.call(*arguments, timeout_s=LIMIT_S)
        met["failures"] += found["failures"]
        met["dropped"] += found["dropped"]
        met["recorded"] += found["seen_dropped"]
        shutil.rmtree(url)

    wrong = run_trials([MODULE], places, one)
    what = "once" if in_a_row == 1 else f"{in_a_row} times"
    record(f"C6 no memory, {what}", len(places), of=len(calls), **met, wrong=len(wrong))
    assert not wrong, f"{len(wrong)} of {len(places)}:\n" + "\n".join(wrong[:5])
    assert met["failures"]
    if in_a_row > 1:
        assert met["dropped"]
