"""Shards whose Arrow frame, rows or footer are damaged or hostile: found, and never believed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest
from support.shard_files import (
    AT,
    FRAME,
    KEY,
    NAME,
    OPEN,
    ROWS,
    RUN_ID,
    SCHEMA,
    SEALED,
    batch_field,
    frame_of,
    hand_made_batch,
    put,
    shard_bytes,
    shard_row,
)

from tensorstore_fmt.format import layout
from tensorstore_fmt.format.shard import SHARD_SCHEMA
from tensorstore_fmt.storage import Storage, open_storage
from tensorstore_fmt.upkeep import arrow_file, claims, sealing, shard_check, shard_file
from tensorstore_fmt.upkeep.arrow_file import Block
from tensorstore_fmt.upkeep.sealing import SealError, seal
from tensorstore_fmt.upkeep.shard_child import ChildDiedError, ShardChild

# --- the child's answers, in this process ---------------------------------------------------


def schema_request(**changes: Any) -> dict[str, Any]:
    request = {"op": "schema", "run_id": RUN_ID.hex(), "number": NAME.number}
    request |= {"worker": KEY.worker, "attempt": KEY.attempt, "writer": KEY.writer}
    return request | changes


@pytest.fixture
def checker() -> shard_check._Checker:
    made = shard_check._Checker()
    assert made.answer(schema_request(), SCHEMA) == ({}, b"")
    return made


@pytest.mark.parametrize(
    ("metadata", "request_", "code"),
    [
        (None, {"number": 5}, "wrong_run"),
        (None, {"run_id": bytes(16).hex()}, "wrong_run"),
        (None, {"writer": 4}, "wrong_run"),
        ({}, {}, "malformed"),
        ({layout.FORMAT_NAME: "no json"}, {}, "malformed"),
        ({layout.FORMAT_NAME: "[]"}, {}, "malformed"),
        ({layout.FORMAT_NAME: "{}"}, {}, "malformed"),
    ],
)
def test_schemas_that_are_refused(
    checker: shard_check._Checker, metadata: Any, request_: dict[str, Any], code: str
) -> None:
    schema = pa.ipc.read_schema(pa.py_buffer(SCHEMA))
    if metadata is not None:
        schema = schema.with_metadata(metadata)
    answer, _ = checker.answer(schema_request(**request_), schema.serialize().to_pybytes())
    assert answer["code"] == code
    about = schema.metadata or {}
    newer = {
        k: v.replace(b'"format_version": [1', b'"format_version": [2') for k, v in about.items()
    }
    if metadata is None and not request_.get("run_id"):
        schema = schema.with_metadata(newer)
        answer, _ = checker.answer(schema_request(), schema.serialize().to_pybytes())
        assert answer["code"] == "unsupported_version"


def test_other_columns_are_refused(checker: shard_check._Checker) -> None:
    for schema in (SHARD_SCHEMA.remove(0), SHARD_SCHEMA.set(0, pa.field("name", pa.binary()))):
        answer, _ = checker.answer(schema_request(), schema.serialize().to_pybytes())
        assert answer["code"] == "malformed"


def batch_answer(
    checker: shard_check._Checker, message: bytes, *, payload_at: int = 64, flushes: Any = ()
) -> dict[str, Any]:
    request = {"op": "batch", "payload_at": payload_at, "flushes": list(flushes)}
    return checker.answer(request, message)[0]


def test_rows_that_prove_themselves_are_given_if_wanted(checker: shard_check._Checker) -> None:
    block = FRAME.batches[2]
    message = SEALED[block.offset : block.end]
    for flushes, count in (([], 0), ([(0, 1)], 0), ([(0, 0), (2, 5)], 1)):
        answer = batch_answer(checker, message, payload_at=block.payload_at, flushes=flushes)
        assert (answer["rows"], answer["bad"], len(answer["found"])) == (1, [], count)
        assert answer["places"] == [[block.payload_at], [100]]
        for row in answer["found"]:
            assert (row["step"], row["offset"], row["name"]) == (2, block.payload_at, "x")


def padded(payload: bytes) -> bytes:
    return payload.ljust(-(-len(payload) // 64) * 64, b"\0")


ROW = shard_row(b"abc", step=7, stride=2, count=3, name="é")


@pytest.mark.parametrize(
    ("columns", "payload", "code"),
    [
        ({"step": [8]}, b"abc", "checksum"),
        ({"name": ["e"]}, b"abc", "checksum"),
        ({"row_crc": [1]}, b"abc", "checksum"),
        ({}, b"abd", "checksum"),
        ({}, padded(b"abc")[:-1] + b"\1", "malformed"),
        ({}, padded(b"abc") + bytes(64), "malformed"),
        ({}, b"", "malformed"),
    ],
)
def test_rows_that_prove_nothing(
    checker: shard_check._Checker, columns: dict[str, Any], payload: bytes, code: str
) -> None:
    stored = payload if len(payload) != 3 else padded(payload)
    message = hand_made_batch([(ROW, stored)], **columns)
    answer = batch_answer(checker, message, flushes=[(0, 9)])
    ((number, found, _, at, name, steps),) = answer["bad"]
    assert (number, found, at) == (0, code, 64)
    assert not answer["found"]
    if not columns:
        assert (name, steps) == ("é", [7, 9, 11])
    good = batch_answer(checker, hand_made_batch([(ROW, padded(b"abc"))]), flushes=[(0, 9)])
    assert not good["bad"]
    odd = batch_answer(checker, hand_made_batch([(ROW, padded(b"abc"))]), payload_at=60)
    assert odd["bad"][0][1] == "malformed"


def test_batches_without_rows_or_with_nulls(checker: shard_check._Checker) -> None:
    answer = batch_answer(checker, hand_made_batch([]))
    assert answer == {"rows": 0, "bad": [], "found": [], "places": [[], []]}
    with pytest.raises(ValueError, match="nulls"):
        batch_answer(checker, hand_made_batch([(ROW, padded(b"abc"))], step=[None]))


def test_footers(checker: shard_check._Checker) -> None:
    request = {"op": "footer", "nbytes": len(SEALED), "batches": 3}
    tail = SEALED[FRAME.footer_at :]
    assert checker.answer(request, tail) == ({}, b"")
    assert "what" in checker.answer(request | {"batches": 2}, tail)[0]
    other = shard_check._Checker()
    other.answer(schema_request(), SHARD_SCHEMA.serialize().to_pybytes())
    assert "what" in other.answer(request, tail)[0]  # without the metadata


def test_a_file_of_which_only_the_end_is_there() -> None:
    source = shard_check._Sparse(b"0123456789", 100)
    assert source.readable()
    assert source.seekable()
    assert (source.seek(-10, 2), source.tell()) == (90, 90)
    assert source.read(4) == b"0123"
    assert (source.seek(2, 1), source.read()) == (96, b"6789")
    assert (source.seek(0), source.read(8)) == (0, arrow_file.MAGIC)
    assert source.seek(0) == 0
    with pytest.raises(OSError, match="footer"):
        source.read()
    source.seek(50)
    with pytest.raises(OSError, match="footer"):
        source.read(1)


def test_what_a_file_needs_behind_its_last_batch(checker: shard_check._Checker) -> None:
    request = {"op": "seal", "blocks": [b.place for b in FRAME.batches]}
    answer, tail = checker.answer(request, SCHEMA)
    assert answer == {}
    assert OPEN + tail == SEALED
    assert checker.answer({"op": "seal", "blocks": []}, SCHEMA)[0] == {}


def open_answer(checker: shard_check._Checker, path: Path, data: bytes) -> dict[str, Any]:
    path.write_bytes(data)
    return checker.answer({"op": "open", "path": str(path), "nbytes": len(SEALED)}, b"")[0]


def test_files_as_anybody_would_open_them(checker: shard_check._Checker, tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    assert open_answer(checker, path, SEALED) == {"batches": 3}
    blocks = [b.place for b in FRAME.batches]
    tail = SEALED[FRAME.end :]
    swapped = OPEN + arrow_file.patch_footer(tail, (blocks[0], blocks[2], blocks[1]))
    assert "what" in open_answer(checker, path, swapped)
    fewer = shard_bytes(*ROWS[:2])
    short_tail = arrow_file.patch_footer(fewer[frame_of(fewer).end :], tuple(blocks[:2]))
    path.write_bytes(OPEN + short_tail)
    request = {"op": "open", "path": str(path), "nbytes": len(OPEN + short_tail)}
    assert "what" in checker.answer(request, b"")[0]
    assert "what" in checker.answer(request | {"nbytes": 17}, b"")[0]


# --- the child itself --------------------------------------------------------------------


def test_requests_until_the_input_ends() -> None:
    """A request that is damaged is answered; half of one ends the process in good order."""

    def framed(text: bytes, data: bytes = b"") -> bytes:
        return shard_check.FRAME.pack(len(text), len(data)) + text + data

    asked = framed(json.dumps(schema_request()).encode(), SCHEMA)
    asked += framed(b'{"op": "batch", "payload_at": 0, "flushes": []}', b"no message")
    asked += framed(b'{"op": "batch"}', SEALED[AT[0] : FRAME.batches[0].end])
    for rest in (b"", b"half", framed(b"{}")[:-1]):
        done = subprocess.run(
            [sys.executable, "-P", "-m", "tensorstore_fmt.upkeep.shard_check"],
            input=asked + rest,
            capture_output=True,
            timeout=60,
            check=True,
        )
        answers, out = [], done.stdout
        while out:
            text_nbytes, made_nbytes = shard_check.FRAME.unpack_from(out)
            begin = shard_check.FRAME.size
            answers.append(json.loads(out[begin : begin + text_nbytes]))
            out = out[begin + text_nbytes + made_nbytes :]
        assert [a.get("code") for a in answers] == [None, "malformed", "malformed"]


def test_a_child_that_dies_is_started_again() -> None:
    block = FRAME.batches[1]
    message = SEALED[block.offset : block.end]
    with ShardChild() as child:
        assert child.schema(RUN_ID, NAME, SCHEMA) == {}
        child._process.kill()
        child._process.wait()
        with pytest.raises(ChildDiedError):
            child.batch(block, message)
        assert child.batch(block, message)["rows"] == 1  # it knows the schema again
    child.close()


def test_a_child_that_takes_too_long_is_ended() -> None:
    with ShardChild(timeout_s=0.0) as child:
        with pytest.raises(ChildDiedError):
            child.schema(RUN_ID, NAME, SCHEMA)
        with pytest.raises(ChildDiedError):
            child.batch(FRAME.batches[0], bytes(1 << 20))


# --- sealing -----------------------------------------------------------------------------


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    (tmp_path / "shards").mkdir()
    return open_storage(tmp_path, writable=True)


def sealed(
    storage: Storage,
    data: bytes,
    needed: int | None,
    *,
    child: ShardChild | None = None,
    **more: Any,
) -> tuple[str | None, bytes]:
    """Put a shard into a folder and seal it; give the answer and the file as it is then."""
    path = Path(storage._root) / NAME.path
    path.write_bytes(data)
    options: dict[str, Any] = {"run_id": RUN_ID, "nbytes": len(data), "dry_run": False} | more
    with child or ShardChild() as one:
        try:
            done = seal(
                storage,
                options["run_id"],
                NAME,
                options["nbytes"],
                needed=needed,
                child=one,
                dry_run=options["dry_run"],
            )
        except SealError as error:
            done = f"left: {error}"
    return done, path.read_bytes()


def test_sealing_gives_the_file_that_its_writer_would_have_made(storage: Storage) -> None:
    torn = SEALED[AT[1] : AT[1] + 100]
    for data, needed in (
        (OPEN, len(OPEN)),
        (OPEN + torn, len(OPEN)),
        (OPEN, None),
        (SEALED[:-1], 0),
    ):
        done, made = sealed(storage, data, needed)
        assert done is not None
        assert not done.startswith("left")
        assert made == SEALED
        assert sealed(storage, data, needed, dry_run=True) == (done, data)
    assert sealed(storage, SEALED, len(OPEN)) == (None, SEALED)


@pytest.mark.parametrize(
    ("data", "needed"),
    [
        (OPEN + SEALED[AT[1] : AT[1] + 100], None),  # who knows whether entries name these
        (OPEN, len(OPEN) + 1),  # it was longer once
        (put(OPEN, AT[1], "<I", 0), len(OPEN)),  # damaged before what entries name
        (put(SEALED, AT[1], "<I", 0), len(OPEN)),  # the same, with a footer
        (b"junk" * 30, 100),
        (put(OPEN, OPEN.index(b"run_id") + 12, "<B", 0x66), len(OPEN)),  # of another run
    ],
)
def test_what_is_left_as_it_is(storage: Storage, data: bytes, needed: int | None) -> None:
    done, made = sealed(storage, data, needed)
    assert done is not None
    assert done.startswith("left")
    assert made == data


def test_a_shard_that_was_never_begun_needs_no_footer(storage: Storage) -> None:
    for data in (b"", b"junk" * 30):
        assert sealed(storage, data, 0) == (None, data)


def test_nothing_is_written_if_the_child_dies(storage: Storage) -> None:
    done, made = sealed(storage, OPEN, len(OPEN), child=ShardChild(timeout_s=0.0))
    assert done is not None
    assert done.startswith("left")
    assert made == OPEN


def test_objects_cannot_be_sealed(tmp_path: Path) -> None:
    with open_storage(f"memory://{tmp_path.name}-seal/run", writable=True) as storage:
        storage.publish(NAME.path, [OPEN])
        with ShardChild() as child, pytest.raises(SealError):
            seal(storage, RUN_ID, NAME, len(OPEN), needed=0, child=child, dry_run=False)


def test_a_file_that_changes_meanwhile_is_not_touched(storage: Storage) -> None:
    path = Path(storage._root) / NAME.path
    path.write_bytes(OPEN + b"more")
    with pytest.raises(SealError):
        sealing._append(storage, NAME, frame_of(OPEN), SEALED[len(OPEN) :])
    assert path.read_bytes() == OPEN + b"more"


@pytest.mark.parametrize("timeout_s", [60.0, 0.0])
def test_a_footer_that_does_not_open_is_taken_away_again(
    storage: Storage, timeout_s: float
) -> None:
    path = Path(storage._root) / NAME.path
    junk = b"this is no footer at all, ARROW1"
    path.write_bytes(OPEN + junk)
    with ShardChild(timeout_s=timeout_s) as child, pytest.raises(SealError):
        sealing._check(storage, NAME, frame_of(OPEN), junk, child)
    assert path.read_bytes() == OPEN


def test_blocks_know_their_end() -> None:
    assert Block(8, 16, 24).end == 48


# --- what entries name in a shard ------------------------------------------------------------


def checked(
    storage: Storage, data: bytes, claimed: list[tuple[int, bytes]], **options: Any
) -> shard_file.ShardCheck:
    """Check a shard in which entries name these payloads at these offsets."""
    path = Path(storage._root) / NAME.path
    path.write_bytes(data)
    table = np.zeros(len(claimed), claims.CLAIM)
    for row, (offset, payload) in zip(table, claimed, strict=True):
        row["offset"], row["nbytes"], row["raw_nbytes"] = offset, len(payload), len(payload)
        row["crc32c"], row["count"], row["stride"] = crc32c.crc32c(payload), 1, 1
        row["step"] = offset
    made = claims.Claims()
    made.series.append(("x", "uint8"))
    made._arrays[NAME] = [table]
    with options.pop("child", None) or ShardChild() as child:
        check = shard_file.ShardCheck(
            storage=storage, run_id=RUN_ID, name=NAME, nbytes=len(data), claims=made, child=child,
            **options,
        )  # fmt: skip
        check.run()
    return check


CLAIMS = [(b.payload_at, bytes([n]) * 100) for n, b in enumerate(FRAME.batches)]


def damage_of(check: shard_file.ShardCheck) -> set[tuple[str, tuple[int, ...]]]:
    """Give the codes of what is damaged, with the steps (here: offsets) that it hits."""
    return {
        (p.code, tuple(s for _, steps in p.names for s in steps))
        for p in check.problems
        if p.severity == "damage"
    }


def test_a_whole_shard_has_no_problems(storage: Storage) -> None:
    check = checked(storage, SEALED, CLAIMS, is_closed=True)
    assert not check.problems
    assert (check.chunks, check.checked_nbytes) == (3, len(SEALED))
    assert check.unreferenced_nbytes == 0
    fewer = checked(storage, SEALED, CLAIMS[:2], is_closed=True, flushes=[(1, 2)])
    assert not fewer.problems
    assert fewer.unreferenced_nbytes == 100
    assert [row["step"] for row in fewer.found] == [1, 2]


def test_a_footer_that_lists_other_batches_is_damage(storage: Storage) -> None:
    places = tuple(b.place for b in FRAME.batches)
    tail = arrow_file.patch_footer(SEALED[FRAME.end :], (places[1], places[0], places[2]))
    assert damage_of(checked(storage, OPEN + tail, CLAIMS, is_closed=True)) == {("malformed", ())}


def test_a_child_that_dies_of_a_batch_is_reported_and_payloads_are_still_checked(
    storage: Storage,
) -> None:
    check = checked(storage, SEALED, CLAIMS, is_closed=True, child=ShardChild(timeout_s=0.0))
    assert check.chunks == 3
    assert damage_of(check) == {("malformed", ())}


def test_batches_that_arrow_cannot_read_or_that_have_other_rows(storage: Storage) -> None:
    at = batch_field(SEALED, AT[1], 0)
    for rows in (2, 0):  # two: its columns are too short for that
        found = damage_of(checked(storage, put(SEALED, at, "<q", rows), CLAIMS, is_closed=True))
        assert ("malformed", ()) in found or not rows


def test_payloads_that_lie_in_no_batch(storage: Storage) -> None:
    """Where the frame is gone, each of them is still checked by its own checksum."""
    junk = put(OPEN, 0, "<Q", 0)
    check = checked(storage, junk, CLAIMS)
    assert check.chunks == 3
    assert damage_of(check) == {("malformed", ())}
    bad = bytearray(junk)
    bad[CLAIMS[1][0]] ^= 1
    found = damage_of(checked(storage, bytes(bad), CLAIMS))
    assert found == {("malformed", ()), ("checksum", (CLAIMS[1][0],))}
    far = junk + bytes(3 << 20) + b"y" * 100
    check = checked(storage, far, [*CLAIMS, (len(far) - 100, b"y" * 100)])
    assert check.chunks == 4
    assert ("checksum", (CLAIMS[1][0],)) not in damage_of(check)


def test_a_chunk_that_spans_two_batches_is_checked_too(storage: Storage) -> None:
    """No writer does that; it must not be passed over."""
    begin = CLAIMS[1][0]
    across = (begin, SEALED[begin : AT[2] + 16])
    check = checked(storage, SEALED, [*CLAIMS, across], is_closed=True)
    assert check.chunks >= 4  # what lies in it may be looked at again
    assert not damage_of(check)
    wrong = (begin, b"\1" * len(across[1]))
    assert ("checksum", (begin,)) in damage_of(
        checked(storage, SEALED, [*CLAIMS, wrong], is_closed=True)
    )


class HalfChild(ShardChild):
    """A child that says half of an answer and ends."""

    def _start(self) -> None:
        answer = shard_check.FRAME.pack(10, 0) + b"half"
        code = f"import sys; sys.stdout.buffer.write({answer!r})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )


def test_half_an_answer_is_none() -> None:
    with HalfChild() as child, pytest.raises(ChildDiedError):
        child.footer(FRAME, b"")
