"""Entries with their catalog, cut and put together; and rows of shards made entries again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tensorstore_fmt.format import grid, layout, merge, page, segment
from tensorstore_fmt.format.catalog import SUMS, Series
from tensorstore_fmt.format.page import Entries
from tensorstore_fmt.format.ragged import Ragged

__all__ = ["Part", "dropped_part", "part_of_rows"]


@dataclass(frozen=True, slots=True)
class Part:
    """Entries and the tables that their numbers mean; series may have no entries."""

    series: list[Series]
    shards: list[tuple[layout.ShardName, int]]
    entries: Entries

    def take(self, mask: np.ndarray) -> Part:
        """Give some of the entries."""
        return self if mask.all() else Part(self.series, self.shards, self.entries.take(mask))

    def without(self, identity: tuple[object, ...], steps: Sequence[int]) -> Part:
        """Leave out entries of a series that cover any of these steps."""
        rows = self.entries.rows
        numbers = [n for n, s in enumerate(self.series) if s.identity == identity]
        mask = np.isin(rows["series"], numbers)
        gone = np.array(steps, np.int64)
        for i in np.flatnonzero(mask).tolist():
            row = rows[i]
            behind = gone - int(row["step"])
            stride, count = int(row["stride"]), int(row["count"])
            mask[i] = ((behind >= 0) & (behind % stride == 0) & (behind // stride < count)).any()
        return self.take(~mask)

    def without_grids(self) -> Part:
        """Leave out all series of several chunks."""
        gridded = [n for n, s in enumerate(self.series) if any(s.grid)]
        return self.take(~np.isin(self.entries.rows["series"], gridded))

    def tidy(self) -> Part:
        """Leave out series and shards without entries, and sum up the entries of series anew."""
        rows = self.entries.rows.copy()
        used, number = np.unique(rows["series"], return_inverse=True)
        is_here = rows["codec"] != layout.CODEC_DROPPED
        count = np.where(is_here, rows["count"], 0).astype(np.int64)
        repeats = np.where(rows["flags"] & layout.ENTRY_REPEAT, count, 1)
        sums = {key: np.zeros(len(used), np.int64) for key in SUMS}
        sums["first_step"][:] = layout.MAX_STEP
        np.minimum.at(sums["first_step"], number, rows["step"])
        np.maximum.at(sums["last_step"], number, self.entries.last_step)
        np.add.at(sums["steps"], number, count * (rows["chunk"] == 0))
        np.add.at(sums["raw_nbytes"], number, rows["raw_nbytes"].astype(np.int64) * repeats)
        np.add.at(sums["stored_nbytes"], number, rows["nbytes"].astype(np.int64))
        series = [
            self.series[n]._replace(**{key: int(sums[key][i]) for key in SUMS})
            for i, n in enumerate(used.tolist())
        ]
        rows["series"] = number
        is_stored = rows["shard"] != layout.INLINE_SHARD
        numbers = np.unique(rows["shard"][is_stored])
        shards = [self.shards[n] for n in numbers.tolist()]
        rows["shard"][is_stored] = np.searchsorted(numbers, rows["shard"][is_stored])
        return Part(series, shards, Entries(rows, self.entries.dims, self.entries.inline))

    def input(self, header: segment.Header) -> merge.MergeInput:
        """Give what `merge.merge` takes: a segment in memory."""
        part = self.tidy()
        order = sorted(range(len(part.series)), key=lambda n: part.series[n].identity)
        place = np.empty(len(order), np.uint32)
        place[order] = np.arange(len(order))
        rows = part.entries.rows
        rows["series"] = place[rows["series"]]
        keys = (rows["first_flush"], rows["chunk"], rows["step"], rows["series"])
        entries = part.entries.take(np.lexsort(keys))
        series = [part.series[n] for n in order]
        pages = page.encode_entries(entries)
        data = memoryview(b"".join(segment.encode(header, series, part.shards, pages)))
        found = segment.decode_header(data, where=header.name.path)
        head = segment.decode_head(found, data)

        def read_page(number: int) -> memoryview:
            row = head.root[number]
            return data[int(row["offset"]) : int(row["offset"]) + int(row["nbytes"])]

        return merge.MergeInput(head, read_page)


def dropped_part(rows: Sequence[tuple[Series, int]], flush: int) -> Part:
    """Make entries that say that these steps are dropped."""
    catalog = {series.identity: series for series, _ in rows}
    number = {identity: n for n, identity in enumerate(catalog)}
    table = np.zeros(len(rows), page.ENTRY_ROW)
    table["series"] = [number[series.identity] for series, _ in rows]
    table["step"] = [step for _, step in rows]
    table["stride"] = table["count"] = 1
    table["first_flush"] = table["last_flush"] = flush
    table["codec"] = layout.CODEC_DROPPED
    table["shard"] = layout.INLINE_SHARD
    dims = [(0,) * sum(n < 0 for n in series.shape) for series, _ in rows]
    entries = Entries(table, Ragged.of_ints(dims), Ragged.empty(len(rows), np.uint8))
    return Part(list(catalog.values()), [], entries)


# --- rows of shards -----------------------------------------------------------------------


def _series_of(row: dict[str, Any]) -> Series:
    return Series(
        name=row["name"],
        kind=row["kind"],
        mode=row["mode"],
        dtype=row["dtype"],
        shape=tuple(row["shape"]),
        grid=tuple(row["grid"]),
        global_shape=tuple(row["global_shape"]),
        origin=tuple(row["origin"]),
    )


_CONTENT = ("codec", "flags", "nbytes", "raw_nbytes", "crc32c", "digest")


def _sure_rows(rows: Sequence[dict[str, Any]]) -> list[tuple[Series, dict[str, Any]]]:
    """Leave out what was saved twice in one flush: which of them counts, no row tells.

    The same row twice (a batch that was written again) is one.
    """
    chosen: dict[tuple[object, ...], tuple[Series, dict[str, Any]]] = {}
    saves: dict[tuple[object, ...], set[tuple[object, ...]]] = {}
    doubtful: set[tuple[object, ...]] = set()
    for row in rows:
        series = _series_of(row)
        numbers = (row["step"], row["stride"], row["count"], row["flush"])
        save = (series.identity, series.shape, *numbers)
        key = (*save, row["chunk"])
        known = chosen.setdefault(key, (series, row))
        if any(known[1][k] != row[k] for k in _CONTENT):
            doubtful.add(save)
        for k in range(row["count"]):
            step = row["step"] + k * row["stride"]
            saves.setdefault((series.group, step, row["flush"]), set()).add(save)
    for same in saves.values():
        if len(same) > 1:
            doubtful |= same
    return [found for key, found in chosen.items() if key[:-1] not in doubtful]


def _whole_rows(found: list[tuple[Series, dict[str, Any]]]) -> list[tuple[Series, dict[str, Any]]]:
    """Leave out rows whose numbers cannot be."""
    return [
        (series, row)
        for series, row in found
        if row["step"] >= 0
        and row["stride"] >= 1
        and 1 <= row["count"] <= layout.MAX_ENTRY_STEPS
        and row["step"] + row["stride"] * row["count"] <= layout.MAX_STEP
        and row["offset"] % 8 == 0
        and len(series.shape) == len(series.grid) <= layout.MAX_RANK
        and all(0 <= n <= layout.MAX_AXIS for n in series.shape)
        and row["chunk"] < grid.n_chunks(series.shape, series.grid)
    ]


def part_of_rows(rows: Sequence[dict[str, Any]]) -> Part:
    """Make entries of proven rows; each has its place as ``shard`` and ``offset``."""
    found = _whole_rows(_sure_rows([r for r in rows if r["count"] <= layout.MAX_ENTRY_STEPS]))
    found.sort(key=lambda f: (f[0].identity, f[1]["step"], f[1]["chunk"], f[1]["flush"]))
    shapes: dict[tuple[object, ...], Series] = {}
    ends: dict[layout.ShardName, int] = {}
    for series, row in found:
        known = shapes.setdefault(series.identity, series)
        if known.shape != series.shape:
            pairs = zip(known.shape, series.shape, strict=True)
            shape = tuple(m if m == n else -1 for m, n in pairs)
            shapes[series.identity] = known._replace(shape=shape)
        end = row["offset"] + row["nbytes"]
        ends[row["shard"]] = max(end, ends.get(row["shard"], 0))
    catalog = list(shapes.values())
    number = {identity: n for n, identity in enumerate(shapes)}
    shards = sorted(ends)
    table = np.zeros(len(found), page.ENTRY_ROW)
    for column in ("step", "stride", "count", "chunk", "offset", *_CONTENT):
        table[column] = [row[column] for _, row in found]
    table["first_flush"] = table["last_flush"] = [row["flush"] for _, row in found]
    table["series"] = [number[series.identity] for series, _ in found]
    table["shard"] = [shards.index(row["shard"]) for _, row in found]
    dims = [
        tuple(
            n
            for n, fixed in zip(series.shape, shapes[series.identity].shape, strict=True)
            if fixed < 0
        )
        for series, _ in found
    ]
    entries = Entries(table, Ragged.of_ints(dims), Ragged.empty(len(found), np.uint8))
    return Part(catalog, [(name, ends[name]) for name in shards], entries)
