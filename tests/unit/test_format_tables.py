"""Ragged columns, `run.json`, and shards: what cannot be said is refused before it is written."""

from __future__ import annotations

import json
from typing import Any

import crc32c
import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest

from tensorstore_fmt.errors import ArgumentError, FormatError
from tensorstore_fmt.format import layout, runfile
from tensorstore_fmt.format.catalog import Series
from tensorstore_fmt.format.ragged import Ragged
from tensorstore_fmt.format.shard import ShardEncoder, ShardRow, row_crc

RUN_ID = bytes(range(16))
ROWS = [(1, 2), (), (3,), (4, 5, 6), ()]

# --- ragged columns -------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [[], [()], [(), ()], [(1, 2), (3, 4)], ROWS])
def test_ragged_rows_come_back(rows: list[tuple[int, ...]]) -> None:
    ragged = Ragged.of_ints(rows)
    assert len(ragged) == len(rows)
    assert ragged.tuples() == rows
    assert [ragged.row(i) for i in range(len(rows))] == rows
    assert ragged.lengths.tolist() == [len(row) for row in rows]
    assert Ragged.of_arrow(ragged.to_arrow_list()).tuples() == rows
    sliced = ragged.to_arrow_list().slice(1)
    assert Ragged.of_arrow(sliced).tuples() == rows[1:]


def test_ragged_bytes_come_back() -> None:
    rows = [b"ab", b"", b"c"]
    column = Ragged.of_bytes(rows).to_arrow_binary()
    assert column.to_pylist() == rows
    again = Ragged.of_arrow(column.slice(1))
    assert [again[i].tobytes() for i in range(2)] == rows[1:]
    assert Ragged.of_arrow(pa.array([], pa.binary())).tuples() == []


def test_parts_of_ragged_rows() -> None:
    ragged = Ragged.of_ints(ROWS)
    for a in range(len(ROWS) + 1):
        for b in range(a, len(ROWS) + 1):
            assert ragged.slice(a, b).tuples() == ROWS[a:b]
            assert Ragged.concat([ragged.slice(0, a), ragged.slice(a, 5)]).tuples() == ROWS
    assert Ragged.concat([ragged]) is ragged
    assert Ragged.concat([ragged, ragged.slice(0, 0), ragged]).tuples() == ROWS + ROWS
    order = [3, 0, 3, 1]
    assert ragged.take(np.array(order)).tuples() == [ROWS[i] for i in order]
    assert ragged.take(np.array([1, 4])).tuples() == [(), ()]
    assert ragged.take(np.empty(0, np.int64)).tuples() == []


# --- run.json -------------------------------------------------------------------------------


def info(**attrs: Any) -> runfile.RunInfo:
    return runfile.RunInfo(run_id=RUN_ID, created_us=17, attrs=attrs)


def test_attributes_up_to_the_limit() -> None:
    room = layout.MAX_RUN_JSON_NBYTES - len(runfile.encode(info(a="")))
    data = runfile.encode(info(a="x" * room))
    assert len(data) == layout.MAX_RUN_JSON_NBYTES
    assert runfile.decode(data).attrs == {"a": "x" * room}
    with pytest.raises(ArgumentError):
        runfile.encode(info(a="x" * (room + 1)))


@pytest.mark.parametrize(
    "value", [{1: 2}, {"b": [{2: 3}]}, float("nan"), [float("inf")], b"bytes", {"b": object()}, {1}]
)
def test_what_json_cannot_say(value: object) -> None:
    with pytest.raises(ArgumentError) as caught:
        runfile.encode(info(a=value))
    assert caught.value.code == "bad_argument"


def signed(document: object) -> bytes:
    """Give a document as ``run.json``, with its checksum."""
    head = json.dumps(document, separators=(",", ":"))[:-1].encode()
    return head + layout.RUN_JSON_TAIL + b"%08x" % crc32c.crc32c(head) + b'"}\n'


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({}, None),
        ({"later": [1]}, None),
        ({"format_version": [1, 7]}, None),
        ({"format_version": [2, 0]}, "unsupported_version"),
        ({"format_version": ["1", 0]}, "malformed"),
        ({"format_version": 1}, "malformed"),
        ({"required": ["x"]}, "unknown_feature"),
        ({"required": None}, "malformed"),
        ({"run_id": "zz"}, "malformed"),
        ({"run_id": "00"}, "malformed"),
        ({"created_us": "17"}, "malformed"),
        ({"attrs": []}, "malformed"),
        ({"format": "other"}, "not_a_run"),
    ],
)
def test_what_a_document_says(change: dict[str, Any], code: str | None) -> None:
    document = {
        "format": layout.FORMAT_NAME,
        "format_version": [1, 0],
        "run_id": RUN_ID.hex(),
        "created_us": 17,
        "required": [],
        "attrs": {"a": 1},
    }
    data = signed(document | change)
    if code is None:
        assert runfile.decode(data).run_id == RUN_ID
        return
    with pytest.raises(FormatError) as caught:
        runfile.decode(data)
    assert caught.value.code == code


# --- shards ---------------------------------------------------------------------------------

NAME = layout.ShardName(key=layout.WriterKey(worker=1, attempt=2, writer=3), number=4)


def shard_row(payload: bytes, **changes: Any) -> ShardRow:
    series = Series(name="é", kind=0, mode=1, dtype="uint8", shape=(len(payload),), grid=(0,))
    values = {
        "series": series, "step": 5, "stride": 1, "count": 1, "chunk": 0, "flush": 7, "codec": 0,
        "flags": 0, "nbytes": len(payload), "raw_nbytes": len(payload),
        "crc32c": crc32c.crc32c(payload), "digest": 0, "parts": [payload],
    }  # fmt: skip
    return ShardRow(**(values | changes))


def test_payloads_lie_where_the_encoder_says() -> None:
    encoder = ShardEncoder(RUN_ID, NAME)
    payloads = [[b"a" * 64, b"b", b""], [b""], [b"c" * 100]]
    made, offsets = b"", []
    for batch in payloads:
        parts, places = encoder.batch([shard_row(p) for p in batch])
        made += b"".join(bytes(p) for p in parts)
        offsets.append(places)
        assert encoder.position == len(made)
    made += b"".join(bytes(p) for p in encoder.seal())
    for batch, places in zip(payloads, offsets, strict=True):
        for payload, at in zip(batch, places, strict=True):
            if payload:
                assert at % 8 == 0
                padded = -(-len(payload) // layout.PAYLOAD_ALIGNMENT) * layout.PAYLOAD_ALIGNMENT
                assert made[at : at + padded] == payload.ljust(padded, b"\0")
    with pa.ipc.open_file(made) as reader:
        table = reader.read_all()
    assert [p.rstrip(b"\0") for p in table["payload"].to_pylist()] == [
        p for b in payloads for p in b
    ]


def test_a_row_proves_all_that_it_says() -> None:
    row = shard_row(b"abc")
    proofs = {row_crc(RUN_ID, NAME.key, row), row_crc(bytes(16), NAME.key, row)}
    changes = (
        {"step": 6}, {"stride": 2}, {"count": 2}, {"chunk": 1}, {"flush": 8}, {"codec": 1},
        {"flags": 1}, {"nbytes": 4}, {"raw_nbytes": 4}, {"crc32c": 0}, {"digest": 1},
    )  # fmt: skip
    proofs |= {row_crc(RUN_ID, NAME.key, shard_row(b"abc", **change)) for change in changes}
    for field, value in (
        ("name", "e"), ("kind", 1), ("mode", 2), ("dtype", "int8"), ("shape", (4,)), ("grid", (1,)),
        ("global_shape", (9,)), ("origin", (1,)),
    ):  # fmt: skip
        of = {f: getattr(row.series, f) for f in ("name", "kind", "mode", "dtype", "shape", "grid")}
        proofs.add(
            row_crc(RUN_ID, NAME.key, shard_row(b"abc", series=Series(**of | {field: value})))
        )
    for key in (
        layout.WriterKey(worker=0, attempt=2, writer=3),
        layout.WriterKey(worker=1, attempt=0, writer=3),
        layout.WriterKey(worker=1, attempt=2, writer=0),
    ):
        proofs.add(row_crc(RUN_ID, key, row))
    assert len(proofs) == 2 + len(changes) + 8 + 3


def test_a_pyarrow_that_copies_payloads_is_noticed() -> None:
    """Offsets would be wrong if it did not hand the placeholder over as it is."""
    encoder = ShardEncoder(RUN_ID, NAME)
    encoder._placeholder = pa.py_buffer(bytes(1024))  # not the one that the sink waits for
    with pytest.raises(AssertionError):
        encoder.batch([shard_row(b"abc")])
