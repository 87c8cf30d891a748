"""Shards walked over without Arrow: the frame of messages and footer, damaged or hostile."""

from __future__ import annotations

import struct

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest
from support.shard_files import (
    AT,
    FRAME,
    OPEN,
    SEALED,
    batch_field,
    footer_field,
    frame_of,
    message_field,
    put,
)

from tensorstore_fmt.errors import FormatError
from tensorstore_fmt.upkeep import arrow_file


def test_what_stands_where() -> None:
    assert FRAME.is_sealed
    assert FRAME.is_ended
    assert FRAME.problem is None
    assert FRAME.torn_nbytes == 0
    assert [b.rows for b in FRAME.batches] == [1, 1, 1]
    for n, block in enumerate(FRAME.batches):
        assert SEALED[block.payload_at : block.payload_at + 100] == bytes([n]) * 100
        assert block.payload_nbytes == 128
    assert [b.place for b in FRAME.footer or ()] == [b.place for b in FRAME.batches]
    frame = frame_of(OPEN)
    assert frame.batches == FRAME.batches
    assert (frame.footer, frame.is_ended, frame.problem, frame.end) == (
        None,
        False,
        None,
        len(OPEN),
    )


@pytest.mark.parametrize("data", [b"", b"ARROW1", b"ARROW1\0\1" + bytes(64), b"x" * 64])
def test_what_is_no_arrow_file(data: bytes) -> None:
    frame = frame_of(data)
    assert frame.problem is not None
    assert frame.schema is None
    assert not frame.batches


def test_a_file_cut_anywhere_holds_the_batches_that_are_whole() -> None:
    ends = [b.end for b in FRAME.batches]
    for n in range(len(SEALED)):
        frame = frame_of(SEALED[:n])
        assert not frame.is_sealed
        assert frame.batches == FRAME.batches[: sum(end <= n for end in ends)]
        assert frame.end <= n
        assert frame.torn_nbytes == n - frame.end


def test_a_flipped_bit_gives_no_batch_that_lies_elsewhere() -> None:
    """Found are batches of the file as it was, or none; nothing outside is asked for."""
    good = {b.place for b in FRAME.batches}
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 8, len(SEALED)).tolist()
    for at, bit in enumerate(bits):
        if any(b.payload_at <= at < b.end for b in FRAME.batches):
            continue  # the frame does not look there
        frame = frame_of(put(SEALED, at, "<B", SEALED[at] ^ 1 << bit))
        for block in frame.batches:
            assert block.end <= len(SEALED)
            if block.place not in good:
                assert frame.problem or not frame.is_sealed or frame.batches != frame.footer


ROOT = int.from_bytes(SEALED[AT[1] + 8 : AT[1] + 12], "little")
MESSAGES = [
    ("an odd mark", AT[1], "<I", 0xFFFFFFFE),
    ("a length that is not of words", AT[1] + 4, "<I", 12),
    ("a length beyond the file", AT[1] + 4, "<I", 1 << 23),
    ("a length above the limit", AT[1] + 4, "<I", (16 << 20) + 8),
    ("a root outside", AT[1] + 8, "<I", 1 << 20),
    ("a vtable outside", AT[1] + 8 + ROOT, "<i", -5000),
    ("another version", message_field(SEALED, AT[1], 0), "<h", 3),
    ("another type", message_field(SEALED, AT[1], 1), "<B", 2),
    ("a second schema", message_field(SEALED, AT[1], 1), "<B", 1),
    ("a negative body", message_field(SEALED, AT[1], 3), "<q", -8),
    ("a body of odd length", message_field(SEALED, AT[1], 3), "<q", 9),
    ("a body beyond the file", message_field(SEALED, AT[1], 3), "<q", 1 << 40),
    ("a header outside", message_field(SEALED, AT[1], 2), "<I", 1 << 20),
    ("more buffers than there are", batch_field(SEALED, AT[1], 2), "<I", 1 << 20),
]  # fmt: skip


@pytest.mark.parametrize(
    ("at", "form", "value"), [m[1:] for m in MESSAGES], ids=[m[0] for m in MESSAGES]
)
def test_damaged_messages(at: int, form: str, value: int) -> None:
    damaged = put(SEALED, at, form, value)
    frame = frame_of(damaged)
    assert frame.problem is not None
    assert frame.end == AT[1]
    assert frame.batches == (FRAME.batches[0], FRAME.batches[2])  # the footer knows the third
    frame = frame_of(put(OPEN, at, form, value))
    assert frame.batches == FRAME.batches[:1]
    assert frame.torn_nbytes == len(OPEN) - AT[1]


def test_messages_that_lack_something() -> None:
    """Fields with their default are left out of a FlatBuffer."""
    size = int.from_bytes(SEALED[AT[1] + 4 : AT[1] + 8], "little")
    begin = AT[1] + 8
    table = begin + int.from_bytes(SEALED[begin : begin + 4], "little")
    vtable = table - struct.unpack_from("<i", SEALED, table)[0]
    for number in (0, 2):  # no version, no header
        frame = frame_of(put(SEALED, vtable + 4 + 2 * number, "<H", 0))
        assert frame.problem is not None
        assert len(frame.batches) == 2
    batch = begin + arrow_file._Table.root(SEALED[begin : begin + size]).table(2).at
    slots = batch - struct.unpack_from("<i", SEALED, batch)[0] + 4
    without = frame_of(put(SEALED, slots + 2 * 2, "<H", 0))  # no buffers: no payload then
    assert without.batches[1].payload_nbytes == 0
    compressed = pa.ipc.IpcWriteOptions(compression="zstd")
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, pa.schema([("a", pa.int64())]), options=compressed) as writer:
        writer.write_batch(pa.record_batch({"a": pa.array(range(1000))}))
    frame = frame_of(sink.getvalue().to_pybytes())
    assert frame.problem is not None
    assert not frame.batches


def test_buffers_outside_of_their_batch() -> None:
    at = batch_field(SEALED, AT[1], 2)
    at += int.from_bytes(SEALED[at : at + 4], "little")
    count = int.from_bytes(SEALED[at : at + 4], "little")
    last = at + 4 + 16 * (count - 1)
    body = FRAME.batches[1].body_nbytes
    for offset, nbytes in ((-8, 8), (0, -8), (body, 8), (0, body + 8)):
        frame = frame_of(put(SEALED, last, "<qq", offset, nbytes))
        assert frame.problem is not None
        assert len(frame.batches) == 2


def test_a_schema_longer_than_the_first_read() -> None:
    schema = pa.schema([("a", pa.int64())], metadata={"x": "y" * 10_000})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch([pa.array([1])], schema=schema))
    data = sink.getvalue().to_pybytes()
    frame = frame_of(data)
    assert frame.problem is None
    assert frame.batches[0].offset > 10_000
    assert frame_of(data[:9000]).problem is not None


FOOTERS = [
    ("longer than the file", len(SEALED) - 10, "<I", len(SEALED)),
    ("above the limit", len(SEALED) - 10, "<I", (64 << 20) + 1),
    ("of another version", footer_field(SEALED, 0), "<h", 3),
    ("with more batches than it holds", None, "<I", 1 << 20),
    ("with a batch in the magic", None, "<q", 0),
    ("with a batch at an odd place", None, "<q", 12),
    ("with a batch behind itself", None, "<q", 1 << 40),
    ("cut to nothing", len(SEALED) - 10, "<I", 0),
    ("a few bytes long", len(SEALED) - 10, "<I", 3),
]


@pytest.mark.parametrize(
    ("at", "form", "value"), [m[1:] for m in FOOTERS], ids=[m[0] for m in FOOTERS]
)
def test_damaged_footers(at: int | None, form: str, value: int) -> None:
    if at is None:
        at = footer_field(SEALED, 3)
        at += int.from_bytes(SEALED[at : at + 4], "little") + (0 if form == "<I" else 4)
    frame = frame_of(put(SEALED, at, form, value))
    assert not frame.is_sealed
    assert frame.problem is not None
    assert frame.is_ended
    assert frame.batches == FRAME.batches


def test_a_footer_with_dictionaries() -> None:
    sink = pa.BufferOutputStream()
    values = pa.array(["x", "y", "x"]).dictionary_encode()
    with pa.ipc.new_file(sink, pa.schema([("a", values.type)])) as writer:
        writer.write_batch(pa.record_batch({"a": values}))
    frame = frame_of(sink.getvalue().to_pybytes())
    assert not frame.is_sealed
    assert frame.problem is not None


def test_batches_up_to_the_footer_without_an_end_mark() -> None:
    data = OPEN + SEALED[FRAME.footer_at :]
    frame = frame_of(data)
    assert frame.is_sealed
    assert not frame.is_ended
    assert frame.problem is not None


def test_a_footer_gets_the_places_of_as_many_batches_as_it_lists() -> None:
    tail = SEALED[FRAME.end :]
    places = tuple((64 + 8 * n, 16, 24) for n in range(3))
    made = arrow_file.patch_footer(tail, places)
    assert len(made) == len(tail)
    assert [b.place for b in arrow_file.parse_footer(made[8:-10], 200)] == list(places)
    assert arrow_file.patch_footer(made, tuple(b.place for b in FRAME.batches)) == tail
    with pytest.raises(FormatError) as caught:
        arrow_file.patch_footer(tail, places[:2])
    assert caught.value.code == "malformed"
