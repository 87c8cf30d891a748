"""A set of steps that only grows at its end, as a rule: little memory where steps are regular."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt.format.progressions import runs_of_steps

__all__ = ["StepRuns"]

_I64 = NDArray[np.int64]


class StepRuns:
    """Steps, kept as arithmetic progressions: 24 bytes for each of these."""

    def __init__(self) -> None:
        self._runs = np.empty((0, 3), np.int64)  # first, stride, last

    def __len__(self) -> int:
        """Give the number of progressions."""
        return len(self._runs)

    def has(self, steps: _I64) -> NDArray[np.bool_]:
        """Say of ascending steps which are in the set."""
        found = np.zeros(len(steps), np.bool_)
        if not len(steps):
            return found
        is_near = (self._runs[:, 0] <= steps[-1]) & (steps[0] <= self._runs[:, 2])
        for first, stride, last in self._runs[is_near].tolist():
            begin, end = np.searchsorted(steps, (first, last + 1))
            found[begin:end] |= (steps[begin:end] - first) % stride == 0
        return found

    def add(self, steps: _I64) -> None:
        """Put ascending steps, which are not in the set, into it."""
        runs = [(int(first), int(stride), int(last)) for first, stride, last in self._runs[-1:]]
        for begin, end in runs_of_steps(steps):
            if begin < end:
                first, last = int(steps[begin]), int(steps[end - 1])
                stride = (last - first) // max(end - begin - 1, 1) or 1
                _append(runs, (first, stride, last))
        if runs:
            self._runs = np.concatenate([self._runs[:-1], np.array(runs, np.int64)])

    def cut(self, step: int) -> None:
        """Take this step and all greater ones out of the set."""
        runs = self._runs[self._runs[:, 0] < step]
        first, stride, last = runs.T
        runs[:, 2] = np.minimum(last, first + (step - 1 - first) // stride * stride)
        self._runs = runs


def _append(runs: list[tuple[int, int, int]], run: tuple[int, int, int]) -> None:
    """Append a progression, or lengthen the last by it."""
    first, stride, last = run
    if runs:
        begin, known, end = runs[-1]
        gap = first - end
        goes_on = gap > 0 and (begin == end or gap == known) and (first == last or gap == stride)
        if goes_on:
            runs[-1] = (begin, gap, last)
            return
    runs.append(run)
