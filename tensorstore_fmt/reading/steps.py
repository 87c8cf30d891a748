"""Step sets: which steps a caller asks for."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple, SupportsIndex, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.format import layout

__all__ = ["StepSet", "Steps", "step_number", "step_set"]

_I64 = NDArray[np.int64]

Steps: TypeAlias = slice | Sequence[int] | NDArray[np.integer] | None
"""Step numbers: a half-open slice of them, exactly these, or None for all that were saved."""


class StepSet(NamedTuple):
    """Steps asked for: exactly some, or those that were saved among a range.

    Attributes
    ----------
    low, high
        Smallest and greatest step that can be meant.
    stride
        Of a range: only steps a multiple of this above `low`.
    exact
        Ascending, without repetition; None for a range.
    order
        Position in `exact` of each step in the caller's order; None if it is that order.
    """

    low: int = 0
    high: int = layout.MAX_STEP
    stride: int = 1
    exact: _I64 | None = None
    order: _I64 | None = None

    @classmethod
    def one(cls, number: int) -> StepSet:
        """Give the set of one step."""
        return cls(number, number, 1, np.array([number]))

    def has_all(self, saved: _I64) -> bool:
        """Say whether all of the saved steps, at least one, are meant."""
        return bool(
            self.exact is None
            and self.stride == 1
            and self.low <= saved[0]
            and saved[-1] <= self.high
        )

    def of_saved(self, saved: _I64) -> NDArray[np.bool_]:
        """Say which of the saved steps are meant."""
        if self.exact is not None:
            return np.isin(saved, self.exact)
        meant = (saved >= self.low) & (saved <= self.high)
        if self.stride != 1:
            meant &= (saved - self.low) % self.stride == 0
        return meant


def step_number(step: SupportsIndex) -> int:
    """Check one step.

    Raises
    ------
    ArgumentError
        It is no integer, or out of range.
    """
    if type(step) is int and 0 <= step <= layout.MAX_STEP:  # as a rule
        return step
    if isinstance(step, bool | np.bool_):
        raise ArgumentError(f"a step is an integer, not {step!r}", step=step)
    try:
        number = operator.index(step)
    except TypeError:
        raise ArgumentError(f"a step is an integer, not {step!r:.100}") from None
    if not 0 <= number <= layout.MAX_STEP:
        raise ArgumentError(
            f"step {number} is out of range: steps are numbers from 0 on, not positions; "
            "for the last saved one use .steps[-1]",
            step=number,
        )
    return number


def step_set(steps: Steps) -> StepSet:
    """Resolve the argument ``steps``.

    Raises
    ------
    ArgumentError
        It is something else, or has numbers that no step can have.
    """
    if steps is None:
        return StepSet()
    if isinstance(steps, slice):
        low = 0 if steps.start is None else step_number(steps.start)
        if steps.stop is None:
            high = layout.MAX_STEP
        elif steps.stop == 0:
            high = -1
        else:
            high = min(_index(steps.stop), layout.MAX_STEP + 1) - 1
            if high < 0:
                step_number(steps.stop)  # says what is wrong
        stride = 1 if steps.step is None else _index(steps.step)
        if stride < 1:
            raise ArgumentError(f"steps={steps}: the stride of a slice of steps is at least 1")
        return StepSet(low, high, stride)
    if isinstance(steps, str | bytes):
        raise ArgumentError(f"steps={steps!r}: use a slice, a sequence of integers, or None")
    given = np.asarray(steps)
    if given.size == 0:
        given = given.astype(np.int64)
    if given.ndim != 1 or given.dtype.kind not in "iu":
        raise ArgumentError(
            f"steps={steps!r:.100}: use a slice, a sequence of integers, or None for all; "
            "one step is step="
        )
    if given.size and not 0 <= int(given.min()) <= int(given.max()) <= layout.MAX_STEP:
        step_number(int(given.min()))
        step_number(int(given.max()))
    given = given.astype(np.int64)
    if len(given) == 0:
        return StepSet(0, -1, exact=given)
    if (given[1:] > given[:-1]).all():
        return StepSet(int(given[0]), int(given[-1]), exact=given)
    exact, order = np.unique(given, return_inverse=True)
    return StepSet(int(exact[0]), int(exact[-1]), exact=exact, order=order)


def _index(value: object) -> int:
    try:
        return operator.index(value)  # type: ignore[arg-type]  # this is the question
    except TypeError:
        raise ArgumentError(f"a slice of steps has integers, not {value!r:.100}") from None
