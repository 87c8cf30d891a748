"""Merging the segments of one writer into one (spec, "Duties of a writer", joining of entries).

Entries stream through in windows of whole series, so memory is bounded by the largest
series, not by the segments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import crc32c
import numpy as np

from tensorstore_fmt.format import codec, layout, page
from tensorstore_fmt.format.page import Entries, Series, StoredPage
from tensorstore_fmt.format.ragged import Ragged
from tensorstore_fmt.format.segment import Head

__all__ = ["MergeInput", "Merged", "is_alone", "join_entries", "merge", "unify"]

_WINDOW_ROWS: Final = 32_768
_HALF_JOINED_NBYTES: Final = layout.JOINED_INLINE_NBYTES // 2


@dataclass(frozen=True, slots=True)
class MergeInput:
    """A segment to merge: its head, and how to get the stored bytes of a page."""

    head: Head
    read_page: Callable[[int], bytes | memoryview]


@dataclass(frozen=True, slots=True)
class Merged:
    """What `segment.encode` needs."""

    series: list[Series]
    shards: list[tuple[layout.ShardName, int]]
    pages: list[StoredPage]


def unify(catalogs: Sequence[Sequence[Series]]) -> tuple[list[Series], list[np.ndarray]]:
    """Give the union of catalogs in order, and for each catalog the new numbers of its rows.

    An axis whose lengths differ becomes −1.
    """
    merged: dict[tuple[object, ...], Series] = {}
    for catalog in catalogs:
        for series in catalog:
            old = merged.get(series.identity)
            merged[series.identity] = series if old is None else _both(old, series)
    ordered = sorted(merged.values(), key=lambda s: s.identity)
    number = {series.identity: i for i, series in enumerate(ordered)}
    maps = [
        np.fromiter((number[s.identity] for s in catalog), np.uint32, len(catalog))
        for catalog in catalogs
    ]
    return ordered, maps


def _both(a: Series, b: Series) -> Series:
    return replace(
        a,
        shape=tuple(m if m == n else -1 for m, n in zip(a.shape, b.shape, strict=True)),
        first_step=min(a.first_step, b.first_step),
        last_step=max(a.last_step, b.last_step),
        steps=a.steps + b.steps,
        raw_nbytes=a.raw_nbytes + b.raw_nbytes,
        stored_nbytes=a.stored_nbytes + b.stored_nbytes,
    )


def merge(inputs: Sequence[MergeInput]) -> Merged:
    """Merge segments of one writer, oldest flushes first."""
    catalogs = [[i.head.catalog[n] for n in range(len(i.head.catalog))] for i in inputs]
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
    waiting_rows = 0
    for entries in _windows(streams, len(series)):
        joined = join_entries(entries, series, alone)
        waiting.append(joined)
        waiting_rows += len(joined)
        if waiting_rows >= layout.TARGET_PAGE_ROWS:
            pages += page.encode_entries(Entries.concat(waiting))
            waiting, waiting_rows = [], 0
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


def is_alone(series: Sequence[Series]) -> np.ndarray:
    """Say of each series whether no other one can replace its steps."""
    groups: dict[tuple[object, ...], int] = {}
    for s in series:
        groups[s.group] = groups.get(s.group, 0) + 1
    return np.fromiter((groups[s.group] == 1 for s in series), np.bool_, len(series))


class _Stream:
    """The entries of one input, with the numbers of the merged catalog."""

    def __init__(
        self,
        source: MergeInput,
        catalog: Sequence[Series],
        merged: Sequence[Series],
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
        parts = [self._held]
        while self._at < len(self._pages):
            number = self._pages[self._at]
            if self._series_map[root["first_series"][number]] >= stop:
                break
            parts.append(self._decode(number))
            self._at += 1
        entries = Entries.concat([p for p in parts if len(p)])
        cut = int(np.searchsorted(entries.rows["series"], stop))
        self._held = entries.slice(cut, len(entries))
        return entries.slice(0, cut)

    def rows_below(self, stop: int) -> int:
        """Give an upper bound of the entries of series below `stop`."""
        root = self._source.head.root
        pages = self._pages[self._at :]
        firsts = self._series_map[root["first_series"][pages]] if pages else np.empty(0, np.int64)
        return len(self._held) + int(root["rows"][pages][firsts < stop].sum() if pages else 0)

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
    catalog: Sequence[Series],
    merged: Sequence[Series],
    series_map: np.ndarray,
) -> Ragged:
    """Give the varying lengths of entries under a catalog in which more axes may vary."""
    numbers = np.unique(entries.rows["series"])
    if all(catalog[n].shape == merged[series_map[n]].shape for n in numbers):
        return entries.dims
    parts: list[np.ndarray] = []
    lengths = np.empty(len(entries), np.int64)
    for n in numbers:  # rows of one series are neighbours, in order
        old, new = catalog[n].shape, merged[series_map[n]].shape
        begin, end = np.searchsorted(entries.rows["series"], (n, n + 1))
        full = np.tile(np.array(old, np.int64), (int(end - begin), 1))
        varying = [i for i, length in enumerate(old) if length < 0]
        if varying:
            full[:, varying] = entries.dims.slice(begin, end).values.reshape(-1, len(varying))
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
        while stop < n_series and sum(s.rows_below(stop + step) for s in streams) < _WINDOW_ROWS:
            stop, step = min(stop + step, n_series), step * 2
        yield Entries.concat([e for s in streams if len(e := s.take_before(stop))])


# --- joining --------------------------------------------------------------------


def join_entries(entries: Entries, series: Sequence[Series], is_alone: np.ndarray) -> Entries:
    """Sort entries, and join what may be joined.

    Parameters
    ----------
    entries
        All entries of some series, of segments in the order of their flushes.
    series
        The catalog.
    is_alone
        For each series, whether no other of its group is in the catalog.
    """
    rows = entries.rows
    order = np.lexsort((rows["first_flush"], rows["step"], rows["chunk"], rows["series"]))
    entries = entries.take(order)
    if len(entries) > 1:
        link = _links(entries, is_alone)
        if link.any():
            entries = _join(entries, link, series)
    rows = entries.rows
    order = np.lexsort((rows["first_flush"], rows["chunk"], rows["step"], rows["series"]))
    if (np.diff(order) == 1).all():
        return entries
    return entries.take(order)


def _links(entries: Entries, is_alone: np.ndarray) -> np.ndarray:
    """Say of each entry but the last whether it can be joined with the next."""
    rows = entries.rows
    a, b = rows[:-1], rows[1:]
    last = entries.last_step
    is_same = (a["series"] == b["series"]) & (a["chunk"] == b["chunk"])
    gap = b["step"] - last[:-1]
    is_forward = gap > 0
    # Steps in order, and flushes too, all through the series (views rest on it, see 10.2).
    is_mixed = is_same & ((b["first_flush"] < a["last_flush"]) | ~is_forward)
    bad = np.unique(a["series"][is_mixed])
    may_cross = is_alone[a["series"]] & ~np.isin(a["series"], bad)
    is_one_flush = (a["first_flush"] == b["last_flush"]) & (a["last_flush"] == b["first_flush"])
    link = is_same & is_forward & (may_cross | is_one_flush)
    link &= (a["codec"] == b["codec"]) & _equal_neighbours(entries.dims)
    link &= (a["count"] == 1) | (a["stride"] == gap)
    link &= (b["count"] == 1) | (b["stride"] == gap)
    link &= _is_joinable_payload(entries)
    return _even_strides(link, gap)


def _equal_neighbours(ragged: Ragged) -> np.ndarray:
    """Say of each row but the last whether it equals the next."""
    lengths = ragged.lengths
    equal = lengths[:-1] == lengths[1:]
    if not ragged.offsets[-1]:
        return equal
    width = int(lengths.max())
    padded = np.full((len(ragged), width), -1, np.int64)
    mask = np.arange(width) < lengths[:, None]
    padded[mask] = ragged.values
    return equal & (padded[:-1] == padded[1:]).all(axis=1)


def _is_joinable_payload(entries: Entries) -> np.ndarray:
    rows = entries.rows
    a, b = rows[:-1], rows[1:]
    is_inline = rows["shard"] == layout.INLINE_SHARD
    # One step's payload that stands for many: the same bytes, not only the same checksum.
    repeats = ((rows["flags"] & layout.ENTRY_REPEAT) != 0) | (rows["count"] == 1)
    is_repeat = repeats[:-1] & repeats[1:] & (a["raw_nbytes"] == b["raw_nbytes"])
    is_repeat &= (a["flags"] | layout.ENTRY_REPEAT) == (b["flags"] | layout.ENTRY_REPEAT)
    is_repeat &= (a["digest"] == b["digest"]) & (a["crc32c"] == b["crc32c"])
    is_repeat &= (a["nbytes"] == b["nbytes"]) & (a["shard"] == b["shard"])
    is_repeat &= a["offset"] == b["offset"]
    is_repeat &= _sum_at_most(rows["count"], layout.MAX_ENTRY_STEPS)
    same_shard = is_repeat & ~is_inline[:-1]
    is_constant = is_repeat & is_inline[:-1] & (a["codec"] == layout.CODEC_CONSTANT)
    if is_constant.any():
        is_constant &= _equal_small_inline(entries)
    is_dropped = a["codec"] == layout.CODEC_DROPPED
    is_values = is_inline[:-1] & is_inline[1:] & ((rows["flags"] & layout.ENTRY_REPEAT) == 0)[:-1]
    is_values &= (b["flags"] & layout.ENTRY_REPEAT) == 0
    is_values &= (a["codec"] == layout.CODEC_RAW) | (a["codec"] == layout.CODEC_DELTA)
    small = rows["nbytes"] <= _HALF_JOINED_NBYTES
    is_values &= small[:-1] & small[1:]
    return same_shard | is_constant | (is_dropped & is_repeat) | is_values


def _sum_at_most(counts: np.ndarray, most: int) -> np.ndarray:
    """Say of each neighbouring pair that chains of such pairs cannot sum to more than `most`."""
    ends = np.cumsum(counts.astype(np.int64))
    blocks = (ends - 1) // (most // 2)
    small = counts <= most // 2
    return (blocks[:-1] == blocks[1:]) & small[:-1] & small[1:]


def _equal_small_inline(entries: Entries) -> np.ndarray:
    """Say of each neighbouring pair whether their inline bytes (at most 16) are the same."""
    lengths = entries.inline.lengths
    padded = np.zeros((len(entries), 16), np.uint8)
    small = lengths <= 16
    mask = (np.arange(16) < lengths[:, None]) & small[:, None]
    padded[mask] = entries.inline.values[np.repeat(small, lengths)]
    equal = (lengths[:-1] == lengths[1:]) & small[:-1]
    return equal & (padded[:-1] == padded[1:]).all(axis=1)


def _even_strides(link: np.ndarray, gap: np.ndarray) -> np.ndarray:
    """Drop links where the distance of steps changes within a chain.

    Where it changes at each of several links in a row, every second link stays: a chain
    may begin anew behind a link that was dropped.
    """
    link = link.copy()
    changes = np.zeros(len(link), np.bool_)
    changes[1:] = link[1:] & link[:-1] & (gap[1:] != gap[:-1])
    if changes.any():
        starts = changes & ~np.concatenate([[False], changes[:-1]])
        index = np.arange(len(link))
        begin = np.maximum.accumulate(np.where(starts, index, 0))
        link &= ~(changes & ((index - begin) % 2 == 0))
    return link


def _join(entries: Entries, link: np.ndarray, series: Sequence[Series]) -> Entries:
    """Join chains of linked entries; inline values up to the size the spec allows."""
    rows = entries.rows
    is_first = np.concatenate([[True], ~link])
    is_values = (rows["shard"] == layout.INLINE_SHARD) & np.isin(
        rows["codec"], (layout.CODEC_RAW, layout.CODEC_DELTA)
    )
    sizes = np.where(is_values, rows["nbytes"], 0).astype(np.int64)
    starts = np.cumsum(sizes) - sizes
    chain_start = starts[np.maximum.accumulate(np.where(is_first, np.arange(len(rows)), 0))]
    block = (starts - chain_start) // _HALF_JOINED_NBYTES
    is_first[1:] |= (block[1:] != block[:-1]) & is_values[1:]
    first = np.flatnonzero(is_first)
    ends = np.append(first[1:], len(rows))
    joined = rows[first].copy()
    is_many = ends - first > 1
    joined["last_flush"] = rows["last_flush"][ends - 1]
    counts = np.add.reduceat(rows["count"].astype(np.int64), first)
    joined["count"] = counts
    gaps = rows["step"][np.minimum(first + 1, len(rows) - 1)] - entries.last_step[first]
    joined["stride"] = np.where(is_many & (joined["count"] > 1), gaps, joined["stride"])
    values = is_many & is_values[first]
    joined["flags"][is_many & ~values & (joined["codec"] != layout.CODEC_DROPPED)] |= (
        layout.ENTRY_REPEAT
    )
    inline = _join_inline(entries, first, ends, values, joined, series)
    return Entries(joined, entries.dims.take(first), inline)


def _join_inline(
    entries: Entries,
    first: np.ndarray,
    ends: np.ndarray,
    values: np.ndarray,
    joined: np.ndarray,
    series: Sequence[Series],
) -> Ragged:
    """Put inline values of chains together; sets nbytes, raw_nbytes, crc32c, digest in `joined`."""
    old = entries.inline
    strings = np.fromiter(
        (values[i] and series[s].dtype == "string" for i, s in enumerate(joined["series"])),
        np.bool_,
        len(joined),
    )
    plain = values & (joined["codec"] == layout.CODEC_RAW) & ~strings
    special = np.flatnonzero(values & ~plain)
    begin = old.offsets[first]
    # A chain of repeats keeps the bytes of its first entry only.
    end = old.offsets[np.where(plain, ends, first + 1)]
    lengths = end - begin
    chunks: dict[int, bytes] = {}
    for i in special.tolist():
        of = series[joined["series"][i]] if strings[i] else None
        chunks[i] = _join_special(entries, int(first[i]), int(ends[i]), of)
        lengths[i] = len(chunks[i])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    data = np.empty(int(offsets[-1]), np.uint8)
    usual = np.ones(len(first), np.bool_)
    usual[special] = False
    picked = Ragged(np.stack([begin[usual], end[usual]], 1).ravel(), old.values)
    keep = np.repeat(usual, lengths)
    data[keep] = _gather(picked)
    for i, chunk in chunks.items():
        data[offsets[i] : offsets[i + 1]] = np.frombuffer(chunk, np.uint8)
    changed = np.flatnonzero(values)
    view = memoryview(data)
    joined["nbytes"][changed] = lengths[changed]
    joined["raw_nbytes"][changed] = lengths[changed]
    joined["flags"][changed] &= ~np.uint8(layout.ENTRY_HAS_DIGEST)
    joined["digest"][changed] = 0
    joined["crc32c"][changed] = np.fromiter(
        (crc32c.crc32c(view[offsets[i] : offsets[i + 1]]) for i in changed.tolist()),
        np.uint32,
        len(changed),
    )
    return Ragged(offsets, data)


def _gather(pairs: Ragged) -> np.ndarray:
    """Give the bytes between (begin, end) pairs, which stand interleaved in the offsets."""
    begins, ends = pairs.offsets[::2], pairs.offsets[1::2]
    lengths = ends - begins
    total = int(lengths.sum())
    if total == 0:
        return pairs.values[:0]
    targets = np.cumsum(lengths) - lengths
    index = np.repeat(begins - targets, lengths)
    index += np.arange(total)
    return pairs.values[index]


def _join_special(entries: Entries, first: int, end: int, strings: Series | None) -> bytes:
    """Join strings and step tables, whose payloads are not simply put together."""
    payloads = [entries.inline[i].tobytes() for i in range(first, end)]
    counts = entries.rows["count"][first:end].tolist()
    if strings is not None:
        elements = math.prod(strings.full_shape(entries.dims.tuple(first)))
        texts: list[str] = []
        for payload, count in zip(payloads, counts, strict=True):
            texts += codec.unpack_strings(payload, count * elements)
        return codec.pack_strings(texts)
    total = sum(map(len, payloads))
    raw = np.empty(total, np.uint8)
    at = 0
    for payload, count in zip(payloads, counts, strict=True):
        out = raw[at : at + len(payload)]
        codec.decode(payload, out, codec=layout.CODEC_DELTA, dtype="int64", rows=count)
        at += len(payload)
    return codec.encode_delta(raw, rows=sum(counts)).to_bytes()
