"""Chunk lengths: which axes are split, and that the boxes of chunks tile the tensor."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from tensorstore_fmt.format.grid import choose_grid, chunk_box, chunk_counts, n_chunks

KIB = 1024


@pytest.mark.parametrize(
    ("shape", "itemsize", "grid"),
    [
        ((), 8, ()),
        ((256 * KIB,), 1, (0,)),  # just fits
        ((256 * KIB + 1,), 1, (256 * KIB,)),
        ((300, 300), 4, (192, 0)),
        ((3, 300, 300), 4, (1, 192, 0)),
        ((2, 3, 256, 256), 4, (1, 1, 0, 0)),  # attention: a matrix is a chunk
        ((2, 3, 128, 128), 4, (1, 0, 0, 0)),  # 64 KiB matrices of one entry are put together
        ((64, 4, 128, 128), 4, (1, 0, 0, 0)),  # but not those of several
        ((64, 3, 64, 64), 4, (4, 0, 0, 0)),
        ((1000, 3, 128, 127), 4, (1, 0, 0, 0)),
        ((3, 2**40), 8, (1, 32 * KIB)),
        ((0, 2**40), 8, (0, 0)),
    ],
)
def test_the_grid_that_is_chosen(
    shape: tuple[int, ...], itemsize: int, grid: tuple[int, ...]
) -> None:
    assert choose_grid(shape, itemsize) == grid


def test_chunks_stay_below_the_target_and_tile_the_tensor() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        shape = tuple(rng.integers(0, 9, rng.integers(0, 5)).tolist())
        target = int(rng.integers(1, 200))
        grid = choose_grid(shape, 2, target_nbytes=target)
        seen = np.zeros(shape, np.int64)
        for number in range(n_chunks(shape, grid)):
            box = chunk_box(shape, grid, number)
            assert math.prod(b - a for a, b in box) * 2 <= max(target, 2)
            seen[tuple(slice(a, b) for a, b in box)] += 1
        assert (seen == 1).all()


def test_chunks_are_numbered_with_the_last_axis_fastest() -> None:
    shape, grid = (5, 3, 4), (2, 0, 3)
    assert chunk_counts(shape, grid) == (3, 1, 2)
    corners = [tuple(a for a, _ in chunk_box(shape, grid, n)) for n in range(6)]
    assert corners == list(itertools.product((0, 2, 4), (0,), (0, 3)))
    assert chunk_box(shape, grid, 5) == ((4, 5), (0, 3), (3, 4))
    assert chunk_counts((5, 0), (2, 1)) == (1, 1)
    assert chunk_box((5, 0), (2, 1), 0) == ((0, 5), (0, 0))
