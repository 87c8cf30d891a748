"""Contestants that keep numbers: a value for each name at each step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from suite.contestant import Contestant


class ScalarStore(Contestant):
    """Writes as training does, step by step; reads from opening to closing."""

    share: ClassVar[float] = 1.0  # of the steps that are written where the clock runs

    def write(self, place: Path, names: Sequence[str], rows: Sequence[Sequence[float]]) -> None:
        """Store one row of values at each step 0, 1, …, and close."""
        raise NotImplementedError

    def series(self, place: Path, name: str) -> np.ndarray:
        """Open, and read the values of one name at all steps."""
        raise NotImplementedError

    def last(self, place: Path, names: Sequence[str]) -> list[float]:
        """Open, and read the last value of each name."""
        raise NotImplementedError
