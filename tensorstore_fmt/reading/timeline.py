"""Timelines: which saved values are visible, step by step (spec, "What is visible")."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt.errors import LimitError
from tensorstore_fmt.format import layout
from tensorstore_fmt.reading.entries import Found, Pages, Query, find
from tensorstore_fmt.reading.view import View

__all__ = ["Timeline", "timelines"]

# A page of some KB may claim 2**36 steps. Each that is listed costs about 16 bytes.
_MAX_STEPS: Final = 2**26
_STEPS_AT_ONCE: Final = 2**21
_STEPS_OF_ENTRY: Final = 8  # that take less memory than an entry does
_SAMPLES: Final = 257
_ROW_NBYTES: Final = 128  # of an entry, about

_I64 = NDArray[np.int64]
_Numbers = NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class Timeline:
    """What is visible of a name: one row per (step, mode, worker, part), ascending by step.

    Attributes
    ----------
    found
        The entries.
    step, row, source
        Shape (t,), int64, the last two maybe narrower: the step, the entry of its chunk 0, and
        its source in `found`.
    """

    found: Found
    step: _I64
    row: _Numbers
    source: _Numbers

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
    limit = np.full(len(found.sources), layout.MAX_STEP + 1, np.int64)
    if query.attempt is None:
        limit[:] = [view.visible_below(s.attempt) for s in found.sources]
    row = np.flatnonzero(rows["chunk"] == 0)
    claims = _Claims(
        row, found.source[row], rows["step"][row], rows["stride"][row], found.count[row],
        limit[found.source[row]] - 1,
    )  # fmt: skip
    _, n = claims.within(query.low, query.high)
    total = int(n.sum())
    if total > _MAX_STEPS:
        raise LimitError(
            f"{query.name!r}: its entries claim {total:,} steps, and at most {_MAX_STEPS:,} are "
            "listed at once; ask for fewer: a range of steps, one worker, one mode",
            name=query.name,
        )
    ranges = _ranges(claims, query.low, query.high)
    line = _joined(found, (_listed(found, claims, *each) for each in ranges))
    if query.worker is not None:
        is_theirs = np.array([s.worker == query.worker for s in found.sources], np.bool_)
        if not is_theirs.all():
            line = line.take(is_theirs[line.source])
    return line


@dataclass(frozen=True, slots=True)
class _Claims:
    """What entries of chunk 0 say of steps: columns of shape (e,), int64.

    Attributes
    ----------
    row, source
        The entry, and its source.
    begin, stride, count
        Its steps.
    last
        The greatest step that is visible of its attempt.
    """

    row: _I64
    source: _I64
    begin: _I64
    stride: _I64
    count: _I64
    last: _I64

    def within(self, low: int, high: int) -> tuple[_I64, _I64]:
        """Give of each entry which of its steps is the first from `low` to `high`, and how many.

        Entries may begin before and end after that.
        """
        first = np.maximum(-((self.begin - low) // self.stride), 0)
        most = np.minimum(self.last, high)
        end = np.minimum((most - self.begin) // self.stride + 1, self.count)
        return first, np.maximum(end - first, 0)

    def median(self, low: int, high: int) -> int:
        """Give about the middle of all steps from `low` to `high`; less than `high`."""
        first, n = self.within(low, high)
        ends = np.cumsum(n)
        at = np.linspace(0, int(ends[-1]) - 1, _SAMPLES).astype(np.int64)
        entry = ends.searchsorted(at, side="right")
        inner = first[entry] + at - (ends[entry] - n[entry])
        steps = np.sort(self.begin[entry] + inner * self.stride[entry])
        return min(int(steps[_SAMPLES // 2]), high - 1)


def _ranges(claims: _Claims, low: int, high: int) -> Iterator[tuple[int, int]]:
    """Cut a range of steps so that few entries do not make many rows at once.

    Each step is resolved by itself, and what that takes for a moment is several times what it
    leaves.
    """
    total = int(claims.within(low, high)[1].sum())
    if total <= max(_STEPS_AT_ONCE, _STEPS_OF_ENTRY * len(claims.row)) or low == high:
        yield low, high
        return
    middle = claims.median(low, high)
    yield from _ranges(claims, low, middle)
    yield from _ranges(claims, middle + 1, high)


def _listed(found: Found, claims: _Claims, low: int, high: int) -> Timeline:
    """List the steps of a range, with what wins at each."""
    row, source = claims.row, claims.source
    first, n = claims.within(low, high)
    total = int(n.sum())
    step = claims.begin + first * claims.stride
    if total != len(row) or not (n == 1).all():
        ends = np.cumsum(n)
        inner = np.arange(total) - np.repeat(ends - n, n)
        inner *= np.repeat(claims.stride, n)
        inner += np.repeat(step, n)
        step, row, source = inner, np.repeat(row, n), np.repeat(source, n)
    line = Timeline(found, step, row, source)
    return line if (step[1:] > step[:-1]).all() else _winners(line)


def _joined(found: Found, lines: Iterator[Timeline]) -> Timeline:
    """Put timelines of ranges that follow each other together; row and source get narrow."""
    first = next(lines)
    following = next(lines, None)
    if following is None:
        return first
    kind_of_row, kind_of_source = map(np.min_scalar_type, (len(found.entries), len(found.sources)))
    steps: list[_I64] = []
    rows: list[_Numbers] = []
    sources: list[_Numbers] = []
    for line in itertools.chain((first, following), lines):
        steps.append(line.step)
        rows.append(line.row.astype(kind_of_row))
        sources.append(line.source.astype(kind_of_source))
    del first, following, line
    step = np.concatenate(steps)
    steps.clear()
    return Timeline(found, step, np.concatenate(rows), np.concatenate(sources))


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
