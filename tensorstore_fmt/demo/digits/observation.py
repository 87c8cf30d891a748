"""What the follower saw at one step, as it travels from its process to a terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["OPTIONS_VARIABLE", "READY", "Observation", "check_gradients"]

OPTIONS_VARIABLE = "TENSORSTORE_FMT_DEMO_STORAGE_OPTIONS"
"""Environment variable with the storage options as JSON: a command line is there for all to see."""

READY = "ready"
"""The follower's first line in its JSON form: it has started, and looks for the run now."""

_VANISHED_L2 = 1e-7  # below it, a whole gradient no longer moves float32 weights of order 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One step as the follower saw it.

    Attributes
    ----------
    loss, accuracy
        Of the step's batch.
    smallest_l2, smallest_name
        The gradient with the smallest norm since the observation before.
    not_finite
        Elements that were NaN or infinite in all gradients since the observation before.
    problems
        One sentence for each gradient that failed the check; empty if all is well.
    is_closed
        Whether the run was already closed when the follower saw this step.
    """

    step: int
    loss: float
    accuracy: float
    smallest_l2: float
    smallest_name: str
    not_finite: int
    problems: tuple[str, ...]
    is_closed: bool

    def __str__(self) -> str:
        """Give the line a person reads."""
        # With the demo's mark before it this just fits a terminal of 80 columns.
        if self.problems:
            checks = "FAILED: " + "; ".join(self.problems)
        else:
            checks = f"gradients ok, smallest l2 {self.smallest_l2:.1e}, {self.not_finite} NaN"
        return f"step {self.step:>3}  loss {self.loss:.3f}  acc {self.accuracy:.3f}  {checks}"

    def to_json(self) -> str:
        """Give one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Observation | None:
        """Read what `to_json` gave; None if `line` is something else (a warning, a traceback)."""
        try:
            fields = json.loads(line)
            return cls(**fields | {"problems": tuple(fields["problems"])})
        except (ValueError, TypeError, KeyError):
            return None


def check_gradients(
    statistics: Mapping[str, Mapping[str, npt.NDArray[np.generic]]],
) -> tuple[float, str, int, tuple[str, ...]]:
    """Look for NaN, infinite and vanishing gradients in their statistics alone.

    Parameters
    ----------
    statistics
        For each gradient the columns ``step``, ``l2``, ``nan``, ``posinf`` and ``neginf``, as
        ``series.stats()`` gives them.

    Returns
    -------
    tuple
        The smallest norm, the name of its gradient, how many elements were not finite, and a
        sentence for each gradient that has a problem.
    """
    smallest, smallest_name, not_finite = np.inf, "none", 0
    problems: list[str] = []
    for name, columns in statistics.items():
        bad = (
            np.asarray(columns["nan"], dtype=np.int64)
            + np.asarray(columns["posinf"], dtype=np.int64)
            + np.asarray(columns["neginf"], dtype=np.int64)
        )
        l2 = np.asarray(columns["l2"], dtype=np.float64)
        if bad.any():
            step = columns["step"][np.argmax(bad > 0)]
            problems.append(f"{name} has {bad.sum()} NaN or infinite elements from step {step}")
            not_finite += int(bad.sum())
        elif len(l2) and l2.min() < _VANISHED_L2:
            problems.append(
                f"{name} vanishes (l2 {l2.min():.1e}) at step {columns['step'][np.argmin(l2)]}"
            )
        if len(l2) and np.nanmin(l2, initial=np.inf) < smallest:
            smallest, smallest_name = float(np.nanmin(l2)), name
    return smallest, smallest_name.removeprefix("gradient/"), not_finite, tuple(problems)
