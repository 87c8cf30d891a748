"""Payloads: which steps of a series are stored in the same bytes, so that none need be read."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt.errors import ArgumentError, NotThereError
from tensorstore_fmt.format import layout
from tensorstore_fmt.reading.assembly import assemble, choose
from tensorstore_fmt.reading.entries import Query
from tensorstore_fmt.reading.modes import mode_number
from tensorstore_fmt.reading.run import Run
from tensorstore_fmt.reading.steps import StepSet
from tensorstore_fmt.reading.timeline import timelines
from tensorstore_fmt.reading.view import View as Snapshot
from tensorstore_fmt.rules.rule import Series

__all__ = ["are_repeated"]


def are_repeated(run: Run, series: Series, steps: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Say of each step whether it is stored in the very bytes of the one before it.

    A writer that notices equal data stores it once (spec, "Duties of a writer"). From the index
    alone; False where that does not say it.

    Parameters
    ----------
    steps
        Ascending. The first one is never a repetition.
    """
    session = run._session
    query = Query(
        name=series.name, low=int(steps[0]), high=int(steps[-1]),
        mode=mode_number(series.mode), worker=series.worker,
    )  # fmt: skip
    unknown = np.zeros(len(steps), np.bool_)

    def work(view: Snapshot) -> NDArray[np.bool_]:
        (line,) = timelines(view, session.pages, [query])
        wanted = StepSet(query.low, query.high, exact=steps)
        groups = assemble(choose(view, line, wanted), ()).groups
        if len(groups) != 1 or len(groups[0].number) != len(steps):  # parts, other shapes
            return unknown
        found, entry = line.found, groups[0].entry
        rows = found.entries.rows
        is_one = (rows["count"] == 1) | ((rows["flags"] & layout.ENTRY_REPEAT) != 0)
        is_one &= rows["shard"] != layout.INLINE_SHARD
        same = is_one[entry[1:]] & is_one[entry[:-1]]
        for column in (found.source, rows["shard"], rows["offset"]):
            same &= column[entry[1:]] == column[entry[:-1]]
        result = unknown.copy()
        result[1:] = same.all(axis=1) & (entry.shape[1] > 0)
        return result

    try:
        return session.do(work)
    except (NotThereError, ArgumentError):  # some steps have statistics only, or another shape
        return unknown
