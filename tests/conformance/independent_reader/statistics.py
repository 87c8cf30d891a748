"""Statistics ("7.8 Statistics"): computed from values of inline series, and combined over parts."""

from __future__ import annotations

import numpy as np

from .errors import fail
from .limits import DTYPES, Array


def compute_stats(values: Array, dtype: str) -> Array:
    """Compute the statistics of values of real dtypes."""
    if dtype == "bfloat16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    elif (DTYPES[dtype] == np.uint8 and dtype != "uint8") or values.dtype.kind not in "biuf":
        fail("unknown_dtype", f"statistics of {dtype} are not computed here")
    x = values.astype(np.float64).ravel()
    finite, number = x[np.isfinite(x)], x[~np.isnan(x)]
    bounds = (number.min(), number.max()) if number.size else (np.nan, np.nan)
    counts = (x.size, x.size - number.size, (x == np.inf).sum(), (x == -np.inf).sum())
    sums = (finite.sum(), (finite * finite).sum(), np.abs(finite).sum())
    return np.array([*counts, (x == 0).sum(), *bounds, *sums], np.float64)


def merge_stats(one: Array, two: Array) -> Array:
    merged = one + two
    merged[5], merged[6] = np.fmin(one[5], two[5]), np.fmax(one[6], two[6])
    return merged
