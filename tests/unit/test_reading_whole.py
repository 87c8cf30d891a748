"""Whole tensors of one step: what the shortcut reads, as NumPy has it, and what it leaves alone."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support.build_run import Put, RunBuilder

import tensorstore_fmt as tsf
from tensorstore_fmt.errors import ChecksumError, FormatError, TruncatedError
from tensorstore_fmt.format import layout
from tensorstore_fmt.reading import pool, reader, whole
from tensorstore_fmt.reading.locate import AtStep, at_steps
from tensorstore_fmt.storage import Storage

Reads = list[bool]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Note of each read by the shortcut whether it gave the tensor."""
    noted: Reads = []

    def note(storage: Storage, where: AtStep) -> Any:
        found = whole.read_whole(storage, where)
        noted.append(found is not None)
        return found

    monkeypatch.setattr(reader, "read_whole", note)
    return noted


def normal(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.02).astype(np.float32)


@pytest.fixture
def build(tmp_path: Path) -> RunBuilder:
    return RunBuilder(tmp_path / "run")


STRAIGHT = [
    ((4000,), (1000,)),
    ((4001,), (1000,)),
    ((70, 100), (7, None)),
    ((70, 100), (33, None)),
    ((7, 10, 100), (1, 3, None)),
    ((5, 1, 70, 30), (1, 1, 64, None)),
    ((1, 1, 90), (1, 1, 8)),
    ((3, 2, 1), (1, 1, 1)),
    ((900, 1000), (100, None)),  # for several threads
]


@pytest.mark.parametrize("compression", ["none", "auto", "zstd"])
@pytest.mark.parametrize("form", STRAIGHT)
def test_chunks_in_the_order_of_the_tensor(
    tmp_path: Path,
    reads: Reads,
    form: tuple[tuple[int, ...], tuple[int | None, ...]],
    compression: str,
) -> None:
    shape, chunks = form
    values = {
        "x": normal(shape),
        "half": normal(shape, 1).astype(ml_dtypes.bfloat16),
        "sparse": np.maximum(normal(shape, 2), 0),
        "noise": np.random.default_rng(3).integers(0, 256, shape, np.uint8),
        "double": normal(shape, 4).astype(np.float64),
    }
    values["sparse"][: shape[0] // 2] = 0  # constant chunks between others
    with tsf.create_run(tmp_path / "run", compression=compression, chunks={"*": chunks}) as run:
        run.log(values, step=3)
        run.flush()
        run.log(values, step=4)  # the same payloads again
    with tsf.open_run(tmp_path / "run") as run:
        for step in (3, 4):
            for name, value in values.items():
                found = run[name].read(step=step)
                assert (found.dtype, found.shape) == (value.dtype, value.shape)
                np.testing.assert_array_equal(found, value)
                found[...] = 1  # of the caller alone
                np.testing.assert_array_equal(run[name].read(step=step), value)
    assert len(reads) == 20
    assert all(reads)


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("compression", ["none", "auto"])
def test_any_number_of_threads(
    tmp_path: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch, threads: int, compression: str
) -> None:
    monkeypatch.setattr(pool, "THREADS", threads)
    value = normal((3001, 1000))
    with tsf.create_run(tmp_path / "run", compression=compression) as run:
        run.log({"x": value}, step=3)
    with tsf.open_run(tmp_path / "run") as run:
        for _ in range(3):
            np.testing.assert_array_equal(run["x"].read(step=3), value)
    assert all(reads)


@pytest.mark.parametrize("compression", ["none", "auto"])
def test_one_large_chunk(tmp_path: Path, reads: Reads, compression: str) -> None:
    """Small ones are read by `read_located`; this needs no plan either."""
    value = normal((600, 1000))
    chunks = {"*": (None, None)}
    with tsf.create_run(tmp_path / "run", compression=compression, chunks=chunks) as run:
        run.log({"x": value, "small": value[:100]}, step=3)
    with tsf.open_run(tmp_path / "run") as run:
        np.testing.assert_array_equal(run["small"].read(step=3), value[:100])
        assert reads == []
        np.testing.assert_array_equal(run["x"].read(step=3), value)
    assert reads == [True]


def test_neighbours_are_read_together() -> None:
    key = layout.WriterKey(worker=0, attempt=0, writer=1)
    shards = [(layout.ShardName(key=key, number=i), 10_000) for i in range(2)]
    runs = whole._Runs(shards, 3000)

    def add(shard: int, offset: int, nbytes: int, place: int, codec: int) -> bool:
        raw_nbytes = nbytes if codec == layout.CODEC_RAW else 1000
        return runs.add(shard, whole._Payload(offset, nbytes, place, raw_nbytes, codec, 0))

    planes, raw = layout.CODEC_PLANES, layout.CODEC_RAW
    assert add(0, 0, 900, 0, planes)
    assert add(1, 64, 900, 1000, planes)
    assert add(0, 960, 900, 2000, planes)  # continues the first one, with a gap
    assert add(1, 1000, 1000, 3000, raw)
    assert add(1, 2000, 1000, 4000, raw)  # as in the result
    assert add(1, 3000, 1000, 7000, raw)  # elsewhere
    assert add(0, 1900, 1101, 5000, planes)  # would be too long
    assert add(0, 1900, 900, 6000, planes)  # the same payload again
    assert add(0, 9000, 1000, 8000, planes)  # far away
    found = [(r.path[-7:-6], r.start, r.stop, r.place, len(r.payloads)) for r in runs.found]
    assert found == [
        ("0", 0, 1860, -1, 2),
        ("1", 64, 964, -1, 1),
        ("1", 1000, 3000, 3000, 2),
        ("1", 3000, 4000, 7000, 1),
        ("0", 1900, 3001, -1, 1),
        ("0", 1900, 2800, -1, 1),
        ("0", 9000, 10_000, -1, 1),
    ]
    assert not add(0, 9900, 101, 0, planes)
    assert not add(0, 0, 0, 0, planes)
    assert not runs.add(0, whole._Payload(0, 900, 0, 901, raw, 0))
    assert len(runs.found) == len(found)


def test_raw_and_other_payloads_in_turn(tmp_path: Path, reads: Reads) -> None:
    value = np.random.default_rng(0).integers(0, 256, (40, 4096), np.uint8)
    value[::3] = normal((14, 1024)).view(np.uint8)
    value[5] = 0
    with tsf.create_run(tmp_path / "run", chunks={"*": (1, None)}) as run:
        run.log({"x": value}, step=2)
    with tsf.open_run(tmp_path / "run") as run:
        np.testing.assert_array_equal(run["x"].read(step=2), value)
        (where,) = at_steps(run._session.view, run._session.pages, [run["x"].ask(step=2).query])
    assert where is not None
    assert set(where.page.entries.rows["codec"].tolist()) >= {
        layout.CODEC_RAW, layout.CODEC_CONSTANT, layout.CODEC_ZSTD,
    }  # fmt: skip
    assert reads == [True]


def test_steps_that_share_a_payload(build: RunBuilder, reads: Reads) -> None:
    value = normal((6, 300))
    build.writer().flush(
        Put(step=2, stride=3, count=4, repeat=True, value=value, grid=(2, 0)),
        Put(name="many", step=0, count=2, value=np.stack([value, -value]), grid=(2, 0)),
    )
    with tsf.open_run(build.url) as run:
        for step in (2, 5, 11):
            np.testing.assert_array_equal(run["x"].read(step=step), value)
        for step in (3, 14):
            with pytest.raises(tsf.NotThereError):
                run["x"].read(step=step)
        assert reads == [True] * 3 + [False] * (len(reads) - 3)
        np.testing.assert_array_equal(run["many"].read(step=1), -value)
    assert not any(reads[3:])


@pytest.mark.parametrize(
    "puts",
    [
        [Put(value=normal((64, 64)), grid=(32, 32))],  # chunks interlace
        [Put(value=normal((64, 64)), grid=(32, 0), skip_chunks=[1])],
        [Put(value=normal((64, 64)), grid=(32, 0), change={"raw_nbytes": 9})],
        [Put(value=normal((64, 64)), grid=(32, 0), codec=99)],
        [Put(value=None, shape=(64, 64), grid=(32, 0))],
        [Put(value=normal((64, 64)), shape=(-1, 64), grid=(32, 0))],
        [Put(value=normal((64, 64)), grid=(32, 0), global_shape=(64, 64), origin=(0, 0))],
        [Put(value=["text"] * 8, grid=(4,))],
    ],
)
def test_what_it_leaves_to_others(build: RunBuilder, reads: Reads, puts: list[Put]) -> None:
    build.writer().flush(*puts)
    with tsf.open_run(build.url) as run:
        value = puts[0].value
        is_whole = not puts[0].skip_chunks and not puts[0].change and puts[0].codec != 99
        if is_whole and value is not None:
            np.testing.assert_array_equal(run["x"].read(step=0), value)
        else:
            with pytest.raises((FormatError, tsf.StepDroppedError)):
                run["x"].read(step=0)
    assert not any(reads)


def test_a_step_that_was_saved_twice(build: RunBuilder, reads: Reads) -> None:
    value = normal((64, 64))
    writer = build.writer()
    writer.flush(Put(value=value, grid=(32, 0)))
    writer.flush(Put(value=-value, grid=(32, 0)))
    with tsf.open_run(build.url) as run:
        np.testing.assert_array_equal(run["x"].read(step=0), -value)
    assert not any(reads)


@pytest.mark.parametrize("compression", ["none", "auto"])
def test_every_byte_is_checked(tmp_path: Path, compression: str, reads: Reads) -> None:
    value = normal((60, 64))
    with tsf.create_run(tmp_path / "run", compression=compression, chunks={"*": (9, None)}) as run:
        run.log({"x": value}, step=3)
    (file,) = (tmp_path / "run/shards").iterdir()
    data = file.read_bytes()
    outcomes = {True: 0, False: 0}
    for at in range(0, len(data), 61):
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        file.write_bytes(damaged)
        with tsf.open_run(tmp_path / "run") as run:
            try:
                np.testing.assert_array_equal(run["x"].read(step=3), value)
            except ChecksumError:
                outcomes[False] += 1
            else:
                outcomes[True] += 1  # between payloads, or in front of them
    assert outcomes[False] > 100
    assert reads.count(False) == outcomes[False]
    file.write_bytes(data[: len(data) // 2])
    with tsf.open_run(tmp_path / "run") as run, pytest.raises(TruncatedError):
        run["x"].read(step=3)


def test_many_threads_of_the_caller(tmp_path: Path) -> None:
    values = [normal((900, 1000), seed) for seed in range(4)]
    with tsf.create_run(tmp_path / "run") as run:
        for step, value in enumerate(values):
            run.log({"x": value}, step=step)
    wrong: list[int] = []
    with tsf.open_run(tmp_path / "run") as run:

        def read(step: int) -> None:
            found = [run["x"].read(step=step).tobytes() for _ in range(10)]
            wrong.append(found.count(values[step].tobytes()) - 10)

        threads = [threading.Thread(target=read, args=(step,)) for step in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == [0] * 4


def test_more_chunks_than_it_takes(
    tmp_path: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole, "_MOST_CHUNKS", 49)
    value = normal((50, 1025))
    with tsf.create_run(tmp_path / "run", chunks={"*": (1, None)}) as run:
        run.log({"x": value}, step=0)
    with tsf.open_run(tmp_path / "run") as run:
        np.testing.assert_array_equal(run["x"].read(step=0), value)
    assert reads == [False]


def test_a_claim_of_enormous_chunks(build: RunBuilder, reads: Reads) -> None:
    build.writer().flush(
        Put(value=normal((4, 4)), shape=(1 << 40, 1 << 20), grid=(1 << 39, 0), skip_chunks=[])
    )
    with tsf.open_run(build.url) as run, pytest.raises(FormatError):
        run["x"].read(step=0)
    assert not any(reads)
    assert layout.MAX_CHUNK_RAW_NBYTES < 1 << 39
