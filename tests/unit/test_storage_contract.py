"""What every storage does alike: local files, memory, a real S3 server."""

from __future__ import annotations

import itertools
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tensorstore_fmt.errors import ArgumentError, TruncatedError
from tensorstore_fmt.storage import (
    FileInfo,
    Listing,
    Prefix,
    Range,
    Storage,
    open_storage,
)
from tensorstore_fmt.testing.servers import S3Server

_NUMBERS = itertools.count()


@pytest.fixture(params=["local", "file", "memory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    options = None
    if request.param == "local":
        url = str(tmp_path / "a run")
    elif request.param == "file":
        url = (tmp_path / "a run").as_uri()
    elif request.param == "memory":
        url = f"memory://contract/{next(_NUMBERS)}"
    else:
        server: S3Server = request.getfixturevalue("s3")
        url, options = server.url(f"contract/{next(_NUMBERS)}"), server.storage_options
    with open_storage(url, storage_options=options, writable=True) as opened:
        yield opened


def test_results_come_in_the_order_of_the_requests(storage: Storage) -> None:
    storage.publish("index/b.seg", [b"0123", memoryview(b"456"), bytearray(b"789")])
    storage.publish("run.json", [b"{}"])
    storage.publish("shards/deeper.arrow", [b""])
    got = storage.fetch(
        [
            Range("index/b.seg", 8, 10),
            Listing("index"),
            Prefix("run.json", 4096),
            Range("index/b.seg", 0, 1),
            Range("index/b.seg", 3, 3),
            Listing(""),
        ]
    )
    assert got[0] == b"89"
    assert got[1] == [FileInfo("b.seg", 10)]
    assert got[2] == (b"{}", 2)
    assert got[3:5] == [b"0", b""]
    assert got[5] == [FileInfo("run.json", 2)]
    assert storage.fetch([]) == []


def test_a_prefix_is_all_of_a_shorter_file(storage: Storage) -> None:
    storage.publish("a", [b"0123456789"])
    storage.publish("empty", [])
    whole, cut, exact, empty = storage.fetch(
        [Prefix("a", 11), Prefix("a", 3), Prefix("a", 10), Prefix("empty", 5)]
    )
    assert whole == (b"0123456789", 10)
    assert cut[0] == b"012"
    assert cut[1] in (10, None)
    assert exact[0] == b"0123456789"
    assert exact[1] in (10, None)
    assert empty == (b"", 0)


def test_a_file_that_is_too_short_is_truncated(storage: Storage) -> None:
    storage.publish("a", [b"0123456789"])
    storage.publish("empty", [b""])
    fine, *short = storage.fetch_settled(
        [
            Range("a", 0, 10),
            Range("a", 8, 11),
            Range("a", 10, 11),
            Range("a", 90, 99),
            Range("a", 0, 1 << 50),  # nothing of that size is ever allocated
            Range("empty", 0, 1),
        ]
    )
    assert fine == b"0123456789"
    for error in short:
        assert isinstance(error, TruncatedError)
        assert error.code == "truncated"
        assert str(error.facts["file"]).endswith(("a", "empty"))
    with pytest.raises(TruncatedError):
        storage.fetch([Range("a", 8, 11)])


def test_what_is_missing(storage: Storage) -> None:
    got = storage.fetch_settled(
        [Prefix("run.json", 9), Listing("index"), Range("shards/x", 0, 1), Listing("")]
    )
    assert type(got[0]) is FileNotFoundError
    assert got[1] == []
    assert type(got[2]) is FileNotFoundError
    assert got[3] == []
    storage.delete(["index/nope", "run.json"])
    with pytest.raises(FileNotFoundError):
        storage.fetch([Listing("index"), Prefix("run.json", 9)])


def test_publishing_replaces_unless_it_must_not(storage: Storage) -> None:
    storage.publish("run.json", [b"one"], if_absent=True)
    with pytest.raises(FileExistsError):
        storage.publish("run.json", [b"two"], if_absent=True)
    with pytest.raises(FileExistsError):  # also with the very same bytes
        storage.publish("run.json", [b"one"], if_absent=True)
    assert storage.fetch([Prefix("run.json", 9)]) == [(b"one", 3)]
    assert storage.fetch([Range("run.json", 0, 3)]) == [b"one"]
    storage.publish("run.json", [b"three"])
    assert storage.fetch([Prefix("run.json", 9)]) == [(b"three", 5)]
    assert storage.fetch([Range("run.json", 0, 5)]) == [b"three"]
    assert storage.fetch([Listing("")]) == [[FileInfo("run.json", 5)]]


def test_of_many_who_publish_the_same_name_one_wins(storage: Storage) -> None:
    outcomes: list[int | None] = []
    barrier = threading.Barrier(8)

    def race(number: int) -> None:
        barrier.wait()
        try:
            storage.publish("run.json", [b"%d" % number], if_absent=True)
        except FileExistsError:
            outcomes.append(None)
        else:
            outcomes.append(number)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [number for number in outcomes if number is not None]
    assert len(outcomes) == 8
    assert storage.fetch([Prefix("run.json", 9)])[0][0] == b"%d" % winner
    assert [info.base for info in storage.fetch([Listing("")])[0]] == ["run.json"]


def test_a_listing_is_never_an_old_one(storage: Storage) -> None:
    for number in range(3):
        storage.publish(f"index/{number}", [b"x" * number])
        expected = [FileInfo(str(i), i) for i in range(number + 1)]
        assert storage.fetch([Listing("index")]) == [expected]
    storage.delete(["index/0", "index/2", "index/2"])
    assert storage.fetch([Listing("index")]) == [[FileInfo("1", 1)]]
    assert isinstance(storage.fetch_settled([Range("index/2", 0, 2)])[0], FileNotFoundError)


def test_threads_share_one(storage: Storage) -> None:
    data = bytes(range(256)) * 64
    storage.publish("a", [data])
    storage.publish("b", [data[::-1]])
    wrong: list[object] = []

    def read(seed: int) -> None:
        for i in range(10):
            start = (seed * 977 + i * 131) % 8000
            a, b = storage.fetch([Range("a", start, start + 500), Range("b", start, start + 9)])
            if a != data[start : start + 500] or b != data[::-1][start : start + 9]:
                wrong.append((seed, i))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_reading_into_memory_of_the_caller(storage: Storage) -> None:
    storage.publish("a", [b"0123456789"])
    memory = bytearray(5)
    view = memoryview(memory)
    storage.fetch_into([Range("a", 7, 10), Range("a", 0, 2)], [view[:3], view[3:]])
    assert memory == b"78901"
    with pytest.raises(ArgumentError):
        storage.fetch_into([Range("a", 7, 10)], [view])
    with pytest.raises(TruncatedError):
        storage.fetch_into([Range("a", 7, 12)], [view])


def test_each_range_is_given_once_when_it_is_there(storage: Storage) -> None:
    data = bytes(range(256)) * 40
    storage.publish("a", [data])
    ranges = [Range("a", i, i + 100 + i % 7) for i in range(0, 10_000, 83)]
    ranges[5:5] = [Range("gone", 0, 9), Range("a", 10_200, 10_300), Range("a", 7, 7)]
    for most in (1, 1000, 10**6):
        given = dict(storage.fetch_each(ranges, most_nbytes=most))
        assert sorted(given) == list(range(len(ranges)))
        assert isinstance(given.pop(5), FileNotFoundError)
        assert isinstance(given.pop(6), TruncatedError)
        for number, result in given.items():
            assert result == data[ranges[number].start : ranges[number].stop]
    assert list(storage.fetch_each([], most_nbytes=1)) == []
    some = storage.fetch_each(ranges, most_nbytes=10**6)
    assert next(some)[0] in range(len(ranges))
    some.close()  # the rest is not waited for
    assert storage.fetch([ranges[0]]) == [data[:100]]


def test_it_pickles_small_and_works_again(storage: Storage) -> None:
    storage.publish("a", [b"x" * 1000])
    storage.fetch([Prefix("a", 9)])
    stored = pickle.dumps(storage)
    assert len(stored) < 600
    with pickle.loads(stored) as again:
        assert again.url == storage.url
        assert again.can_write
        assert again.fetch([Range("a", 999, 1000)]) == [b"x"]


def test_nothing_is_written_by_a_reader(storage: Storage) -> None:
    storage.publish("a", [b"x"])
    reader = pickle.loads(pickle.dumps(storage))
    reader.can_write = False
    for write in (
        lambda: reader.publish("b", [b""]),
        lambda: reader.delete(["a"]),
        lambda: reader.create("b"),
    ):
        with pytest.raises(ArgumentError):
            write()  # type: ignore[no-untyped-call]  # a lambda
    assert reader.fetch([Listing("")]) == [[FileInfo("a", 1)]]
    reader.close()


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../a", "a/../b", "a//b", "a/", ".", "a\0b"])
def test_paths_stay_inside(storage: Storage, path: str) -> None:
    requests: list[Range | Prefix] = [Range(path, 0, 1), Prefix(path, 1)]
    got: list[object] = [*storage.fetch_settled(requests)]
    if path:  # the empty directory is the root itself
        got += storage.fetch_settled([Listing(path)])
    assert all(isinstance(error, ArgumentError) for error in got)
    with pytest.raises(ArgumentError):
        storage.publish(path, [b"x"])
    with pytest.raises(ArgumentError):
        storage.delete([path])


def test_it_can_be_used_after_closing(storage: Storage) -> None:
    storage.publish("a", [b"x"])
    storage.close()
    storage.close()
    assert storage.fetch([Range("a", 0, 1)]) == [b"x"]


def test_syncing_what_was_published(storage: Storage) -> None:
    storage.publish("index/a", [b"x"])
    storage.publish("run.json", [b"x"])
    storage.sync(["index/a", "run.json"])
    storage.sync([])


def test_impossible_requests() -> None:
    for start, stop in ((-1, 5), (5, 4)):
        with pytest.raises(ArgumentError):
            Range("a", start, stop)
    with pytest.raises(ArgumentError):
        Prefix("a", 0)


def test_runs_in_memory_are_apart() -> None:
    one = open_storage("memory://apart/one", writable=True)
    two = open_storage("memory://apart/two", writable=True)
    one.publish("a", [b"1"])
    two.publish("a", [b"2"])
    assert one.fetch([Range("a", 0, 1)]) == [b"1"]
    assert two.fetch([Range("a", 0, 1)]) == [b"2"]
    again = open_storage("memory:///apart/one", writable=False)
    assert again.fetch([Listing("")]) == [[FileInfo("a", 1)]]
