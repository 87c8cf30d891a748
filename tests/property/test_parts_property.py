"""Tensors in parts over several workers: read as one, or refused; the oracle is the whole array."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tensorstore_fmt as tsf
from tensorstore_fmt.format import layout
from tensorstore_fmt.testing.writers import create_test_run

SHAPES = [(4, 6), (9,), (300, 400)]  # small parts lie in the index, large ones in shards

saves = st.lists(
    st.tuples(
        st.integers(0, 3),  # step
        st.integers(0, 2),  # worker
        st.sampled_from(["its rows", "its rows in two", "all"]),
        st.sampled_from([None, "TRAIN"]),
        st.booleans(),  # whether a flush follows
    ),
    max_size=14,
)
Key = tuple[str | None, int]
Parts = dict[tuple[int, int], np.ndarray]  # by worker and first row: a later save replaces it


def rows_of(kind: str, worker: int, workers: int, n: int) -> Iterator[slice]:
    begin, end = n * worker // workers, n * (worker + 1) // workers
    if kind == "all":
        yield slice(0, n)
    elif kind == "its rows" or end - begin < 2:
        yield slice(begin, end)
    else:
        middle = (begin + end) // 2
        yield slice(begin, middle)
        yield slice(middle, end)


@given(
    workers=st.integers(1, 3),
    saves=saves,
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(["float32", "float64", "int16"]),
    stats=st.booleans(),
)
def test_parts_are_one_tensor_or_refused(
    workers: int,
    saves: list[tuple[int, int, str, str | None, bool]],
    shape: tuple[int, ...],
    dtype: str,
    *,
    stats: bool,
) -> None:
    oracle: dict[Key, Parts] = defaultdict(dict)
    rng = np.random.default_rng(len(saves))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        url = str(Path(folder) / "run")
        runs = [
            stack.enter_context(
                create_test_run(url, worker=worker, num_workers=workers, stats=stats)
            )
            for worker in range(workers)
        ]
        for step, worker, kind, mode, flushes in saves:
            if worker >= workers:
                continue
            whole = (100 * rng.standard_normal(shape)).astype(dtype)
            for rows in rows_of(kind, worker, workers, shape[0]):
                origin = (rows.start, *[0] * (len(shape) - 1))
                part = tsf.Part(value=whole[rows], global_shape=shape, origin=origin)
                runs[worker].log({"x": part}, step=step, mode=mode)
                oracle[mode, step][worker, rows.start] = whole[rows]
            if flushes:
                runs[worker].flush()
        for run in runs:
            run.close()
        with tsf.open_run(url) as reader:
            for (mode, step), parts in oracle.items():
                tensor = reader["x"].select(mode=mode or "NONE")
                check(tensor, step, parts, np.zeros(shape, dtype), stats=stats)


def check(tensor: tsf.Tensor, step: int, parts: Parts, whole: np.ndarray, *, stats: bool) -> None:
    """Compare one step with its parts, which may leave holes or overlap."""
    times = np.zeros(len(whole), np.int64)
    for (_, row), part in parts.items():
        whole[row : row + len(part)] = part
        times[row : row + len(part)] += 1
    if (times != 1).any():
        with pytest.raises(tsf.FormatError):
            tensor.read(step=step)
        return
    assert tensor.read(step=step).tobytes() == whole.tobytes()
    np.testing.assert_array_equal(tensor.read(step=step, index=np.s_[1::2]), whole[1::2])
    is_inline = max(part.nbytes for part in parts.values()) <= layout.INLINE_STEP_NBYTES
    if stats or is_inline:
        found = tensor.stats(steps=[step])
        assert (found.count[0], found.min[0], found.max[0]) == (
            whole.size, whole.min(), whole.max(),
        )  # fmt: skip
        exact = whole.astype(np.float64)
        assert abs(found.sum[0] - exact.sum()) <= 2**-20 * np.abs(exact).sum()  # section 7.8
