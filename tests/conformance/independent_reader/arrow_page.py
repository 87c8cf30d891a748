"""The Arrow stream inside a page ("6.3 Pages"): its columns, and nothing else beside them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from .errors import SpecError, need
from .limits import CATALOG, ENTRIES, SHARDS

END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"

_LIST = pa.list_(pa.int64())
SCHEMAS: dict[int, list[tuple[str, pa.DataType]]] = {
    CATALOG: [
        ("name", pa.utf8()),
        *[(name, pa.uint8()) for name in ("kind", "mode")],
        ("dtype", pa.utf8()),
        *[(name, _LIST) for name in ("shape", "grid", "global_shape", "origin")],
        *[(name, pa.int64()) for name in ("first_step", "last_step", "steps")],
        *[(name, pa.int64()) for name in ("raw_nbytes", "stored_nbytes")],
    ],
    SHARDS: [
        *[(name, pa.uint32()) for name in ("worker", "attempt")],
        ("writer", pa.uint64()),
        *[(name, pa.int64()) for name in ("number", "nbytes")],
    ],
    ENTRIES: [
        ("series", pa.uint32()),
        *[(name, pa.int64()) for name in ("step", "stride")],
        *[(name, pa.uint32()) for name in ("count", "chunk")],
        ("dims", _LIST),
        *[(name, pa.int64()) for name in ("first_flush", "last_flush")],
        *[(name, pa.uint8()) for name in ("codec", "flags")],
        ("shard", pa.uint32()),
        ("offset", pa.int64()),
        *[(name, pa.uint32()) for name in ("nbytes", "raw_nbytes", "crc32c")],
        ("digest", pa.uint64()),
        ("inline", pa.binary()),
    ],
}


def page_rows(content: bytes, kind: int, rows: int) -> Iterator[tuple[Any, ...]]:
    """Decode the Arrow stream of a page and give its rows."""
    try:
        _check_messages(content)
        with pa.ipc.open_stream(content) as stream:
            batch = stream.read_next_batch()
        batch.validate(full=True)
        names = batch.schema.names
    except (pa.ArrowException, EOFError, OSError, struct.error, ValueError) as error:
        raise SpecError("malformed", f"Arrow: {error}") from None
    need(names == [name for name, _ in SCHEMAS[kind]], "columns of the page")
    need(batch.num_rows == rows, "rows of the page")
    for column, (_, wanted) in zip(batch.columns, SCHEMAS[kind], strict=True):
        _check_column(column, wanted)
    return zip(*[column.to_pylist() for column in batch.columns], strict=True)


def _check_messages(content: bytes) -> None:
    """One schema, one uncompressed record batch, the end mark, nothing behind."""
    source = pa.BufferReader(content)
    for kind in ("schema", "record batch"):
        message = pa.ipc.read_message(source)
        need(message.type == kind and message.metadata_version == 4, f"message {message.type}")
        if kind == "record batch":
            need(not _is_compressed(message.metadata.to_pybytes()), "compression inside Arrow")
    need(content[source.tell() :] == END_OF_STREAM, "end-of-stream mark")


def _is_compressed(metadata: bytes) -> bool:
    """Say whether a RecordBatch message has body compression: no Arrow API tells."""
    place = _table_field(metadata, struct.unpack_from("<I", metadata)[0], 2)
    batch = place + struct.unpack_from("<I", metadata, place)[0]
    return _table_field(metadata, batch, 3) != 0


def _table_field(buffer: bytes, table: int, number: int) -> int:
    """Give the place of a field of a flatbuffers table, 0 if it is absent."""
    vtable = table - int(struct.unpack_from("<i", buffer, table)[0])
    if 4 + 2 * number >= struct.unpack_from("<H", buffer, vtable)[0]:
        return 0
    offset = int(struct.unpack_from("<H", buffer, vtable + 4 + 2 * number)[0])
    return table + offset if offset else 0


def _check_column(column: pa.Array, wanted: pa.DataType) -> None:
    children = [column.values] if pa.types.is_list(column.type) else []
    found = pa.list_(column.type.value_type) if children else column.type
    need(found == wanted, f"column type {column.type} is not {wanted}")
    need(not any(part.null_count for part in (column, *children)), "nulls")
