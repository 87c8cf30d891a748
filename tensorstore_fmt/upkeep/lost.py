"""Which names and steps are hit when a page or a segment is gone; as exact as can be told."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from tensorstore_fmt.format import layout
from tensorstore_fmt.format.catalog import Series
from tensorstore_fmt.format.segment import Catalog
from tensorstore_fmt.upkeep.claims import expand
from tensorstore_fmt.upkeep.report import Names
from tensorstore_fmt.upkeep.segment_file import SegmentFile

__all__ = ["Logged", "lost_of_head", "lost_of_page", "merge_names"]

Run = tuple[int, int, int]


class Logged:
    """The steps that a writer logged, per mode, as far as its step tables can be read."""

    def __init__(self) -> None:
        self._runs: dict[tuple[layout.WriterKey, int], list[Run]] = {}

    def add(self, key: layout.WriterKey, logged: dict[int, list[Run]]) -> None:
        """Add what one segment says."""
        for mode, runs in logged.items():
            self._runs.setdefault((key, mode), []).extend(runs)

    def between(self, key: layout.WriterKey, mode: int, first: int, last: int) -> list[int]:
        """Give the logged steps from `first` to `last`."""
        clipped = []
        for step, stride, count in self._runs.get((key, mode), ()):
            skip = max(0, -(-(first - step) // stride))
            keep = min(count, (last - step) // stride + 1)
            if skip < keep:
                clipped.append((step + skip * stride, stride, keep - skip))
        return expand(clipped)


def merge_names(parts: Iterable[Names]) -> Names:
    """Put the steps of the same names together."""
    steps: dict[str, set[int]] = {}
    for names in parts:
        for name, found in names:
            steps.setdefault(name, set()).update(found)
    return tuple((name, tuple(sorted(steps[name]))) for name in sorted(steps))


def _even_steps(series: Series, first: int, last: int) -> list[int]:
    """Guess the steps of a series from how many they are, where no step table is left."""
    if (first, last) != (series.first_step, series.last_step) or series.steps < 1:
        return [first] if first == last else []
    if series.steps == 1 or first == last:
        return [first]
    stride, rest = divmod(last - first, series.steps - 1)
    return expand([(first, stride, series.steps)]) if not rest and stride else []


def _steps_of(
    series: Series, first: int, last: int, key: layout.WriterKey, logged: Logged
) -> list[int]:
    low, high = max(first, series.first_step), min(last, series.last_step)
    return logged.between(key, series.mode, low, high) or _even_steps(series, low, high)


def lost_of_page(file: SegmentFile, number: int, logged: Logged) -> list[tuple[Series, list[int]]]:
    """Give the series with entries in a damaged page, each with the steps that may be hit.

    Steps that other pages of the segment hold as a whole are left out.
    """
    head = file.head
    assert head is not None
    row = head.root[number]
    found = []
    for n in range(int(row["first_series"]), int(row["last_series"]) + 1):
        series = head.catalog[n]
        first, last = int(row["min_step"]), int(row["max_step"])
        steps = _steps_of(series, first, last, file.name.key, logged)
        if not any(series.grid) and steps:
            kept = set(_kept_steps(file, n))
            steps = [s for s in steps if s not in kept]
        found.append((series, steps))
    return found


def _kept_steps(file: SegmentFile, number: int) -> list[int]:
    """Give the steps of a series in the good pages of its segment."""
    assert file.head is not None
    numbers = [n for n in file.head.entry_pages(number).tolist() if n not in file.bad_pages]
    runs: list[Run] = []
    for _, entries in file.pages(numbers):
        rows = entries.rows[entries.rows["series"] == number]
        runs += [(int(r["step"]), int(r["stride"]), int(r["count"])) for r in rows]
    return expand(runs)


def lost_of_head(catalog: Catalog, key: layout.WriterKey, logged: Logged) -> Names:
    """Give names and steps of a segment of which only the catalog is left (in the bundle)."""
    found: list[Names] = []
    for n in np.flatnonzero(catalog.kind != layout.KIND_STEPS).tolist():
        series = catalog[n]
        steps = _steps_of(series, series.first_step, series.last_step, key, logged)
        found.append(((series.name, tuple(steps)),))
    return merge_names(found)
