"""Segments and bundles: what contradicts itself is refused with the code of the spec."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import crc32c
import numpy as np
import pyarrow as pa
import pytest
from support.build_run import RUN_ID, Put, RunBuilder

from tensorstore_fmt.errors import FormatError, LimitError
from tensorstore_fmt.format import bundle, layout, page, segment

HEADER = layout.SEGMENT_HEADER.size


@pytest.fixture
def data(tmp_path: Path) -> bytes:
    """A segment with a catalog, shards and entries."""
    writer = RunBuilder(tmp_path).writer(worker=1, attempt=2, writer=3, num_workers=2)
    name = writer.flush(
        Put(name="a", step=5, value=np.arange(3), stride=1, count=3, inline=True),
        Put(name="b", step=4, value=np.arange(8)),
        first=2,
        last=6,
        through=7,
    )
    return (tmp_path / name.path).read_bytes()


def header_of(data: bytes, **known: object) -> segment.Header:
    return segment.decode_header(data, where="it", **known)  # type: ignore[arg-type] # as given


def sealed(data: bytearray) -> bytes:
    """Mend the checksum of the header."""
    data[HEADER - 4 : HEADER] = crc32c.crc32c(bytes(data[: HEADER - 4])).to_bytes(4, "little")
    return bytes(data)


def changed(data: bytes, offset: int, form: str, value: object) -> bytes:
    """Change a field of the header, and mend its checksum."""
    made = bytearray(data)
    struct.pack_into(form, made, offset, value)
    return sealed(made)


def with_root(data: bytes, change: Callable[[np.ndarray], object]) -> bytes:
    """Change rows of the root, and mend both checksums."""
    made = bytearray(data)
    end = HEADER + header_of(data).root_nbytes
    root = np.frombuffer(data[HEADER:end], layout.ROOT_ROW).copy()
    change(root)
    made[HEADER:end] = root.tobytes()
    struct.pack_into("<I", made, 52, crc32c.crc32c(root.tobytes()))
    return sealed(made)


def refused(data: bytes) -> FormatError:
    with pytest.raises(FormatError) as caught:
        segment.decode_head(header_of(data, nbytes=len(data)), data)
    assert caught.value.facts.get("file", "it")
    return caught.value


# --- the header ---------------------------------------------------------------------------


def test_what_a_header_says(data: bytes) -> None:
    header = header_of(data, nbytes=len(data), run_id=RUN_ID)
    key = layout.WriterKey(worker=1, attempt=2, writer=3)
    assert header.name == layout.SegmentName(key=key, last=6, count=5)
    assert header.name.first == 2
    assert (header.num_workers, header.series, header.file_nbytes) == (2, 2, len(data))
    assert header.complete_through == (7, 7, 7, 7)
    assert not header.is_closed
    assert segment.decode_head(header, data).shards[0][1] > 64


@pytest.mark.parametrize(
    ("offset", "form", "most"),
    [
        (48, "<I", layout.MAX_WORKER + 1),
        (56, "<q", layout.MAX_STEP),
        (96, "<Q", layout.MAX_HEAD_NBYTES),
        (104, "<I", layout.MAX_ROOT_NBYTES),
        (108, "<I", layout.MAX_SERIES),
        *((at, "<q", layout.MAX_STEP) for at in (128, 136, 144, 152)),
    ],
)
def test_a_header_at_a_limit_and_above(data: bytes, offset: int, form: str, most: int) -> None:
    with pytest.raises(LimitError) as caught:
        header_of(changed(data, offset, form, most + 1))
    assert caught.value.facts["file"] == "it"
    made = changed(data, offset, form, most)
    if offset in (96, 104):  # longer than the file
        with pytest.raises(FormatError) as malformed:
            header_of(made)
        assert malformed.value.code == "malformed"
    else:
        header_of(made)


@pytest.mark.parametrize(
    ("offset", "form", "value", "code"),
    [
        (0, "<B", 0x88, "bad_magic"),
        (8, "<H", layout.MAJOR + 1, "unsupported_version"),
        (12, "<I", 2, "malformed"),
        (16, "<B", 1, "wrong_run"),
        (32, "<Q", 4, "wrong_run"),
        (40, "<I", 0, "wrong_run"),
        (44, "<I", 1, "wrong_run"),
        (56, "<q", -1, "malformed"),
        (64, "<Q", 3, "wrong_run"),
        (64, "<Q", 7, "wrong_run"),
        (72, "<Q", 7, "wrong_run"),
        (80, "<Q", 1, "unknown_feature"),
        (88, "<Q", 1 << 40, "truncated"),
        (104, "<I", 63, "malformed"),
        (128, "<q", -2, "malformed"),
        (168, "<B", 1, "malformed"),
        (251, "<B", 1, "malformed"),
    ],
)
def test_headers_that_are_refused(
    data: bytes, offset: int, form: str, value: int, code: str
) -> None:
    name = header_of(data).name
    with pytest.raises(FormatError) as caught:
        header_of(changed(data, offset, form, value), run_id=RUN_ID, name=name, nbytes=len(data))
    assert caught.value.code == code
    assert caught.value.facts["file"] == "it"


def test_headers_say_what_was_found(data: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        header_of(changed(data, 8, "<H", 7))
    assert caught.value.facts["version"] == 7
    with pytest.raises(FormatError) as caught:
        header_of(changed(data, 80, "<Q", 6))
    assert caught.value.facts["required"] == 6
    with pytest.raises(FormatError) as caught:
        header_of(data, nbytes=len(data) - 1)
    assert caught.value.facts["nbytes"] == len(data) - 1
    with pytest.raises(FormatError) as caught:
        header_of(data, nbytes=len(data) + 1)
    assert caught.value.code == "malformed"
    with pytest.raises(FormatError) as caught:
        header_of(data[: HEADER - 1])
    assert caught.value.code == "truncated"
    for at in (5, 9, 100, HEADER - 1):
        damaged = bytearray(data)
        damaged[at] ^= 1
        with pytest.raises(FormatError) as caught:
            header_of(bytes(damaged))
        assert caught.value.code == ("bad_magic" if at < 8 else "checksum")


def test_a_header_promises_nothing_unless_told() -> None:
    key = layout.WriterKey(worker=0, attempt=0, writer=1)
    numbers = dict.fromkeys(
        ("resume_step", "first_flush", "last_flush", "opened_us", "published_us"), 0
    )
    header = segment.Header(run_id=RUN_ID, key=key, num_workers=1, **numbers)
    assert header.complete_through == (-1, -1, -1, -1)
    made = b"".join(segment.encode(header, [], [], []))
    again = header_of(made, nbytes=len(made))
    assert again.complete_through == (-1, -1, -1, -1)
    assert (again.is_closed, again.recovers, again.required, again.series) == (False, 0, 0, 0)


def test_a_copy_of_header_and_root_that_is_cut_short(data: bytes) -> None:
    header = header_of(data)
    need = HEADER + header.root_nbytes
    again = segment.recover_head_parts(data[-need:], header)
    assert again == data[:need]
    with pytest.raises(FormatError) as caught:
        segment.recover_head_parts(data[-need + 1 :], header)
    assert caught.value.code == "truncated"


# --- the root -----------------------------------------------------------------------------


def test_a_root_that_is_whole(data: bytes) -> None:
    made = with_root(data, lambda root: None)
    assert made == data
    kinds = segment.decode_head(header_of(data), data).root["kind"].tolist()
    assert kinds == [layout.PAGE_CATALOG, layout.PAGE_SHARDS, layout.PAGE_ENTRIES]


@pytest.mark.parametrize(
    ("row", "field", "most"),
    [
        (2, "raw_nbytes", layout.MAX_PAGE_RAW_NBYTES),
        (2, "rows", layout.MAX_PAGE_ROWS),
        (2, "max_step", layout.MAX_STEP),
        (2, "min_step", layout.MAX_STEP),
    ],
)
def test_pages_above_a_limit(data: bytes, row: int, field: str, most: int) -> None:
    def put(root: np.ndarray, value: int) -> None:
        root[row][field] = value
        root[row]["max_step"] = max(root[row]["min_step"], root[row]["max_step"])

    assert refused(with_root(data, lambda root: put(root, most + 1))).code == "limit"
    made = with_root(data, lambda root: put(root, most))
    header = header_of(made)
    head = segment.decode_head(header, made)  # the page itself is not looked at yet
    begin = int(head.root[row]["offset"])
    with pytest.raises(FormatError) as caught:
        head.decode_entries(row, made[begin : begin + int(head.root[row]["nbytes"])])
    assert caught.value.code == "malformed"


@pytest.mark.parametrize(
    ("row", "field", "value"),
    [
        (0, "offset", 0),
        (1, "offset", 8),
        (2, "nbytes", 1),
        (0, "kind", 0),
        (0, "kind", 4),
        (0, "kind", layout.PAGE_SHARDS),
        (1, "kind", layout.PAGE_CATALOG),
        (1, "kind", layout.PAGE_ENTRIES),
        (2, "rows", 0),
        (2, "first_series", 9),
        (2, "reserved", b"\1".rjust(15, b"\0")),
        (0, "rows", 1),
        (0, "first_series", 1),
        (0, "last_series", 0),
        (0, "min_step", 1),
        (1, "max_step", 1),
        (1, "last_series", 1),
        (2, "last_series", 9),
        (2, "min_step", -1),
        (2, "min_step", 10**6),
    ],
)
def test_roots_that_contradict_themselves(data: bytes, row: int, field: str, value: object) -> None:
    def put(root: np.ndarray) -> None:
        root[row][field] = np.void(value) if isinstance(value, bytes) else value

    assert refused(with_root(data, put)).code == "malformed"


def test_entry_pages_of_a_series(tmp_path: Path) -> None:
    writer = RunBuilder(tmp_path).writer()
    steps = range(2 * layout.TARGET_PAGE_ROWS)
    puts = [Put(name="b", step=2 * s, value=np.int8(1), inline=True) for s in steps]
    name = writer.flush(*puts, Put(name="a", value=1, inline=True), Put(name="c", value=2.5))
    data = (tmp_path / name.path).read_bytes()
    head = segment.decode_head(header_of(data), data)
    pages = head.entry_pages()
    assert len(pages) >= 3
    per_series = [set(head.entry_pages(n).tolist()) for n in range(3)]
    for number in pages.tolist():
        row = head.root[number]
        stored = data[int(row["offset"]) : int(row["offset"]) + int(row["nbytes"])]
        found = set(head.decode_entries(number, stored).rows["series"].tolist())
        assert {n for n in range(3) if number in per_series[n]} == found
    first = int(pages[0])

    def put(root: np.ndarray) -> None:
        root[first]["last_series"] = 2  # more than the page behind it begins with

    assert refused(with_root(data, put)).code == "malformed"


# --- pages --------------------------------------------------------------------------------


def with_dims(data: bytes, dims: pa.Array) -> tuple[segment.Head, bytes]:
    """Give a head, and its entry page with another column of lengths."""
    head = segment.decode_head(header_of(data), data)
    row = head.root[2]
    stored = data[int(row["offset"]) : int(row["offset"]) + int(row["nbytes"])]
    batch = page.load_page(stored, row, page.ENTRIES_SCHEMA, "x")
    at = batch.schema.get_field_index("dims")
    made = page.store_page(batch.set_column(at, "dims", dims), layout.PAGE_ENTRIES)
    root = head.root.copy()
    root[2]["nbytes"], root[2]["raw_nbytes"] = len(made.data), made.raw_nbytes
    root[2]["crc32c"] = crc32c.crc32c(made.data)
    return replace(head, root=root), made.data


def test_whether_something_may_be_null_does_not_matter(data: bytes) -> None:
    rows = int(segment.decode_head(header_of(data), data).root[2]["rows"])
    kind = pa.list_(pa.field("length", pa.int64(), nullable=False))
    head, stored = with_dims(data, pa.array([[]] * rows, kind))
    assert len(head.decode_entries(2, stored)) == rows


def test_a_null_within_a_list_is_refused(data: bytes) -> None:
    rows = int(segment.decode_head(header_of(data), data).root[2]["rows"])
    head, stored = with_dims(data, pa.array([[None]] + [[]] * (rows - 1), pa.list_(pa.int64())))
    with pytest.raises(FormatError, match="nulls"):
        head.decode_entries(2, stored)


def test_a_page_that_would_be_too_large_is_not_made() -> None:
    batch = pa.record_batch({"a": pa.array([b"x" * layout.MAX_PAGE_RAW_NBYTES])})
    with pytest.raises(LimitError) as caught:
        page.store_page(batch, layout.PAGE_ENTRIES)
    assert caught.value.facts["nbytes"] > layout.MAX_PAGE_RAW_NBYTES


# --- bundles ------------------------------------------------------------------------------


def bundle_of(*rows: tuple[int, int, bytes]) -> bytes:
    """Make a bundle of (last, count, bytes)."""
    key = layout.WriterKey(worker=0, attempt=0, writer=1)
    named = [
        (layout.SegmentName(key=key, last=last, count=count), len(data) + 5, data)
        for last, count, data in rows
    ]
    return b"".join(bytes(p) for p in bundle.encode(RUN_ID, named))


def bundle_with(data: bytes, at: int, form: str, value: int) -> bytes:
    """Change a field of header or table, and mend both checksums."""
    made = bytearray(data)
    struct.pack_into(form, made, at, value)
    n = layout.BUNDLE_HEADER.size
    count = int.from_bytes(data[12:16], "little")
    table = bytes(made[n : n + count * layout.BUNDLE_ROW.size])
    struct.pack_into("<I", made, n - 16, crc32c.crc32c(table))
    struct.pack_into("<I", made, n - 4, crc32c.crc32c(bytes(made[: n - 4])))
    return bytes(made)


def test_what_a_bundle_says() -> None:
    data = bundle_of((0, 1, b"abc"), (3, 3, b""), (4, 1, b"de"))
    rows = bundle.decode(data, run_id=RUN_ID, nbytes=len(data))
    assert [(r.name.last, r.name.count, r.file_nbytes) for r in rows] == [
        (0, 1, 8), (3, 3, 5), (4, 1, 7),
    ]  # fmt: skip
    assert [data[r.offset : r.offset + r.nbytes] for r in rows] == [b"abc", b"", b"de"]
    assert bundle.decode(data, run_id=RUN_ID) == rows
    assert bundle_with(data, 8, "<H", layout.MAJOR) == data


TABLE = layout.BUNDLE_HEADER.size


@pytest.mark.parametrize(
    ("at", "form", "value", "code"),
    [
        (8, "<H", layout.MAJOR + 1, "unsupported_version"),
        (40, "<Q", 1, "unknown_feature"),
        (12, "<I", layout.MAX_BUNDLE_ROWS + 1, "limit"),
        (52, "<B", 1, "malformed"),
        (TABLE, "<I", layout.MAX_WORKER + 1, "limit"),
        (TABLE + 4, "<I", layout.MAX_WORKER + 1, "limit"),
        (TABLE + 16, "<Q", layout.MAX_NUMBER + 1, "limit"),
        (TABLE + 24, "<Q", 0, "malformed"),
        (TABLE + 24, "<Q", 3, "malformed"),
        (TABLE + 32, "<Q", 2, "malformed"),
        (TABLE + 40, "<Q", 0, "malformed"),
        (TABLE + 48, "<Q", 2, "malformed"),
        (TABLE + 56, "<B", 1, "malformed"),
    ],
)
def test_bundles_that_contradict_themselves(at: int, form: str, value: int, code: str) -> None:
    data = bundle_of((1, 1, b"abc"), (2, 1, b"de"))
    with pytest.raises(FormatError) as caught:
        bundle.decode(bundle_with(data, at, form, value), run_id=RUN_ID, nbytes=len(data))
    assert caught.value.code == code


def test_a_bundle_cut_short_or_made_longer() -> None:
    data = bundle_of((1, 1, b"abc"), (2, 1, b"de"))
    for nbytes, code in ((len(data) - 1, "truncated"), (len(data) + 1, "malformed")):
        with pytest.raises(FormatError) as caught:
            bundle.decode(data, run_id=RUN_ID, nbytes=nbytes)
        assert caught.value.code == code
    end_of_table = TABLE + 2 * layout.BUNDLE_ROW.size
    assert len(bundle.decode(data[:end_of_table], run_id=RUN_ID)) == 2
    for end in (0, TABLE - 1, TABLE, end_of_table - 1):
        with pytest.raises(FormatError) as caught:
            bundle.decode(data[:end], run_id=RUN_ID)
        assert caught.value.code == "truncated"


def test_a_table_that_does_not_cover_its_file_or_names_a_segment_twice() -> None:
    data = bundle_of((1, 1, b"abc"), (2, 1, b"de"))
    short = bundle_with(data, TABLE + layout.BUNDLE_ROW.size + 48, "<Q", 1)
    with pytest.raises(FormatError) as caught:
        bundle.decode(short, run_id=RUN_ID)
    assert caught.value.code == "malformed"
    with pytest.raises(FormatError) as caught:
        bundle.decode(bundle_of((1, 1, b"abc"), (1, 1, b"de")), run_id=RUN_ID)
    assert caught.value.code == "malformed"
