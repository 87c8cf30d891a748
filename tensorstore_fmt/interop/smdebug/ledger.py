"""Ledger: which workers have written which steps, and which of these are complete.

A step is complete when all workers have written it, or a later one is complete, or the run has
ended. If more steps than a window wait for workers, half of them are given up: they count as
complete with what there is of them.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt.interop.smdebug.mode_keys import ModeKeys, StepState, mode_of
from tensorstore_fmt.reading.steptable import StepRows

__all__ = ["Ledger"]

_I64 = NDArray[np.int64]

_MODES: Final = (ModeKeys.TRAIN, ModeKeys.EVAL, ModeKeys.PREDICT, ModeKeys.GLOBAL)


class Ledger:
    """The steps of a run as of one look at it; immutable.

    Parameters
    ----------
    rows
        The step table.
    num_workers
        How many workers write.
    has_ended
        Whether all of them have closed the run.
    window
        How many steps may wait for workers.
    first, stop
        Only steps from `first` up to, not including `stop`; None: no bound.
    """

    def __init__(
        self,
        rows: StepRows,
        *,
        num_workers: int,
        has_ended: bool,
        window: int,
        first: int | None = None,
        stop: int | None = None,
    ) -> None:
        keep = np.ones(len(rows.step), np.bool_)
        if first is not None:
            keep &= rows.step >= first
        if stop is not None:
            keep &= rows.step < stop
        step, worker = rows.step[keep], rows.worker[keep]
        self._mode = rows.mode[keep]
        self._step, self._mode_step = step, rows.mode_step[keep]
        self.has_ended = has_ended
        pairs = np.unique(np.stack([step, worker], 1), axis=0)
        self.steps: _I64
        self.steps, count = np.unique(pairs[:, 0], return_counts=True)
        """All steps that any worker has written, ascending."""
        self.last_complete = self._last_complete(count, num_workers, window)
        self.complete: _I64 = self.steps[self.steps <= self.last_complete]
        """Those that are complete."""
        self._by_mode: dict[ModeKeys, tuple[_I64, _I64]] = {}

    def _last_complete(self, count: _I64, num_workers: int, window: int) -> int:
        if not len(self.steps):
            return -1
        if self.has_ended:
            return int(self.steps[-1])
        done = np.flatnonzero(count >= num_workers)
        last = int(self.steps[done[-1]]) if len(done) else -1
        waiting = self.steps[self.steps > last]
        if len(waiting) > window:
            last = int(waiting[len(waiting) // 2 - 1])
        return last

    @property
    def modes(self) -> list[ModeKeys]:
        """Modes in which anything was written."""
        here = {mode_of(number) for number in set(self._mode.tolist())}
        return [mode for mode in _MODES if mode in here]

    def of_mode(self, mode: ModeKeys) -> tuple[_I64, _I64]:
        """Give the steps of a mode, as mode steps (ascending) and as the global steps they are."""
        if mode is ModeKeys.GLOBAL:
            return self.steps, self.steps
        found = self._by_mode.get(mode)
        if found is None:
            mine = self._mode == mode.value
            number, row = np.unique(self._mode_step[mine], return_index=True)
            found = self._by_mode[mode] = number, self._step[mine][row]
        return found

    def global_step(self, step: int, mode: ModeKeys) -> int | None:
        """Give the global step that a step of a mode is; None if there is none."""
        numbers, steps = self.of_mode(mode)
        at = int(numbers.searchsorted(step))
        return int(steps[at]) if at < len(numbers) and numbers[at] == step else None

    def mode_of(self, step: int) -> ModeKeys | None:
        """Give the mode of a global step; None if there is no such step."""
        rows = np.flatnonzero(self._step == step)
        return mode_of(int(self._mode[rows].min())) if len(rows) else None

    def mode_step_of(self, step: int) -> int | None:
        """Give the number of a global step within its mode; None if there is no such step."""
        rows = np.flatnonzero(self._step == step)
        if not len(rows):
            return None
        mode = self._mode[rows].min()
        if mode_of(int(mode)) is ModeKeys.GLOBAL:
            return step
        return int(self._mode_step[rows][self._mode[rows] == mode][0])

    def in_mode(self, steps: _I64, mode: ModeKeys) -> list[int]:
        """Give those of some global steps that are of a mode, as its own steps."""
        numbers, of = self.of_mode(mode)
        found: list[int] = numbers[np.isin(of, steps)].tolist()
        return found

    def state(self, step: int, mode: ModeKeys) -> StepState:
        """Say whether a step can be read, or will never be."""
        numbers, steps = self.of_mode(mode)
        at = int(numbers.searchsorted(step))
        is_there = at < len(numbers) and numbers[at] == step
        if is_there and (self.has_ended or steps[at] <= self.last_complete):
            return StepState.AVAILABLE
        if not is_there and (self.has_ended or (steps[at:] <= self.last_complete).any()):
            return StepState.UNAVAILABLE
        return StepState.NOT_YET_AVAILABLE
