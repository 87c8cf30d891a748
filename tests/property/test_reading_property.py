"""Reading runs made of random entries against a dict of what they hold."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import basic_indices
from support.build_run import Put, RunBuilder

from tensorstore_fmt.reading.run import open_run

SHAPE = (5, 4)


@st.composite
def puts(draw: st.DrawFn) -> Put:
    count = draw(st.integers(1, 5))
    repeat = draw(st.booleans())
    seed = draw(st.integers(0, 2**32 - 1))
    shape = SHAPE if count == 1 or repeat else (count, *SHAPE)
    return Put(
        step=draw(st.integers(0, 30)),
        stride=1 if count == 1 else draw(st.integers(1, 4)),
        count=count,
        repeat=repeat,
        value=np.random.default_rng(seed).random(shape, np.float32),
        grid=draw(st.sampled_from([(0, 0), (2, 0), (3, 3), (1, 1)])),
        inline=draw(st.booleans()),
    )


def held(put: Put) -> dict[int, np.ndarray]:
    """Give what a `Put` saves, by step."""
    return {
        put.step + i * put.stride: put.value if put.count == 1 or put.repeat else put.value[i]
        for i in range(put.count)
    }


flushes = st.lists(st.lists(puts(), min_size=1, max_size=4), min_size=1, max_size=4)


@given(flushes, basic_indices(SHAPE, allow_newaxis=False), st.data())
def test_the_last_save_of_each_step_is_read(
    saves: list[list[Put]], index: object, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        build = RunBuilder(Path(folder))
        writer = build.writer()
        oracle: dict[int, np.ndarray] = {}
        for flush in saves:
            kept: list[Put] = []
            steps: set[int] = set()
            for put in flush:  # a writer saves no step twice in one flush
                if not steps & held(put).keys():
                    kept.append(put)
                    steps |= held(put).keys()
                    oracle |= held(put)
            writer.flush(*kept, closed=flush is saves[-1])
        tensor = open_run(build.url)["x"]
        steps_saved = sorted(oracle)
        assert tensor.steps.tolist() == steps_saved
        got = tensor.read(index=index)
        np.testing.assert_array_equal(got, np.stack([oracle[s][index] for s in steps_saved]))
        some = data.draw(st.lists(st.sampled_from(steps_saved), min_size=1, max_size=6))
        got = tensor.read(steps=some, index=index)
        np.testing.assert_array_equal(got, np.stack([oracle[s][index] for s in some]))
        run = open_run(build.url)
        for step in some:
            np.testing.assert_array_equal(tensor.read(step=step), oracle[step])
            np.testing.assert_array_equal(tensor.read(step=step, index=index), oracle[step][index])
        items = [("x", step, each) for step in some for each in ((), index)]
        for (_, step, each), result in zip(items, run.read(items), strict=True):
            np.testing.assert_array_equal(result, oracle[step][each])
        begin, end = sorted(data.draw(st.tuples(st.integers(0, 50), st.integers(0, 50))))
        stride = data.draw(st.integers(1, 3))
        got = tensor.read(steps=slice(begin, end, stride))
        wanted = [oracle[s] for s in steps_saved if s in range(begin, end, stride)]
        np.testing.assert_array_equal(got, np.array(wanted, np.float32).reshape(-1, *SHAPE))
