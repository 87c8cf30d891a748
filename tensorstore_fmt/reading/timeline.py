"""Timelines: which saved values are visible, step by step (spec, "What is visible")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt.errors import LimitError
from tensorstore_fmt.format import layout
from tensorstore_fmt.reading.entries import Found, Pages, Query, find
from tensorstore_fmt.reading.view import View

__all__ = ["Timeline", "timelines"]

_MAX_STEPS: Final = 2**28
_ROW_NBYTES: Final = 128  # of an entry, about

_I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Timeline:
    """What is visible of a name: one row per (step, mode, worker, part), ascending by step.

    Attributes
    ----------
    found
        The entries.
    step, row, source
        Shape (t,), int64: the step, the entry of its chunk 0, and its source in `found`.
    """

    found: Found
    step: _I64
    row: _I64
    source: _I64

    def __len__(self) -> int:
        return len(self.step)

    @property
    def is_dropped(self) -> NDArray[np.bool_]:
        """Whether the writer dropped it, or a part of the same tensor."""
        codes = self.found.entries.rows["codec"] == layout.CODEC_DROPPED
        if not codes.any():
            return np.zeros(len(self), np.bool_)
        dropped: NDArray[np.bool_] = codes.take(self.row)
        sources = self.found.sources
        is_part = np.array([bool(s.series.global_shape) for s in sources])[self.source]
        if self.found.query.worker is None and (dropped & is_part).any():
            mode = np.array([s.series.mode for s in sources])[self.source]
            for m in range(len(layout.MODES)):
                mine = is_part & (mode == m)
                dropped |= mine & np.isin(self.step, self.step[dropped & mine])
        return dropped

    @property
    def steps(self) -> _I64:
        """All steps, ascending, once each; the caller owns the array."""
        step = self.step
        if len(step) < 2:
            return step.copy()
        distinct: _I64 = step[np.concatenate([[True], step[1:] != step[:-1]])]
        return distinct

    def take(self, keep: NDArray[np.bool_] | _I64) -> Timeline:
        """Give some of the rows."""
        return Timeline(self.found, self.step[keep], self.row[keep], self.source[keep])

    def saved(self) -> Timeline:
        """Give the rows that were not dropped."""
        dropped = self.is_dropped
        return self.take(~dropped) if dropped.any() else self


def timelines(view: View, pages: Pages, queries: Sequence[Query]) -> list[Timeline]:
    """Give what is visible of queries, fetching all pages they need in one round.

    Raises
    ------
    LostSegmentsError
        A segment is not there any more.
    FormatError
        A page is damaged.
    LimitError
        The entries claim more steps than a reader lists.
    """
    lines: dict[Query, Timeline | None] = {query: view.lines.get(query) for query in queries}
    unknown = [query for query, known in lines.items() if known is None]
    for query, found in zip(unknown, find(view, pages, unknown), strict=True):
        line = _resolve(view, found)
        view.lines.put(query, line, _ROW_NBYTES * len(found.entries) + 24 * len(line))
        lines[query] = line
    return [known for query in queries if (known := lines[query]) is not None]


def _resolve(view: View, found: Found) -> Timeline:
    """Resolve what is visible (spec, "What is visible", rules 2 to 4)."""
    query = found.query
    rows = found.entries.rows
    row = np.flatnonzero(rows["chunk"] == 0)
    source = found.source[row]
    begin, stride, count = rows["step"][row], rows["stride"][row], found.count[row]
    # Entries may begin before and end after what was asked for.
    first = np.maximum(-((begin - query.low) // stride), 0)
    limit = np.full(len(found.sources), layout.MAX_STEP + 1, np.int64)
    if query.attempt is None:
        limit[:] = [view.visible_below(s.attempt) for s in found.sources]
    high = np.minimum(limit[source] - 1, query.high)
    end = np.minimum((high - begin) // stride + 1, count)
    n = np.maximum(end - first, 0)
    total = int(n.sum())
    if total > _MAX_STEPS:
        raise LimitError(
            f"{query.name!r}: its entries claim {total:,} steps; at most {_MAX_STEPS:,} are listed",
            name=query.name,
        )
    if total == len(row) and (n == 1).all():
        step = begin + first * stride
    else:
        ends = np.cumsum(n)
        inner = np.arange(total) - np.repeat(ends - n - first, n)
        step = np.repeat(begin, n) + inner * np.repeat(stride, n)
        row, source = np.repeat(row, n), np.repeat(source, n)
    line = Timeline(found, step, row, source)
    if not (step[1:] > step[:-1]).all():
        line = _winners(line)
    if query.worker is not None:
        is_theirs = np.array([s.worker == query.worker for s in found.sources], np.bool_)
        if not is_theirs.all():
            line = line.take(is_theirs[line.source])
    return line


def _winners(line: Timeline) -> Timeline:
    """Keep of what was saved several times what wins."""
    sources, step, row, source = line.found.sources, line.step, line.row, line.source
    groups: dict[object, int] = {}
    group = np.array(
        [groups.setdefault((s.series.mode, s.worker, s.part), len(groups)) for s in sources],
        np.int64,
    )
    rank = np.array([s.writer.rank for s in sources], np.int64)
    flush = line.found.entries.rows["last_flush"][row]
    order = np.lexsort((flush, rank[source], group[source], step))
    step, row, source = step[order], row[order], source[order]
    group_of = group[source]
    wins = np.ones(len(step), np.bool_)
    wins[:-1] = (step[1:] != step[:-1]) | (group_of[1:] != group_of[:-1])
    attempt = np.array([s.attempt for s in sources], np.int64)
    if (attempt != attempt[0]).any():
        mode = np.array([s.series.mode for s in sources], np.int64)
        keys = np.flatnonzero(wins)
        by = np.lexsort((attempt[source[keys]], mode[source[keys]], step[keys]))
        keys = keys[by]
        is_last = np.ones(len(keys), np.bool_)
        is_last[:-1] = (step[keys][1:] != step[keys][:-1]) | (
            mode[source[keys]][1:] != mode[source[keys]][:-1]
        )
        # The greatest attempt stands last among those of one step and mode.
        ends = np.flatnonzero(is_last)
        newest = np.repeat(attempt[source[keys[ends]]], np.diff(ends, prepend=-1))
        wins[keys[attempt[source[keys]] < newest]] = False
    return Timeline(line.found, step[wins], row[wins], source[wins])
