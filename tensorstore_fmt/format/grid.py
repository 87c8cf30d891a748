"""Grids: how a tensor's box is cut into chunks (spec, "Grid"), and which lengths to choose."""

from __future__ import annotations

import math
from typing import Final

__all__ = [
    "DEFAULT_CHUNK_NBYTES",
    "choose_grid",
    "chunk_box",
    "chunk_counts",
    "n_chunks",
    "steps_lengths",
]

DEFAULT_CHUNK_NBYTES: Final = 256 * 1024
_BATCHED_NBYTES: Final = 64 * 1024  # inner boxes of at least this size stay apart


def steps_lengths(shape: tuple[int, ...], grid: tuple[int, ...]) -> tuple[int, ...]:
    """Give the chunk length along each axis, with 0 (whole axis) resolved; never 0."""
    return tuple(g or max(n, 1) for n, g in zip(shape, grid, strict=True))


def chunk_counts(shape: tuple[int, ...], grid: tuple[int, ...]) -> tuple[int, ...]:
    """Give the number of chunks along each axis; all 1 for a tensor without elements."""
    if 0 in shape:
        return (1,) * len(shape)
    return tuple(-(-n // g) if g else 1 for n, g in zip(shape, grid, strict=True))


def n_chunks(shape: tuple[int, ...], grid: tuple[int, ...]) -> int:
    """Give the number of chunks of a tensor; at least 1."""
    return math.prod(chunk_counts(shape, grid))


def chunk_box(
    shape: tuple[int, ...], grid: tuple[int, ...], number: int
) -> tuple[tuple[int, int], ...]:
    """Give (start, stop) per axis of chunk `number`, in elements."""
    if 0 in shape:
        return tuple((0, n) for n in shape)
    counts = chunk_counts(shape, grid)
    lengths = steps_lengths(shape, grid)
    box: list[tuple[int, int]] = []
    for n, g, count in zip(reversed(shape), reversed(lengths), reversed(counts), strict=True):
        number, j = divmod(number, count)
        box.append((j * g, min((j + 1) * g, n)))
    return tuple(reversed(box))


def choose_grid(
    shape: tuple[int, ...], itemsize: int, *, target_nbytes: int = DEFAULT_CHUNK_NBYTES
) -> tuple[int, ...]:
    """Choose chunk lengths of about `target_nbytes`, splitting leading axes first.

    Trailing axes stay whole as long as they fit. Leading axes of something that is
    large already (attention ``(B, H, S, S)``) are split down to 1, so that one matrix is
    one chunk. Lengths are powers of two, or one and a half times one, so that a name whose shape
    changes from step to step uses few different grids.
    """
    if not shape or math.prod(shape) * itemsize <= target_nbytes:
        return (0,) * len(shape)
    grid = [0] * len(shape)
    inner, axis = itemsize, len(shape) - 1
    while inner * shape[axis] <= target_nbytes:  # ends: all axes together do not fit
        inner *= shape[axis]
        axis -= 1
    is_batched = inner >= _BATCHED_NBYTES and axis < len(shape) - 2
    length = 1 if is_batched else max(1, target_nbytes // inner)
    power = 1 << (length.bit_length() - 1)
    grid[axis] = min(power + power // 2 if power + power // 2 <= length else power, shape[axis])
    grid[:axis] = [1] * axis
    return tuple(grid)
