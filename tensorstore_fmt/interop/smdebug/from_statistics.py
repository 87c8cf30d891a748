"""Reductions of a tensor that was not saved itself, from its statistics in the index."""

from __future__ import annotations

import math

from tensorstore_fmt.reading.stats import Stats

__all__ = ["from_statistics"]


def from_statistics(stats: Stats, name: str, *, is_abs: bool) -> float | None:
    """Give what NumPy would give for the tensor of the first row; None if they do not say.

    NaN and infinities count as in NumPy, though the sums in the statistics leave them out.
    """
    if int(stats.nan[0]):
        return math.nan
    positive, negative = int(stats.posinf[0]), int(stats.neginf[0])
    least, most = float(stats.min[0]), float(stats.max[0])
    if name in ("min", "max") and not is_abs:
        return least if name == "min" else most
    if name == "max":
        return max(abs(least), abs(most))
    if name in ("min", "prod") or (is_abs and name in ("std", "variance")):
        return None
    if positive or negative:
        if name in ("std", "variance"):
            return math.nan
        if is_abs or name in ("l1", "l2"):
            return math.inf
        return math.nan if positive and negative else math.copysign(math.inf, positive - 0.5)
    count, std = int(stats.count[0]), float(stats.std[0])
    total = float(stats.sumabs[0] if is_abs or name == "l1" else stats.sum[0])
    return {
        "mean": total / count if count else math.nan,
        "sum": total,
        "l1": total,
        "l2": float(stats.l2[0]),
        "std": std,
        "variance": std * std,
    }.get(name)
