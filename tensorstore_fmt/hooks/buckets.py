"""Histograms as runs hold them: a row for each bucket, with its left end, right end and count."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt.writing.convert import snapshot

__all__ = ["as_numpy", "buckets"]


def _exponential() -> NDArray[np.float64]:
    """Ends that grow by a tenth, to both sides of 0, as TensorBoard's do by default."""
    steps = np.ceil(np.log(1e32) / np.log(1.1))
    ends = 1e-12 * 1.1 ** np.arange(steps)
    return np.concatenate([-ends[::-1], [0.0], ends])


_EXPONENTIAL: Final = _exponential()


def as_numpy(name: str, value: object) -> NDArray[Any]:
    """Give anything that can be logged as an array of its own."""
    return snapshot(name, value).array


def buckets(name: str, values: object, bins: Any = "tensorflow") -> NDArray[np.float64]:  # noqa: ANN401 - numpy.histogram's
    """Count values in buckets; NaN is left out, infinities are in the outermost buckets.

    Parameters
    ----------
    name
        For messages.
    bins
        ``"tensorflow"``, or as `numpy.histogram` takes it.

    Returns
    -------
    ndarray
        Shape (buckets, 3), without empty buckets at both ends.
    """
    flat = as_numpy(name, values).reshape(-1).astype(np.float64)
    flat = flat[~np.isnan(flat)]
    if isinstance(bins, str) and bins == "tensorflow":
        flat = np.clip(flat, _EXPONENTIAL[0], _EXPONENTIAL[-1])
        counts, ends = np.histogram(flat, _EXPONENTIAL)
    else:
        counts, ends = np.histogram(flat[np.isfinite(flat)], bins)
    (used,) = np.nonzero(counts)
    if used.size:
        first, last = used[0], used[-1] + 1
        counts, ends = counts[first:last], ends[first : last + 1]
    return np.stack([ends[:-1], ends[1:], counts], axis=1).astype(np.float64)
