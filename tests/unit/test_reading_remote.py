"""Reading from stores that are not a disk: rounds, batches, no listing."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import numpy as np
import pytest
from support.build_run import Put, RunBuilder

from tensorstore_fmt.errors import MissingFileError, StepNotYetWrittenError
from tensorstore_fmt.reading import fetch
from tensorstore_fmt.reading.run import Run, open_run
from tensorstore_fmt.reading.session import Session
from tensorstore_fmt.storage import Range, Storage, open_storage
from tensorstore_fmt.storage.remote import ObjectStore, RemoteStorage
from tensorstore_fmt.testing.servers import serve_http
from tensorstore_fmt.testing.storage import CountingStorage, FaultyStorage, Operation


class Remote(CountingStorage):
    """A disk that says it is none."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.is_local = False


@pytest.fixture
def build(tmp_path: Path) -> RunBuilder:
    return RunBuilder(tmp_path / "run")


def remote(build: RunBuilder) -> tuple[Run, Remote]:
    storage = Remote(open_storage(build.url, writable=False))
    return Run(Session(build.url, None, storage=storage)), storage


def test_a_closed_run_is_opened_and_read_in_two_rounds(build: RunBuilder) -> None:
    value = np.random.default_rng(0).random((8, 1000))
    build.writer().flush(Put(value=value, grid=(1, 0)), closed=True)
    build.bundle()
    run, storage = remote(build)
    np.testing.assert_array_equal(run["x"].read(step=0, index=3), value[3])
    assert storage.rounds == 2


def test_large_reads_go_in_batches_that_hold_everything_once(
    build: RunBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = np.random.default_rng(0).random((64, 50, 100))
    build.writer().flush(*(Put(step=s, value=value + s, grid=(1, 0, 0)) for s in range(3)))
    monkeypatch.setattr(fetch, "_REMOTE_NBYTES", 1_000_000)
    monkeypatch.setattr(fetch, "_REMOTE_REQUEST_NBYTES", 200_000)
    run, storage = remote(build)
    assert run["x"].ndim == 3
    run["x"].steps  # noqa: B018 - so that the index is there
    storage.reset()
    np.testing.assert_array_equal(run["x"].read(), np.stack([value + s for s in range(3)]))
    assert storage.rounds == 8
    assert storage.nbytes < 1.01 * 3 * value.nbytes
    spans = sorted((r.path, r.start, r.stop) for r in storage.requests)
    for (path, _, stop), (other, start, _) in itertools.pairwise(spans):
        assert path != other or stop <= start


class WaitingStore(ObjectStore):
    """Answers the first range when five others were answered; counts what is on its way."""

    max_in_flight = 6

    def __init__(self) -> None:
        self.others = asyncio.Semaphore(0)
        self.on_the_way: list[int] = []
        self.most = (0, 0)
        self.cancelled = 0

    async def read(self, path: str, start: int, stop: int) -> bytes:
        self.on_the_way.append(stop - start)
        self.most = max(self.most, (len(self.on_the_way), sum(self.on_the_way)))
        try:
            if start == 0:
                for _ in range(5):
                    await self.others.acquire()
            else:
                await asyncio.sleep(0.001)
                self.others.release()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        self.on_the_way.remove(stop - start)
        return bytes(stop - start)

    async def read_prefix(self, path: str, nbytes: int) -> tuple[bytes, int | None]:
        raise NotImplementedError


@pytest.mark.parametrize(("most_nbytes", "most_at_once"), [(10_000, 6), (350, 3), (1, 1)])
def test_requests_do_not_wait_for_slow_ones(most_nbytes: int, most_at_once: int) -> None:
    store = WaitingStore()
    storage = RemoteStorage("memory://x", {}, writable=False, open_store=lambda _: store)
    ranges = [Range("a", 100 * i, 100 * i + 100) for i in range(20)]
    if most_at_once == 1:
        ranges = ranges[1:]  # nothing else can be asked for while the first one waits
    order = [number for number, _ in storage.fetch_each(ranges, most_nbytes=most_nbytes)]
    assert sorted(order) == list(range(len(ranges)))
    assert most_at_once == 1 or order.index(0) >= 5
    assert store.most == (most_at_once, 100 * most_at_once)
    storage.close()


def test_who_stops_reading_waits_for_nothing() -> None:
    store = WaitingStore()
    storage = RemoteStorage("memory://x", {}, writable=False, open_store=lambda _: store)
    arriving = storage.fetch_each([Range("a", 100, 200), Range("a", 0, 9)], most_nbytes=1000)
    assert next(arriving) == (0, bytes(100))
    arriving.close()
    assert storage.fetch([Range("a", 5, 8)]) == [bytes(3)]  # and the loop has gone on
    assert store.cancelled == 1
    storage.close()


def test_where_nothing_can_be_listed_the_bundle_is_the_listing(build: RunBuilder) -> None:
    w = build.writer()
    w.flush(Put(value=np.arange(5)))
    with serve_http(build.root) as server:
        with pytest.raises(MissingFileError):
            open_run(server.url)
        build.bundle()
        run = open_run(server.url)
        assert run["x"].read(step=0).tolist() == [0, 1, 2, 3, 4]
        assert run.refresh() is False
        w.flush(Put(step=1, value=np.arange(5)))
        assert run.refresh() is False
        build.bundle(whole=False)
        assert run.refresh() is True
        assert run["x"].read(step=1, index=-1) == 4


def test_a_failing_storage_is_none_of_the_absences(build: RunBuilder) -> None:
    build.writer().flush(Put(value=np.arange(5)))
    failing = False

    def hook(operation: Operation) -> int | None:
        if failing and operation.path.startswith("shards/"):
            raise PermissionError("no")
        return None

    storage = FaultyStorage(open_storage(build.url, writable=False), hook)
    run = Run(Session(build.url, None, storage=storage))
    assert run.state("x", 0) == "here"
    failing = True
    with pytest.raises(PermissionError):
        run["x"].read(step=0)
    with pytest.raises(PermissionError):
        run.state("x", 0)
    with pytest.raises(StepNotYetWrittenError):
        run["x"].read(step=1)
