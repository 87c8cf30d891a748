"""Segments that must be refused: each is a good one with one thing wrong, checksums repaired."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import build
import payloads
import pyarrow as pa
from build import CATALOG, ENTRIES, NO_SHARD, SHARDS, Page, Row, Segment
from cases import FileCase, RunCase, S
from cases_content import smooth
from cases_damage import flip
from cases_index import f64

Change = Callable[[Segment], "bytes | None"]


def _base() -> Segment:
    """Give the good segment: two series, one shard, four entries."""
    run = RunCase("segment", "")
    writer = run.writer()
    shard = writer.shard()
    writer.save(S("a", "float64"), [1, 3, 5], [f64(1), f64(2), f64(3)])
    writer.save(S("a", "float64"), [6], [f64(4)])
    writer.save(S("b", shape=(4, -1), grid=(2, 0)), [1], [smooth((4, 20), 1)], shard=shard)
    return writer.publish()


def cases() -> Iterator[FileCase]:
    """Give all of them."""
    good = _base()
    name, run_id = good.name, good.run_id

    def case(title: str, about: str, code: str, data: bytes) -> FileCase:
        facts = {"name": name, "run_id": run_id.hex(), "code": code}
        return FileCase(f"segment-{title}", about, "segment", data, facts)

    for border, about, code, change in _changes():
        segment = copy.deepcopy(good)
        data = change(segment)
        yield case(border, about, code, segment.encode() if data is None else data)
    for title, about, fields in (
        ("worker-too-great", "Worker 1 of 1.", {"worker": 1}),
        ("writer-zero", "The writer is 0.", {"writer": 0}),
    ):
        segment = copy.deepcopy(good)
        segment.header.update(fields)
        facts = {"name": segment.name, "run_id": run_id.hex(), "code": "malformed"}
        yield FileCase(f"segment-{title}", about, "segment", segment.encode(), facts)
    data = good.encode()
    yield case("longer", "One byte follows the end.", "malformed", data + b"\0")
    for part, at in good.borders:
        if part == "end":
            yield case("cut-last-byte", "The last byte is missing.", "truncated", data[:-1])
        else:
            about = f"Cut where this part begins: {part}."
            yield case(f"cut-{part}", about, "truncated", data[:at])
    for part, at in (("magic", 7), ("header", 128), ("root", 300), ("entries", -500)):
        about = f"Cut within this part: {part}."
        yield case(f"cut-within-{part}", about, "truncated", data[:at])


def _both(at: int) -> Change:
    """Flip a bit of both headers."""

    def change(segment: Segment) -> bytes:
        data = segment.encode()
        return flip(flip(data, at), len(data) - 256 + at)

    return change


def _both_roots(segment: Segment) -> bytes:
    data = segment.encode()
    return flip(flip(data, 256 + 12), len(data) - 256 - 64 * len(segment.pages) + 12)


def _in_page(kind: int, at: int = 20) -> Change:
    def change(segment: Segment) -> bytes:
        names = {CATALOG: "catalog", SHARDS: "shards", ENTRIES: "entries"}
        place = next(begin for part, begin in segment.borders if part == names[kind])
        return flip(segment.encode(), place + at)

    return change


def _header(**fields: object) -> Change:
    return lambda segment: segment.header.update(fields)


def _root(number: int, **fields: int) -> Change:
    return lambda segment: segment.pages[number].root.update(fields)


def _row(page_kind: int, number: int, /, **fields: object) -> Change:
    return lambda segment: segment.page(page_kind).rows[number].update(fields)


def _pages(change: Callable[[list[Page]], Any]) -> Change:
    def changed(segment: Segment) -> None:
        change(segment.pages)

    return changed


def _rows(kind: int, change: Callable[[list[Row]], Any]) -> Change:
    def changed(segment: Segment) -> None:
        change(segment.page(kind).rows)

    return changed


def _inline(payload: bytes, **fields: object) -> Change:
    facts = {
        "inline": payload, "nbytes": len(payload), "crc32c": build.crc(payload), "shard": NO_SHARD,
    }  # fmt: skip
    return _row(ENTRIES, 0, **(facts | fields))


def _changes() -> Iterator[tuple[str, str, str, Change]]:
    yield from _header_changes()
    yield from _root_changes()
    yield from _catalog_changes()
    yield from _shard_changes()
    yield from _entry_changes()
    yield from _page_changes()


def _header_changes() -> Iterator[tuple[str, str, str, Change]]:
    yield "magic", "Both magics are damaged.", "bad_magic", _both(0)
    yield "header-checksum", "Both headers fail their checksum.", "checksum", _both(100)
    yield "major", "Major version 2.", "unsupported_version", _header(major=2)
    yield "required", "An unknown required bit.", "unknown_feature", _header(required=1 << 63)
    other = build.noise("another run", 16)
    yield "run-id", "The run_id of another run.", "wrong_run", _header(run_id=other)
    yield "writer", "Another writer than the name's.", "wrong_run", _header(writer=77)
    yield "worker", "Another worker than the name's.", "wrong_run", _header(worker=1, num_workers=2)
    yield "attempt", "Another attempt than the name's.", "wrong_run", _header(attempt=3)
    yield "last-flush", "Another flush than the name's.", "wrong_run", _header(last_flush=2)
    yield "first-flush", "Another count than the name's.", "wrong_run", _header(first_flush=1)
    for field, value in (
        ("root_nbytes", 1 << 25), ("head_nbytes", 1 << 40), ("series", 1 << 25),
        ("resume_step", 1 << 62), ("complete_through", (1 << 62, -1, -1, -1)),
        ("num_workers", 1_000_001),
    ):  # fmt: skip
        title = f"limit-{field.replace('_', '-')}"
        yield title, f"{field} is above its limit.", "limit", _header(**{field: value})
    for title, about, fields in (
        ("flags", "A reserved flag is set.", {"flags": 2}),
        ("reserved", "A reserved byte is not zero.", {"reserved": bytes(83) + b"\1"}),
        ("num-workers", "num_workers is 0.", {"num_workers": 0}),
        ("resume-step", "resume_step is -1.", {"resume_step": -1}),
        ("complete-through", "complete_through is -2.", {"complete_through": (-1, -1, -1, -2)}),
        ("root-nbytes", "root_nbytes is no multiple of 64.", {"root_nbytes": 250}),
        ("head-short", "head_nbytes ends before the shard page.", {"head_nbytes": 700}),
        ("series", "The catalog has fewer rows than the header says.", {"series": 9}),
    ):
        yield title, about, "malformed", _header(**fields)
    yield (
        "head-overflow", "head_nbytes reaches beyond the file.", "malformed",
        _header(head_nbytes=1 << 29),
    )  # fmt: skip
    yield (
        "file-longer-than-stated", "file_nbytes is less than the file has.", "malformed",
        _header(file_nbytes=600),
    )  # fmt: skip
    yield (
        "file-absurd", "file_nbytes is 2^63.", "truncated", _header(file_nbytes=1 << 63),
    )  # fmt: skip


def _root_changes() -> Iterator[tuple[str, str, str, Change]]:
    yield "root-checksum", "Both roots fail their checksum.", "checksum", _both_roots
    for field in ("nbytes", "raw_nbytes", "rows"):
        title = f"limit-page-{field.replace('_', '-')}"
        yield title, f"A page with {field} 2^32 - 1.", "limit", _root(0, **{field: 2**32 - 1})

    def bombs(pages: list[Page]) -> None:
        rows = pages[0].rows
        pages[1:1] = [
            Page(CATALOG, rows, stored=b"frame", root={"raw_nbytes": 1 << 24}) for _ in range(64)
        ]

    about = "The catalog pages of a small file have 1 GiB and some bytes, raw."
    yield "limit-head-raw-nbytes", about, "limit", _pages(bombs)
    yield "limit-page-step", "A page with max_step 2^62.", "limit", _root(2, max_step=1 << 62)
    for title, about, number, fields in (
        ("root-reserved", "A reserved byte of a root row is not zero.", 0, {"reserved": 1}),
        ("root-kind", "A page of kind 4.", 2, {"kind": 4}),
        ("root-kind-zero", "A page of kind 0.", 0, {"kind": 0}),
        ("root-rows-zero", "A page with 0 rows.", 2, {"rows": 0}),
        ("root-rows", "A page has fewer rows than the root says.", 2, {"rows": 5}),
        ("root-raw-nbytes", "raw_nbytes is not that of the frame.", 0, {"raw_nbytes": 8}),
        ("root-first-series", "The first catalog page begins at row 1.", 0,
         {"first_series": 1, "last_series": 2}),
        ("root-last-series", "last_series of a catalog page is one too many.", 0,
         {"last_series": 2}),
        ("root-catalog-step", "A catalog page with a max_step.", 0, {"max_step": 5}),
        ("root-min-step", "min_step is smaller than any of the page.", 2, {"min_step": 0}),
        ("root-max-step", "max_step is greater than any of the page.", 2, {"max_step": 99}),
        ("root-series-range", "An entry page says a series that it does not have.", 2,
         {"last_series": 0}),
    ):  # fmt: skip
        yield title, about, "malformed", _root(number, **fields)

    def moved(by: int) -> Change:
        def change(segment: Segment) -> None:
            place = dict(reversed(segment.borders))["entries"]
            segment.pages[2].root["offset"] = (place + by) % 2**64

        return change

    yield "root-gap", "A page begins 8 bytes late.", "malformed", moved(8)
    yield "root-overlap", "Two pages overlap by 8 bytes.", "malformed", moved(-8)
    yield (
        "root-offset-overflow",
        "A page begins at 2^64 - 8.",
        "malformed",
        _root(2, offset=2**64 - 8),
    )
    yield (
        "root-offset-beyond",
        "A page begins beyond the file.",
        "malformed",
        _root(2, offset=1 << 40),
    )
    yield (
        "root-order", "The shard page stands before the catalog.", "malformed",
        _pages(lambda pages: pages.insert(0, pages.pop(1))),
    )  # fmt: skip
    yield (
        "root-two-shard-pages", "Two shard pages.", "malformed",
        _pages(lambda pages: pages.insert(1, copy.deepcopy(pages[1]))),
    )  # fmt: skip


def _catalog_changes() -> Iterator[tuple[str, str, str, Change]]:
    fields: dict[str, Any]
    yield "catalog-checksum", "A catalog page is damaged.", "checksum", _in_page(CATALOG)
    for title, about, fields in (
        ("name", "A name of 1,025 bytes.", {"name": "b" * 1025}),
        ("rank", "A tensor of rank 33.", {"shape": [1] * 33, "grid": [0] * 33}),
        ("axis", "An axis of 2^48 + 1.", {"shape": [4, 2**48 + 1]}),
        ("grid", "A grid length of 2^62.", {"grid": [1 << 62, 0]}),
        ("series-step", "last_step is 2^62.", {"last_step": 1 << 62}),
    ):
        yield f"limit-{title}", about, "limit", _row(CATALOG, 1, **fields)
    part: dict[str, Any] = {"global_shape": [4, 20], "origin": [0, 1], "shape": [4, 20]}
    for title, about, fields in (
        ("kind", "A series of kind 3.", {"kind": 3}),
        ("mode", "A series in mode 4.", {"mode": 4}),
        ("empty-name", "Data with an empty name.", {"name": ""}),
        ("step-table-name", "A step table with a name.",
         {"kind": 2, "dtype": "int64", "shape": [2], "grid": [0]}),
        ("grid-rank", "The grid is shorter than the shape.", {"grid": [2]}),
        ("grid-negative", "A grid length of -1.", {"grid": [2, -1]}),
        ("length-negative", "An axis of -2.", {"shape": [4, -2]}),
        ("origin-rank", "The origin is shorter than the global shape.", part | {"origin": [0]}),
        ("part-rank", "A part of another rank than its global tensor.",
         {"global_shape": [80], "origin": [0]}),
        ("part-outside", "A part that reaches out of its global tensor.", part),
        ("statistics-dtype", "Statistics of dtype float32.",
         {"kind": 1, "shape": [10], "grid": [0]}),
        ("statistics-shape", "Statistics with nine fields.",
         {"kind": 1, "dtype": "float64", "shape": [9], "grid": [0]}),
        ("string-rank", "Strings of rank 2.", {"dtype": "string"}),
        ("series-steps", "first_step is greater than last_step.", {"first_step": 3}),
        ("order", "The names descend.", {"name": "A"}),
        ("twice", "Two rows are the same series.",
         {"name": "a", "dtype": "float64", "shape": [], "grid": []}),
    ):  # fmt: skip
        yield f"catalog-{title}", about, "malformed", _row(CATALOG, 1, **fields)


def _shard_changes() -> Iterator[tuple[str, str, str, Change]]:
    yield "shards-checksum", "The shard page is damaged.", "checksum", _in_page(SHARDS)
    yield "limit-shard-worker", "A shard of worker 10^6.", "limit", _row(SHARDS, 0, worker=10**6)
    yield "limit-shard-number", "A shard numbered 10^12.", "limit", _row(SHARDS, 0, number=10**12)
    yield "shard-number", "A shard numbered -1.", "malformed", _row(SHARDS, 0, number=-1)
    yield "shard-nbytes", "A shard of -1 bytes.", "malformed", _row(SHARDS, 0, nbytes=-1)
    yield (
        "shard-twice", "The same shard twice.", "malformed",
        _rows(SHARDS, lambda rows: rows.append(dict(rows[0]))),
    )  # fmt: skip


def _entry_changes() -> Iterator[tuple[str, str, str, Change]]:
    fields: dict[str, Any]
    yield "entries-checksum", "An entry page is damaged.", "checksum", _in_page(ENTRIES)
    large = bytes(65544)
    for title, about, change in (
        ("count", "An entry of 2^20 + 1 steps.", _row(ENTRIES, 0, count=2**20 + 1)),
        ("inline", "65,544 bytes inline.", _inline(large, raw_nbytes=len(large), count=8193)),
        ("chunk-raw", "A chunk of 2^32 - 1 raw bytes.", _row(ENTRIES, 2, raw_nbytes=2**32 - 1)),
        ("chunk", "A payload of 2^32 - 1 bytes.", _row(ENTRIES, 2, nbytes=2**32 - 1)),
        ("dims", "A length of 2^48 + 1.", _row(ENTRIES, 2, dims=[2**48 + 1])),
    ):
        yield f"limit-{title}", about, "limit", change
    for title, about, fields in (
        ("stride-overflow", "step + stride * (count - 1) passes 2^63.", {"stride": 2**62}),
        ("step", "A step of 2^62.", {"step": 2**62, "count": 1, "stride": 1}),
    ):
        # The root's max_step cannot be true, nor overflow here.
        def change(segment: Segment, fields: dict[str, Any] = fields) -> None:
            page = segment.page(ENTRIES)
            page.root |= {"min_step": 1, "max_step": 5}
            page.rows[0].update(fields)

        yield f"limit-{title}", about, "limit", change
    for title, about, number, fields in (
        ("series", "An entry of a series that is not there.", 2, {"series": 2}),
        ("step-negative", "A step of -1.", 0, {"step": -1}),
        ("stride-zero", "A stride of 0.", 0, {"stride": 0}),
        ("stride-of-one", "One step, with a stride of 2.", 1, {"stride": 2}),
        ("count-zero", "No steps.", 1, {"count": 0}),
        ("flags", "A reserved flag.", 0, {"flags": 4}),
        ("digest", "A digest without its flag.", 0, {"digest": 5}),
        ("flush-after", "A flush that the segment does not cover.", 1,
         {"first_flush": 2, "last_flush": 2}),
        ("flush-order", "first_flush is greater than last_flush.", 0, {"last_flush": 0}),
        ("dims-missing", "No length for an axis of -1.", 2, {"dims": []}),
        ("dims-more", "A length for no axis.", 0, {"dims": [1]}),
        ("dims-negative", "A length of -1.", 2, {"dims": [-1]}),
        ("chunk", "A chunk outside of the grid.", 2, {"chunk": 2}),
        ("raw-nbytes", "raw_nbytes is not that of the box.", 2, {"raw_nbytes": 164}),
        ("shard", "A shard that is not there.", 2, {"shard": 1}),
        ("offset-unaligned", "A payload at no multiple of 8.", 2, {"offset": 4}),
        ("offset-negative", "A payload at -8.", 2, {"offset": -8}),
        ("offset-overflow", "A payload that ends beyond 2^63.", 2, {"offset": 2**63 - 8}),
        ("offset-beyond", "A payload that ends beyond the shard row.", 2, {"offset": 1 << 30}),
        ("inline-offset", "An inline payload with an offset.", 0, {"offset": 8}),
        ("inline-and-shard", "An inline payload and a shard.", 2, {"inline": b"x"}),
        ("inline-nbytes", "An inline payload of another length.", 0, {"inline": bytes(23)}),
        ("dropped-payload", "Dropped steps with a payload.", 1, {"codec": 255}),
        ("dropped-crc", "Dropped steps with a checksum.", 1,
         {"codec": 255, "nbytes": 0, "raw_nbytes": 0, "inline": b""}),
        ("dropped-dims", "Dropped steps with a length that is not 0.", 2,
         {"codec": 255, "nbytes": 0, "raw_nbytes": 0, "shard": NO_SHARD, "offset": 0,
          "crc32c": 0}),
        ("twice", "The same step twice.", 1,
         {"step": 1, "count": 3, "stride": 2, "nbytes": 24, "raw_nbytes": 24,
          "inline": bytes(24)}),
    ):  # fmt: skip

        def change_row(
            segment: Segment, number: int = number, fields: dict[str, Any] = fields
        ) -> None:
            page = segment.page(ENTRIES)
            row = page.rows[number]
            row.update(fields)
            if "series" in fields:
                page.root |= {"last_series": 1}

        yield f"entry-{title}", about, "malformed", change_row
    yield (
        "entries-order", "Two entries change places.", "malformed",
        _rows(ENTRIES, lambda rows: rows.__setitem__(slice(0, 2), rows[1::-1])),
    )  # fmt: skip


def _page_changes() -> Iterator[tuple[str, str, str, Change]]:
    """What stands inside a page, in place of one good Arrow stream in one good frame."""

    def raw(make: Callable[[Page], bytes], kind: int = ENTRIES) -> Change:
        def change(segment: Segment) -> None:
            page = segment.page(kind)
            page.raw = make(page)

        return change

    def stored(make: Callable[[bytes], bytes]) -> Change:
        def change(segment: Segment) -> None:
            page = segment.page(ENTRIES)
            page.stored = make(page.content())

        return change

    columns = build.COLUMNS[ENTRIES]
    for title, about, make in (
        ("column-missing", "A column is missing.",
         lambda page: _stream(page, {k: v for k, v in columns.items() if k != "digest"})),
        ("column-more", "A column too many.",
         lambda page: _stream(page, columns | {"more": pa.int64()})),
        ("column-order", "Two columns change places.",
         lambda page: _stream(page, {"step": pa.int64()} | columns)),
        ("column-type", "A column of another type.",
         lambda page: _stream(page, columns | {"codec": pa.uint16()})),
        ("nulls", "A null.", lambda page: _stream(page, columns, null="step")),
        ("dictionary", "A dictionary.",
         lambda page: _stream(page, columns, dictionary="codec")),
        ("two-batches", "Two record batches.", lambda page: _stream(page, columns, times=2)),
        ("compressed", "Compression inside Arrow.",
         lambda page: _stream(page, columns, compression="zstd")),
        ("no-end", "No end-of-stream mark.", lambda page: _stream(page, columns)[:-8]),
        ("trailing", "Bytes behind the end-of-stream mark.",
         lambda page: _stream(page, columns) + bytes(8)),
        ("not-arrow", "No Arrow stream.", lambda _: build.noise("page", 400)),
        ("empty", "No bytes at all.", lambda _: b""),
    ):  # fmt: skip
        yield f"page-{title}", about, "malformed", raw(make)
    yield (
        "page-utf8", "A name that is not UTF-8.", "malformed",
        raw(lambda page: page.content().replace(b"ab\0\0\0\0\0\0", b"a\xff\0\0\0\0\0\0"), CATALOG),
    )  # fmt: skip
    skippable = b"\x50\x2a\x4d\x18\x04\0\0\0skip"
    for title, about, frame in (
        ("no-size", "A frame without its content size.",
         lambda content: payloads.zstd(content, with_size=False)),
        ("trailing", "Bytes behind the frame.", lambda content: payloads.zstd(content) + b"\0"),
        ("two", "Two frames.",
         lambda content: payloads.zstd(content[:64]) + payloads.zstd(content[64:])),
        ("skippable", "A skippable frame in front.",
         lambda content: skippable + payloads.zstd(content)),
        ("cut", "A frame that is cut.", lambda content: payloads.zstd(content)[:-9]),
        ("none", "No frame at all.", lambda content: content),
    ):  # fmt: skip
        yield f"frame-{title}", about, "malformed", stored(frame)


def _stream(
    page: Page,
    columns: dict[str, pa.DataType],
    *,
    times: int = 1,
    null: str = "",
    dictionary: str = "",
    compression: str | None = None,
) -> bytes:
    """Give an Arrow stream that is not as the format wants it."""
    arrays = []
    for name, kind in columns.items():
        values = [row.get(name, 0) for row in page.rows]
        if name == null:
            values[0] = None
        array = pa.array(values, kind)
        arrays.append(array.dictionary_encode() if name == dictionary else array)
    batch = pa.RecordBatch.from_arrays(arrays, names=list(columns))
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(sink, batch.schema, options=options) as writer:
        for _ in range(times):
            writer.write_batch(batch)
    return bytes(sink.getvalue().to_pybytes())
