"""Shards made by hand, and ways to make their Arrow frame say something else."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import crc32c
import pyarrow as pa
import pyarrow.ipc

from tensorstore_fmt.format import layout
from tensorstore_fmt.format.catalog import Series
from tensorstore_fmt.format.shard import SHARD_SCHEMA, ShardEncoder, ShardRow, row_crc
from tensorstore_fmt.upkeep import arrow_file
from tensorstore_fmt.upkeep.arrow_file import ArrowFrame

RUN_ID = bytes(range(16))
KEY = layout.WriterKey(worker=1, attempt=2, writer=3)
NAME = layout.ShardName(key=KEY, number=4)


def shard_row(payload: bytes, **changes: Any) -> ShardRow:
    """Give a row of one chunk of bytes; `changes` of its fields, ``name`` of its series."""
    series = Series(
        name=changes.pop("name", "x"), kind=0, mode=0, dtype="uint8", shape=(len(payload),),
        grid=(0,),
    )  # fmt: skip
    values = {
        "series": series, "step": 0, "stride": 1, "count": 1, "chunk": 0, "flush": 1, "codec": 0,
        "flags": 0, "nbytes": len(payload), "raw_nbytes": len(payload),
        "crc32c": crc32c.crc32c(payload), "digest": 0, "parts": [payload],
    }  # fmt: skip
    return ShardRow(**(values | changes))


def shard_bytes(
    *batches: Sequence[ShardRow], sealed: bool = True, name: layout.ShardName = NAME
) -> bytes:
    """Give the file that a writer makes of these batches."""
    encoder = ShardEncoder(RUN_ID, name)
    parts = [part for batch in batches for part in encoder.batch(batch)[0]]
    if sealed:
        parts += encoder.seal()
    return b"".join(bytes(part) for part in parts)


def frame_of(data: bytes) -> ArrowFrame:
    """Walk over a file in memory; nothing outside of it may be asked for."""

    def read(start: int, stop: int) -> bytes:
        assert 0 <= start <= stop <= len(data)
        return data[start:stop]

    return arrow_file.walk(read, len(data))


def message_field(data: bytes, offset: int, number: int) -> int:
    """Give the place in the file of a field of a message's table."""
    size = int.from_bytes(data[offset + 4 : offset + 8], "little")
    table = arrow_file._Table.root(data[offset + 8 : offset + 8 + size])
    return offset + 8 + table.field(number)


def batch_field(data: bytes, offset: int, number: int) -> int:
    """Give the place in the file of a field of a record batch."""
    size = int.from_bytes(data[offset + 4 : offset + 8], "little")
    batch = arrow_file._Table.root(data[offset + 8 : offset + 8 + size]).table(2)
    assert batch is not None
    return offset + 8 + batch.field(number)


def footer_field(data: bytes, number: int) -> int:
    """Give the place in the file of a field of the footer."""
    begin = frame_of(data).footer_at
    return begin + arrow_file._Table.root(data[begin:-10]).field(number)


def put(data: bytes, at: int, form: str, *values: int) -> bytes:
    """Change some bytes."""
    made = bytearray(data)
    struct.pack_into(form, made, at, *values)
    return bytes(made)


def hand_made_batch(rows: Sequence[tuple[ShardRow, bytes]], **columns: Any) -> bytes:
    """Give a record batch message of rows with what shall stand as their payload.

    `columns` replaces whole columns; else each row proves itself.
    """
    values: dict[str, list[Any]] = {field.name: [] for field in SHARD_SCHEMA}
    for row, payload in rows:
        for field in SHARD_SCHEMA.names[:8]:
            values[field].append(getattr(row.series, field))
        for field in SHARD_SCHEMA.names[8:-2]:
            values[field].append(getattr(row, field))
        values["row_crc"].append(row_crc(RUN_ID, KEY, row))
        values["payload"].append(payload)
    arrays = [pa.array(columns.get(f.name, values[f.name]), f.type) for f in SHARD_SCHEMA]
    batch = pa.RecordBatch.from_arrays(arrays, schema=SHARD_SCHEMA)
    made: bytes = batch.serialize().to_pybytes()
    return made


ROWS = [[shard_row(bytes([n]) * 100, step=n, flush=n)] for n in range(3)]
SEALED = shard_bytes(*ROWS)
OPEN = shard_bytes(*ROWS, sealed=False)
FRAME = frame_of(SEALED)
AT = [block.offset for block in FRAME.batches]
SCHEMA = SEALED[8 : FRAME.batches[0].offset]
