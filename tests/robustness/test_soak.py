"""A writer at a steady pace with readers and a rule (K1); opening and closing for ever (K3)."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.concurrent_soak import MODULE
from support.crash_running import quick_folder
from support.goals import COUNT, record, trials

from tensorstore_fmt.storage.local import _OPEN_FILES
from tensorstore_fmt.testing.forks import Child, ForkServer

MIB = 1024 * 1024
MERGING = 96 * MIB
SECONDS = 60.0 * COUNT
WARM_S = 20.0 if COUNT < 10 else 300.0 if COUNT < 45 else 2400.0  # 4,096 flushes: 2,048 s
Health = list[tuple[float, int, int, int, int]]


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as place:
        yield place


@pytest.fixture
def server() -> Iterator[ForkServer]:
    with ForkServer([MODULE]) as forks:
        yield forks


def listen(child: Child, into: dict[str, list[Any]]) -> None:
    for kind, what in child.messages():
        into.setdefault(kind, []).append(what)
    child.finish()


@dataclass(frozen=True)
class Growth:
    """How memory grew after warming up.

    What is held between merges counts, so the least of each of ten stretches of time is taken:
    a merge needs memory, and gives it back. But allocators keep some of it after the first merge of
    each size, which is a step and no slope: sizes are few, as segments above 8 MiB are not merged
    again. An hour is warm after the last of these steps. The slope is the median of the slopes
    between any two stretches, which a few that are higher do not change.
    """

    least: list[int]
    hours: float

    @classmethod
    def of(cls, health: Health) -> Growth:
        warm = [each for each in health if each[0] >= WARM_S] or health[-2:]
        parts = np.array_split([each[1] for each in warm], 10)
        hours = (warm[-1][0] - warm[0][0]) / 3600
        return cls([int(min(part)) for part in parts if len(part)], hours)

    @property
    def nbytes(self) -> int:
        """From the first stretch to the last."""
        return self.least[-1] - self.least[0]

    @property
    def mib_per_hour(self) -> float:
        pairs = itertools.combinations(enumerate(self.least), 2)
        slopes = [(y - x) / (j - i) for (i, x), (j, y) in pairs]
        return float(np.median(slopes)) * len(self.least) / self.hours / MIB


@pytest.mark.slow
def test_soak(folder: Path, server: ForkServer) -> None:
    url = f"{folder}/run"
    limit = SECONDS * 1.5 + 120
    heard: dict[str, dict[str, list[Any]]] = {}
    writer = server.start(MODULE, "write_steadily", url, SECONDS, timeout_s=limit)
    first = next(iter(writer.messages()))
    assert first[0] == "health", first[1]
    children = {"writer": writer}
    for name in ("reader 1", "reader 2", "rule"):
        kind = name.partition(" ")[0]
        children[name] = server.start(MODULE, "follow_values", url, kind, timeout_s=limit)
    threads = [
        threading.Thread(target=listen, args=(child, heard.setdefault(name, {})))
        for name, child in children.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wrong = [said["error"][0] for said in heard.values() if "error" in said]
    assert not wrong, wrong[0]
    health: Health = heard["writer"]["health"]
    result = heard["writer"]["result"][0]
    values = server.call(MODULE, "check_soak", url, result["steps"], timeout_s=600.0)
    grown = Growth.of(health)
    readers = [Growth.of(heard[name]["health"]) for name in children if name != "writer"]
    steps = round(SECONDS * 100)
    record(
        "K1",
        round(SECONDS),
        unit="s",
        **result,
        values=values,
        writer_grown_kib=grown.nbytes // 1024,
        writer_mb_per_h=round(grown.mib_per_hour, 2),
        writer_least_mib=[round(least / MIB, 1) for least in grown.least],
        writer_peak_mib=max(each[1] for each in health) // MIB,
        readers_grown_kib=[each.nbytes // 1024 for each in readers],
        readers_mb_per_h=[round(each.mib_per_hour, 2) for each in readers],
        most_queued_bytes=max(each[4] for each in health),
        most_fds={name: max(each[2] for each in said["health"]) for name, said in heard.items()},
        most_threads=max(each[3] for said in heard.values() for each in said["health"]),
    )
    assert result["steps"] == steps
    assert result["dropped"] == 0
    assert [heard[name]["result"][0]["followed"] for name in list(children)[1:]] == [steps] * 3
    assert grown.nbytes < MERGING  # a minute sees the first merges of each size
    if COUNT >= 45:
        assert grown.mib_per_hour < 1.0
    for said in heard.values():
        _, _, fds, threads, _ = zip(*said["health"], strict=True)
        assert max(fds) <= fds[0] + _OPEN_FILES + 4
        assert max(threads) <= threads[0] + 4  # those of the pool, and the merger's
    assert max(each[4] for each in health) < 16 * MIB


@pytest.mark.slow
def test_opening_and_closing_leaves_nothing(folder: Path, server: ForkServer) -> None:
    count = trials(1000)
    timeout_s = 120 + count
    before, after, left = server.call(MODULE, "cycles", str(folder), count, timeout_s=timeout_s)
    grown = (after[0] - before[0]) // 1024
    record("K3", count, fds=after[1] - before[1], threads=after[2] - before[2], grown_kib=grown)
    assert left == []
    assert after[1:] == before[1:]
    assert grown < 16 * 1024
