"""Segments: catalog, shards and entries, read from a head or from a whole file ("6.3 Pages")."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .arrow_page import page_rows
from .checksums import crc32c
from .codecs import unzstd
from .errors import SpecError, need
from .grid import chunk_box, count_chunks
from .head import HEADER_NBYTES, read_header, read_root
from .limits import (
    CATALOG,
    DROPPED,
    DTYPES,
    ENTRIES,
    MAX_AXIS,
    MAX_CHUNK_NBYTES,
    MAX_CHUNK_RAW_NBYTES,
    MAX_ENTRY_STEPS,
    MAX_INLINE_NBYTES,
    MAX_NAME_NBYTES,
    MAX_NUMBER,
    MAX_RANK,
    MAX_STEP,
    MAX_WORKER,
    NO_SHARD,
    SHARDS,
)
from .records import (
    Entry,
    Header,
    RootRow,
    SegmentName,
    Series,
    Shard,
    full_shape,
    parse_segment_name,
)


@dataclass
class EntryPage:
    """An entry page: its rows, or what is wrong with it ("10.2": only that page is lost)."""

    row: RootRow
    entries: list[Entry] = field(default_factory=list)
    error: SpecError | None = None


@dataclass
class Segment:
    """A segment, or the head of one (then without pages)."""

    header: Header
    root: list[RootRow]
    series: list[Series] = field(default_factory=list)
    shards: list[Shard] = field(default_factory=list)
    pages: list[EntryPage] = field(default_factory=list)

    @property
    def entries(self) -> list[Entry]:
        return [entry for page in self.pages for entry in page.entries]


def read_segment(
    data: bytes, *, name: str | None = None, run_id: bytes | str | None = None
) -> Segment:
    """Read and check a whole segment; the first damaged page is the error."""
    parsed = parse_segment_name(name) if name is not None else None
    need(name is None or parsed is not None, f"name {name}", "wrong_run")
    run = bytes.fromhex(run_id) if isinstance(run_id, str) else run_id
    segment = read_head(data, parsed, run, len(data))
    read_entry_pages(segment, data)
    for page in segment.pages:
        if page.error is not None:
            raise page.error
        for entry in page.entries:
            check_use(segment.series[entry.series], entry)
    return segment


def validate_segment(
    data: bytes, *, name: str | None = None, run_id: bytes | str | None = None
) -> Segment:
    """Check also what a reader need not: copies, and what only all pages together show."""
    segment = read_segment(data, name=name, run_id=run_id)
    size, root = len(data), segment.header.root_nbytes
    need(data[:HEADER_NBYTES] == data[size - HEADER_NBYTES :], "the headers differ")
    end = size - HEADER_NBYTES
    first = data[HEADER_NBYTES : HEADER_NBYTES + root]
    need(first == data[end - root : end], "the roots differ")
    entries = segment.entries
    keys = [(e.series, e.step, e.chunk, e.first_flush) for e in entries]
    need(all(a < b for a, b in itertools.pairwise(keys)), "order of the entries")
    groups = {k: list(g) for k, g in itertools.groupby(entries, lambda e: e.series)}
    need(len(groups) == len(segment.series), "series without entries")
    for number, group in groups.items():
        row = segment.series[number]
        steps = (min(e.step for e in group), max(e.last_step for e in group))
        need((row.first_step, row.last_step) == steps, "step range of a series")
    named = {e.shard for e in entries} - {NO_SHARD}
    need(len(named) == len(segment.shards), "shard row that no entry names")
    return segment


def read_head(
    data: bytes, name: SegmentName | None, run_id: bytes | None, file_nbytes: int
) -> Segment:
    """Read header, root, catalog and shard page from a segment or its head ("6. Segment")."""
    header = read_header(data, name, run_id, file_nbytes)
    segment = Segment(header, read_root(data, header))
    for row in segment.root:
        if row.kind == CATALOG:
            segment.series += [Series(*values) for values in _read_page(data, row)]
        elif row.kind == SHARDS:
            segment.shards += [Shard(*values) for values in _read_page(data, row)]
    for series in segment.series:
        _check_series(series)
    keys = [series.sort_key() for series in segment.series]
    need(all(a < b for a, b in itertools.pairwise(keys)), "order of the catalog")
    for shard in segment.shards:
        need(max(shard[:2]) <= MAX_WORKER, "worker of a shard", "limit")
        need(shard.number <= MAX_NUMBER, "number of a shard", "limit")
        need(min(shard) >= 0 and shard.writer, "shard row")
    ascending = all(a[:4] < b[:4] for a, b in itertools.pairwise(segment.shards))
    need(ascending, "order of the shards")
    return segment


def _read_page(data: bytes, row: RootRow) -> Iterator[tuple[Any, ...]]:
    stored = data[row.offset : row.offset + row.nbytes]
    need(crc32c(stored) == row.crc32c, f"page at {row.offset}", "checksum")
    return page_rows(unzstd(stored, row.raw_nbytes), row.kind, row.rows)


# ---- catalog ---------------------------------------------------------------------------------


def _check_series(row: Series) -> None:
    """Limits and rules of a catalog row."""
    lists = (row.shape, row.grid, row.global_shape, row.origin)
    need(len(row.name.encode()) <= MAX_NAME_NBYTES, "name", "limit")
    need(max(map(len, lists)) <= MAX_RANK, "rank", "limit")
    need(all(x <= MAX_AXIS for part in lists for x in part), "axis", "limit")
    need(max(row.first_step, row.last_step) <= MAX_STEP, "step", "limit")
    need(row.kind <= 2 and row.mode <= 3 and (not row.name) == (row.kind == 2), "kind, name")
    need(len(row.grid) == len(row.shape) and min(row.shape, default=0) >= -1, "shape, grid")
    need(all(x >= 0 for part in lists[1:] for x in part), "negative length")
    need(len(row.global_shape) == len(row.origin), "origin")
    need(0 <= row.first_step <= row.last_step, "first_step, last_step")
    need(row.dtype != "string" or len(row.shape) <= 1, "rank of strings")
    is_part = row.part is not None and row.kind != 1
    need(not is_part or len(row.origin) == len(row.shape), "rank of a part")


# ---- entries ---------------------------------------------------------------------------------


def read_entry_pages(segment: Segment, data: bytes) -> None:
    """Read all entry pages; a damaged one is kept with its error."""
    for row in segment.root:
        if row.kind == ENTRIES:
            page = EntryPage(row)
            try:
                page.entries = _read_entry_page(segment, data, row)
            except SpecError as error:
                page.error = error
            segment.pages.append(page)


def _read_entry_page(segment: Segment, data: bytes, row: RootRow) -> list[Entry]:
    page = [Entry(*values) for values in _read_page(data, row)]
    for entry in page:
        need(entry.series < len(segment.series), "series of an entry")
        _check_entry(segment, entry)
    keys = [(e.series, e.step, e.chunk, e.first_flush) for e in page]
    need(all(a < b for a, b in itertools.pairwise(keys)), "order of the entries")
    steps = (min(e.step for e in page), max(e.last_step for e in page))
    need((row.min_step, row.max_step) == steps, "step range of an entry page")
    series = (page[0].series, page[-1].series)
    need((row.first_series, row.last_series) == series, "series range of an entry page")
    return page


def _check_entry(segment: Segment, e: Entry) -> None:
    """Limits and rules of one entry."""
    header = segment.header
    need(e.num_steps <= MAX_ENTRY_STEPS, "count", "limit")
    need(e.last_step <= MAX_STEP, "step", "limit")
    need(e.nbytes <= MAX_CHUNK_NBYTES and e.raw_nbytes <= MAX_CHUNK_RAW_NBYTES, "chunk", "limit")
    need(len(e.inline) <= MAX_INLINE_NBYTES, "inline", "limit")
    need(all(x <= MAX_AXIS for x in e.dims), "dims", "limit")
    need(e.step >= 0 and e.stride >= 1 and e.num_steps >= 1, "steps of an entry")
    need(e.num_steps > 1 or (e.stride == 1 and e.first_flush == e.last_flush), "entry of one step")
    flushes = (header.first_flush, e.first_flush, e.last_flush, header.last_flush)
    need(list(flushes) == sorted(flushes), "flushes of an entry")
    need(e.flags < 4 and (e.flags & 2 or e.digest == 0), "flags or digest")
    need(min(e.dims, default=0) >= 0, "dims")
    need(len(e.dims) == segment.series[e.series].shape.count(-1), "dims")
    if e.shard == NO_SHARD:
        need(e.offset == 0 and len(e.inline) == e.nbytes, "inline payload")
    else:
        need(e.shard < len(segment.shards) and not e.inline, "shard of an entry")
        need(e.offset >= 0 and e.offset % 8 == 0, "offset of a payload")
        need(e.offset + e.nbytes <= segment.shards[e.shard].nbytes, "nbytes of a shard row")
    if e.codec == DROPPED:
        empty = (e.chunk, e.flags, e.nbytes, e.raw_nbytes, e.crc32c, e.digest, any(e.dims))
        need(e.shard == NO_SHARD and not any(empty), "an entry of dropped steps")


def check_part(series: Series, shape: list[int]) -> None:
    """A part lies within its global tensor ("2. Terms")."""
    if series.kind == 0 and series.part:
        for at, length, whole in zip(series.origin, shape, series.global_shape, strict=True):
            need(at + length <= whole, "part outside of its global tensor")


def is_in_grid(series: Series, e: Entry) -> bool:
    """Say whether the grid has the chunk; others are not looked for ("6.3")."""
    return e.codec == DROPPED or e.chunk < count_chunks(full_shape(series, e), series.grid)


def check_use(series: Series, e: Entry) -> None:
    """Check what makes no page damaged, but what is read with it malformed ("6.3", section 7)."""
    if e.codec == DROPPED:
        return
    shape = full_shape(series, e)
    if series.kind != 0:
        fixed = ("float64", [10]) if series.kind == 1 else ("int64", [2])
        is_fixed = (series.dtype, series.shape) == fixed and series.grid == [0]
        need(is_fixed and (series.kind == 1 or not series.part), "statistics or step table")
    check_part(series, shape)
    need(is_in_grid(series, e), "chunk outside of the grid")
    box = chunk_box(shape, series.grid, e.chunk)
    elements = e.rows * math.prod(b - a for a, b in box)
    if series.dtype == "string":
        least = 4 * (elements + 1) if elements else 0
        need(e.raw_nbytes >= least and (elements or not e.raw_nbytes), "raw_nbytes of strings")
    elif series.dtype in DTYPES:
        need(e.raw_nbytes == elements * DTYPES[series.dtype].itemsize, "raw_nbytes of a chunk")
