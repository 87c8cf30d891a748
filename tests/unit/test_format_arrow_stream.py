"""Streams that pages must not hold are refused before Arrow sees them."""

from __future__ import annotations

import contextlib

import pyarrow as pa
import pyarrow.ipc
import pytest

from tensorstore_fmt.errors import FormatError
from tensorstore_fmt.format.arrow_stream import check_stream

BATCH = pa.record_batch({"a": pa.array(range(1000)), "b": pa.array(["x"] * 1000)})


def stream(*batches: pa.RecordBatch, **options: object) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(
        sink, batches[0].schema, options=pa.ipc.IpcWriteOptions(**options)
    ) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def test_a_plain_stream() -> None:
    check_stream(stream(BATCH))


@pytest.mark.parametrize(
    "raw",
    [
        stream(BATCH, compression="zstd"),
        stream(BATCH, compression="lz4"),
        stream(BATCH, BATCH),
        stream(BATCH, metadata_version=pa.ipc.MetadataVersion.V4),
        stream(pa.record_batch({"a": pa.array(["x", "y"]).dictionary_encode()})),
        stream(BATCH) + b"\0",
        stream(BATCH)[:-1],
        b"",
    ],
    ids=["zstd", "lz4", "two", "v4", "dictionary", "longer", "shorter", "empty"],
)
def test_what_is_refused(raw: bytes) -> None:
    with pytest.raises(FormatError):
        check_stream(raw)


def test_any_cut_and_any_flipped_byte_is_refused_or_still_such_a_stream() -> None:
    raw = stream(BATCH.slice(0, 3))
    for cut in range(len(raw)):
        with pytest.raises(FormatError):
            check_stream(raw[:cut])
    for at in range(len(raw)):
        for bit in (1, 0x80):
            damaged = bytearray(raw)
            damaged[at] ^= bit
            with contextlib.suppress(FormatError):
                check_stream(bytes(damaged))
