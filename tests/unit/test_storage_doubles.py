"""The storages that others test with: they count, delay and fail."""

from __future__ import annotations

import errno
import time
from pathlib import Path

import pytest

from tensorstore_fmt.errors import TruncatedError
from tensorstore_fmt.storage import Listing, Prefix, Range, Storage, open_storage
from tensorstore_fmt.testing.storage import (
    CountingStorage,
    FaultyStorage,
    LatencyStorage,
    Operation,
)


@pytest.fixture
def real(tmp_path: Path) -> Storage:
    storage = open_storage(tmp_path, writable=True)
    storage.publish("index/a", [b"0123456789"])
    return storage


def test_counting(real: Storage) -> None:
    storage = CountingStorage(real)
    storage.fetch([Prefix("index/a", 4), Range("index/a", 2, 9), Listing("index")])
    storage.fetch([Range("index/a", 0, 1)])
    storage.fetch([])
    assert storage.rounds == 2
    assert storage.nbytes == 4 + 7 + 1
    assert storage.requests == [
        Operation("prefix", "index/a", 0, 4, 1),
        Operation("range", "index/a", 2, 9, 1),
        Operation("listing", "index", 0, 0, 1),
        Operation("range", "index/a", 0, 1, 2),
    ]
    storage.reset()
    storage.publish("b", [b"12", b"3"], if_absent=True)
    with storage.create("c") as appender:
        appender.append([b"12", b"3"])
        appender.append([b"45"])
        appender.sync()
    storage.sync(["b"])
    storage.map("c", 5)
    with storage.lock("locks/a"):
        assert storage.is_locked("locks/a")
    storage.delete(["b", "c"])
    assert [(each.op, each.path, each.start, each.stop) for each in storage.operations] == [
        ("publish", "b", 0, 3),
        ("create", "c", 0, 0),
        ("append", "c", 0, 3),
        ("append", "c", 3, 5),
        ("sync", "c", 0, 0),
        ("sync", "b", 0, 0),
        ("map", "c", 0, 5),
        ("lock", "locks/a", 0, 0),
        ("delete", "b", 0, 0),
        ("delete", "c", 0, 0),
    ]
    assert storage.rounds == 0
    storage.close()


def test_latency_is_of_rounds_not_of_requests(
    real: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    storage = LatencyStorage(real, 0.02)
    storage.fetch([Range("index/a", i, i + 1) for i in range(10)])
    assert slept == [0.02]


def test_faults(real: Storage) -> None:
    def hook(operation: Operation) -> int | None:
        if operation.path == "bad":
            raise PermissionError(operation.op)
        return 4 if operation.path in ("index/a", "short") else None

    storage = FaultyStorage(real, hook)
    got = storage.fetch_settled(
        [Range("bad", 0, 1), Prefix("index/a", 9), Range("index/a", 0, 9), Listing("index")]
    )
    assert isinstance(got[0], PermissionError)
    assert got[1] == (b"0123", 4)
    assert isinstance(got[2], TruncatedError)
    assert got[3] == real.fetch([Listing("index")])[0]
    for act in (
        lambda: storage.publish("bad", [b""]),
        lambda: storage.create("bad"),
        lambda: storage.sync(["bad"]),
        lambda: storage.delete(["bad"]),
        lambda: storage.lock("bad"),
    ):
        with pytest.raises(PermissionError):
            act()
    with pytest.raises(OSError, match="No space") as caught:
        storage.publish("short", [b"0123456789"])
    assert caught.value.errno == errno.ENOSPC
    assert isinstance(real.fetch_settled([Prefix("short", 9)])[0], FileNotFoundError)
    with storage.create("short") as appender, pytest.raises(OSError, match="No space"):
        appender.append([b"0123456789"])
    assert real.fetch([Prefix("short", 99)]) == [(b"0123", 4)]
