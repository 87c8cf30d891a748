"""One step: what makes up a tensor at a single step, where it is all in one page.

A shortcut past `timeline` and `assembly`, which take twice as long, whatever they are asked.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Final

import numpy as np

from tensorstore_fmt import dtypes
from tensorstore_fmt.format import layout
from tensorstore_fmt.format.grid import n_chunks
from tensorstore_fmt.reading.assembly import Assembly, Chosen, Group
from tensorstore_fmt.reading.entries import Found, Query
from tensorstore_fmt.reading.locate import AtStep
from tensorstore_fmt.reading.plan import Touched, n_touched, touched_chunks
from tensorstore_fmt.reading.selection import Selection, normalize
from tensorstore_fmt.reading.timeline import Timeline

__all__ = ["assemble_step"]

_MOST_KEPT: Final = 256  # chunks of a selection, which take about 1 KiB each


def assemble_step(where: AtStep, query: Query, index: object) -> Assembly | None:
    """Assemble one step; None if that takes a look at more than its own entries.

    Raises
    ------
    SelectionError
        The tensor does not have the selection.
    """
    source, page = where.source, where.page
    series = source.series
    which = page.rows_of(source.row, where.step, where.step)
    largest = math.prod(min(g or n, n) for n, g in zip(series.shape, series.grid, strict=True))
    if (
        not isinstance(which, slice)
        or n_chunks(series.shape, series.grid) != which.stop - which.start
        or largest > layout.MAX_CHUNK_RAW_NBYTES  # a claim, which is refused with more to say
    ):
        return None
    entries = page.entries.slice(which.start, which.stop)
    rows = entries.rows
    # Not saved twice, each chunk by itself, and all of it there.
    if (
        (rows["chunk"] != np.arange(len(rows))).any()
        or (rows["step"] != where.step).any()
        or (rows["count"] != 1).any()
        or (rows["codec"] == layout.CODEC_DROPPED).any()
    ):
        return None
    selection = normalize(index, series.shape)
    touched = _touched(selection, series.shape, series.grid)
    entry = touched.numbers
    if (rows["raw_nbytes"][entry] != touched.sizes * dtypes.itemsize(series.dtype)).any():
        return None
    steps, first = np.array([where.step]), np.zeros(1, np.int64)
    found = Found(query, (source,), (0, len(rows)), entries, np.ones(len(rows), np.int64))
    line = Timeline(found, steps, first, first)
    whole = tuple([(0, n) for n in selection.counts])
    group = Group(
        series, touched, whole, steps, first, entry.reshape(1, -1),
        np.zeros((1, len(entry)), np.int64),
    )  # fmt: skip
    return Assembly(
        Chosen(line, steps, first, first, is_parts=False), series.dtype, selection, [group]
    )


def _touched(selection: Selection, shape: tuple[int, ...], grid: tuple[int, ...]) -> Touched:
    """Find the chunks of a selection, which as a rule is the same at step after step."""
    if n_touched(selection, shape, grid) > _MOST_KEPT:
        return touched_chunks(selection, shape, grid)
    return _kept(selection, shape, grid)


@lru_cache(maxsize=64)
def _kept(selection: Selection, shape: tuple[int, ...], grid: tuple[int, ...]) -> Touched:
    return touched_chunks(selection, shape, grid)
