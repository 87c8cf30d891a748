"""What others read of a run, without a line of ours: Arrow, Polars, DuckDB, a second reader."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import duckdb
import ml_dtypes
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from conformance.independent_reader import crc32c, open_run, validate_segment
from numpy.typing import NDArray

import tensorstore_fmt as tsf

VECTOR = Path(__file__).resolve().parents[2] / "spec" / "vectors" / "valid" / "walkthrough"

MATRIX = (np.arange(40 * 50, dtype="<f4").reshape(40, 50) - 1000) / 8
NOISE = np.frombuffer(np.random.default_rng(7).bytes(8000), "<u2").reshape(10, 400)
STEPS = (0, 10, 20)


def _values(step: int) -> dict[str, Any]:
    return {
        "loss": 1 / (step + 1),
        "text": f"Schritt {step} ✓",
        "words": ["a", "", "ß" * (step + 1)],
        "matrix": MATRIX + step,
        "noise": NOISE ^ step,
        "frozen": MATRIX[:5],
        "zeros": np.zeros((100, 100)),
        "empty": np.zeros((0, 3), np.int8),
        "batch": np.ones((step // 10 + 1, 700), np.float16),
        "bf16": MATRIX.astype(ml_dtypes.bfloat16),
        "grid": np.arange(300 * 400, dtype=np.int32).reshape(300, 400) * (step + 1),
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that the library wrote and closed."""
    folder = tmp_path_factory.mktemp("foreign") / "run"
    with tsf.create_run(str(folder), attrs={"lr": 0.1}, chunks={"grid": (128, None)}) as run:
        for step in STEPS:
            run.log(_values(step), step=step, mode="TRAIN")
            run.flush()
        run.log({"loss": 0.5}, step=20, mode="EVAL")
    return folder


def _shard(folder: Path) -> Path:
    (path,) = (folder / "shards").iterdir()
    return path


def _noise_rows(rows: list[dict[str, Any]]) -> dict[int, NDArray[Any]]:
    """Take the steps of the tensor that is stored raw out of rows of a shard."""
    found = {}
    for row in rows:
        if row["name"] == "noise":
            assert (row["codec"], row["shape"], row["chunk"]) == (0, [10, 400], 0)
            raw = row["payload"][: row["nbytes"]]
            each = len(raw) // row["count"]
            for i in range(row["count"]):
                step = row["step"] + i * row["stride"]
                found[step] = np.frombuffer(raw[i * each : (i + 1) * each], "<u2")
    return found


def _check_noise(rows: list[dict[str, Any]]) -> None:
    found = _noise_rows(rows)
    assert set(found) == set(STEPS)
    for step, value in found.items():
        np.testing.assert_array_equal(value.reshape(10, 400), NOISE ^ step)


def test_pyarrow_reads_a_shard(written: Path) -> None:
    with pa.memory_map(str(_shard(written))) as source:
        table = pa.ipc.open_file(source).read_all()
        about = json.loads(table.schema.metadata[b"tensorstore_fmt"])
        assert about["format_version"] == [1, 0]
        assert about["run_id"] == json.loads((written / "run.json").read_text())["run_id"]
        table.validate(full=True)
        _check_noise(table.to_pylist())


def test_polars_reads_a_shard(written: Path) -> None:
    path = _shard(written)
    frame = pl.read_ipc(path)
    lazy = pl.scan_ipc(path).filter(pl.col("name") == "noise").collect()
    _check_noise(frame.to_dicts())
    _check_noise(lazy.to_dicts())
    assert frame.select("raw_nbytes").to_series().dtype == pl.UInt32


def test_duckdb_reads_a_shard(written: Path) -> None:
    with pa.memory_map(str(_shard(written))) as source, duckdb.connect() as connection:
        connection.register("shard", pa.ipc.open_file(source).read_all())
        found = connection.sql(
            "select name, sum(nbytes)::bigint, count(*) from shard group by name order by name"
        ).fetchall()
        names = {name for name, _, _ in found}
        assert {"noise", "matrix", "grid"} <= names
        ((payload,),) = connection.sql(
            "select payload from shard where name = 'noise' order by step limit 1"
        ).fetchall()
        raw = bytes(payload)[: NOISE.nbytes]
        np.testing.assert_array_equal(np.frombuffer(raw, "<u2").reshape(10, 400), NOISE)


def test_rows_of_a_shard_prove_what_they_are(written: Path) -> None:
    """Section "Shard": row_crc and crc32c, from the words of the spec."""
    run_id = bytes.fromhex(json.loads((written / "run.json").read_text())["run_id"])
    table = pa.ipc.open_file(_shard(written).read_bytes()).read_all()
    about = json.loads(table.schema.metadata[b"tensorstore_fmt"])
    for row in table.to_pylist():
        name, dtype = row["name"].encode(), row["dtype"].encode()
        covered = run_id + struct.pack(
            "<QII", int(about["writer"], 16), about["worker"], about["attempt"]
        )
        covered += (
            struct.pack("<I", len(name)) + name + struct.pack("<BB", row["kind"], row["mode"])
        )
        covered += struct.pack("<I", len(dtype)) + dtype + struct.pack("<I", len(row["shape"]))
        for column in ("shape", "grid"):
            covered += struct.pack(f"<{len(row[column])}q", *row[column])
        covered += struct.pack("<I", len(row["global_shape"]))
        for column in ("global_shape", "origin"):
            covered += struct.pack(f"<{len(row[column])}q", *row[column])
        last = ("step", "stride", "count", "chunk", "flush", "codec", "flags", "nbytes")
        covered += struct.pack("<qqIIqBBI", *(row[column] for column in last))
        covered += struct.pack("<IQI", row["raw_nbytes"], row["digest"], row["crc32c"])
        assert crc32c(covered) == row["row_crc"]
        assert crc32c(row["payload"][: row["nbytes"]]) == row["crc32c"]
        assert len(row["payload"]) % 64 == 0
        assert not any(row["payload"][row["nbytes"] :])


def _crc32c(data: bytes) -> int:
    """Section "Conventions": CRC-32/ISCSI, a bit at a time."""
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
    return state ^ 0xFFFFFFFF


def _page(data: bytes, row: tuple[int, ...]) -> list[dict[str, Any]]:
    """Section "Pages"; Arrow itself knows zstd."""
    offset, nbytes, raw_nbytes, crc, rows = row[:5]
    stored = data[offset : offset + nbytes]
    assert _crc32c(stored) == crc
    content = pa.Codec("zstd").decompress(stored, decompressed_size=raw_nbytes)
    with pa.ipc.open_stream(content) as stream:
        batch = stream.read_next_batch()
    assert batch.num_rows == rows
    found: list[dict[str, Any]] = batch.to_pylist()
    return found


def test_a_tensor_with_arrow_and_the_standard_library() -> None:
    """From run.json to the values of ``w`` at step 20, in the words of the spec."""
    document = (VECTOR / "run.json").read_bytes()
    assert document[-22:-11] == b',"crc32c":"'
    assert _crc32c(document[:-22]) == int(document[-11:-3], 16)
    run_id = json.loads(document)["run_id"]

    (path,) = (VECTOR / "index").glob("*.seg")
    data = path.read_bytes()
    assert data[:8] == b"\x89TSFSEG\n"
    assert _crc32c(data[:252]) == struct.unpack_from("<I", data, 252)[0]
    assert struct.unpack_from("<H", data, 8)[0] == 1
    assert struct.unpack_from("<Q", data, 80)[0] == 0
    assert data[16:32].hex() == run_id
    assert struct.unpack_from("<Q", data, 88)[0] == len(data)
    root_crc32c, root_nbytes = (struct.unpack_from("<I", data, at)[0] for at in (52, 104))
    root = data[256 : 256 + root_nbytes]
    assert _crc32c(root) == root_crc32c
    pages = list(struct.iter_unpack("<QIIIIIIqqB15x", root))

    catalog = [row for page in pages if page[9] == 1 for row in _page(data, page)]
    shards = [row for page in pages if page[9] == 2 for row in _page(data, page)]
    (number,) = (i for i, row in enumerate(catalog) if (row["name"], row["kind"]) == ("w", 0))
    near = [p for p in pages if p[9] == 3 and p[5] <= number <= p[6] and p[7] <= 20 <= p[8]]
    (entry,) = (
        row
        for page in near
        for row in _page(data, page)
        if row["series"] == number and row["step"] == 20 and row["count"] == 1
    )
    series = catalog[number]
    assert (series["dtype"], series["shape"], series["grid"]) == ("float32", [6, 8], [0, 0])

    shard = shards[entry["shard"]]
    name = "{worker:06d}-{attempt:06d}-{writer:016x}-{number:012d}.arrow".format(**shard)
    with (VECTOR / "shards" / name).open("rb") as file:
        file.seek(entry["offset"])
        payload = file.read(entry["nbytes"])
    assert _crc32c(payload) == entry["crc32c"]
    raw = _planes(payload, entry["raw_nbytes"])
    found = struct.unpack("<48f", raw)
    assert found == tuple((1 + k * 37 % 128 / 128) * (1 - k % 2 * 2) for k in range(48))


def _planes(payload: bytes, raw_nbytes: int) -> bytes:
    """Section "planes"."""
    flags, width, _ = struct.unpack_from("<BBH", payload)
    n, at = raw_nbytes // width, 4 + 4 * width
    planes = []
    for length in struct.unpack_from(f"<{width}I", payload, 4):
        stored = payload[at : at + length]
        at += length
        if length == 1 < n:
            stored *= n
        elif length != n:
            stored = pa.Codec("zstd").decompress(stored, decompressed_size=n).to_pybytes()
        planes.append(stored)
    words = [int.from_bytes(bytes(column), "little") for column in zip(*planes, strict=True)]
    bits = 8 * width
    if flags & 1:
        words = [x >> 1 | (x & 1) << (bits - 1) for x in words]
    return b"".join(x.to_bytes(width, "little") for x in words)


def test_the_second_reader_reads_what_the_library_writes(written: Path) -> None:
    run = open_run(written)
    assert not run.damage
    assert run.is_closed
    assert run.attrs == {"lr": 0.1}
    for step in STEPS:
        for name, value in _values(step).items():
            found = run.read(name, step, 1)
            if isinstance(value, str | list):
                assert found.ravel().tolist() == ([value] if isinstance(value, str) else value)
                continue
            array = np.asarray(value)
            assert found.shape == array.shape
            assert found.tobytes() == array.astype(array.dtype.newbyteorder("<")).tobytes(), name
    assert run.read("loss", 20, 2) == 0.5
    np.testing.assert_array_equal(
        run.read("grid", 10, 1, index=(slice(100, 200, 7), 3)),
        _values(10)["grid"][100:200:7, 3],
    )
    assert math.isclose(run.stats("matrix", 10, 1)[7], float((MATRIX + 10).sum()), rel_tol=1e-6)
    assert [row[1:4] for row in run.step_table()] == [
        (1, 0, 0), (1, 10, 1), (1, 20, 2), (2, 20, 0),
    ]  # fmt: skip


def test_segments_of_the_library_are_valid(written: Path) -> None:
    """Also what only a validator has to check."""
    run_id = json.loads((written / "run.json").read_text())["run_id"]
    paths = list((written / "index").glob("*.seg"))
    assert paths
    for path in paths:
        validate_segment(path.read_bytes(), name=path.name, run_id=run_id)
