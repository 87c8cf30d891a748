"""Statistics: of each step, from the index alone (spec, "Statistics")."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tensorstore_fmt.errors import FormatError, StepNotFoundError
from tensorstore_fmt.format import layout, statistics
from tensorstore_fmt.reading.absence import absence, describe_query
from tensorstore_fmt.reading.assembly import Chosen, assemble, choose
from tensorstore_fmt.reading.entries import Query
from tensorstore_fmt.reading.fetch import read_all
from tensorstore_fmt.reading.reader import check_all_is_there, check_name
from tensorstore_fmt.reading.session import Session
from tensorstore_fmt.reading.steps import StepSet
from tensorstore_fmt.reading.timeline import Timeline, timelines
from tensorstore_fmt.reading.view import Source, View

__all__ = ["Stats", "derived", "read_stats", "stat_rows", "vectors"]

_I64 = NDArray[np.int64]
_F64 = NDArray[np.float64]

_COUNTS = ("count", "nan", "posinf", "neginf", "zero")


class Stats(Mapping[str, NDArray[Any]]):
    """Columns of statistics, one row a step, ascending; also attributes: ``stats.mean``.

    ``step``, ``count``, ``nan``, ``posinf``, ``neginf``, ``zero`` are int64, the others
    float64: ``min`` and ``max`` (of what is not NaN), ``sum``, ``sumsq``, ``sumabs``,
    ``mean``, ``std`` (of the population) and ``l2`` (of the finite elements).
    """

    step: _I64
    count: _I64
    nan: _I64
    posinf: _I64
    neginf: _I64
    zero: _I64
    min: _F64
    max: _F64
    sum: _F64
    sumsq: _F64
    sumabs: _F64
    mean: _F64
    std: _F64
    l2: _F64

    def __init__(self, name: str, step: _I64, rows: _F64) -> None:
        self._name = name
        columns: dict[str, NDArray[Any]] = {"step": step}
        for field, column in zip(layout.STATS_FIELDS, rows.T, strict=True):
            columns[field] = (
                column.astype(np.int64) if field in _COUNTS else np.ascontiguousarray(column)
            )
        columns |= derived(columns)
        self._columns = columns
        self.__dict__.update(columns)

    def __getitem__(self, column: str) -> NDArray[Any]:
        return self._columns[column]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def table(self) -> pa.Table:
        """Give the columns as an Arrow table."""
        return pa.table(self._columns)

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        return self.table().__arrow_c_stream__(requested_schema)

    def __repr__(self) -> str:
        return f"<Stats of {self._name!r}: {len(self.step)} steps, columns {', '.join(self)}>"


def derived(columns: Mapping[str, NDArray[Any]]) -> dict[str, _F64]:
    """Compute mean, std and l2 from the columns that are stored."""
    n = columns["count"] - columns["nan"] - columns["posinf"] - columns["neginf"]
    with np.errstate(all="ignore"):
        n = np.where(n > 0, n, np.nan)
        mean = columns["sum"] / n
        std = np.sqrt(np.maximum(columns["sumsq"] / n - mean * mean, 0))
        return {"mean": mean, "std": std, "l2": np.sqrt(columns["sumsq"])}


def read_stats(session: Session, query: Query, wanted: StepSet) -> Stats:
    """Read the statistics of the steps that have any.

    Raises
    ------
    NotThereError
        A step that was asked for exactly has none.
    AmbiguousError
        Several workers or modes have some of the same step.
    """

    def work(view: View) -> Stats:
        check_name(view, query.name)
        if wanted.exact is None:
            check_all_is_there(view, query)
        of_data, of_stats = (
            Query(
                name=query.name, kind=kind, low=wanted.low, high=wanted.high,
                mode=query.mode, worker=query.worker, attempt=query.attempt,
            )
            for kind in (layout.KIND_DATA, layout.KIND_STATS)
        )  # fmt: skip
        data, stats = (line.saved() for line in timelines(view, session.pages, [of_data, of_stats]))
        every = StepSet(wanted.low, wanted.high, wanted.stride)
        step, rows = vectors(view, session, data, stats, every)
        if wanted.exact is not None:
            missing = wanted.exact[~np.isin(wanted.exact, step)]
            if len(missing):
                raise _missing(view, query, data, stats, int(missing[0]))
            at = step.searchsorted(wanted.exact)
            at = at if wanted.order is None else at[wanted.order]
            step, rows = step[at], rows[at]
        return Stats(query.name, step, rows)

    return session.do(work)


def vectors(
    view: View, session: Session, data: Timeline | None, stats: Timeline, every: StepSet
) -> tuple[_I64, _F64]:
    """Give the steps of a range that have statistics, ascending, and these: shape (n, 10).

    Parameters
    ----------
    data, stats
        What is saved of the values and of the statistics; without `data` those of values that
        lie in the index are left out.
    """
    found = _of_series(view, session, stats, every)
    if data is not None:
        found = found.with_more(_of_values(view, session, data, every, found))
    return found.by_step()


@dataclass(frozen=True, slots=True)
class _Vectors:
    """Statistics of saved values, a row each.

    Attributes
    ----------
    step, values
        Shapes (n,) and (n, 10).
    part
        Shape (n,), int64: number of the part; 0 if it is none.
    size
        Shape (n,): elements of the tensor that it is a part of; 0 if it is none.
    numbers
        Of each part.
    """

    step: _I64
    values: _F64
    part: _I64
    size: _F64
    numbers: dict[object, int]

    def part_of(self, source: Source) -> int:
        """Give the number of a source's part; −1 for one that is not here."""
        if source.part is None or not self.numbers:  # also where a worker's part is asked for alone
            return 0
        return self.numbers.get((source.worker, source.part), -1)

    def with_more(self, more: _Vectors) -> _Vectors:
        """Add others, in any order of steps."""
        if not len(more.step):
            return self
        step = np.concatenate([self.step, more.step])
        order = np.argsort(step, kind="stable")
        return _Vectors(
            step[order],
            np.concatenate([self.values, more.values])[order],
            np.concatenate([self.part, more.part])[order],
            np.concatenate([self.size, more.size])[order],
            self.numbers,
        )

    def by_step(self) -> tuple[_I64, _F64]:
        """Add up the parts of each step; leave out what lacks some."""
        if not self.size.any():
            return self.step, self.values
        begins = np.flatnonzero(np.diff(self.step, prepend=-1))
        total = np.add.reduceat(self.values, begins)
        total[:, 5] = np.fmin.reduceat(self.values[:, 5], begins)
        total[:, 6] = np.fmax.reduceat(self.values[:, 6], begins)
        size = self.size[begins]
        is_whole = (size == 0) | (total[:, 0] == size)
        return self.step[begins][is_whole], total[is_whole]


def _of_chosen(chosen: Chosen, rows: _I64, values: _F64, numbers: dict[object, int]) -> _Vectors:
    """Say of vectors which parts they are of."""
    line = chosen.line
    part, size = np.zeros(len(rows), np.int64), np.zeros(len(rows))
    if chosen.is_parts:
        sources = line.found.sources
        part = np.array([_number(s, numbers) for s in sources])[line.source[rows]]
        size = np.array([_size(s) for s in sources])[line.source[rows]]
    return _Vectors(line.step[rows], values, part, size, numbers)


def _number(source: Source, numbers: dict[object, int]) -> int:
    if source.part is None:
        return 0
    return numbers.setdefault((source.worker, source.part), len(numbers) + 1)


def _size(source: Source) -> float:
    return 0.0 if source.part is None else float(np.prod(source.series.global_shape, dtype=float))


def _missing(view: View, query: Query, data: Timeline, stats: Timeline, step: int) -> Exception:
    facts: dict[str, Any] = {"name": query.name, "step": step}
    if (stats.step == step).any():
        return FormatError(
            f"{describe_query(query)}: the statistics of step {step} do not cover the whole tensor",
            code="parts",
            **facts,
        )
    if (data.step == step).any():
        return StepNotFoundError(
            f"{describe_query(query)}: step {step} has values but no statistics; read the values",
            **facts,
        )
    return absence(view, stats.found.query, stats, step)


def stat_rows(session: Session, line: Timeline, rows: _I64) -> _F64:
    """Read the vectors of some rows of a timeline; shape (n, 10)."""
    step = line.step[rows]
    chosen = Chosen(line, step, rows, np.arange(len(rows)), is_parts=False)
    (values,) = read_all(session.storage, [assemble(chosen, ())])
    if values.shape != (len(rows), layout.STATS_LEN) or values.dtype != np.float64:
        raise FormatError(
            f"{line.found.query.name!r}: its statistics have shape {values.shape[1:]} and dtype "
            f"{values.dtype}",
            name=line.found.query.name,
        )
    return values


def _of_series(view: View, session: Session, line: Timeline, every: StepSet) -> _Vectors:
    """Take them from statistics series."""
    chosen = choose(view, line, every)
    values = np.empty((0, layout.STATS_LEN))
    if len(chosen.rows):
        values = stat_rows(session, chosen.line, chosen.rows)
    return _of_chosen(chosen, chosen.rows, values, {})


def _of_values(
    view: View, session: Session, line: Timeline, every: StepSet, have: _Vectors
) -> _Vectors:
    """Compute them from values that lie in the index, but for those that there are."""
    entries = line.found.entries.rows[line.row]
    keep = (entries["shard"] == layout.INLINE_SHARD) & _is_one_chunk(line)
    if len(have.step) and len(line):
        part = np.array([have.part_of(s) for s in line.found.sources])[line.source]
        for number in np.unique(part).tolist():
            keep &= (part != number) | ~np.isin(line.step, have.step[have.part == number])
    chosen = choose(view, line.take(keep), every)
    taken, parts = [chosen.rows[:0]], [np.empty((0, layout.STATS_LEN))]
    used = chosen.line.source[chosen.rows]
    for number in np.unique(used).tolist():
        rows = chosen.rows[used == number]
        series = chosen.line.found.sources[number].series
        for some in _same_shape(chosen.line, rows):
            step = chosen.line.step[some]
            alone = Chosen(chosen.line, step, some, np.arange(len(some)), is_parts=False)
            (values,) = read_all(session.storage, [assemble(alone, ())])
            flat = np.ascontiguousarray(values).reshape(len(some), -1)
            taken.append(some)
            parts.append(statistics.compute_rows(flat, dtype=series.dtype))
    return _of_chosen(chosen, np.concatenate(taken), np.concatenate(parts), have.numbers)


def _is_one_chunk(line: Timeline) -> NDArray[np.bool_]:
    """Say of each row whether its value is numbers in one chunk."""
    sources = line.found.sources
    can = np.zeros(len(sources), np.bool_)
    unsure: dict[tuple[int, ...], list[int]] = {}  # by the most that lengths which vary may be
    for number, source in enumerate(sources):
        series = source.series
        axes = list(zip(series.shape, series.grid, strict=True))
        if not statistics.supports(series.dtype) or any(0 < g < n for n, g in axes):
            continue
        limits = tuple([g or layout.MAX_AXIS for n, g in axes if n < 0])
        if limits:
            unsure.setdefault(limits, []).append(number)
        can[number] = not limits
    result = can[line.source] if len(can) else np.zeros(len(line), np.bool_)
    for limits, numbers in unsure.items():
        mine = np.isin(line.source, numbers)
        dims = line.found.entries.dims.take(line.row[mine]).values
        result[mine] = (dims.reshape(-1, len(limits)) <= limits).all(axis=1)
    return result


def _same_shape(line: Timeline, rows: _I64) -> list[_I64]:
    """Split rows of one source by the lengths of the axes that vary."""
    dims = line.found.entries.dims.take(line.row[rows]).values.reshape(len(rows), -1)
    if dims.shape[1] == 0:
        return [rows]
    _, inverse = np.unique(dims, axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    return [rows[inverse == i] for i in range(int(inverse.max(initial=-1)) + 1)]
