"""A writer at a steady pace with readers and a rule (K1); opening and closing for ever (K3)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
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
WARM_S = 20.0 if COUNT < 10 else 300.0
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


def growth(health: Health) -> tuple[int, float]:
    """Give by how much memory grew after warming up, in bytes and in MB an hour.

    What is held between merges counts, so the least of each of ten stretches of time is taken:
    a merge needs memory, and gives it back.
    """
    warm = [each for each in health if each[0] >= WARM_S] or health[-2:]
    least = [min(part) for part in np.array_split([each[1] for each in warm], 10) if len(part)]
    hours = (warm[-1][0] - warm[0][0]) / 3600
    slope = float(np.polyfit(np.linspace(0, hours, len(least)), least, 1)[0])
    return int(least[-1] - least[0]), slope / MIB


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
    grown, slope = growth(health)
    read_bytes = [growth(heard[name]["health"])[0] for name in children if name != "writer"]
    steps = round(SECONDS * 100)
    record(
        "K1",
        round(SECONDS),
        unit="s",
        **result,
        values=values,
        writer_grown_kib=grown // 1024,
        writer_mb_per_h=round(slope, 2),
        writer_peak_mib=max(each[1] for each in health) // MIB,
        readers_grown_kib=[nbytes // 1024 for nbytes in read_bytes],
        most_queued_bytes=max(each[4] for each in health),
        most_fds={name: max(each[2] for each in said["health"]) for name, said in heard.items()},
        most_threads=max(each[3] for said in heard.values() for each in said["health"]),
    )
    assert result["steps"] == steps
    assert result["dropped"] == 0
    assert [heard[name]["result"][0]["followed"] for name in list(children)[1:]] == [steps] * 3
    assert grown < MERGING  # a minute sees the first merges of each size
    if COUNT >= 30:
        assert slope < 1.0
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
