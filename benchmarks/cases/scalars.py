"""Case 9: losses and metrics, a number for each name at each step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import numpy as np

import datasets
from peers.ours import OursScalars
from peers.scalars import ParquetScalars, TensorBoardEvents, TensorBoardTorch, TensorBoardX
from suite.case import Case, Figures, Place, Table, Verdict, tree_nbytes
from suite.contestant import Contestant
from suite.scalars import ScalarStore

POINT_NBYTES = 8
MOST_S = 1.0
MOST_TIMES = 20


@dataclass(frozen=True)
class Size:
    """How many series there are, and of how many steps."""

    series: int
    steps: int

    def names(self) -> list[str]:
        """Name them as users do."""
        return [f"metrics/m{i}" for i in range(self.series)]

    def rows(self, share: float, *, quick: bool) -> list[list[float]]:
        """Give a list of Python's floats for each step: losses of single examples."""
        losses = datasets.load("losses_f32", quick=quick).reshape(-1)
        steps = max(2, int(self.steps * share))
        values = np.resize(losses, self.series * self.steps).reshape(self.steps, self.series)
        return values[:steps].astype(np.float64).tolist()


# A run of a million points would keep EventAccumulator, which reads all of them, for 20 s.
WRITING, LONG, MANY = Size(10, 100_000), Size(5, 100_000), Size(1000, 500)
QUICK_WRITING, QUICK_LONG, QUICK_MANY = Size(10, 1000), Size(2, 2000), Size(100, 20)


class Writing(Case):
    """The clock runs from making the writer to the end of close."""

    number: ClassVar[int] = 9
    cache = "none"
    name = "scalars-write"
    question = "How many points of scalars can be written a second?"
    data = (
        "10 series of 100,000 steps, losses of single examples, as Python's floats in lists "
        "before the clock starts; those that say so write a part of the steps"
    )
    unit = "points_per_second"
    least_is_best = False

    def contestants(self) -> Sequence[type[Contestant]]:
        return [OursScalars, TensorBoardEvents, TensorBoardX, TensorBoardTorch, ParquetScalars]

    def trial(self, contestant: Contestant, place: Place) -> Figures:
        assert isinstance(contestant, ScalarStore)
        size = QUICK_WRITING if place.quick else WRITING
        rows = size.rows(contestant.share, quick=place.quick)
        contestant.write(place.scratch / "warm", size.names(), rows[:2])
        points = len(rows) * size.series
        begin, processor = time.perf_counter(), time.process_time()
        contestant.write(place.scratch / "run", size.names(), rows)
        seconds, processor = time.perf_counter() - begin, time.process_time() - processor
        found = contestant.last(place.scratch / "run", size.names())
        if found != rows[-1]:
            raise RuntimeError(f"{contestant.name}: the last values came back otherwise")
        stored = tree_nbytes(place.scratch / "run")
        return {
            "points_per_second": points / seconds,
            "point_seconds": seconds / points,
            "point_processor_seconds": processor / points,
            "stored_bytes": stored,
            "stored_per_raw": stored / points / POINT_NBYTES,
        }

    def judge(self, table: Table) -> list[Verdict]:
        verdicts = []
        for rival in (TensorBoardEvents.name, TensorBoardTorch.name):
            speed = table.ratio(OursScalars.name, rival, self.unit)
            must = f"write ≥ 10 × {rival}"
            work = table.ratio(rival, OursScalars.name, "point_processor_seconds")
            more = "" if work is None else f" ({work:.1f} × in time of the processor)"
            measured = "not measured" if speed is None else f"{speed:.1f} ×{more}"
            verdicts.append(Verdict(must, measured, None if speed is None else speed >= 10))
        size = table.median(OursScalars.name, "stored_per_raw")
        must = "size ≤ 8 bytes a point + 10 %"
        if size is None:
            return [*verdicts, Verdict(must, "not measured", None)]
        return [*verdicts, Verdict(must, f"{size:.2f} × 8 bytes", size <= 1.1)]


class Reading(Case):
    """Everything counts from opening to closing."""

    number: ClassVar[int] = 9
    unit = "read_seconds"

    def __init__(self, name: str, question: str, size: Size, quick_size: Size) -> None:
        self.name = name
        self.question = question
        self._size = size
        self._quick_size = quick_size
        self.data = (
            f"a run of {size.series:,} series of {size.steps:,} steps, losses of single examples; "
            "up to twenty times in about a second, compared after the clock has stopped"
        )

    def contestants(self) -> Sequence[type[Contestant]]:
        return [OursScalars, TensorBoardEvents, ParquetScalars]

    def _given(self, place: Place) -> tuple[list[str], list[list[float]]]:
        size = self._quick_size if place.quick else self._size
        return size.names(), size.rows(1.0, quick=place.quick)

    def _read(self, store: ScalarStore, place: Path, names: Sequence[str]) -> Any:
        raise NotImplementedError

    def _expected(self, rows: list[list[float]]) -> list[float]:
        raise NotImplementedError

    def prepare(self, contestant: Contestant, place: Place) -> None:
        assert isinstance(contestant, ScalarStore)
        contestant.write(place.kept / "run", *self._given(place))

    def trial(self, contestant: Contestant, place: Place) -> Figures:
        assert isinstance(contestant, ScalarStore)
        names, rows = self._given(place)
        contestant.write(place.scratch / "warm", names, rows[:2])
        self._read(contestant, place.scratch / "warm", names)
        times: list[float] = []
        most_s = 0.05 if place.quick else MOST_S
        while not times or (sum(times) < most_s and len(times) < MOST_TIMES):
            begin = time.perf_counter()
            found = self._read(contestant, place.kept / "run", names)
            times.append(time.perf_counter() - begin)
            if list(found) != self._expected(rows):
                raise RuntimeError(f"{contestant.name}: values came back otherwise")
        return {
            "read_seconds": median(times),
            "stored_bytes": tree_nbytes(place.kept / "run"),
        }

    def judge(self, table: Table) -> list[Verdict]:
        speed = table.ratio(TensorBoardEvents.name, OursScalars.name, self.unit)
        if speed is None:
            return [Verdict("read ≥ 100 × EventAccumulator", "not measured", None)]
        parquet = table.ratio(ParquetScalars.name, OursScalars.name, self.unit)
        more = "" if parquet is None else f" ({parquet:.2f} × Parquet's columns)"
        return [Verdict("read ≥ 100 × EventAccumulator", f"{speed:.0f} ×{more}", speed >= 100)]


class OneSeries(Reading):
    """One long series of a run with four others, which EventAccumulator reads too."""

    def _read(self, store: ScalarStore, place: Path, names: Sequence[str]) -> Any:
        return store.series(place, names[1])

    def _expected(self, rows: list[list[float]]) -> list[float]:
        return [row[1] for row in rows]


class LastValues(Reading):
    """The last value of each series."""

    def _read(self, store: ScalarStore, place: Path, names: Sequence[str]) -> Any:
        return store.last(place, names)

    def _expected(self, rows: list[list[float]]) -> list[float]:
        return rows[-1]


CASES: list[Case] = [
    Writing(),
    OneSeries(
        "scalars-series",
        "How long does it take to open a run and read a series of 100,000 scalars?",
        LONG,
        QUICK_LONG,
    ),
    LastValues(
        "scalars-last",
        "How long does it take to open a run and read the last value of each of 1,000 series?",
        MANY,
        QUICK_MANY,
    ),
]
