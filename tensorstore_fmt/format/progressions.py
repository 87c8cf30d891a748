"""Steps as arithmetic progressions, which is what entries can hold (spec, "Pages")."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

__all__ = ["runs_of_steps"]


def runs_of_steps(steps: np.ndarray) -> Iterator[tuple[int, int]]:
    """Cut ascending steps into arithmetic progressions; give (begin, end) positions."""
    begin, n = 0, len(steps)
    if n > 2:
        gaps = np.diff(steps)
        borders = np.flatnonzero(gaps[1:] != gaps[:-1]) + 2  # first position behind a change
        if not len(borders):
            yield 0, n
            return
        while begin < n:
            # The progression from `begin` goes on until the gap changes behind its first two.
            i = int(np.searchsorted(borders, begin + 2))
            end = int(borders[i]) if i < len(borders) else n
            yield begin, end
            begin = end
    else:
        yield 0, n
