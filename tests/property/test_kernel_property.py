"""The compiled kernel and NumPy say the same."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import assume, example, given
from hypothesis import strategies as st
from support.kernels import compiled, using

from tensorstore_fmt import dtypes
from tensorstore_fmt.format import codec, planes, statistics

FIXED = [name for name in dtypes.NAMES if name != dtypes.STRING]
SUPPORTED = [name for name in dtypes.NAMES if statistics.supports(name)]
SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 1e38, -1e300, 1e308]


def lengths(most: int) -> st.SearchStrategy[int]:
    """Few, or about as many as the kernel takes at a time, or any number."""
    borders = [b + d for b in (1024, 2048, 4096, 8192) for d in (-1, 0, 1) if b + d <= most]
    return st.one_of(st.integers(0, 70), st.sampled_from(borders), st.integers(0, most))


def some_bytes(seed: int, nbytes: int, offset: int) -> np.ndarray:
    """Give bytes that need not be aligned, with memory on both sides that nobody may touch."""
    whole = np.random.default_rng(seed).integers(0, 256, nbytes + 16, np.uint8)
    return whole[offset : offset + nbytes]


@given(
    st.sampled_from([1, 2, 4, 8]), lengths(20_000), st.booleans(), st.integers(0, 2**32),
    st.integers(0, 8),
)  # fmt: skip
def test_split(w: int, n: int, rotated: bool, seed: int, offset: int) -> None:
    raw = some_bytes(seed, n * w, offset)
    before = raw.copy()
    cut = {}
    for which in (None, compiled()):
        guarded = np.full((w, n + 32), 0x5A, np.uint8)
        with using(which):
            planes.split(raw, [plane[16 : 16 + n] for plane in guarded], rotated=rotated)
        cut[which] = guarded
    np.testing.assert_array_equal(cut[None], cut[compiled()])
    np.testing.assert_array_equal(raw, before)


@given(
    st.sampled_from([1, 2, 4, 8]).flatmap(
        lambda w: st.lists(st.booleans(), min_size=w, max_size=w)
    ),
    lengths(20_000), st.booleans(), st.integers(0, 2**32),
)  # fmt: skip
def test_join(single: list[bool], n: int, rotated: bool, seed: int) -> None:
    offset = seed % 8
    w = len(single)
    cut = [some_bytes(seed + i, 1 if is_one else n, offset) for i, is_one in enumerate(single)]
    joined = {}
    for which in (None, compiled()):
        guarded = np.full(n * w + 32, 0x5A, np.uint8)
        with using(which):
            planes.join(cut, guarded[offset : offset + n * w], rotated=rotated)
        joined[which] = guarded
    np.testing.assert_array_equal(joined[None], joined[compiled()])


@st.composite
def tensors(draw: st.DrawFn) -> tuple[str, np.ndarray]:
    """Numbers of any dtype, of one size or of many, some of them special, aligned or not."""
    dtype: Any = draw(st.sampled_from(SUPPORTED))
    stored = dtypes.numpy_dtype(dtype)
    n = draw(lengths(20_000))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    if draw(st.booleans()):
        bits = rng.integers(0, 256, n * stored.itemsize, np.uint8)
        keep = draw(st.sampled_from([0xFF, 0x7F, 0x3F, 0xC0, 0x01]))
        bits[stored.itemsize - 1 :: stored.itemsize] &= keep
        array = bits.view(stored)
    else:
        scale = 2.0 ** draw(st.integers(-150, 150))
        floats = rng.standard_normal(n) * scale + draw(st.sampled_from([0, scale, -3 * scale]))
        if draw(st.booleans()):
            floats[rng.random(n) < draw(st.floats(0, 1))] = draw(st.sampled_from(SPECIAL))
        with np.errstate(all="ignore"):
            if dtypes.is_integer(dtype):
                floats = np.nan_to_num(floats, posinf=3, neginf=0) % 3
            array = floats.astype(stored)
    if draw(st.booleans()):
        odd = np.empty(array.nbytes + 1, np.uint8)[1:]
        odd[:] = array.view(np.uint8)
        array = odd.view(stored)
    return dtype, array


@given(tensors())
@example(("float32", np.full(9, -0.0, np.float32)))
@example(("float32", np.full(3000, 1e-30, np.float32)))
@example(("float64", np.tile([1.7e308, -1.7e308], 5000)))
@example(("int64", np.array([-(2**63), 2**63 - 1, 2**53 + 1])))
def test_statistics(tensor: tuple[str, np.ndarray]) -> None:
    dtype, array = tensor
    with using(None):
        numpy = statistics.compute(array, dtype=dtype)
    with using(compiled()):
        kernel = statistics.compute(array, dtype=dtype)
    assert kernel[:5].tobytes() == numpy[:5].tobytes()
    # Bits, so that zeros have a sign; NaN is NaN.
    for one, other in zip(kernel[5:7], numpy[5:7], strict=True):
        assert one.tobytes() == other.tobytes() or (np.isnan(one) and np.isnan(other))
    assume(np.isfinite(numpy[7:]).all())
    # Each within 2^-20 of the truth.
    scales = numpy[[9, 8, 9]]
    assert (np.abs(kernel[7:] - numpy[7:]) <= 2.0**-19 * scales).all()


@given(tensors(), st.integers(0, 9))
def test_rows_are_like_tensors(tensor: tuple[str, np.ndarray], k: int) -> None:
    dtype, array = tensor
    n = len(array) // k if k else 0
    rows = array[: k * n].reshape(k, n)
    with using(compiled()):
        together = statistics.compute_rows(rows, dtype=dtype)
        assert together.shape == (k, 10)
        for row, one in zip(rows, together, strict=True):
            alone = statistics.compute(row, dtype=dtype)
            np.testing.assert_array_equal(one, alone)


@given(st.sampled_from(FIXED), lengths(9000), st.booleans(), st.integers(0, 2**32))
def test_payloads(dtype: str, n: int, is_smooth: bool, seed: int) -> None:
    raw = some_bytes(seed, n * dtypes.itemsize(dtype), 0)
    if is_smooth:
        raw = np.sort(raw)
    payloads = {}
    for which in (None, compiled()):
        with using(which):
            encoded = codec.Encoder().encode(raw, dtype=dtype)
            out = np.empty(raw.nbytes, np.uint8)
            codec.decode(encoded.to_bytes(), out, codec=encoded.codec, dtype=dtype)
        assert out.tobytes() == raw.tobytes()
        payloads[which] = (encoded.codec, encoded.crc32c, encoded.to_bytes())
    assert payloads[None] == payloads[compiled()]
