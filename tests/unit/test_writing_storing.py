"""How tensors are kept: once if they are the same, k steps to a chunk, dropped and recorded."""

from __future__ import annotations

import errno
import gc
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import tensorstore_fmt as tsf
from tensorstore_fmt.storage import open_storage
from tensorstore_fmt.testing.storage import CountingStorage, FaultyStorage, Operation
from tensorstore_fmt.testing.writers import create_test_run
from tensorstore_fmt.writing.buffers import BufferPool

RNG = np.random.default_rng(0)


def shard_bytes(run: Path) -> int:
    return sum(f.stat().st_size for f in (run / "shards").glob("*"))


def local(place: Path) -> CountingStorage:
    return CountingStorage(open_storage(place, writable=True))


# --- the same bytes once ---------------------------------------------------------------


def test_a_frozen_tensor_is_stored_once(tmp_path: Path) -> None:
    weight = RNG.standard_normal((300, 500)).astype("f4")
    run = create_test_run(tmp_path / "run", stats=False)
    for step in range(40):
        run.log({"frozen": weight}, step=step)
        if step % 10 == 0:
            run.flush()
    run.close()
    assert shard_bytes(tmp_path / "run") < 1.5 * weight.nbytes
    tensor = tsf.open_run(tmp_path / "run")["frozen"]
    assert tensor.stored_nbytes < weight.nbytes < tensor.nbytes
    assert all((tensor.read(step=s) == weight).all() for s in (0, 7, 39))


def test_steps_that_share_a_chunk_and_are_the_same(tmp_path: Path) -> None:
    small = RNG.standard_normal(500).astype("f4")
    with create_test_run(tmp_path / "run", stats=False) as run:
        for step in range(100):
            run.log({"bias": small}, step=step)
    assert shard_bytes(tmp_path / "run") < 3 * small.nbytes + 8000
    assert (tsf.open_run(tmp_path / "run")["bias"].read() == small).all()


@pytest.mark.parametrize("bits", [0x0000_0000, 0x8000_0000, 0x7FC0_1234, 0x3F80_0000])
def test_constant_chunks_keep_their_bits(tmp_path: Path, bits: int) -> None:
    value = np.full((600, 600), np.uint32(bits)).view("f4")
    with create_test_run(tmp_path / "run", stats=False) as run:
        for step in range(3):
            run.log({"w": value, "small": value[:20, :20]}, step=step)
    assert not list((tmp_path / "run").glob("shards/*"))
    reader = tsf.open_run(tmp_path / "run")
    assert reader["w"].read(step=1).tobytes() == value.tobytes()
    assert reader["small"].read().tobytes() == value[:20, :20].tobytes() * 3


def test_zero_and_minus_zero_are_two_values(tmp_path: Path) -> None:
    with create_test_run(tmp_path / "run") as run:
        for step in range(6):
            run.log({"z": np.full((200, 200), -0.0 if step % 2 else 0.0)}, step=step)
    read = tsf.open_run(tmp_path / "run")["z"].read(index=np.s_[0, 0])
    assert np.signbit(read).tolist() == [False, True] * 3


# --- saved again -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 1000, 100_000])
@pytest.mark.parametrize("flush", [False, True])
def test_the_last_save_of_a_step_wins(tmp_path: Path, size: int, flush: bool) -> None:
    run = create_test_run(tmp_path / "run")
    for value in (1.0, 2.0, 3.0):
        run.log({"x": np.full(size, value), "y": value}, step=5)
        run.log({"x": np.full(size, 9.0)}, step=6)
        if flush:
            run.flush()
    run.log({"x": np.full(size, 4, np.int32)}, step=5)
    run.close()
    reader = tsf.open_run(tmp_path / "run")
    assert reader["x"].steps.tolist() == [5, 6]
    assert (reader["x"].read(step=5) == np.full(size, 4, np.int32)).all()
    assert reader["x"].read(step=5).dtype == np.int32
    assert reader["y"].read(step=5) == 3.0
    assert (reader["x"].read(step=6) == 9.0).all()


def test_steps_of_one_shared_chunk_that_are_saved_again(tmp_path: Path) -> None:
    run = create_test_run(tmp_path / "run")
    for step in [*range(30), 3, 17, 29]:
        run.log({"x": np.full(800, step + (100 if step in (3, 17, 29) else 0))}, step=step)
    for step in (3, 17, 29):
        run.log({"x": np.full(800, -step)}, step=step)
    run.close()
    read = tsf.open_run(tmp_path / "run")["x"].read(index=np.s_[0])
    assert read.tolist() == [-s if s in (3, 17, 29) else s for s in range(30)]


# --- options ----------------------------------------------------------------------------


def test_statistics_only(tmp_path: Path) -> None:
    with create_test_run(tmp_path / "run", stats={"grad/*": "only", "act/*": False}) as run:
        for name in ("grad/w", "act/w", "w"):
            run.log({name: RNG.standard_normal((100, 100))}, step=0)
    reader = tsf.open_run(tmp_path / "run")
    assert reader["grad/w"].stats()["count"].tolist() == [10_000]
    with pytest.raises(tsf.StepNotFoundError):
        reader["grad/w"].read(step=0)
    assert reader["w"].stats()["count"].tolist() == [10_000]
    kinds = {(row["name"], row["kind"]) for row in reader.table().to_pylist()}
    assert ("act/w", "stats") not in kinds
    assert reader["act/w"].read(step=0).shape == (100, 100)


def test_chunk_lengths_are_the_users(tmp_path: Path) -> None:
    chunks = {"a*": (1, None), "b": (7, 100)}
    data = RNG.standard_normal((40, 300))
    with create_test_run(tmp_path / "run", chunks=chunks, stats=False) as run:
        run.log({"a1": data, "b": data}, step=0)
        with pytest.raises(tsf.ArgumentError) as caught:
            run.log({"a2": data[0]}, step=0)
        assert "a2" in str(caught.value)
    (shard,) = (tmp_path / "run" / "shards").iterdir()
    with pa.memory_map(str(shard)) as source:
        rows = pa.ipc.open_file(source).read_all().select(["name", "grid", "chunk"]).to_pylist()
    assert sum(row["name"] == "a1" for row in rows) == 40
    assert {tuple(row["grid"]) for row in rows if row["name"] == "b"} == {(7, 100)}
    reader = tsf.open_run(tmp_path / "run")
    assert (reader["b"].read(step=0, index=np.s_[3:9, 90:110]) == data[3:9, 90:110]).all()


def test_nested_dicts_and_parts(tmp_path: Path) -> None:
    whole = RNG.standard_normal((6, 8))
    for w in range(2):
        with create_test_run(
            tmp_path / "run", worker=w, num_workers=2, new_id=lambda w=w: 5 + w
        ) as run:
            rows = slice(3 * w, 3 * w + 3)
            part = tsf.Part(value=whole[rows], global_shape=(6, 8), origin=(3 * w, 0))
            run.log({"model": {"w": part, "deep": {"b": 1.0 * w}}}, step=0)
            with pytest.raises(tsf.ArgumentError):
                run.log({"p": tsf.Part(value=whole, global_shape=(6, 8), origin=(1, 0))}, step=0)
    reader = tsf.open_run(tmp_path / "run")
    assert reader.names() == ["model/deep/b", "model/w"]
    assert (reader["model/w"].read(step=0) == whole).all()
    assert (reader["model/w"].read(step=0, index=np.s_[1:5, 2]) == whole[1:5, 2]).all()


def test_a_caller_may_change_what_it_logged(tmp_path: Path) -> None:
    data = np.zeros((500, 500))
    with create_test_run(tmp_path / "run") as run:
        for step in range(20):
            data[:] = step
            run.log({"w": data}, step=step)
            data[:] = -1
    read = tsf.open_run(tmp_path / "run")["w"].read(index=np.s_[0, 0])
    assert read.tolist() == list(range(20))


# --- too much, too fast --------------------------------------------------------------------


def test_a_full_queue_drops_and_says_so(tmp_path: Path) -> None:
    gate = RNG.standard_normal((256, 1024)).astype("f4")  # 1 MiB
    run = create_test_run(tmp_path / "run", queue_bytes=2 * gate.nbytes, when_full="drop")
    dropped = 0
    for step in range(60):
        run.log({"w": gate + np.float32(step), "loss": float(step)}, step=step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = run.close()
    reader = tsf.open_run(tmp_path / "run")
    assert reader["loss"].steps.tolist() == list(range(60))  # scalars are never dropped
    for step in range(60):
        if reader.state("w", step) == "dropped":
            dropped += 1
            with pytest.raises(tsf.StepDroppedError):
                reader["w"].read(step=step)
        else:
            assert (reader["w"].read(step=step) == gate + np.float32(step)).all()
    assert dropped == report.dropped


def test_a_tensor_larger_than_the_queue(tmp_path: Path) -> None:
    data = RNG.standard_normal((1000, 1000))
    with create_test_run(tmp_path / "run", queue_bytes=100_000) as run:
        for step in range(3):
            run.log({"big": data + step, "big2": data - step}, step=step)
    reader = tsf.open_run(tmp_path / "run")
    assert (reader["big"].read(step=2) == data + 2).all()
    assert (reader["big2"].read(step=1) == data - 1).all()


def test_buffers_come_back() -> None:
    pool = BufferPool(1000)
    first = pool.empty((10, 10), np.dtype("f4"))
    view = first[3:]
    address = first.__array_interface__["data"][0]
    del first
    second = pool.empty((10, 10), np.dtype("f4"))
    assert second.__array_interface__["data"][0] != address  # the view still uses it
    del view
    gc.collect()
    third = pool.empty((100,), np.dtype("f4"))
    assert third.__array_interface__["data"][0] == address


# --- the storage fails ------------------------------------------------------------------------


class Fails:
    """Fails operations of a kind, from the k-th on, so many times."""

    def __init__(self, op: str, folder: str, begin: int, times: int, error: int) -> None:
        self.op, self.folder, self.begin, self.times, self.error = op, folder, begin, times, error
        self.seen = 0

    def __call__(self, operation: Operation) -> None:
        if operation.op == self.op and operation.path.startswith(self.folder):
            self.seen += 1
            if self.begin <= self.seen < self.begin + self.times:
                raise OSError(self.error, "made to fail", operation.path)


def write_30_steps(place: Path, fails: Fails, on_error: str) -> tuple[tsf.CloseReport, list[bool]]:
    storage = FaultyStorage(open_storage(place, writable=True), fails)
    run = create_test_run(storage, on_error=on_error, stats=False)
    flushed = []
    try:
        for step in range(30):
            run.log({"loss": float(step), "w": np.arange(100_000, dtype="i4") * step}, step=step)
            flushed.append(run.flush())
    finally:
        report = run.close()
    return report, flushed


@pytest.mark.parametrize(
    ("op", "folder"), [("append", "shards/"), ("publish", "index/"), ("create", "shards/")]
)
def test_a_short_failure_costs_nothing(tmp_path: Path, op: str, folder: str) -> None:
    fails = Fails(op, folder, 2 if op == "publish" else 1, 2, errno.EIO)
    with pytest.warns(RuntimeWarning, match="writing failed"):
        report, flushed = write_30_steps(tmp_path / "run", fails, "warn")
    assert fails.seen > 2
    assert report.failures == 2
    assert report.dropped == 0
    assert all(flushed)
    reader = tsf.open_run(tmp_path / "run")
    assert reader["w"].steps.tolist() == list(range(30))
    assert all((reader["w"].read(step=s) == np.arange(100_000) * s).all() for s in range(30))


@pytest.mark.parametrize(("op", "folder"), [("append", "shards/"), ("publish", "index/")])
def test_a_long_failure_drops_tensors_and_keeps_scalars(
    tmp_path: Path, op: str, folder: str
) -> None:
    fails = Fails(op, folder, 5, 22, errno.ENOSPC)
    with pytest.warns(RuntimeWarning):
        report, flushed = write_30_steps(tmp_path / "run", fails, "warn")
    reader = tsf.open_run(tmp_path / "run")
    assert reader["loss"].steps.tolist() == list(range(30))
    here = [s for s in range(30) if reader.state("w", s) == "here"]
    gone = [s for s in range(30) if reader.state("w", s) == "dropped"]
    assert sorted(here + gone) == list(range(30))
    assert len(gone) == report.dropped
    assert (len(gone) > 0) == (op == "append")
    assert all((reader["w"].read(step=s) == np.arange(100_000) * s).all() for s in here)
    assert flushed[-1]
    assert not all(flushed) or op == "append"


def test_failures_are_raised_if_asked(tmp_path: Path) -> None:
    fails = Fails("append", "shards/", 3, 1000, errno.ENOSPC)
    with pytest.raises(tsf.StorageFailedError) as caught:
        write_30_steps(tmp_path / "run", fails, "raise")
    assert isinstance(caught.value.__cause__, OSError)
    reader = tsf.open_run(tmp_path / "run")
    assert reader["loss"].steps.tolist()[:2] == [0, 1]


@pytest.mark.parametrize("earlier", [False, True])
def test_a_failed_sync_abandons_the_shard(tmp_path: Path, earlier: bool) -> None:
    fails = Fails("sync", "shards/", 3, 1, errno.EIO)  # the first sync also names the file
    storage = FaultyStorage(open_storage(tmp_path / "run", writable=True), fails)
    run = create_test_run(storage, on_error="warn", stats=False)
    data = np.arange(1, 100_000, dtype="i4")
    flushed = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(1, 7):
            run.log({"w": data * step}, step=step)
            if earlier and step == 2:
                run.flush()
                run.log({"w": data * step}, step=step + 100)
            flushed.append(run.flush(durable=True))
        run.close()
    # What was visible and not yet synced is unsafe from then on; what was not visible is dropped.
    assert flushed == [True, False, *[not earlier] * 4]
    assert len(list((tmp_path / "run" / "shards").iterdir())) == 2
    reader = tsf.open_run(tmp_path / "run")
    assert reader.state("w", 102 if earlier else 2) == "dropped"
    for step in (1, *([2] if earlier else []), 3, 4, 5, 6):
        assert (reader["w"].read(step=step) == data * step).all()


def test_the_lock_goes_also_if_the_bundle_cannot_be_written(tmp_path: Path) -> None:
    fails = Fails("publish", "index.bundle", 1, 1, errno.ENOSPC)
    storage = FaultyStorage(open_storage(tmp_path / "run", writable=True), fails)
    run = create_test_run(storage, on_error="warn")
    run.log({"loss": 1.0}, step=0)
    with pytest.warns(RuntimeWarning, match="writing failed"):
        run.close()
    assert not list((tmp_path / "run" / "locks").iterdir())
    assert tsf.open_run(tmp_path / "run").is_closed
