"""Statistics of tensors: ten numbers that stand for one (spec, "Statistics").

The compiled kernel makes one pass over them if there is one. Else floats of 32 bits are summed
in blocks that stay in cache: at most eight numbers are added in float32, their sums in float64,
which keeps the error below the spec's 2^-20 whatever the values. Other dtypes become float32
or float64 block by block, or, with one byte an element, a histogram.
"""

from __future__ import annotations

import functools
import math
import threading
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt import dtypes
from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.format import kernel, layout

__all__ = ["combine", "compute", "compute_rows", "supports"]

BLOCK: Final = 65536
"""Elements per block: 256 KiB of float32 and its scratch fit a second-level cache."""

_FOLD: Final = 8  # numbers added in float32, one behind the other: an error of 7 * 2^-24
_SMALL: Final = 4096  # elements; below, float64 costs less than folding
_ROWS_TO_LOOP: Final = 16384  # elements of a row; above, one row at a time is as fast

# Below this per element, squares that float32 lost to underflow could matter.
_TINY_SQUARE: Final = 2.0**-128
# Half the exponent range: sums and squares of such scaled values cannot overflow.
_SCALE: Final = 2.0**-540

_COUNT, _NAN, _POSINF, _NEGINF, _ZERO, _MIN, _MAX, _SUM, _SUMSQ, _SUMABS = range(layout.STATS_LEN)

_SIGN_AND_REST16: Final = np.int32(-0x7000_2000)  # 0x8FFFE000: after a shift by 13
_F16_INFINITY: Final = 0x7C00
_F16_REBIAS: Final = np.float32(2.0**112)

# What the kernel calls words of more than one byte.
_KINDS: Final = {
    "float16": "e", "bfloat16": "E", "float32": "f", "float64": "d",
    "int16": "h", "int32": "i", "int64": "q", "uint16": "H", "uint32": "I", "uint64": "Q",
}  # fmt: skip
_NO_VALUES: Final = np.empty(0)

_F32 = NDArray[np.float32]
_F64 = NDArray[np.float64]


class _Sums(NamedTuple):
    """What finite numbers add up to."""

    total: float
    squares: float
    absolutes: float


class _Scratch(threading.local):
    """Buffers of one thread."""

    def __init__(self) -> None:
        self.f32: _F32 = np.empty(BLOCK, np.float32)
        self.converted: _F32 = np.empty(BLOCK, np.float32)
        self.folded: _F32 = np.empty(BLOCK // _FOLD, np.float32)
        self.flags: NDArray[np.bool_] = np.empty(BLOCK, np.bool_)


_scratch: Final = _Scratch()


def supports(dtype: str) -> bool:
    """Say whether elements of a stored dtype have statistics: real numbers do."""
    return dtypes.is_float(dtype) or dtypes.is_integer(dtype)


def compute(array: NDArray[Any], *, dtype: str) -> _F64:
    """Compute the statistics of one tensor (spec, "Statistics").

    Parameters
    ----------
    array
        Any shape, C-contiguous, of the NumPy dtype of `dtype`, or of unsigned integers with
        its bits.
    dtype
        Name of the stored dtype; `supports` it.

    Returns
    -------
    ndarray
        Shape (10,), float64, in the order of `layout.STATS_FIELDS`. A zero that is a
        minimum or maximum is positive.
    """
    flat = _stored(array, dtype).reshape(-1)
    if kernel.active is not None:
        return _by_kernel(kernel.active, flat, 1, dtype).reshape(-1)
    with np.errstate(all="ignore"):
        if flat.dtype.itemsize == 1:
            return _of_histogram(_histogram(flat.view(np.uint8)), dtype)
        if dtypes.is_integer(dtype):
            return _of_integers(flat)
        stats = _empty()
        for start in range(0, flat.size, BLOCK):
            block = flat[start : start + BLOCK]
            _add_block(stats, _float32_block(block, dtype) if block.itemsize == 2 else block)
        return _finished(stats)


def compute_rows(array: NDArray[Any], *, dtype: str) -> _F64:
    """Compute the statistics of many small tensors at once.

    Parameters
    ----------
    array
        Shape (k, n): k tensors of n elements; else as in `compute`.
    dtype
        Name of the stored dtype; `supports` it.

    Returns
    -------
    ndarray
        Shape (k, 10), float64: row i is what `compute` gives for ``array[i]``.
    """
    rows = _stored(array, dtype)
    k, n = rows.shape
    if kernel.active is not None:
        return _by_kernel(kernel.active, rows.reshape(-1), k, dtype)
    result = np.empty((k, layout.STATS_LEN))
    if n == 0 or n > _ROWS_TO_LOOP or dtype in ("int64", "uint64"):
        for i in range(k):
            result[i] = compute(rows[i], dtype=dtype)
        return result
    per_batch = max(1, BLOCK // n)
    with np.errstate(all="ignore"):
        for start in range(0, k, per_batch):
            batch = rows[start : start + per_batch]
            _of_rows(_float64(batch, dtype), result[start : start + per_batch])
    return result


def combine(rows: _F64) -> _F64:
    """Give the statistics of a tensor from those of its pieces.

    Parameters
    ----------
    rows
        Shape (k, 10), k > 0.

    Returns
    -------
    ndarray
        Shape (10,). A sum that float64 cannot hold on the way is not finite; `compute` of the
        whole may give it all the same.
    """
    with np.errstate(all="ignore"):
        total: _F64 = np.add.reduce(rows, axis=0)
    total[_MIN] = np.fmin.reduce(rows[:, _MIN])
    total[_MAX] = np.fmax.reduce(rows[:, _MAX])
    return total


def _stored(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    if not supports(dtype):
        raise ArgumentError(f"elements of {dtype} have no statistics", dtype=dtype)
    stored = dtypes.numpy_dtype(dtype)
    if array.dtype != stored:
        if array.dtype.kind != "u" or array.dtype.itemsize != stored.itemsize:
            raise ArgumentError(f"array of {array.dtype} does not hold {dtype}", dtype=dtype)
        array = array.view(stored)
    return array


def _by_kernel(compiled: kernel.Kernel, flat: NDArray[Any], rows: int, dtype: str) -> _F64:
    result = np.empty((rows, layout.STATS_LEN))
    if flat.itemsize == 1:
        compiled.statistics(flat.view(np.uint8), "B", _values(dtype), result)
    else:
        compiled.statistics(flat.view(np.uint8), _KINDS[dtype], _NO_VALUES, result)
    return result


def _empty() -> _F64:
    stats = np.zeros(layout.STATS_LEN)
    stats[_MIN], stats[_MAX] = np.inf, -np.inf
    return stats


def _finished(stats: _F64) -> _F64:
    if stats[_COUNT] == stats[_NAN]:
        stats[_MIN] = stats[_MAX] = np.nan
    stats[_MIN : _SUM + 1] += 0.0  # -0 becomes 0, so that the order of blocks cannot show
    return stats


# --- floats -----------------------------------------------------------------------


def _add_block(stats: _F64, block: NDArray[Any]) -> None:
    """Add at most `BLOCK` float32 or float64 elements to running statistics."""
    stats[_COUNT] += block.size
    low, high = float(np.minimum.reduce(block)), float(np.maximum.reduce(block))
    if not math.isfinite(low + high) and not (math.isfinite(low) and math.isfinite(high)):
        low, high, block = _add_non_finite(stats, block)
        if block.size == 0:
            stats[_MIN], stats[_MAX] = min(stats[_MIN], low), max(stats[_MAX], high)
            return
        smallest, greatest = float(np.minimum.reduce(block)), float(np.maximum.reduce(block))
    else:
        smallest, greatest = low, high
    stats[_MIN], stats[_MAX] = min(stats[_MIN], low), max(stats[_MAX], high)
    if smallest <= 0 <= greatest:
        zero = np.equal(block, 0, out=_scratch.flags[: block.size])
        stats[_ZERO] += np.count_nonzero(zero)
        if smallest == greatest:
            return
    sums = _sums(block, smallest, greatest)
    stats[_SUM] += sums.total
    stats[_SUMSQ] += sums.squares
    stats[_SUMABS] += sums.absolutes


def _add_non_finite(stats: _F64, block: NDArray[Any]) -> tuple[float, float, NDArray[Any]]:
    """Count NaN and infinities; give minimum and maximum without NaN, and what is finite."""
    flags = _scratch.flags[: block.size]
    nan = np.count_nonzero(np.isnan(block, out=flags))
    posinf = np.count_nonzero(np.equal(block, np.inf, out=flags))
    finite = block[np.isfinite(block, out=flags)]
    neginf = block.size - finite.size - nan - posinf
    stats[_NAN] += nan
    stats[_POSINF] += posinf
    stats[_NEGINF] += neginf
    # No fmin and fmax: NumPy's forget what they saw before a signalling NaN (2.4.6).
    low, high = (-math.inf if neginf else math.inf), (math.inf if posinf else -math.inf)
    if finite.size:
        low = min(low, float(np.minimum.reduce(finite)))
        high = max(high, float(np.maximum.reduce(finite)))
    elif neginf or posinf:
        low, high = min(low, high), max(low, high)
    return low, high, finite


def _sums(block: NDArray[Any], low: float, high: float) -> _Sums:
    """Add up finite numbers between `low` and `high`, not all of them zero."""
    if block.dtype.itemsize == 4:
        if block.size > _SMALL:
            sums = _sums32(block, low, high)
            # Not if float32 was too narrow for a sum or for squares.
            if math.isfinite(sum(sums)) and sums.squares > block.size * _TINY_SQUARE:
                return sums
        block = block.astype(np.float64)
    sums = _sums64(block, low, high)
    if math.isfinite(sums.total) and math.isfinite(sums.squares):
        return sums
    # Beyond float64 on the way, but perhaps not in the end.
    scaled = _sums64(block * _SCALE, low, high)
    return _Sums(scaled.total / _SCALE, scaled.squares / _SCALE / _SCALE, scaled.absolutes / _SCALE)


def _sums32(block: _F32, low: float, high: float) -> _Sums:
    scratch = _scratch.f32[: block.size]
    total = _sum32(block)
    squares = _sum32(np.multiply(block, block, out=scratch))
    if low >= 0 or high <= 0:
        return _Sums(total, squares, abs(total))
    return _Sums(total, squares, _sum32(np.abs(block, out=scratch)))


def _sum32(block: _F32) -> float:
    """Add up float32 numbers to within 2^-21 of the sum of their absolute values.

    Infinite or NaN if float32 overflows on the way.
    """
    columns = block.size // _FOLD
    folded = _scratch.folded[:columns]
    np.add.reduce(block[: _FOLD * columns].reshape(_FOLD, columns), axis=0, out=folded)
    total = float(np.add.reduce(folded, dtype=np.float64))
    rest = block[_FOLD * columns :]
    return total + float(np.add.reduce(rest, dtype=np.float64)) if rest.size else total


def _sums64(block: _F64, low: float, high: float) -> _Sums:
    total = float(np.add.reduce(block))
    absolutes = abs(total) if low >= 0 or high <= 0 else float(np.add.reduce(np.abs(block)))
    return _Sums(total, float(np.einsum("i,i->", block, block)), absolutes)


def _float32_block(block: NDArray[Any], dtype: str) -> _F32:
    """Widen at most `BLOCK` elements of 16 bits, exactly, into scratch."""
    out = _scratch.converted[: block.size]
    bits = out.view(np.int32)
    if dtype == "bfloat16":
        np.copyto(bits, block.view("<u2"))
        np.left_shift(bits, 16, out=bits)
        return out
    # Several times as fast as the cast: the bits at their places, then the exponent mended.
    # Infinity and NaN, whose exponent would come out finite, take the cast.
    np.copyto(bits, block.view("<i2"))
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, _SIGN_AND_REST16, out=bits)
    np.multiply(out, _F16_REBIAS, out=out)
    if max(np.maximum.reduce(out), -np.minimum.reduce(out)) >= 65536:
        np.copyto(out, block)
    return out


# --- integers -----------------------------------------------------------------------


def _of_integers(flat: NDArray[Any]) -> _F64:
    stats = _empty()
    for start in range(0, flat.size, BLOCK // 2):
        block = flat[start : start + BLOCK // 2]
        stats[_COUNT] += block.size
        low, high = float(np.minimum.reduce(block)), float(np.maximum.reduce(block))
        stats[_MIN], stats[_MAX] = min(stats[_MIN], low), max(stats[_MAX], high)
        if low <= 0 <= high:
            stats[_ZERO] += block.size - np.count_nonzero(block)
            if low == high:
                continue
        sums = _sums64(block.astype(np.float64), low, high)
        stats[_SUM] += sums.total
        stats[_SUMSQ] += sums.squares
        stats[_SUMABS] += sums.absolutes
    return _finished(stats)


# --- one byte an element ------------------------------------------------------------


def _histogram(flat: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Count each of the 256 bytes."""
    counts = np.zeros(256, np.int64)
    for start in range(0, flat.size, BLOCK):
        counts += np.bincount(flat[start : start + BLOCK], minlength=256)
    return counts


def _of_histogram(counts: NDArray[np.int64], dtype: str) -> _F64:
    values = _values(dtype)
    stats = np.zeros(layout.STATS_LEN)
    stats[_COUNT] = counts.sum()
    stats[_NAN] = counts[np.isnan(values)].sum()
    stats[_POSINF] = counts[values == np.inf].sum()
    stats[_NEGINF] = counts[values == -np.inf].sum()
    stats[_ZERO] = counts[values == 0].sum()
    there = values[(counts > 0) & ~np.isnan(values)]
    stats[_MIN], stats[_MAX] = (there.min(), there.max()) if there.size else (np.nan, np.nan)
    finite = np.isfinite(values)
    numbers, values = counts[finite].astype(np.float64), values[finite]
    stats[_SUM] = (numbers * values).sum()
    stats[_SUMSQ] = (numbers * values**2).sum()
    stats[_SUMABS] = (numbers * np.abs(values)).sum()
    return _finished(stats)


@functools.cache
def _values(dtype: str) -> _F64:
    """Give what each of the 256 bytes stands for; shared, not to be changed."""
    values: _F64 = np.arange(256, dtype=np.uint8).view(dtypes.numpy_dtype(dtype)).astype(np.float64)
    values.setflags(write=False)
    return values


# --- many small tensors -------------------------------------------------------------


def _float64(batch: NDArray[Any], dtype: str) -> _F64:
    if batch.dtype.itemsize == 1:
        return np.take(_values(dtype), batch.view(np.uint8))
    return batch.astype(np.float64)


def _of_rows(rows: _F64, out: _F64) -> None:
    """Write the statistics of each row of float64; `rows` may be changed."""
    out[:, _COUNT] = rows.shape[1]
    low, high = rows.min(axis=1), rows.max(axis=1)
    out[:, _NAN : _NEGINF + 1] = 0
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        nan = np.isnan(rows)
        out[:, _NAN] = nan.sum(axis=1)
        low = np.where(nan, np.inf, rows).min(axis=1)
        high = np.where(nan, -np.inf, rows).max(axis=1)
        nothing = nan.all(axis=1)
        low[nothing] = high[nothing] = np.nan
        out[:, _POSINF] = (rows == np.inf).sum(axis=1)
        out[:, _NEGINF] = (rows == -np.inf).sum(axis=1)
        out[:, _ZERO] = (rows == 0).sum(axis=1)
        rows = np.where(np.isfinite(rows), rows, 0.0)
    else:
        out[:, _ZERO] = rows.shape[1] - np.count_nonzero(rows, axis=1)
    out[:, _MIN], out[:, _MAX] = low, high
    out[:, _SUM] = rows.sum(axis=1)
    out[:, _SUMSQ] = np.einsum("ij,ij->i", rows, rows)
    out[:, _SUMABS] = np.abs(rows).sum(axis=1)
    out[:, _MIN : _SUM + 1] += 0.0
    for i in np.flatnonzero(~np.isfinite(out[:, _SUM] + out[:, _SUMSQ])):
        sums = _sums(rows[i], -1.0, 1.0)
        out[i, _SUM : _SUMABS + 1] = sums
