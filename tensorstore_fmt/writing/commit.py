"""From what waits in a generation to the tables of a segment; pure data."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import crc32c
import numpy as np

from tensorstore_fmt import dtypes
from tensorstore_fmt.format import codec, layout
from tensorstore_fmt.format.catalog import CatalogTable, Series
from tensorstore_fmt.format.join import is_alone, join_entries
from tensorstore_fmt.format.page import ENTRY_ROW, Entries
from tensorstore_fmt.format.progressions import runs_of_steps
from tensorstore_fmt.format.ragged import Ragged
from tensorstore_fmt.format.strings import pack_strings
from tensorstore_fmt.writing.pending import (
    Generation,
    InlineStage,
    PendingEntry,
    Placed,
    Save,
)
from tensorstore_fmt.writing.series import step_table_series

__all__ = ["Tables", "collect", "collect_dropped", "tables"]

_FLOAT: Final = struct.Struct("<d")


@dataclass(frozen=True, slots=True)
class Tables:
    """What a segment is made of, before it is cut into pages."""

    series: CatalogTable
    shards: list[tuple[layout.ShardName, int]]
    entries: Entries


def collect(generation: Generation) -> tuple[list[PendingEntry], int]:
    """Give all entries of a finished generation, and how many saved steps were lost.

    A tensor with a chunk that was lost becomes a dropped step.
    """
    entries: list[PendingEntry] = []
    lost: list[Save] = []
    for save in generation.saves:
        if save.is_lost or any(e.placed.is_lost for e in save.entries):
            lost.append(save)
        elif save.replaced:  # it holds one step: `Staging.is_shared` sees to that
            entries += [e for e in save.entries if e.step not in save.replaced]
        else:
            entries += save.entries
    for stage in generation.inline.values():
        entries += _inline_entries(stage)
    for mode, rows in generation.step_tables.items():
        entries += _step_table_entries(mode, rows)
    dropped, n = _dropped_entries(generation, lost, generation.dropped)
    return entries + dropped, n


def collect_dropped(generation: Generation) -> tuple[list[PendingEntry], int]:
    """Do as `collect`, but record all that was saved as dropped; the step tables stay."""
    dropped = list(generation.dropped)
    for stage in generation.inline.values():
        dropped += [(stage.kept.series, step) for step, _ in stage.rows]
    entries, n = _dropped_entries(generation, generation.saves, dropped)
    for mode, rows in generation.step_tables.items():
        entries += _step_table_entries(mode, rows)
    return entries, n


def _dropped_entries(
    generation: Generation, lost: Sequence[Save], dropped: Sequence[tuple[Series, int]]
) -> tuple[list[PendingEntry], int]:
    """Say of steps that they are dropped, and hide what earlier flushes hold of them.

    Returns
    -------
    list, int
        The entries, and how many steps were lost.
    """
    steps = [(save.kept, step) for save in lost for step in save.steps if step not in save.replaced]
    gone = [*dropped, *((kept.series, step) for kept, step in steps)]
    hidden = [(kept.stats, step) for kept, step in steps if kept.stats is not None]
    for (_, step), many in generation.hidden.items():
        hidden += [(series, step) for series in many]
    entries = [_dropped_entry(*each) for each in dict.fromkeys([*gone, *hidden])]
    return entries, len(gone)


def _placed(data: bytes, codec_number: int) -> Placed:
    return Placed(
        codec=codec_number,
        raw_nbytes=len(data),
        nbytes=len(data),
        crc32c=crc32c.crc32c(data),
        inline=data,
    )


def _inline_entries(stage: InlineStage) -> list[PendingEntry]:
    series = stage.kept.series
    if not stage.rows:
        return []
    steps = np.array([row[0] for row in stage.rows], np.int64)
    values = [row[1] for row in stage.rows]
    if len(steps) > 1 and (steps[1:] <= steps[:-1]).any():
        order = np.argsort(steps, kind="stable")
        steps, values = steps[order], [values[i] for i in order.tolist()]
    if series.dtype == dtypes.STRING:
        return _inline_strings(series, steps, values)
    data = _inline_bytes(series, values)
    width = len(data) // len(steps)
    if width == 0:
        return [
            _entry(series, steps[i : i + 1], _placed(b"", layout.CODEC_RAW))
            for i in range(len(steps))
        ]
    most = max(1, layout.JOINED_INLINE_NBYTES // 2 // width)
    entries = []
    for begin, end in runs_of_steps(steps):
        for at in range(begin, end, most):
            stop = min(at + most, end)
            placed = _placed(data[at * width : stop * width], layout.CODEC_RAW)
            entries.append(_entry(series, steps[at:stop], placed))
    return entries


def _inline_bytes(series: Series, values: Sequence[object]) -> bytes:
    """Give the bytes of a stage's values: Python floats, and the bytes of arrays and scalars."""
    kinds = set(map(type, values))
    if bytes not in kinds:
        return np.array(values, dtypes.numpy_dtype(series.dtype)).tobytes()
    if len(kinds) == 1:
        return b"".join(values)  # type: ignore[arg-type] # bytes, all of them
    return b"".join([v if isinstance(v, bytes) else _FLOAT.pack(v) for v in values])


def _inline_strings(
    series: Series, steps: np.ndarray, values: Sequence[object]
) -> list[PendingEntry]:
    entries = []
    for begin, end in runs_of_steps(steps):
        for at in range(begin, end, 32):
            stop = min(at + 32, end)
            texts = [t for v in values[at:stop] for t in v]  # type: ignore[attr-defined] # lists of str
            placed = _placed(pack_strings(texts), layout.CODEC_RAW)
            entries.append(_entry(series, steps[at:stop], placed))
    return entries


def _step_table_entries(mode: int, visits: Sequence[tuple[int, int, int]]) -> list[PendingEntry]:
    steps = np.array([visit[0] for visit in visits], np.int64)
    table = np.array([visit[1:] for visit in visits], "<i8")
    if len(steps) > 1 and (steps[1:] <= steps[:-1]).any():
        # A step that came twice counts with its last visit.
        _, last = np.unique(steps[::-1], return_index=True)
        rows = len(steps) - 1 - last
        steps, table = steps[rows], table[rows]
    series = step_table_series(mode)
    most = layout.JOINED_INLINE_NBYTES // 2 // 16
    entries = []
    for begin, end in runs_of_steps(steps):
        for at in range(begin, end, most):
            stop = min(at + most, end)
            raw = np.ascontiguousarray(table[at:stop]).reshape(-1).view(np.uint8)
            data = codec.encode_delta(raw, rows=stop - at).to_bytes()
            entries.append(_entry(series, steps[at:stop], _placed(data, layout.CODEC_DELTA)))
    return entries


def _entry(series: Series, steps: np.ndarray, placed: Placed) -> PendingEntry:
    return PendingEntry(
        series=series,
        step=int(steps[0]),
        stride=int(steps[1] - steps[0]) if len(steps) > 1 else 1,
        count=len(steps),
        chunk=0,
        placed=placed,
    )


def _dropped_entry(series: Series, step: int) -> PendingEntry:
    placed = Placed(codec=layout.CODEC_DROPPED, raw_nbytes=0, nbytes=0, crc32c=0, inline=b"")
    return PendingEntry(series=series, step=step, stride=1, count=1, chunk=0, placed=placed)


def tables(pending: Sequence[tuple[int, Sequence[PendingEntry]]]) -> Tables:
    """Build the tables of a segment from the entries of one or more flushes.

    Parameters
    ----------
    pending
        Flush numbers, ascending, with their entries.
    """
    entries = [e for _, part in pending for e in part]
    if not entries:
        return Tables(CatalogTable.of([]), [], Entries.empty())
    flushes = np.repeat(
        np.array([number for number, _ in pending], np.int64), [len(part) for _, part in pending]
    )
    series, numbers = _catalog(entries)
    shards, shard_numbers = _shard_table(entries)
    n = len(entries)
    rows = np.zeros(n, ENTRY_ROW)
    rows["series"] = numbers
    for column in ("step", "stride", "count", "chunk"):
        rows[column] = [getattr(e, column) for e in entries]
    rows["first_flush"] = rows["last_flush"] = flushes
    placed = [e.placed for e in entries]
    for column in ("codec", "offset", "nbytes", "raw_nbytes", "crc32c"):
        rows[column] = [getattr(p, column) for p in placed]
    rows["shard"] = shard_numbers
    rows["digest"] = [p.digest or 0 for p in placed]
    rows["flags"] = [
        (layout.ENTRY_HAS_DIGEST if p.digest is not None else 0)
        | (layout.ENTRY_REPEAT if e.is_repeat else 0)
        for e, p in zip(entries, placed, strict=True)
    ]
    inline = Ragged.of_bytes([p.inline or b"" for p in placed])
    table = Entries(rows, _dims(entries, series, numbers), inline)
    catalog = CatalogTable.of(series)
    catalog.sums = _sums(len(series), table, [e.is_new for e in entries])
    joined = join_entries(table, catalog, is_alone(catalog))
    return Tables(catalog, shards, joined)


def _catalog(entries: Sequence[PendingEntry]) -> tuple[list[Series], np.ndarray]:
    """Give the catalog in order, and the number of the series of each entry."""
    by_object: dict[int, Series] = {id(e.series): e.series for e in entries}
    catalog: dict[tuple[object, ...], Series] = {}
    for series in by_object.values():
        known = catalog.get(series.identity)
        if known is not None and known.shape != series.shape:
            shape = tuple(
                m if m == n else -1 for m, n in zip(known.shape, series.shape, strict=True)
            )
            catalog[series.identity] = known._replace(shape=shape)
        elif known is None:
            catalog[series.identity] = series
    ordered = sorted(catalog.items())
    number = {identity: i for i, (identity, _) in enumerate(ordered)}
    of_object = {key: number[series.identity] for key, series in by_object.items()}
    numbers = np.fromiter((of_object[id(e.series)] for e in entries), np.uint32, len(entries))
    return [series for _, series in ordered], numbers


def _shard_table(
    entries: Sequence[PendingEntry],
) -> tuple[list[tuple[layout.ShardName, int]], list[int]]:
    ends: dict[layout.ShardName, int] = {}
    for e in entries:
        p = e.placed
        if p.shard is not None:
            ends[p.shard.name] = max(ends.get(p.shard.name, 0), p.offset + p.nbytes)
    ordered = sorted(ends)
    number = {name: i for i, name in enumerate(ordered)}
    numbers = [
        layout.INLINE_SHARD if e.placed.shard is None else number[e.placed.shard.name]
        for e in entries
    ]
    return [(name, ends[name]) for name in ordered], numbers


def _dims(entries: Sequence[PendingEntry], series: Sequence[Series], numbers: np.ndarray) -> Ragged:
    varying = [tuple(i for i, n in enumerate(s.shape) if n < 0) for s in series]
    if not any(varying):
        return Ragged.empty(len(entries), np.int64)
    rows = []
    for e, number in zip(entries, numbers.tolist(), strict=True):
        is_dropped = e.placed.codec == layout.CODEC_DROPPED
        rows.append(tuple(0 if is_dropped else e.series.shape[i] for i in varying[number]))
    return Ragged.of_ints(rows)


def _sums(n: int, table: Entries, is_new: Sequence[bool]) -> dict[str, np.ndarray]:
    """Give the step ranges and sums of `n` series."""
    rows = table.rows
    number = rows["series"].astype(np.int64)
    first = np.full(n, layout.MAX_STEP, np.int64)
    last = np.zeros(n, np.int64)
    np.minimum.at(first, number, rows["step"])
    np.maximum.at(last, number, table.last_step)
    is_here = rows["codec"] != layout.CODEC_DROPPED
    count = rows["count"].astype(np.int64) * is_here
    repeats = np.where((rows["flags"] & layout.ENTRY_REPEAT) != 0, count, 1)
    steps, raw, stored = (np.zeros(n, np.int64) for _ in range(3))
    np.add.at(steps, number, count * (rows["chunk"] == 0))
    np.add.at(raw, number, rows["raw_nbytes"].astype(np.int64) * repeats)
    np.add.at(stored, number, rows["nbytes"].astype(np.int64) * np.array(is_new, np.int64))
    return {
        "first_step": first,
        "last_step": last,
        "steps": steps,
        "raw_nbytes": raw,
        "stored_nbytes": stored,
    }
