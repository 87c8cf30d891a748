"""Merging the segments of one writer into one (spec, "Duties of a writer", joining of entries).

Entries stream through in windows of whole series, so memory is bounded by the largest
series, not by the segments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from tensorstore_fmt.format import layout, page
from tensorstore_fmt.format.catalog import SUMS, CatalogTable
from tensorstore_fmt.format.join import is_alone, join_entries
from tensorstore_fmt.format.page import Entries, StoredPage
from tensorstore_fmt.format.ragged import Ragged
from tensorstore_fmt.format.segment import Head

__all__ = ["MergeInput", "Merged", "merge", "unify"]

_WINDOW_ROWS: Final = 32_768
_WINDOW_NBYTES: Final = 4 * 1024 * 1024  # as memory; a merge holds a few times as much


@dataclass(frozen=True, slots=True)
class MergeInput:
    """A segment to merge: its head, and how to get the stored bytes of a page."""

    head: Head
    read_page: Callable[[int], bytes | memoryview]


@dataclass(frozen=True, slots=True)
class Merged:
    """What `segment.encode` needs."""

    series: CatalogTable
    shards: list[tuple[layout.ShardName, int]]
    pages: list[StoredPage]


def unify(catalogs: Sequence[CatalogTable]) -> tuple[CatalogTable, list[np.ndarray]]:
    """Give the union of catalogs in order, and for each catalog the new numbers of its rows.

    An axis whose lengths differ becomes −1.
    """
    shapes: dict[tuple[object, ...], tuple[int, ...]] = {}
    identities = [catalog.identities() for catalog in catalogs]
    for catalog, rows in zip(catalogs, identities, strict=True):
        for identity, shape in zip(rows, catalog.shape, strict=True):
            known = shapes.setdefault(identity, shape)
            if known is not shape and known != shape:
                shapes[identity] = tuple(
                    m if m == n else -1 for m, n in zip(known, shape, strict=True)
                )
    ordered = sorted(shapes)
    number = dict(zip(ordered, range(len(ordered)), strict=True))
    maps = [np.fromiter(map(number.__getitem__, rows), np.uint32, len(rows)) for rows in identities]
    columns: list[list[Any]] = [list(column) for column in zip(*ordered, strict=True)]
    names, kind, mode, dtypes, grid, global_shape, origin = columns or ([], [], [], [], [], [], [])
    sums = {key: np.zeros(len(ordered), np.int64) for key in SUMS}
    sums["first_step"][:] = layout.MAX_STEP
    for catalog, rows_map in zip(catalogs, maps, strict=True):  # rows of one differ: no .at needed
        for key, total in sums.items():
            if key == "first_step":
                total[rows_map] = np.minimum(total[rows_map], catalog.sums[key])
            elif key == "last_step":
                total[rows_map] = np.maximum(total[rows_map], catalog.sums[key])
            else:
                total[rows_map] += catalog.sums[key]
    table = CatalogTable(
        names=names,
        kind=kind,
        mode=mode,
        dtypes=dtypes,
        shape=[shapes[identity] for identity in ordered],
        grid=grid,
        global_shape=global_shape,
        origin=origin,
        sums=sums,
    )
    return table, maps


def merge(inputs: Sequence[MergeInput]) -> Merged:
    """Merge segments of one writer, oldest flushes first."""
    catalogs = [i.head.catalog.table() for i in inputs]
    series, series_maps = unify(catalogs)
    shards, shard_maps = _unify_shards([i.head.shards for i in inputs])
    alone = is_alone(series)
    streams = [
        _Stream(i, catalog, series, series_map, shard_map)
        for i, catalog, series_map, shard_map in zip(
            inputs, catalogs, series_maps, shard_maps, strict=True
        )
    ]
    pages: list[StoredPage] = []
    waiting: list[Entries] = []
    waiting_rows = waiting_nbytes = 0
    for entries in _windows(streams, len(series)):
        joined = join_entries(entries, series, alone)
        waiting.append(joined)
        waiting_rows += len(joined)
        waiting_nbytes += len(joined.inline.values)
        if waiting_rows >= layout.TARGET_PAGE_ROWS or waiting_nbytes >= _WINDOW_NBYTES:
            pages += page.encode_entries(Entries.concat(waiting))
            waiting, waiting_rows, waiting_nbytes = [], 0, 0
    pages += page.encode_entries(Entries.concat(waiting))
    return Merged(series, shards, pages)


def _unify_shards(
    tables: Sequence[Sequence[tuple[layout.ShardName, int]]],
) -> tuple[list[tuple[layout.ShardName, int]], list[np.ndarray]]:
    nbytes: dict[layout.ShardName, int] = {}
    for table in tables:
        for name, size in table:
            nbytes[name] = max(size, nbytes.get(name, 0))
    ordered = sorted(nbytes)
    number = {name: i for i, name in enumerate(ordered)}
    maps = [np.fromiter((number[n] for n, _ in t), np.uint32, len(t)) for t in tables]
    return [(name, nbytes[name]) for name in ordered], maps


class _Stream:
    """The entries of one input, with the numbers of the merged catalog."""

    def __init__(
        self,
        source: MergeInput,
        catalog: CatalogTable,
        merged: CatalogTable,
        series_map: np.ndarray,
        shard_map: np.ndarray,
    ) -> None:
        self._source = source
        self._series_map = series_map
        self._shard_map = shard_map
        self._catalog = catalog
        self._merged = merged
        head = source.head
        self._pages = head.entry_pages().tolist()
        self._at = 0
        self._held = Entries.empty()

    def next_series(self) -> int | None:
        """Give the smallest series that is still to come."""
        if len(self._held):
            return int(self._held.rows["series"][0])
        if self._at == len(self._pages):
            return None
        root = self._source.head.root
        return int(self._series_map[root["first_series"][self._pages[self._at]]])

    def take_before(self, stop: int) -> Entries:
        """Give all entries of series below `stop`."""
        root = self._source.head.root
        parts = [self._held] if len(self._held) else []
        while self._at < len(self._pages):
            number = self._pages[self._at]
            if self._series_map[root["first_series"][number]] >= stop:
                break
            parts.append(self._decode(number))
            self._at += 1
        entries = Entries.concat(parts)
        cut = int(np.searchsorted(entries.rows["series"], stop))
        self._held = entries.slice(cut, len(entries))
        return entries.slice(0, cut)

    def share_below(self, stop: int) -> float:
        """Give what share of a window `take_before` would fill, at most."""
        root = self._source.head.root
        rows = int(np.searchsorted(self._held.rows["series"], stop))
        nbytes = int(self._held.inline.offsets[rows])
        if pages := self._pages[self._at :]:
            needed = root[pages][self._series_map[root["first_series"][pages]] < stop]
            rows += int(needed["rows"].sum())
            nbytes += int(needed["raw_nbytes"].sum())
        return max(rows / _WINDOW_ROWS, nbytes / _WINDOW_NBYTES)

    def _decode(self, number: int) -> Entries:
        entries = self._source.head.decode_entries(number, self._source.read_page(number))
        rows = entries.rows
        dims = _remap_dims(entries, self._catalog, self._merged, self._series_map)
        rows["series"] = self._series_map[rows["series"]]
        is_stored = rows["shard"] != layout.INLINE_SHARD
        if is_stored.any():
            rows["shard"][is_stored] = self._shard_map[rows["shard"][is_stored]]
        return Entries(rows, dims, entries.inline)


def _remap_dims(
    entries: Entries,
    catalog: CatalogTable,
    merged: CatalogTable,
    series_map: np.ndarray,
) -> Ragged:
    """Give the varying lengths of entries under a catalog in which more axes may vary."""
    numbers = np.unique(entries.rows["series"])
    if all(catalog.shape[n] == merged.shape[series_map[n]] for n in numbers.tolist()):
        return entries.dims
    parts: list[np.ndarray] = []
    lengths = np.empty(len(entries), np.int64)
    for n in numbers.tolist():  # rows of one series are neighbours, in order
        old, new = catalog.shape[n], merged.shape[series_map[n]]
        begin, end = np.searchsorted(entries.rows["series"], (n, n + 1))
        full = np.tile(np.array(old, np.int64), (int(end - begin), 1))
        varying = [i for i, length in enumerate(old) if length < 0]
        if varying:
            full[:, varying] = entries.dims.slice(begin, end).values.reshape(-1, len(varying))
        # What was dropped has no lengths: zeros stand for them, whatever the catalog said.
        full[entries.rows["codec"][begin:end] == layout.CODEC_DROPPED] = 0
        keep = [i for i, length in enumerate(new) if length < 0]
        parts.append(full[:, keep].ravel())
        lengths[begin:end] = len(keep)
    return Ragged(np.concatenate([[0], np.cumsum(lengths)]), np.concatenate(parts))


def _windows(streams: Sequence[_Stream], n_series: int) -> Iterator[Entries]:
    """Give entries of all streams in order, whole series at a time."""
    while True:
        nexts = [n for s in streams if (n := s.next_series()) is not None]
        if not nexts:
            return
        stop, step = min(nexts) + 1, 1
        while stop < n_series and sum(s.share_below(stop + step) for s in streams) < 1:
            stop, step = min(stop + step, n_series), step * 2
        yield Entries.concat([e for s in streams if len(e := s.take_before(stop))])
