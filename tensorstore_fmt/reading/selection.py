"""Selections: what an index expression picks of a tensor, exactly as NumPy's basic indexing."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from types import EllipsisType
from typing import SupportsIndex, TypeAlias

import numpy as np

from tensorstore_fmt.errors import SelectionError

__all__ = ["Axis", "Index", "Selection", "normalize"]

IndexItem: TypeAlias = SupportsIndex | slice | EllipsisType
Index: TypeAlias = IndexItem | tuple[IndexItem, ...]
"""What `normalize` accepts: integers, slices, one Ellipsis, or a tuple of these."""

_ALLOWED = "use integers, slices and at most one Ellipsis, and index the result for the rest"


@dataclass(frozen=True, slots=True)
class Axis:
    """Elements ``start, start + step, …`` (`count` of them) along one axis.

    Attributes
    ----------
    start, count, step
        In elements; ``step`` is at least 1.
    is_flipped
        The caller sees them in descending order.
    is_dropped
        Picked by an integer: the result lacks this axis.
    """

    start: int
    count: int
    step: int = 1
    is_flipped: bool = False
    is_dropped: bool = False


@dataclass(frozen=True, slots=True)
class Selection:
    """A box with strides of a tensor of a given shape; one `Axis` for each of its axes."""

    axes: tuple[Axis, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Elements picked along every axis, dropped ones included (they count 1)."""
        return tuple(axis.count for axis in self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result."""
        return tuple(axis.count for axis in self.axes if not axis.is_dropped)

    @property
    def is_flipped(self) -> bool:
        """Whether any axis is seen in descending order."""
        return any(axis.is_flipped for axis in self.axes)

    def within(
        self, origin: tuple[int, ...], shape: tuple[int, ...]
    ) -> tuple[Selection, tuple[tuple[int, int], ...]] | None:
        """Restrict to a box of the tensor.

        Returns
        -------
        tuple or None
            The selection in coordinates of the box, and per axis which of the picked elements
            these are (start, stop, counted in ascending order); None if there are none.
        """
        axes = []
        places = []
        for axis, low, length in zip(self.axes, origin, shape, strict=True):
            begin = max(0, -((axis.start - low) // axis.step))
            end = min(axis.count, -((axis.start - low - length) // axis.step))
            if begin >= end:
                return None
            axes.append(Axis(axis.start + begin * axis.step - low, end - begin, axis.step))
            places.append((begin, end))
        return Selection(tuple(axes)), tuple(places)


def normalize(index: object, shape: tuple[int, ...]) -> Selection:
    """Resolve an index expression against a shape, as NumPy's basic indexing does.

    Parameters
    ----------
    index
        An `Index`. Missing trailing axes are whole; slices may leave the tensor.
    shape
        Lengths of the tensor's axes.

    Raises
    ------
    SelectionError
        An integer out of range (code ``out_of_range``), too many indices
        (``too_many_indices``), or something that is not basic indexing (``bad_selection``).
    """
    if not isinstance(index, tuple):
        index = (index,)
    if not index:
        return Selection(tuple([Axis(0, n) for n in shape]))
    ellipses = sum(item is Ellipsis for item in index)
    if ellipses > 1:
        raise SelectionError(f"an index can have one Ellipsis ('...'), this one has {ellipses}")
    n_given = len(index) - ellipses
    if n_given > len(shape):
        for item in index:
            _check(item)
        raise SelectionError(
            f"too many indices: {n_given} for a tensor with {len(shape)} axes of lengths {shape}",
            code="too_many_indices",
            shape=shape,
        )
    axes: list[Axis] = []
    for item in index:
        if item is Ellipsis:
            skipped = len(shape) - n_given
            axes += [Axis(0, n) for n in shape[len(axes) : len(axes) + skipped]]
        else:
            axes.append(_axis(item, shape[len(axes)], len(axes)))
    axes += [Axis(0, n) for n in shape[len(axes) :]]
    return Selection(tuple(axes))


def _axis(item: object, n: int, number: int) -> Axis:
    if isinstance(item, slice):
        try:
            start, stop, step = item.indices(n)
        except (TypeError, ValueError) as error:
            raise SelectionError(f"axis {number}: {error}") from None
        count = len(range(start, stop, step))
        if count == 0:
            return Axis(0, 0)
        if step < 0:
            return Axis(start + (count - 1) * step, count, -step, is_flipped=True)
        return Axis(start, count, step)
    _check(item)
    position = operator.index(item)  # type: ignore[arg-type]  # _check made sure
    if not -n <= position < n:
        raise SelectionError(
            f"index {position} is out of range for axis {number} with {n} elements",
            code="out_of_range",
            axis=number,
            index=position,
            nelements=n,
        )
    return Axis(position % n, 1, is_dropped=True)


def _check(item: object) -> None:
    """Refuse what is not basic indexing, saying what it is."""
    if isinstance(item, slice) or item is Ellipsis:
        return
    if item is None:
        what = "newaxis (None)"
    elif isinstance(item, bool | np.bool_):
        what = "a boolean"
    elif isinstance(item, list) or (
        isinstance(item, np.ndarray) and (item.ndim or item.dtype == np.bool_)
    ):
        what = "an array or list"
    elif isinstance(item, tuple):
        what = "a tuple inside the index"
    else:
        try:
            operator.index(item)  # type: ignore[arg-type]  # this is the question
        except TypeError:
            what = f"{type(item).__name__} ({item!r:.50})"
        else:
            return
    raise SelectionError(f"{what} cannot be part of an index here: {_ALLOWED}")
