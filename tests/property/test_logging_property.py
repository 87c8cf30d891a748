"""What is logged under one name, whatever its kinds, is what is read: a dict is the oracle."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import tensorstore_fmt as tsf
from tensorstore_fmt.testing.writers import create_test_run

QUIET_NAN = np.array(0x7FF80000_DEADBEEF, np.uint64).view(np.float64)
KINDS: dict[str, Callable[[int], object]] = {
    "float": lambda i: i / 7,
    "float64": lambda i: np.float64(i / 7),
    "float64 array": lambda i: np.array(i / 7),
    "nan": lambda _: QUIET_NAN,
    "int": lambda i: i,
    "bool": lambda i: i % 2 == 0,
    "float32": lambda i: np.float32(i),
    "text": lambda i: f"text {i}",
    "small": lambda i: np.full(3, i / 7),
    "empty": lambda _: np.empty((0, 2)),
    "joined": lambda i: np.arange(1000) * (i / 7),
    "gridded": lambda i: np.arange(50_000) * (i / 7),
}  # each way a value takes: floats, inline, strings, joined, in chunks

calls = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from(sorted(KINDS)), st.booleans()), max_size=16
)


def bits(value: object) -> tuple[object, ...]:
    if isinstance(value, str):
        return (value,)
    array = np.asarray(value)
    return array.dtype.str, array.shape, array.tobytes()


@given(calls=calls)
def test_kinds_of_values_may_change_from_call_to_call(calls: list[tuple[int, str, bool]]) -> None:
    oracle: dict[int, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        url = str(Path(folder) / "run")
        run = create_test_run(url)
        for i, (step, kind, flushes) in enumerate(calls):
            oracle[step] = KINDS[kind](i)
            run.log({"x": oracle[step]}, step=step)
            if flushes:
                run.flush()
        assert run.close().dropped == 0
        with tsf.open_run(url) as reader:
            if oracle:
                assert reader["x"].steps.tolist() == sorted(oracle)
            for step, value in oracle.items():
                assert bits(reader["x"].read(step=step)) == bits(value)
