"""Selections: NumPy's basic indexing, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from tensorstore_fmt.errors import SelectionError
from tensorstore_fmt.reading.selection import Axis, normalize

SHAPE = (4, 5, 6)


@pytest.mark.parametrize(
    "index",
    [
        (), 0, -1, np.int16(2), ..., slice(None), slice(1, 3), slice(None, None, -1),
        slice(100, -100, -3), slice(-100, 100, 2), slice(3, 1), (..., 2), (1, ..., 2),
        (slice(2), slice(None, None, 2)), (1, 2, 3), (..., slice(1, None, 3), slice(None)),
        (slice(0, 0),), (np.array(2), slice(None)),
    ],
)  # fmt: skip
def test_gives_the_shape_that_numpy_gives(index: object) -> None:
    assert normalize(index, SHAPE).shape == np.empty(SHAPE)[index].shape


def test_axes_are_ascending_and_remember_their_order() -> None:
    assert normalize(slice(None, None, -2), (5,)).axes == (Axis(0, 3, 2, is_flipped=True),)
    assert normalize(slice(3, None, -2), (5,)).axes == (Axis(1, 2, 2, is_flipped=True),)
    assert normalize(-1, (5,)).axes == (Axis(4, 1, is_dropped=True),)


@pytest.mark.parametrize(
    ("index", "code"),
    [
        (4, "out_of_range"),
        ((0, -6), "out_of_range"),
        ((0, 0, 0, 0), "too_many_indices"),
        ((0, 0, 0, None), "bad_selection"),
        (None, "bad_selection"),
        (True, "bad_selection"),
        (np.True_, "bad_selection"),
        (np.array(True), "bad_selection"),
        ([0, 1], "bad_selection"),
        (np.array([0, 1]), "bad_selection"),
        ((..., ...), "bad_selection"),
        (((0,), 1), "bad_selection"),
        (1.0, "bad_selection"),
        ("a", "bad_selection"),
        (slice(0.5), "bad_selection"),
        (slice(None, None, 0), "bad_selection"),
    ],
)
def test_refuses_what_is_not_basic_indexing(index: object, code: str) -> None:
    with pytest.raises(SelectionError) as caught:
        normalize(index, SHAPE)
    assert caught.value.code == code
    assert isinstance(caught.value, IndexError)


def test_out_of_range_says_which_axis() -> None:
    with pytest.raises(SelectionError) as caught:
        normalize((0, 9), SHAPE)
    assert caught.value.facts == {"axis": 1, "index": 9, "nelements": 5}


def test_within_gives_the_part_of_a_box() -> None:
    selection = normalize((slice(1, 9, 3), 4), (10, 10))  # 1, 4, 7 × 4
    inside = selection.within((3, 2), (5, 5))  # 3 … 7 × 2 … 6
    assert inside is not None
    local, places = inside
    assert local.axes == (Axis(1, 2, 3), Axis(2, 1))
    assert places == ((1, 3), (0, 1))
    assert selection.within((8, 0), (2, 10)) is None
    assert selection.within((0, 5), (10, 5)) is None
