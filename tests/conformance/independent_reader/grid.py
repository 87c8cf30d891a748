"""Grids ("7.3 Grid") and selections of boxes ("10.5 Reading a slice")."""

from __future__ import annotations

import math
from collections.abc import Sequence

Index = tuple[int | slice, ...]


def axis_chunks(length: int, grid: int) -> range:
    """Give the starts of the chunks along an axis."""
    return range(0, max(length, 1), grid or max(length, 1))


def count_chunks(shape: Sequence[int], grid: Sequence[int]) -> int:
    """Count; a tensor without elements has one chunk."""
    if 0 in shape:
        return 1
    return math.prod(len(axis_chunks(n, g)) for n, g in zip(shape, grid, strict=True))


def chunk_box(shape: Sequence[int], grid: Sequence[int], chunk: int) -> list[tuple[int, int]]:
    """Give the box of a chunk, numbered in C order."""
    if 0 in shape:
        return [(0, n) for n in shape]
    box: list[tuple[int, int]] = []
    for n, g in zip(reversed(shape), reversed(grid), strict=True):
        starts = axis_chunks(n, g)
        chunk, j = divmod(chunk, len(starts))
        box.append((starts[j], min(starts[j] + (g or n), n)))
    return box[::-1]


def selection(index: Index, shape: Sequence[int]) -> tuple[list[range], list[int]]:
    """Turn ints and slices into one range per axis; give also the shape of the result."""
    if len(index) > len(shape):
        raise IndexError("more indices than axes")
    padded = (*index, *[slice(None)] * (len(shape) - len(index)))
    ranges: list[range] = []
    for item, length in zip(padded, shape, strict=True):
        if isinstance(item, slice):
            ranges.append(range(*item.indices(length)))
        else:
            at = range(length)[item]
            ranges.append(range(at, at + 1))
    kept = [len(r) for r, item in zip(ranges, padded, strict=True) if isinstance(item, slice)]
    return ranges, kept


def pick(wanted: range, low: int, high: int) -> range:
    """Give the positions in `wanted` of its elements in [low, high)."""
    if wanted.step > 0:
        first = -((wanted.start - low) // wanted.step)
        last = -((wanted.start - high) // wanted.step)
    else:
        first = (wanted.start - high) // -wanted.step + 1
        last = (wanted.start - low) // -wanted.step + 1
    return range(max(first, 0), max(min(last, len(wanted)), first, 0))


def as_slice(wanted: range) -> slice:
    stop = wanted.stop if wanted.stop >= 0 else None
    return slice(wanted.start, stop, wanted.step)


def shift(wanted: range, by: int) -> range:
    return range(wanted.start + by, wanted.stop + by, wanted.step)
