"""Raw payloads read straight into a result, and payloads that are decoded in their place."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tensorstore_fmt.errors import ChecksumError, MissingFileError, TruncatedError
from tensorstore_fmt.reading.run import open_run
from tensorstore_fmt.writing.run import create_run

SHAPES_AND_CHUNKS = [
    ((700, 1000), (100, None)),
    ((700, 1000), (33, None)),
    ((7, 100, 1000), (1, 30, None)),
    ((7, 100, 1000), (3, 30, None)),  # not in one piece
    ((700, 1000), (None, 300)),
    ((5, 1, 700, 300), (1, 1, 64, None)),
    ((1_000_000,), (70_001,)),
    ((700, 1000), (None, None)),
]


def shard(folder: Path) -> Path:
    (found,) = (folder / "shards").iterdir()
    return found


@pytest.mark.parametrize("compression", ["none", "auto", "zstd"])
@pytest.mark.parametrize(("shape", "chunks"), SHAPES_AND_CHUNKS)
def test_large_reads_are_as_numpy_has_them(
    tmp_path: Path,
    shape: tuple[int, ...],
    chunks: tuple[int | None, ...],
    compression: str,
    implementation: str,
) -> None:
    values = (np.random.default_rng(0).standard_normal((3, *shape)) * 0.02).astype(np.float32)
    values[1, : shape[0] // 2] = 0  # constant chunks between others
    values[2] = values[0]  # one payload for two steps
    with create_run(tmp_path / "run", compression=compression, chunks={"*": chunks}) as run:
        for step, value in enumerate(values):
            run.log({"x": value, "half": value.astype(ml_dtypes.bfloat16)}, step=step)
    half = values.astype(ml_dtypes.bfloat16)
    with open_run(tmp_path / "run") as run:
        np.testing.assert_array_equal(run["x"].read(), values)
        np.testing.assert_array_equal(run["x"].read(step=1), values[1])
        np.testing.assert_array_equal(run["x"].read(steps=[2, 0]), values[[2, 0]])
        np.testing.assert_array_equal(run["half"].read(steps=slice(0, 3, 2)), half[::2])
        half_way = shape[0] // 2
        for index in (np.s_[half_way:], np.s_[::-1], np.s_[: half_way + 1 : 2]):
            np.testing.assert_array_equal(run["x"].read(step=1, index=index), values[1][index])
        first = run["x"].read(step=0)
        first[...] = 1  # of the caller alone
        np.testing.assert_array_equal(run["x"].read(step=0), values[0])


@pytest.mark.parametrize("compression", ["none", "auto"])
def test_damage_in_a_large_read_is_named(tmp_path: Path, compression: str) -> None:
    value = (np.random.default_rng(0).standard_normal((700, 1000)) * 0.02).astype(np.float32)
    with create_run(tmp_path / "run", compression=compression, chunks={"*": (100, None)}) as run:
        run.log({"x": value}, step=3)
    file = shard(tmp_path / "run")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    with open_run(tmp_path / "run") as run, pytest.raises(ChecksumError) as caught:
        run["x"].read(step=3)
    assert caught.value.facts["step"] == 3
    assert caught.value.facts["chunk"] == 3
    assert caught.value.facts["file"] == f"shards/{file.name}"
    file.write_bytes(data[: len(data) // 3])
    with open_run(tmp_path / "run") as run, pytest.raises(TruncatedError):
        run["x"].read(step=3)
    file.unlink()
    with open_run(tmp_path / "run") as run, pytest.raises(MissingFileError) as missing:
        run["x"].read(step=3)
    assert missing.value.facts["name"] == "x"


@pytest.mark.parametrize("compression", ["none", "auto"])
def test_damage_in_one_chunk_is_named(tmp_path: Path, compression: str) -> None:
    value = (np.random.default_rng(0).standard_normal((70, 100)) * 0.02).astype(np.float32)
    with create_run(tmp_path / "run", compression=compression) as run:
        run.log({"x": value}, step=3)
    with open_run(tmp_path / "run") as run:
        np.testing.assert_array_equal(run["x"].read(step=3), value)
    file = shard(tmp_path / "run")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    with open_run(tmp_path / "run") as run:
        for _ in range(2):  # not only the first time
            with pytest.raises(ChecksumError) as caught:
                run["x"].read(step=3)
            assert caught.value.facts["step"] == 3
    file.unlink()
    with open_run(tmp_path / "run") as run, pytest.raises(MissingFileError):
        run["x"].read(step=3)
