"""What a case is: a question, data, contestants, one trial in a process of its own, a judgement."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import ClassVar

from suite.contestant import Contestant


@dataclass(frozen=True)
class Place:
    """Where a trial works.

    ``kept`` is this case's and contestant's own and stays between trials; ``scratch`` is empty at
    each trial and removed after it.
    """

    kept: Path
    scratch: Path
    quick: bool

    def is_prepared(self) -> bool:
        """Say whether ``prepare`` came to its end here."""
        return (self.kept / ".prepared").exists()

    def begin_preparing(self) -> None:
        """Remove what an earlier, unfinished preparation left."""
        shutil.rmtree(self.kept, ignore_errors=True)
        self.kept.mkdir(parents=True)

    def end_preparing(self) -> None:
        """Note that it is complete."""
        (self.kept / ".prepared").touch()


@dataclass(frozen=True)
class Verdict:
    """One line of the issue's table: what must hold, what was measured, whether it holds."""

    must: str
    measured: str
    is_met: bool | None  # None: could not be judged, and measured says why


Figures = dict[str, float]


@dataclass
class Table:
    """All trials of one case: figures of each repeat, by contestant."""

    trials: dict[str, list[Figures]] = field(default_factory=dict)

    def median(self, contestant: str, figure: str) -> float | None:
        """Give the median of a figure over the repeats, or None where it was not measured."""
        values = [t[figure] for t in self.trials.get(contestant, ()) if figure in t]
        return median(values) if values else None

    def ratio(self, contestant: str, other: str, figure: str) -> float | None:
        """Give the median over the repeats of one's figure by the other's in the same round."""
        pairs = zip(self.trials.get(contestant, ()), self.trials.get(other, ()), strict=False)
        ratios = [a[figure] / b[figure] for a, b in pairs if figure in a and b.get(figure)]
        return median(ratios) if ratios else None

    def best(self, among: Sequence[str], figure: str, *, least: bool = True) -> str | None:
        """Give the contestant with the best median."""
        known = {c: value for c in among if (value := self.median(c, figure)) is not None}
        return (min if least else max)(known, key=known.__getitem__) if known else None


class Case:
    """A question to several contestants. Subclasses say what one trial is.

    ``number`` is the case's number in the table of the suite's README; several cases may share one.
    """

    number: ClassVar[int]
    name: str
    question: str
    data: str
    cache: ClassVar[str] = "warm"  # or "cold", or "none": nothing is read
    unit: str = "seconds"  # the figure that is plotted and compared first
    least_is_best: ClassVar[bool] = True
    shown: ClassVar[Sequence[str]] = ()  # figures in the report's table; none named: all
    repeats: ClassVar[int] = 5
    timeout_s: ClassVar[float] = 900

    def contestants(self) -> Sequence[type[Contestant]]:
        """Say who takes part, ours first."""
        raise NotImplementedError

    def prepare(self, contestant: Contestant, place: Place) -> None:
        """Make, once, in ``place.kept``, what the trials read. Runs in the contestant's process."""

    def trial(self, contestant: Contestant, place: Place) -> Figures:
        """Measure once, in a process of its own: figures by name; units stand in the names."""
        raise NotImplementedError

    def judge(self, table: Table) -> list[Verdict]:
        """Compare with what the case must reach."""
        raise NotImplementedError


def tree_nbytes(folder: Path) -> int:
    """Give the size of all files below a folder."""
    return sum(
        os.lstat(os.path.join(parent, file)).st_size
        for parent, _, files in os.walk(folder)
        for file in files
    )
