"""Whether each saved tensor has all of its chunks."""

from __future__ import annotations

from collections import Counter
from typing import Final, TypeAlias

import numpy as np

__all__ = ["Boxes", "Run"]

_MOST_COMPARED: Final = 10_000_000

Run: TypeAlias = tuple[int, int, int]
"""Steps: the first, their distance, how many."""


class Boxes:
    """Whether each saved tensor of several chunks has all of them; one series at a time."""

    def __init__(self) -> None:
        self._series = -1
        self._chunks: dict[tuple[int, ...], tuple[int, dict[int, list[Run]]]] = {}
        self._found: list[tuple[int, str, list[int]]] = []

    def add(self, series: int, dims: tuple[int, ...], count: int, row: np.void) -> None:
        """Take an entry; entries of one series come one behind the other."""
        if series != self._series:
            self._close()
            self._series = series
        _, chunks = self._chunks.setdefault(dims, (count, {}))
        run = (int(row["step"]), int(row["stride"]), int(row["count"]))
        chunks.setdefault(int(row["chunk"]), []).append(run)

    def _close(self) -> None:
        for count, chunks in self._chunks.values():
            lists = list(chunks.values())
            is_full = len(chunks) == count
            if is_full and all(runs == lists[0] for runs in lists):
                continue
            if sum(r[2] for runs in lists for r in runs) > _MOST_COMPARED:
                self._found.append((self._series, "too many steps to compare chunks", []))
                continue
            counted = [
                Counter(step + k * stride for step, stride, n in runs for k in range(n))
                for runs in lists
            ]
            every: Counter[int] = Counter()
            for counts in counted:
                every |= counts
            missing = {
                step for step, n in every.items() if any(counts[step] != n for counts in counted)
            }
            missing = missing if is_full else set(every)
            if missing:
                self._found.append((self._series, "a chunk is missing", sorted(missing)))
        self._chunks.clear()

    def finish(self) -> list[tuple[int, str, list[int]]]:
        """Give the series with tensors that are not whole: what is wrong, and at which steps."""
        self._close()
        return self._found
