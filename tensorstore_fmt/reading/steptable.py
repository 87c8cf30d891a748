"""The step table: which steps were logged, when, and their number in their mode."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt.errors import FormatError
from tensorstore_fmt.format import layout
from tensorstore_fmt.reading.assembly import Chosen, assemble
from tensorstore_fmt.reading.entries import Query
from tensorstore_fmt.reading.fetch import read_all
from tensorstore_fmt.reading.session import Session
from tensorstore_fmt.reading.timeline import Timeline, timelines
from tensorstore_fmt.reading.view import View

__all__ = ["StepRows", "complete_steps", "is_complete", "logged_steps", "step_rows"]

_I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepRows:
    """Rows of the step table, ascending by step; columns of shape (n,), int64."""

    step: _I64
    mode: _I64
    worker: _I64
    mode_step: _I64
    wall_time_us: _I64


def _line(
    view: View, session: Session, mode: int | None, low: int = 0, high: int = layout.MAX_STEP
) -> Timeline:
    query = Query(name="", kind=layout.KIND_STEPS, low=low, high=high, mode=mode)
    (line,) = timelines(view, session.pages, [query])
    return line.saved()


def logged_steps(
    session: Session, mode: int | None, low: int = 0, high: int = layout.MAX_STEP
) -> _I64:
    """Give the steps that any worker logged in a mode (None: any), ascending, once each."""
    return session.do(lambda view: _line(view, session, mode, low, high).steps)


def step_rows(
    session: Session, mode: int | None, low: int = 0, high: int = layout.MAX_STEP
) -> StepRows:
    """Read rows of the step table."""

    def work(view: View) -> StepRows:
        line = _line(view, session, mode, low, high)
        values = np.empty((0, 2), np.int64)
        if len(line):
            rows = np.arange(len(line))
            chosen = Chosen(line, line.step, rows, rows, is_parts=False)
            (values,) = read_all(session.storage, [assemble(chosen, ())])
            if values.shape != (len(line), 2) or values.dtype != np.int64:
                raise FormatError("the step table has another shape or dtype than the spec's")
        sources = line.found.sources
        modes = np.array([s.series.mode for s in sources], np.int64)
        workers = np.array([s.worker for s in sources], np.int64)
        return StepRows(
            line.step,
            modes[line.source] if len(line) else line.step,
            workers[line.source] if len(line) else line.step,
            values[:, 0],
            values[:, 1],
        )

    return session.do(work)


def is_complete(session: Session, step: int, mode: int | None) -> bool:
    """Say whether all workers have everything of a step (spec, "What is not there").

    Without a mode: in all modes in which it was logged; if it was not, in all that are used.
    """

    def work(view: View) -> bool:
        if mode is not None:
            return view.complete_through(mode) >= step
        line = _line(view, session, None, step, step)
        logged = {line.found.sources[i].series.mode for i in line.source.tolist()}
        return all(view.complete_through(m) >= step for m in logged or view.used_modes or (0,))

    return session.do(work)


def complete_steps(session: Session, mode: int | None, after: int = -1) -> _I64:
    """Give the logged steps above `after` that are complete, ascending, once each.

    Without a mode: those that are complete in all modes in which they were logged.
    """

    def work(view: View) -> _I64:
        line = _line(view, session, mode, after + 1)
        if not len(line):
            return line.step
        modes = np.array([s.series.mode for s in line.found.sources], np.int64)[line.source]
        through = np.array([view.complete_through(m) for m in range(len(layout.MODES))], np.int64)
        is_done = line.step <= through[modes]
        undone = line.step[~is_done]
        done = np.unique(line.step[is_done])
        return done[~np.isin(done, undone)] if len(undone) else done

    return session.do(work)
