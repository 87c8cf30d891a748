"""Streams that pages must not hold are refused before Arrow sees them."""

from __future__ import annotations

import contextlib
import struct
from collections import Counter

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


def fields(raw: bytes) -> dict[str, int]:
    """Give the places in a stream of what one may change in its record batch message."""
    schema_nbytes = 8 + int.from_bytes(raw[4:8], "little")
    begin = schema_nbytes + 8
    table = begin + int.from_bytes(raw[begin : begin + 4], "little")
    vtable = table - int.from_bytes(raw[table : table + 4], "little", signed=True)
    slot = {
        name: vtable + 4 + 2 * n for n, name in enumerate(("version", "kind", "header", "body"))
    }
    place = {
        f"{name} of it": table + int.from_bytes(raw[at : at + 2], "little")
        for name, at in slot.items()
    }
    return {"prefix": schema_nbytes, "table": table, "vtable": vtable, **slot, **place}


@pytest.mark.parametrize(
    ("field", "form", "value"),
    [
        ("prefix", "<I", 0xFFFFFFFE),  # the mark before each message
        ("prefix", "<q", 0x7FFFFFFF_FFFFFFFF),
        ("table", "<i", 1 << 20),  # its vtable lies before the message
        ("table", "<i", -(1 << 20)),  # or behind
        ("vtable", "<H", 4),  # no field is there
        ("version", "<H", 0),
        ("version", "<H", 0xFFFF),
        ("kind", "<H", 0),
        ("kind", "<H", 0x7FFF),
        ("header", "<H", 0x7FFF),
        ("body", "<H", 0x7FFF),
        ("version of it", "<H", 3),
        ("kind of it", "<B", 2),
        ("kind of it", "<B", 1),
        ("body of it", "<q", -8),
        ("body of it", "<q", 1 << 40),
        ("body of it", "<q", 0),
        ("header of it", "<I", 1 << 30),
    ],
)
def test_fields_that_point_or_say_otherwise(field: str, form: str, value: int) -> None:
    raw = bytearray(stream(BATCH.slice(0, 3)))
    check_stream(bytes(raw))
    struct.pack_into(form, raw, fields(bytes(raw))[field], value)
    with pytest.raises(FormatError) as caught:
        check_stream(bytes(raw))
    assert caught.value.code == "malformed"


def test_a_batch_without_header_or_body_is_for_arrow_to_judge() -> None:
    """They hide no compression: nothing is allocated for them."""
    empty = stream(BATCH.slice(0, 0))
    check_stream(empty)
    raw = bytearray(empty)
    struct.pack_into("<H", raw, fields(empty)["header"], 0)
    check_stream(bytes(raw))


def with_metadata() -> bytes:
    """A stream whose columns, one of them of lists, say things of their own."""
    said = {"ARROW:extension:name": "arrow.uuid", "x": "y" * 20}
    lists = pa.field("b", pa.list_(pa.field("item", pa.int64(), metadata=said)), metadata=said)
    schema = pa.schema([pa.field("a", pa.int64(), metadata=said), lists])
    return stream(pa.record_batch([pa.array([1, 2]), pa.array([[1], [2, 3]])], schema=schema))


def test_metadata_of_columns_are_gone() -> None:
    with pa.ipc.open_stream(check_stream(with_metadata())) as reader:
        schema = reader.schema
        assert reader.read_next_batch().column("b").to_pylist() == [[1], [2, 3]]
    assert schema.field("a").metadata is None
    assert schema.field("b").metadata is None
    assert schema.field("b").type.value_field.metadata is None


def test_schemas_that_point_anywhere_are_refused_or_lose_their_metadata() -> None:
    """Each byte of the schema in turn, so that offsets leave the message and counts are huge."""
    raw = with_metadata()
    nbytes = 8 + int.from_bytes(raw[4:8], "little")
    outcomes: Counter[str] = Counter()
    for at in range(8, nbytes):
        for byte in (0, 1, 0x7F, 0xFF):
            changed = bytearray(raw)
            changed[at] = byte
            try:
                check_stream(bytes(changed))
            except FormatError as error:
                outcomes[error.code] += 1
            else:
                outcomes["taken"] += 1
    assert set(outcomes) == {"malformed", "taken"}
    assert min(outcomes.values()) > 100
