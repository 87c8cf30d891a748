"""Joining entries: steps that continue each other in one entry (spec, "Duties of a writer", 7)."""

from __future__ import annotations

import collections
import math
from typing import Final

import crc32c
import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt.dtypes import STRING
from tensorstore_fmt.format import codec, layout
from tensorstore_fmt.format.catalog import CatalogTable
from tensorstore_fmt.format.page import Entries
from tensorstore_fmt.format.ragged import Ragged
from tensorstore_fmt.format.strings import pack_strings, unpack_strings

__all__ = ["is_alone", "join_entries"]

Mask = NDArray[np.bool_]

_HALF_JOINED_NBYTES: Final = layout.JOINED_INLINE_NBYTES // 2


def is_alone(catalog: CatalogTable) -> Mask:
    """Say of each series whether no other one can replace its steps."""
    groups = catalog.groups()
    counts = collections.Counter(groups)
    return np.fromiter((counts[group] == 1 for group in groups), np.bool_, len(groups))


def join_entries(entries: Entries, series: CatalogTable, is_alone: np.ndarray) -> Entries:
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


def _links(entries: Entries, is_alone: np.ndarray) -> Mask:
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


def _equal_neighbours(ragged: Ragged) -> Mask:
    """Say of each row but the last whether it equals the next."""
    lengths = ragged.lengths
    equal: Mask = lengths[:-1] == lengths[1:]
    if not ragged.offsets[-1]:
        return equal
    width = int(lengths.max())
    padded = np.full((len(ragged), width), -1, np.int64)
    mask = np.arange(width) < lengths[:, None]
    padded[mask] = ragged.values
    equal &= (padded[:-1] == padded[1:]).all(axis=1)
    return equal


def _is_joinable_payload(entries: Entries) -> Mask:
    rows = entries.rows
    a, b = rows[:-1], rows[1:]
    is_inline = rows["shard"] == layout.INLINE_SHARD
    # One step's payload that stands for many: the same bytes, not only the same checksum.
    repeats = ((rows["flags"] & layout.ENTRY_REPEAT) != 0) | (rows["count"] == 1)
    repeats |= rows["codec"] == layout.CODEC_DROPPED  # without a payload, and never flagged
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
    result: Mask = same_shard | is_constant | (is_dropped & is_repeat) | is_values
    return result


def _sum_at_most(counts: np.ndarray, most: int) -> Mask:
    """Say of each neighbouring pair that chains of such pairs cannot sum to more than `most`."""
    ends = np.cumsum(counts.astype(np.int64))
    blocks = (ends - 1) // (most // 2)
    small = counts <= most // 2
    result: Mask = (blocks[:-1] == blocks[1:]) & small[:-1] & small[1:]
    return result


def _equal_small_inline(entries: Entries) -> Mask:
    """Say of each neighbouring pair whether their inline bytes (at most 16) are the same."""
    lengths = entries.inline.lengths
    padded = np.zeros((len(entries), 16), np.uint8)
    small = lengths <= 16
    mask = (np.arange(16) < lengths[:, None]) & small[:, None]
    padded[mask] = entries.inline.values[np.repeat(small, lengths)]
    equal = (lengths[:-1] == lengths[1:]) & small[:-1]
    result: Mask = equal & (padded[:-1] == padded[1:]).all(axis=1)
    return result


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


def _join(entries: Entries, link: np.ndarray, series: CatalogTable) -> Entries:
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
    inline = _join_inline(entries, (first, ends), values, joined, series)
    return Entries(joined, entries.dims.take(first), inline)


def _join_inline(
    entries: Entries,
    chains: tuple[np.ndarray, np.ndarray],
    values: np.ndarray,
    joined: np.ndarray,
    series: CatalogTable,
) -> Ragged:
    """Put inline values of chains together; sets sizes and checksums in `joined`."""
    old = entries.inline
    first, ends = chains
    strings = np.fromiter(
        (values[i] and series.dtypes[s] == STRING for i, s in enumerate(joined["series"].tolist())),
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
        elements = None
        if strings[i]:
            shape = series.full_shape(int(joined["series"][i]), entries.dims.row(int(first[i])))
            elements = math.prod(shape)
        chunks[i] = _join_special(entries, int(first[i]), int(ends[i]), elements)
        lengths[i] = len(chunks[i])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    data = np.empty(int(offsets[-1]), np.uint8)
    usual = np.ones(len(first), np.bool_)
    usual[special] = False
    picked = old.ranges(begin[usual], end[usual])
    data[np.repeat(usual, lengths) if len(special) else slice(None)] = picked
    for i, chunk in chunks.items():
        data[offsets[i] : offsets[i + 1]] = np.frombuffer(chunk, np.uint8)
    changed = np.flatnonzero(values)
    view = data.data
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


def _join_special(entries: Entries, first: int, end: int, elements: int | None) -> bytes:
    """Join strings and step tables, whose payloads are not simply put together."""
    payloads = [entries.inline[i].tobytes() for i in range(first, end)]
    counts = entries.rows["count"][first:end].tolist()
    if elements is not None:
        texts: list[str] = []
        for payload, count in zip(payloads, counts, strict=True):
            texts += unpack_strings(payload, count * elements)
        return pack_strings(texts)
    total = sum(map(len, payloads))
    raw = np.empty(total, np.uint8)
    at = 0
    for payload, count in zip(payloads, counts, strict=True):
        out = raw[at : at + len(payload)]
        codec.decode(payload, out, codec=layout.CODEC_DELTA, dtype="int64", rows=count)
        at += len(payload)
    return codec.encode_delta(raw, rows=sum(counts)).to_bytes()
