"""Blocks: what a run holds in a range of steps, read once for all rules that ask."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt import dtypes
from tensorstore_fmt.errors import NotThereError
from tensorstore_fmt.format import layout, statistics
from tensorstore_fmt.reading.entries import Query
from tensorstore_fmt.reading.modes import MODE_NAMES, mode_number
from tensorstore_fmt.reading.reader import read
from tensorstore_fmt.reading.run import Run
from tensorstore_fmt.reading.selection import Index
from tensorstore_fmt.reading.stats import derived, vectors
from tensorstore_fmt.reading.steps import StepSet
from tensorstore_fmt.reading.tensor import Tensor
from tensorstore_fmt.reading.timeline import timelines
from tensorstore_fmt.reading.view import Source
from tensorstore_fmt.reading.view import View as Snapshot
from tensorstore_fmt.rules.rule import Needs, Series

if TYPE_CHECKING:
    from tensorstore_fmt.rules.view import View

__all__ = [
    "MOST_VALUE_NBYTES",
    "Block",
    "Column",
    "Item",
    "Matches",
    "load",
    "of_modes",
    "series_of",
    "step_nbytes",
]

MOST_VALUE_NBYTES: Final = 64 * 1024 * 1024
"""So many bytes of values are read at once, and as many more are kept for the next rule."""

_I64 = NDArray[np.int64]
_F64 = NDArray[np.float64]
Item = tuple[Series, int, Index]
"""A value to read: series, step and slice."""

_FIELDS: Final = {field: i for i, field in enumerate(layout.STATS_FIELDS)}


class Column:
    """Statistics of one series, one row a step.

    Attributes
    ----------
    series
        Whose they are.
    step
        Shape (n,), int64, ascending.
    rows
        Shape (n, 10), float64: as the spec has them ("Statistics").
    """

    __slots__ = ("_derived", "rows", "series", "step")

    def __init__(self, series: Series, step: _I64, rows: _F64) -> None:
        self.series = series
        self.step = step
        self.rows = rows
        self._derived: dict[str, _F64] | None = None

    def __getitem__(self, field: str) -> _F64:
        """Give a column: one of the ten, or ``mean``, ``std``, ``l2``, ``absmean``.

        The last ones are of the finite elements, NaN if there are none.
        """
        if field in _FIELDS:
            return self.rows[:, _FIELDS[field]]
        if self._derived is None:
            columns = {name: self.rows[:, i] for name, i in _FIELDS.items()}
            more = derived(columns)
            n = columns["count"] - self.not_finite
            with np.errstate(all="ignore"):
                more["absmean"] = columns["sumabs"] / np.where(n > 0, n, np.nan)
            self._derived = more
        return self._derived[field]

    @property
    def not_finite(self) -> _F64:
        """How many elements are NaN or infinite."""
        total: _F64 = self.rows[:, 1:4].sum(axis=1)
        return total


def of_modes(needs: Sequence[Needs], mode: int) -> list[Needs]:
    """Give what is needed of a mode."""
    return [each for each in needs if mode_number(each.mode) in (None, mode)]


@dataclass(frozen=True, slots=True)
class Matches:
    """Names that a pattern matched, among those looked at."""

    pattern: re.Pattern[str]
    matches: dict[str, bool]

    def of(self, names: Sequence[str]) -> list[str]:
        """Give those that match."""
        known = self.matches
        for name in names:
            if name not in known:
                known[name] = self.pattern.search(name) is not None
        return [name for name in names if known[name]]


class Block:
    """A range of steps of some modes. Nothing outside of it is shown.

    Parameters
    ----------
    run
        At the view that is evaluated.
    steps
        The logged steps in it, by mode; shape (n,), int64, ascending.
    low, high
        The first and the last step of the range.
    others
        Runs that the rules compare with.
    names
        Kept from block to block: what patterns match.
    """

    def __init__(
        self,
        run: Run,
        steps: dict[int, _I64],
        *,
        low: int,
        high: int,
        others: Sequence[Run] = (),
        names: dict[str, Matches] | None = None,
    ) -> None:
        self.run = run
        self.low, self.high = low, high
        self.others = tuple(others)
        self._steps = steps
        self._names = {} if names is None else names
        self._columns: dict[Series, Column | None] = {}
        self._values: OrderedDict[tuple[int, Series, int, str], Any] = OrderedDict()
        self._values_nbytes = 0

    @property
    def modes(self) -> tuple[str, ...]:
        """Modes whose steps it has."""
        return tuple(MODE_NAMES[mode] for mode in self._steps)

    def steps(self, mode: str) -> _I64:
        """Give the logged steps of one of its modes, ascending."""
        return self._steps[MODE_NAMES.index(mode)]

    # --- statistics ----------------------------------------------------------------

    def names(self, pattern: str) -> list[str]:
        """Give the names that a regular expression matches, in order."""
        kept = self._names.get(pattern)
        if kept is None:
            kept = self._names[pattern] = Matches(re.compile(pattern), {})
        return kept.of(self.run._session.view.names)

    def columns(self, pattern: str, mode: str | None = None) -> list[Column]:
        """Give statistics of all series whose names match, those with at least one step here.

        They are fetched in one round of requests, once; no chunk is.
        """
        wanted = self.series(pattern, mode)
        self._load([series for series in wanted if series not in self._columns])
        found = [self._columns[series] for series in wanted]
        return [column for column in found if column is not None]

    def of(self, series: Series) -> list[Column]:
        """Give the statistics of one series: one column, or none if it has no step here."""
        self._load([series] if series not in self._columns else [])
        column = self._columns[series]
        return [] if column is None else [column]

    def series(self, pattern: str, mode: str | None = None) -> list[Series]:
        """Give all series whose names match, whether or not they have steps here."""
        number = mode_number(mode)
        modes = [m for m in self._steps if number in (None, m)]
        return self.run._session.do(
            lambda view: [
                series
                for name in self.names(pattern)
                for m in modes
                for series in series_of(view, name, m)
            ]
        )

    def shape(self, series: Series) -> tuple[int, ...]:
        """Give the shape of a series, as the catalogs have it; −1 for an axis that varies."""
        view = self.run._session.view
        for source in view.sources(series.name, layout.KIND_DATA):
            if MODE_NAMES[source.series.mode] == series.mode:
                return source.series.global_shape or source.series.shape
        return ()

    def _load(self, wanted: Sequence[Series]) -> None:
        if wanted:
            for column in load(self.run, wanted, self.low, self.high):
                self._columns[column.series] = column if len(column.step) else None

    # --- values ----------------------------------------------------------------------

    def saved(self, pattern: str, mode: str | None = None) -> list[tuple[Series, _I64]]:
        """Give the series whose names match, and the steps here at which values were saved.

        Unlike `columns` also those without statistics. From the index alone.
        """
        session = self.run._session
        found = self.series(pattern, mode)

        def work(view: Snapshot) -> list[tuple[Series, _I64]]:
            queries = [_query(each, layout.KIND_DATA, self.low, self.high) for each in found]
            lines = timelines(view, session.pages, queries)
            return [
                (series, line.saved().steps)
                for series, line in zip(found, lines, strict=True)
                if len(line)
            ]

        return session.do(work)

    def read(self, items: Sequence[Item], *, other: int | None = None) -> Iterator[Any]:
        """Give values one after the other; few are in memory, and each is fetched once.

        Arrays are read-only, as other rules may get the same.

        Parameters
        ----------
        items
            Series, step and slice of each.
        other
            Read them from this one of `others`, where None stands for a value that is not there.
        """
        begin = 0
        while begin < len(items):
            end, nbytes = begin, 0
            while end < len(items) and (end == begin or nbytes <= MOST_VALUE_NBYTES):
                nbytes += self._nbytes(items[end], other)
                end += 1
            yield from self._fetch(items[begin:end], other)
            begin = end

    def _fetch(self, items: Sequence[Item], other: int | None) -> list[Any]:
        """Read those that are not kept, with one round of requests."""
        where = -1 if other is None else other
        keys = [(where, series, step, repr(index)) for series, step, index in items]
        found = {key: self._values[key] for key in keys if key in self._values}
        missing = [i for i, key in enumerate(keys) if key not in found]
        if missing:
            run = self.run if other is None else self.others[other]
            got = _read(run, [items[i] for i in missing], may_lack=other is not None)
            for i, value in zip(missing, got, strict=True):
                found[keys[i]] = value
                self._keep(keys[i], value)
        return [found[key] for key in keys]

    def _keep(self, key: tuple[int, Series, int, str], value: object) -> None:
        if isinstance(value, np.ndarray):
            value.flags.writeable = False
        self._values[key] = value
        self._values_nbytes += getattr(value, "nbytes", 0)
        while self._values_nbytes > MOST_VALUE_NBYTES:
            _, gone = self._values.popitem(last=False)
            self._values_nbytes -= getattr(gone, "nbytes", 0)

    def _nbytes(self, item: Item, other: int | None) -> int:
        run = self.run if other is None else self.others[other]
        view = run._session.view
        sources = view.sources(item[0].name, layout.KIND_DATA)
        return max((step_nbytes(source) for source in sources), default=0)

    # --- the rest ----------------------------------------------------------------------

    def views(self, needs: Sequence[Needs]) -> Iterator[View]:
        """Give a view of each step of each mode, ascending; of what `needs` lists."""
        from tensorstore_fmt.rules.view import views  # the two know each other

        return views(self, needs)


def step_nbytes(source: Source) -> int:
    """Give about how many bytes one step of a series has."""
    series = source.series
    shape = series.global_shape or series.shape
    if -1 in shape or series.dtype == dtypes.STRING:
        return series.raw_nbytes // max(series.steps, 1)
    return math.prod(shape) * dtypes.itemsize(series.dtype)


def series_of(view: Snapshot, name: str, mode: int) -> list[Series]:
    """Give the series of a name in a mode: one a worker, or one if they are parts."""
    workers: dict[int | None, None] = {}
    for kind in (layout.KIND_DATA, layout.KIND_STATS):
        for source in view.sources(name, kind):
            if source.series.mode == mode:
                workers[None if source.series.global_shape else source.worker] = None
    if None in workers:
        return [Series(name, MODE_NAMES[mode], None)]
    return [Series(name, MODE_NAMES[mode], worker) for worker in workers]


def load(run: Run, wanted: Sequence[Series], low: int, high: int) -> list[Column]:
    """Read the statistics of series in a range of steps, in one round of requests."""
    session = run._session
    every = StepSet(low, high)

    def work(view: Snapshot) -> list[Column]:
        of_stats = [_query(series, layout.KIND_STATS, low, high) for series in wanted]
        of_data = [
            _query(series, layout.KIND_DATA, low, high) if _has_in_index(view, series) else None
            for series in wanted
        ]
        asked = [*of_stats, *(each for each in of_data if each is not None)]
        lines = iter(timelines(view, session.pages, asked))
        stats = [next(lines).saved() for _ in of_stats]
        data = [None if each is None else next(lines).saved() for each in of_data]
        return [
            Column(series, *vectors(view, session, d, s, every))
            for series, d, s in zip(wanted, data, stats, strict=True)
        ]

    return session.do(work)


def _query(series: Series, kind: int, low: int, high: int) -> Query:
    return Query(
        name=series.name, kind=kind, low=low, high=high,
        mode=mode_number(series.mode), worker=series.worker,
    )  # fmt: skip


def _has_in_index(view: Snapshot, series: Series) -> bool:
    """Say whether values may lie in the index, without statistics of their own."""
    mode = mode_number(series.mode)
    has_stats = any(s.series.mode == mode for s in view.sources(series.name, layout.KIND_STATS))
    return any(
        source.series.mode == mode
        and statistics.supports(source.series.dtype)
        and (not has_stats or step_nbytes(source) <= layout.INLINE_STEP_NBYTES)
        for source in view.sources(series.name, layout.KIND_DATA)
    )


def _read(run: Run, items: Sequence[Item], *, may_lack: bool) -> list[Any]:
    session = run._session
    asks = [
        Tensor(session, _whole(series)).ask(step=step, index=index) for series, step, index in items
    ]
    try:
        return read(session, asks)
    except NotThereError:
        if not may_lack:
            raise
        return [_read_one(run, item) for item in items]


def _read_one(run: Run, item: Item) -> Any:  # noqa: ANN401 - an array or a text
    series, step, index = item
    try:
        return Tensor(run._session, _whole(series)).read(step=step, index=index)
    except NotThereError:
        return None


def _whole(series: Series) -> Query:
    return Query(name=series.name, mode=mode_number(series.mode), worker=series.worker)
