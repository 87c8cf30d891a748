from __future__ import annotations

import warnings
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tensorstore_fmt import dtypes
from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.format import layout, statistics

pytestmark = pytest.mark.usefixtures("implementation")

SUPPORTED = [name for name in dtypes.NAMES if statistics.supports(name)]
EXACT = slice(0, 7)


@np.errstate(all="ignore")
def reference(array: np.ndarray) -> np.ndarray:
    """Say the same in plain words: float64 (long double for sums), no blocks."""
    exact = array.reshape(-1)
    floats = exact.astype(np.float64)
    finite = floats[np.isfinite(floats)].astype(np.longdouble)
    numbers = exact if exact.dtype.kind in "iu" else floats[~np.isnan(floats)]
    return np.array(
        [
            floats.size,
            np.isnan(floats).sum(),
            (floats == np.inf).sum(),
            (floats == -np.inf).sum(),
            (floats == 0).sum(),
            float(numbers.min()) if numbers.size else np.nan,
            float(numbers.max()) if numbers.size else np.nan,
            *(x.sum().astype(np.float64) for x in (finite, finite**2, np.abs(finite))),
        ]
    )


def check(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == (layout.STATS_LEN,)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found[EXACT], expected[EXACT])
    scales = expected[[9, 8, 9]]
    for got, want, scale in zip(found[7:], expected[7:], scales, strict=True):
        assert got == want or abs(got - want) <= 2.0**-20 * scale


def compute(array: np.ndarray, dtype: str) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return statistics.compute(array, dtype=dtype)


def test_supports() -> None:
    assert set(dtypes.NAMES) - set(SUPPORTED) == {"bool", "complex64", "complex128", "string"}
    with pytest.raises(ArgumentError):
        statistics.compute(np.zeros(3, bool), dtype="bool")
    with pytest.raises(ArgumentError):
        statistics.compute(np.zeros(3, np.float64), dtype="float32")


@pytest.mark.parametrize("dtype", SUPPORTED)
@pytest.mark.parametrize("n", [0, 1, 7, 1000, 5000, 65536 + 3, 200_001])
def test_random_bits(dtype: str, n: int) -> None:
    size = dtypes.itemsize(dtype)
    rng = np.random.default_rng(n)
    array = rng.integers(0, 256, n * size, np.uint8).view(dtypes.numpy_dtype(dtype))
    check(compute(array, dtype), reference(array))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("n", [100, 4097, 70_001])
@pytest.mark.parametrize("special", [(), (np.nan,), (np.inf,), (-np.inf, np.inf), (0.0, -0.0)])
def test_normal_numbers(dtype: str, n: int, special: tuple[float, ...]) -> None:
    values = np.random.default_rng(0).standard_normal(n) * 100
    for i, value in enumerate(special):
        values[i :: n // 3] = value
    array = values.astype(dtypes.numpy_dtype(dtype))
    check(compute(array, dtype), reference(array))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("n", [5, 70_001])
def test_all_the_same(dtype: str, n: int) -> None:
    for value in (0.0, -0.0, 0.1, -0.3, np.nan, np.inf, -np.inf):
        array = np.full(n, value, dtypes.numpy_dtype(dtype))
        check(compute(array, dtype), reference(array))


@pytest.mark.parametrize(
    ("dtype", "quiet", "signalling"),
    [
        ("float16", 0x7E01, 0x7C01),
        ("bfloat16", 0x7FC1, 0x7F81),
        ("float32", 0x7FC0_0001, 0x7F80_0001),
        ("float64", 0x7FF8_0000_0000_0001, 0x7FF0_0000_0000_0001),
    ],
)
@pytest.mark.parametrize("infinity", [0, 1, -1])
def test_nan_anywhere(dtype: str, quiet: int, signalling: int, infinity: int) -> None:
    stored = dtypes.numpy_dtype(dtype)
    values = np.random.default_rng(0).standard_normal((70, 70))
    if infinity:
        values[:, 30] = infinity * np.inf
    rows: Any = values.astype(stored)
    bits = rows.view(f"<u{stored.itemsize}")
    bits[np.arange(70), np.arange(70)] = quiet
    bits[np.arange(1, 70), np.arange(69)] = signalling
    together = statistics.compute_rows(rows, dtype=dtype)
    for row, one in zip(rows, together, strict=True):
        check(one, reference(row))
        check(compute(row, dtype), reference(row))


@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e-25, 1e-22, 1e-19, 1e18, 1e20, 1e37])
@pytest.mark.parametrize("n", [100, 70_001])
def test_float32_out_of_its_range(scale: float, n: int) -> None:
    array = (np.random.default_rng(0).uniform(-1, 9, n) * scale).astype(np.float32)
    check(compute(array, "float32"), reference(array))


def test_float32_sums_that_overflow() -> None:
    top = np.finfo(np.float32).max
    for array in (np.full(70_000, top), np.tile([top, -top], 35_000)):
        check(compute(array.astype(np.float32), "float32"), reference(array))


def test_float64_sums_that_overflow_only_on_the_way() -> None:
    top = np.finfo(np.float64).max
    array = np.array([top, top, -top, -top, 1.0])
    found = compute(array, "float64")
    assert abs(found[7]) <= 2.0**-20 * top
    assert np.isposinf(found[8:]).all()


def test_a_few_large_among_small() -> None:
    array = np.full(70_000, 1e-30, np.float32)
    array[::1000] = 3e15
    check(compute(array, "float32"), reference(array))


def test_zeros_are_positive() -> None:
    found = compute(np.array([-0.0, -1.0]), "float64")
    assert not np.signbit(found[6])
    assert not np.signbit(compute(np.full(9, -0.0, np.float32), "float32")[5:]).any()


def test_64_bit_integers_are_rounded_once() -> None:
    array = np.array([2**63 - 1, -(2**63), 2**53 + 1, 0])
    check(compute(array, "int64"), reference(array))
    unsigned = np.array([2**64 - 1, 2**63 + 1], np.uint64)
    check(compute(unsigned, "uint64"), reference(unsigned))


def test_any_shape_and_bits() -> None:
    array = np.random.default_rng(0).standard_normal((3, 5, 7)).astype(ml_dtypes.bfloat16)
    expected = reference(array)
    check(compute(array, "bfloat16"), expected)
    check(compute(array.view(np.uint16), "bfloat16"), expected)
    check(compute(array[0, 0, 0].reshape(()), "bfloat16"), reference(array[:1, :1, :1]))


@pytest.mark.parametrize("dtype", SUPPORTED)
@pytest.mark.parametrize(("k", "n"), [(0, 4), (3, 0), (1, 1), (64, 17), (300, 500), (2, 20_000)])
def test_rows(dtype: str, k: int, n: int) -> None:
    rng = np.random.default_rng(k + n)
    bits = rng.integers(0, 256, k * n * dtypes.itemsize(dtype), np.uint8)
    rows: Any = bits.view(dtypes.numpy_dtype(dtype)).reshape(k, n)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = statistics.compute_rows(rows, dtype=dtype)
    assert found.shape == (k, layout.STATS_LEN)
    for row, one in zip(rows, found, strict=True):
        check(one, reference(row))


def test_rows_of_normal_numbers() -> None:
    rows = np.random.default_rng(0).standard_normal((100, 333)).astype(np.float32)
    rows[3, 5], rows[4, :] = np.nan, np.nan
    for row, one in zip(rows, statistics.compute_rows(rows, dtype="float32"), strict=True):
        check(one, reference(row))
    top = np.array([[1e308, 1e308, -1e308, -1e308], [1, 2, 3, 4]])
    assert np.isfinite(statistics.compute_rows(top, dtype="float64")[:, 7]).all()
