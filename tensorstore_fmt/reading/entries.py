"""Entries: fetching entry pages and finding in them what was saved of a name."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt.errors import FormatError, MissingFileError
from tensorstore_fmt.format import layout
from tensorstore_fmt.format.page import ENTRY_ROW, Entries
from tensorstore_fmt.format.ragged import Ragged
from tensorstore_fmt.reading import pool
from tensorstore_fmt.reading.cache import Cache
from tensorstore_fmt.reading.plan import merge_ranges
from tensorstore_fmt.reading.view import MANY, NO_BYTES, Segment, Source, View
from tensorstore_fmt.storage import Range, Storage

__all__ = ["Found", "LostSegmentsError", "Page", "Pages", "Query", "find"]

_MAX_CACHED_NBYTES: Final = 64 * 1024 * 1024
_MAX_REQUEST_NBYTES: Final = 8 * 1024 * 1024
_THREADED_NBYTES: Final = 128 * 1024
_ROW_NBYTES: Final = 160  # of a decoded entry without its lists and inline bytes

_MOST_KEYS: Final = 1 << 62  # pairs of a series and a step

_I64 = NDArray[np.int64]

PageKey: TypeAlias = tuple[layout.SegmentName, int]
"""A page: its segment, and its row in the root."""


class LostSegmentsError(Exception):
    """Segments of a view have vanished; internal, another view may do.

    Attributes
    ----------
    lost
        By segment, what to raise if nothing can stand for it.
    """

    def __init__(self, lost: dict[layout.SegmentName, FormatError]) -> None:
        super().__init__(", ".join(name.path for name in lost))
        self.lost = lost


@dataclass(frozen=True, slots=True)
class Page:
    """A decoded entry page with the columns that searches need, contiguous."""

    entries: Entries
    series: NDArray[np.uint32]
    step: _I64
    last_step: _I64
    nbytes: int

    @classmethod
    def of(cls, entries: Entries) -> Page:
        """Wrap decoded entries."""
        rows = entries.rows
        nbytes = _ROW_NBYTES * len(rows) + entries.dims.values.nbytes + entries.inline.values.nbytes
        return cls(
            entries,
            np.ascontiguousarray(rows["series"]),
            np.ascontiguousarray(rows["step"]),
            entries.last_step,
            nbytes,
        )

    def rows_of(self, series: int, low: int, high: int) -> slice | _I64:
        """Give the rows of a series that cover any of the steps low … high."""
        begin = int(self.series.searchsorted(series, side="left"))
        end = int(self.series.searchsorted(series, side="right"))
        step = self.step[begin:end]
        end = begin + int(step.searchsorted(high, side="right"))
        first = begin + int(step.searchsorted(low, side="left"))
        if first == begin:
            return slice(begin, end)
        # Entries that begin earlier may reach into the range.
        earlier = np.flatnonzero(self.last_step[begin:first] >= low)
        if len(earlier) == 0:
            return slice(first, end)
        if len(earlier) == first - begin:
            return slice(begin, end)
        return np.concatenate([earlier + begin, np.arange(first, end)])

    def only_row(self, series: int, step: int) -> int:
        """Give the only row of a series that covers a step; −1 if none does, or not only one."""
        rows = self.rows_of(series, step, step)
        if isinstance(rows, slice):
            return rows.start if rows.stop - rows.start == 1 else -1
        return int(rows[0]) if len(rows) == 1 else -1

    def only_rows(self, series: Sequence[int], steps: Sequence[int]) -> list[int]:
        """Do as `only_row` for each.

        Parameters
        ----------
        series, steps
            One of each for each answer.
        """
        if len(series) < MANY or not len(self.series):
            return [self.only_row(row, at) for row, at in zip(series, steps, strict=True)]
        base, span = int(self.series[0]), int(self.step.max()) + 1
        if (int(self.series[-1]) - base + 1) * span > _MOST_KEYS:
            return [self.only_row(row, at) for row, at in zip(series, steps, strict=True)]
        rows, wanted = np.array(series, np.int64), np.array(steps, np.int64)
        # Entries are sorted by series, then by step.
        keys = (self.series.astype(np.int64) - base) * span + self.step
        last = keys.searchsorted((rows - base) * span + np.minimum(wanted, span - 1), side="right")
        last -= 1
        begin = self.series.searchsorted(rows.astype(np.uint32), side="left")
        is_there = last >= begin
        is_there &= self.last_step.take(last, mode="clip") >= wanted
        (others,) = np.nonzero(is_there & (last > begin))
        if len(others):
            earlier = np.stack([begin[others], last[others]], axis=1).reshape(-1)
            reach = np.maximum.reduceat(self.last_step, earlier)[::2]
            is_there[others[reach >= wanted[others]]] = False
        found: list[int] = np.where(is_there, last, -1).tolist()
        return found


class Pages:
    """Decoded entry pages of a run, the least recently used ones forgotten. Threads share it."""

    def __init__(self, storage: Storage, *, max_nbytes: int = _MAX_CACHED_NBYTES) -> None:
        self._storage = storage
        self._cache: Cache[PageKey, Page] = Cache(max_nbytes)

    def get(self, needed: Sequence[tuple[Segment, int]]) -> dict[PageKey, Page]:
        """Give pages by segment and root row, fetching what is not here in one round.

        Raises
        ------
        LostSegmentsError
            A segment is not there any more.
        FormatError
            A page is damaged.
        """
        pages: dict[PageKey, Page] = {}
        missing: dict[PageKey, Segment] = {}
        for segment, number in needed:
            key = (segment.name, number)
            page = self._cache.get(key)
            if page is None:
                missing[key] = segment
            else:
                pages[key] = page
        if missing:
            pages |= self._load(missing)
        return pages

    def forget(self) -> None:
        """Forget all pages."""
        self._cache.clear()

    def _load(self, missing: dict[PageKey, Segment]) -> dict[PageKey, Page]:
        lost: dict[layout.SegmentName, FormatError] = {}  # vanished
        pages: dict[PageKey, Page] = {}
        is_doubtful = False
        for key, page in self._decoded(missing).items():
            name, segment = key[0], missing[key]
            if isinstance(page, Page):
                pages[key] = page
            elif isinstance(page, FileNotFoundError):
                lost[name] = MissingFileError(
                    f"{name.path}: the segment is not there any more, and none that covers it",
                    file=name.path,
                )
            elif isinstance(page, FormatError) and len(segment.kept):
                segment.kept = NO_BYTES  # it may come from a damaged bundle
                is_doubtful = True
            else:
                if isinstance(page, FormatError):
                    page.facts.setdefault("file", name.path)
                raise page
        if is_doubtful:
            return pages | self._load({k: s for k, s in missing.items() if k not in pages})
        if lost:
            raise LostSegmentsError(lost)
        for key, page in pages.items():
            self._cache.put(key, page, page.nbytes)
        return pages

    def _decoded(self, missing: dict[PageKey, Segment]) -> dict[PageKey, Page | Exception]:
        """Fetch and decode pages, in threads if they are many bytes."""
        stored = self._stored(missing)
        decoded: dict[PageKey, Page | Exception] = {}

        def work(keys: Sequence[PageKey]) -> None:
            for key in keys:
                data = stored[key]
                if isinstance(data, Exception):
                    decoded[key] = data
                    continue
                try:
                    decoded[key] = Page.of(missing[key].head.decode_entries(key[1], data))
                except FormatError as error:
                    decoded[key] = error

        nbytes = sum([len(data) for data in stored.values() if not isinstance(data, Exception)])
        threads = pool.THREADS if nbytes > _THREADED_NBYTES else 1
        keys = list(missing)
        pool.run_all(work, [part for i in range(threads) if (part := keys[i::threads])])
        return {key: decoded[key] for key in keys}

    def _stored(self, missing: dict[PageKey, Segment]) -> dict[PageKey, memoryview | Exception]:
        """Get stored pages from what is kept of their segments, else from the storage."""
        stored: dict[PageKey, memoryview | Exception] = {}
        files: dict[layout.SegmentName, int] = {}
        wanted: list[tuple[PageKey, int, int, int]] = []
        for key, segment in missing.items():
            row = segment.head.root[key[1]]
            offset, nbytes = int(row["offset"]), int(row["nbytes"])
            if offset + nbytes <= len(segment.kept):
                stored[key] = segment.kept[offset : offset + nbytes]
            else:
                wanted.append((key, files.setdefault(key[0], len(files)), offset, nbytes))
        if not wanted:
            return stored
        columns = np.array([each[1:] for each in wanted], np.int64).T
        merged = merge_ranges(
            *columns,
            max_gap_bytes=self._storage.max_gap_bytes,
            max_request_nbytes=_MAX_REQUEST_NBYTES,
        )
        paths = [name.path for name in files]
        requests = [
            Range(paths[file], start, stop)
            for file, start, stop in zip(
                merged.file.tolist(), merged.start.tolist(), merged.stop.tolist(), strict=True
            )
        ]
        results = self._storage.fetch_settled(requests)
        for (key, _, offset, nbytes), number in zip(wanted, merged.request.tolist(), strict=True):
            result = results[number]
            if isinstance(result, Exception):
                stored[key] = result
            else:
                begin = offset - requests[number].start
                stored[key] = memoryview(result)[begin : begin + nbytes]
        return stored


class Query(NamedTuple):
    """Which entries to find: of a name, from step `low` to `high`; None: any."""

    name: str
    kind: int = layout.KIND_DATA
    low: int = 0
    high: int = layout.MAX_STEP
    mode: int | None = None
    worker: int | None = None
    attempt: int | None = None

    def accepts(self, source: Source, view: View) -> bool:
        """Say whether a series is meant, or decides what of those that are meant is visible."""
        if not (
            (self.mode is None or source.series.mode == self.mode)
            and (self.attempt is None or source.attempt == self.attempt)
            and source.series.first_step <= self.high
            and source.series.last_step >= self.low
        ):
            return False
        if self.worker is None or source.worker == self.worker:
            return True
        # Another worker's steps below the one its attempt resumed from hide those of earlier
        # attempts, too. As a rule there are none.
        return (
            self.attempt is None
            and source.attempt > view.attempts[0]
            and source.series.first_step < view.resume_step(source.attempt)
        )


@dataclass(frozen=True, slots=True)
class Found:
    """Entries of a query, in the order of their sources, then as in the pages.

    Attributes
    ----------
    sources
        Where they come from.
    begins
        Entries ``begins[i]`` to ``begins[i + 1]`` come from ``sources[i]``.
    entries
        All of them.
    count
        Shape (n,), int64: how many of its steps the view shows of each.
    """

    query: Query
    sources: tuple[Source, ...]
    begins: tuple[int, ...]
    entries: Entries
    count: _I64

    @property
    def source(self) -> _I64:
        """Number of each entry's source."""
        if len(self.sources) == 1:
            return np.zeros(len(self.entries), np.int64)
        return np.repeat(np.arange(len(self.sources)), np.diff(self.begins))

    def source_of(self, entry: int) -> Source:
        """Give where an entry comes from."""
        return self.sources[bisect_right(self.begins, entry) - 1]

    @property
    def last_step(self) -> _I64:
        """Greatest step of each that the view shows."""
        rows = self.entries.rows
        last: _I64 = rows["step"] + rows["stride"] * (self.count - 1)
        return last


def find(view: View, pages: Pages, queries: Sequence[Query]) -> list[Found]:
    """Find the entries of queries, fetching all pages they need in one round.

    Raises
    ------
    LostSegmentsError
        A segment is not there any more.
    FormatError
        A page is damaged.
    """
    asked = []
    needed: list[tuple[Segment, int]] = []
    for query in queries:
        parts = []
        for source in view.sources(query.name, query.kind):
            if query.accepts(source, view):
                numbers = source.segment.pages_of(source.row, query.low, query.high)
                if numbers:
                    parts.append((source, numbers))
                    needed += [(source.segment, number) for number in numbers]
        asked.append(parts)
    have = pages.get(needed)
    return [_collect(query, parts, have) for query, parts in zip(queries, asked, strict=True)]


def _collect(
    query: Query,
    parts: Sequence[tuple[Source, list[int]]],
    have: dict[PageKey, Page],
) -> Found:
    sources: list[Source] = []
    begins = [0]
    pieces: list[Entries] = []
    counts: list[_I64] = []
    for source, numbers in parts:
        n = 0
        for number in numbers:
            page = have[source.segment.name, number]
            rows = page.rows_of(source.row, query.low, query.high)
            if isinstance(rows, slice):
                piece = page.entries.slice(rows.start, rows.stop)
            else:
                piece = page.entries.take(rows)
            if not len(piece):
                continue
            count = piece.rows["count"].astype(np.int64)
            if source.segment.cut is not None:
                piece, count = _cut(piece, count, source)
            n += len(piece)
            pieces.append(piece)
            counts.append(count)
        if n:
            sources.append(source)
            begins.append(begins[-1] + n)
    return Found(
        query,
        tuple(sources),
        tuple(begins),
        _concat(pieces),
        counts[0] if len(counts) == 1 else np.concatenate(counts or [np.empty(0, np.int64)]),
    )


def _concat(pieces: Sequence[Entries]) -> Entries:
    """Put entries behind each other; `np.concatenate` is slow on records."""
    if len(pieces) < 2:
        return pieces[0] if pieces else Entries.empty()
    rows = np.empty(sum(map(len, pieces)), ENTRY_ROW)
    at = 0
    for piece in pieces:
        rows[at : at + len(piece)] = piece.rows
        at += len(piece)
    return Entries(
        rows, Ragged.concat([p.dims for p in pieces]), Ragged.concat([p.inline for p in pieces])
    )


def _cut(piece: Entries, count: _I64, source: Source) -> tuple[Entries, _I64]:
    """Hide what the view had not seen (spec, "Damage and merges")."""
    cut = source.segment.cut
    assert cut is not None
    rows = piece.rows
    last = cut.last_step(source.series)
    shown = (last - rows["step"]) // rows["stride"] + 1
    count = np.where(rows["last_flush"] > cut.flush, np.clip(shown, 0, count), count)
    keep = (rows["first_flush"] <= cut.flush) & (count > 0)
    return (piece, count) if keep.all() else (piece.take(keep), count[keep])
