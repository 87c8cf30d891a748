"""Reading values: slices, steps, codecs, winners, attempts, parts, damage."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from support.build_run import Put, RunBuilder, step_row

from tensorstore_fmt.errors import (
    AmbiguousError,
    ArgumentError,
    ChecksumError,
    FormatError,
    MissingFileError,
    NameNotFoundError,
    SelectionError,
    StepDroppedError,
    StepNotFoundError,
    StepNotYetWrittenError,
    TruncatedError,
    UnsupportedError,
)
from tensorstore_fmt.format import layout
from tensorstore_fmt.reading import timeline
from tensorstore_fmt.reading.run import Run, open_run
from tensorstore_fmt.reading.session import Session
from tensorstore_fmt.storage import open_storage
from tensorstore_fmt.testing.storage import CountingStorage
from tensorstore_fmt.writing.run import create_run


@pytest.fixture
def build(tmp_path: Path) -> RunBuilder:
    return RunBuilder(tmp_path / "run")


def counting(build: RunBuilder) -> tuple[Run, CountingStorage]:
    storage = CountingStorage(open_storage(build.url, writable=False))
    return Run(Session(build.url, None, storage=storage)), storage


def arrays(n: int, shape: tuple[int, ...] = (6, 7), dtype: type = np.float32) -> list[np.ndarray]:
    return [np.random.default_rng(i).random(shape).astype(dtype) for i in range(n)]


# --- values -----------------------------------------------------------------------


def test_every_place_a_value_can_lie(build: RunBuilder) -> None:
    a = arrays(9)
    w = build.writer()
    w.flush(
        Put(step=0, value=a[0]),
        Put(step=1, value=np.stack(a[1:4]), count=3),
        Put(step=10, value=a[4], count=3, stride=5, repeat=True),
        Put(step=30, value=a[5], inline=True),
        Put(step=31, value=np.stack(a[6:8]), count=2, inline=True),
        Put(step=40, value=np.full((6, 7), 2.5, np.float32), codec=layout.CODEC_CONSTANT),
        Put(step=41, value=np.full((6, 7), 3.5, np.float32), codec=1, inline=True),
        closed=True,
    )
    t = open_run(build.url)["x"]
    expected = [
        a[0], *a[1:4], a[4], a[4], a[4], a[5], *a[6:8],
        np.full((6, 7), 2.5, np.float32), np.full((6, 7), 3.5, np.float32),
    ]  # fmt: skip
    assert t.steps.tolist() == [0, 1, 2, 3, 10, 15, 20, 30, 31, 32, 40, 41]
    np.testing.assert_array_equal(t.read(), np.stack(expected))
    for index in (np.s_[2, 3], np.s_[::-1, 1:5:2], np.s_[..., -1], np.s_[5:1], np.s_[:, 7:]):
        got = t.read(index=index)
        np.testing.assert_array_equal(got, np.stack([e[index] for e in expected]))
        assert got.flags.owndata or got.base.flags.owndata
        assert got.flags.writeable
    for step, e in zip(t.steps.tolist(), expected, strict=True):
        np.testing.assert_array_equal(t.read(step=step), e)
        np.testing.assert_array_equal(t.at(step)[1], e[1])
    np.testing.assert_array_equal(t.read(steps=[32, 2, 2, 15]), np.stack([a[7], a[2], a[2], a[4]]))
    np.testing.assert_array_equal(t.read(steps=slice(2, 32, 2)), np.stack([a[2], a[4], a[4], a[5]]))


@pytest.mark.parametrize("grid", [(2, 3), (1, 0), (0, 2), (5, 5), (100, 1)])
@pytest.mark.parametrize("count", [1, 4])
def test_chunks_and_steps_in_all_combinations(
    build: RunBuilder, grid: tuple[int, ...], count: int
) -> None:
    a = arrays(4, (5, 4))
    w = build.writer()
    if count == 1:
        for i in range(4):
            w.flush(Put(step=3 * i, value=a[i], grid=grid))
    else:
        w.flush(Put(step=0, stride=3, count=4, value=np.stack(a), grid=grid))
    t = open_run(build.url)["x"]
    whole = np.stack(a)
    for index in ((), np.s_[1:4, ::2], np.s_[-1], np.s_[::-2, 1:2], np.s_[2, 3]):
        inner = index if isinstance(index, tuple) else (index,)
        np.testing.assert_array_equal(t.read(index=index), whole[(slice(None), *inner)])
        np.testing.assert_array_equal(
            t.read(steps=[3, 9], index=index), whole[[1, 3]][(slice(None), *inner)]
        )
        np.testing.assert_array_equal(t.read(step=6, index=index), whole[(2, *inner)])


def test_a_single_step_is_read_without_a_timeline_where_that_will_do(
    build: RunBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = arrays(4)
    w = build.writer()
    w.flush(*(Put(step=i, value=a[i], grid=(2, 3)) for i in range(3)))
    resolved = []
    resolve = timeline._resolve
    monkeypatch.setattr(timeline, "_resolve", lambda *given: resolved.append(1) or resolve(*given))
    t = open_run(build.url)["x"]
    for index in ((), np.s_[3], np.s_[::-2, 1:5], np.s_[6:], np.s_[..., -1:]):
        np.testing.assert_array_equal(t.read(step=1, index=index), a[1][index])
    assert not resolved
    with pytest.raises(SelectionError, match="out of range"):
        t.read(step=1, index=6)
    with pytest.raises(StepNotYetWrittenError):
        t.read(step=7, index=0)
    w.flush(Put(step=1, value=a[3], grid=(2, 3)))  # which of the two it is takes a look at both
    t = open_run(build.url)["x"]
    resolved.clear()
    np.testing.assert_array_equal(t.read(step=1, index=np.s_[1:]), a[3][1:])
    np.testing.assert_array_equal(t.read(step=2, index=np.s_[1:]), a[2][1:])
    assert resolved


def test_scalars_are_arrays_of_rank_0_and_bits_are_kept(build: RunBuilder) -> None:
    nan = np.array(0x7FA00001, np.uint32).view(np.float32)
    build.writer().flush(
        Put(name="f", value=nan, inline=True),
        Put(name="b", value=np.array(True), inline=True),
        Put(name="h", value=np.array(1.5, ml_dtypes.bfloat16), inline=True),
        Put(name="z", value=np.zeros((3, 0), np.int16)),
    )
    run = open_run(build.url)
    got = run["f"].read(step=0)
    assert isinstance(got, np.ndarray)
    assert got.shape == ()
    assert got.tobytes() == nan.tobytes()
    assert run["b"].read(step=0).dtype == bool
    assert run["h"].read(step=0).dtype == ml_dtypes.bfloat16
    assert run["h"].dtype_name == "bfloat16"
    assert run["z"].read().shape == (1, 3, 0)
    assert run["z"].read(index=np.s_[1]).shape == (1, 0)


def test_strings(build: RunBuilder) -> None:
    build.writer().flush(
        Put(name="s", step=0, value="α", inline=True),
        Put(name="s", step=1, value=["", "βγ"], count=2, inline=True),
        Put(name="l", step=0, value=["a", "b", "c"], grid=(2,)),
        Put(name="e", step=0, value=[], dtype="string"),
    )
    run = open_run(build.url)
    assert run["s"].read(step=0) == "α"
    assert run["s"].read().tolist() == ["α", "", "βγ"]
    assert run["s"].dtype_name == "string"
    assert run["l"].read(step=0).tolist() == ["a", "b", "c"]
    assert run["l"].read(step=0, index=2) == "c"
    assert run["l"].read(index=np.s_[::-1]).tolist() == [["c", "b", "a"]]
    assert run["e"].read(step=0).shape == (0,)


def test_lengths_that_vary(build: RunBuilder) -> None:
    build.writer().flush(
        *(Put(step=i, value=np.arange(2 * i).reshape(2, i), shape=(2, -1)) for i in range(4)),
        Put(step=9, value=np.arange(6).reshape(2, 3) + 1, shape=(2, -1)),
    )
    t = open_run(build.url)["x"]
    assert t.shape == (2, None)
    assert t.shape_at(2) == (2, 2)
    assert t.read(step=3).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert t.read(steps=[3, 9], index=np.s_[1, -1]).tolist() == [5, 6]
    with pytest.raises(ArgumentError) as caught:
        t.read()
    assert caught.value.code == "shape_varies"
    assert t.read(step=0).shape == (2, 0)


def test_dtypes_that_vary_are_not_stacked(build: RunBuilder) -> None:
    build.writer().flush(Put(step=0, value=np.zeros(3)), Put(step=1, value=np.zeros(3, np.int8)))
    t = open_run(build.url)["x"]
    with pytest.raises(ArgumentError) as caught:
        t.read()
    assert caught.value.code == "shape_varies"
    assert t.read(step=1).dtype == np.int8


# --- steps -------------------------------------------------------------------------


def test_steps_are_numbers_and_missing_ones_raise(build: RunBuilder) -> None:
    w = build.writer()
    w.flush(*(Put(step=s, value=np.float32(s), inline=True) for s in (0, 5, 10, 15)), through=15)
    t = open_run(build.url)["x"]
    assert t.read(steps=slice(5, 15)).tolist() == [5, 10]
    assert t.read(steps=slice(None, None, 10)).tolist() == [0, 10]
    assert t.read(steps=slice(5, None, 10)).tolist() == [5, 15]
    assert t.read(steps=slice(6, 9)).shape == (0,)
    assert t.read(steps=[]).shape == (0,)
    assert t.read(steps=range(0, 11, 5)).tolist() == [0, 5, 10]
    with pytest.raises(StepNotFoundError) as caught:
        t.read(steps=[5, 6])
    assert caught.value.facts == {"name": "x", "step": 6}
    with pytest.raises(StepNotYetWrittenError):
        t.read(step=16)
    for wrong in ({"step": -1}, {"step": 1.5}, {"step": True}, {"step": 1, "steps": [1]}):
        with pytest.raises(ArgumentError):
            t.read(**wrong)
    for wrong in (slice(-2, None), slice(0, 5, -1), [1.5], "1", 5, [[1]], slice("a")):
        with pytest.raises(ArgumentError):
            t.read(steps=wrong)


def test_message_names_the_nearest_steps(build: RunBuilder) -> None:
    build.writer().flush(
        Put(step=10, value=np.zeros(2)), Put(step=1000, value=np.zeros(2)), closed=True
    )
    with pytest.raises(StepNotFoundError, match="10 before it and 1000 after it"):
        open_run(build.url)["x"].read(step=500)


def test_four_kinds_of_absence(build: RunBuilder) -> None:
    w = build.writer()
    w.flush(
        Put(step=0, value=np.zeros(3, np.float32)),
        Put(step=1, value=None, shape=(3,)),
        Put(step=5, value=None, shape=(3,), count=3, stride=2),
        Put(step=3, value=np.ones(3, np.float32)),
        step_row(0), step_row(1), step_row(2), step_row(3),
        through=7,
    )  # fmt: skip
    run = open_run(build.url)
    t = run["x"]
    assert t.steps.tolist() == [0, 3]
    for step in (1, 5, 7, 9):
        with pytest.raises(StepDroppedError):
            t.read(step=step)
    with pytest.raises(StepNotFoundError):
        t.read(step=2)
    with pytest.raises(StepNotYetWrittenError):
        t.read(step=8)
    shard = next((build.root / "shards").iterdir())
    data = bytearray(shard.read_bytes())
    at = bytes(data).find(np.ones(3, np.float32).tobytes())
    data[at] ^= 1
    shard.write_bytes(data)
    run = open_run(build.url)
    states = [run.state("x", s) for s in (0, 1, 2, 3, 8)]
    assert states == ["here", "dropped", "never", "unreadable", "not_yet"]
    with pytest.raises(ChecksumError) as caught:
        run["x"].read(step=3)
    facts = caught.value.facts
    assert (facts["name"], facts["step"], facts["file"]) == ("x", 3, f"shards/{shard.name}")
    assert facts["offset"] == at
    os.truncate(shard, at)
    run = open_run(build.url)
    with pytest.raises(TruncatedError) as truncated:
        run["x"].read(step=3)
    assert truncated.value.facts["step"] == 3
    shard.unlink()
    run = open_run(build.url)
    with pytest.raises(MissingFileError) as missing:
        run["x"].read(step=3)
    assert missing.value.facts["file"] == f"shards/{shard.name}"
    assert run.state("x", 0) == "unreadable"


def test_unknown_codec_and_dtype_fail_alone(build: RunBuilder) -> None:
    build.writer().flush(
        Put(name="a", value=np.zeros(3), change={"codec": 77}),
        Put(name="b", value=np.zeros(3)),
        Put(name="c", value=np.zeros(3), dtype="float64"),
    )
    run = open_run(build.url)
    with pytest.raises(UnsupportedError) as caught:
        run["a"].read()
    assert caught.value.code == "unknown_codec"
    assert run["b"].read(step=0).tolist() == [0, 0, 0]


def test_a_chunk_that_the_index_lacks_is_an_error(build: RunBuilder) -> None:
    build.writer().flush(
        Put(name="a", value=np.zeros((4, 4)), grid=(2, 2), skip_chunks=[2]),
        Put(name="b", value=np.zeros((4, 4)), change={"raw_nbytes": 64}),
    )
    run = open_run(build.url)
    assert run["a"].read(index=np.s_[:2, :]).shape == (1, 2, 4)
    for name in ("a", "b"):
        with pytest.raises(FormatError) as caught:
            run[name].read()
        assert caught.value.code == "malformed"


def test_an_entry_that_ends_behind_its_shard_is_an_error(build: RunBuilder) -> None:
    build.writer().flush(Put(name="c", value=np.zeros((4, 4)), change={"offset": 8 * 10**6}))
    with pytest.raises(FormatError) as caught:
        open_run(build.url)["c"].read()
    assert caught.value.code == "malformed"


# --- who wins ------------------------------------------------------------------------


def test_the_latest_flush_of_a_writer_wins(build: RunBuilder) -> None:
    w = build.writer()
    old, new = np.zeros((4, 4)), np.ones((2, 4))
    w.flush(
        Put(step=1, value=old, grid=(1, 0), shape=(-1, 4)),
        Put(step=2, value=old, shape=(-1, 4), grid=(1, 0)),
    )
    w.flush(Put(step=1, value=new, grid=(1, 0), shape=(-1, 4)))
    w.flush(Put(step=3, value=np.float32(7)), Put(step=2, value=None, shape=()))
    t = open_run(build.url)["x"]
    assert t.read(step=1).tolist() == new.tolist()
    with pytest.raises(StepDroppedError):
        t.read(step=2)
    assert t.steps.tolist() == [1, 3]


def test_a_step_saved_twice_in_one_segment(build: RunBuilder) -> None:
    build.writer().flush(
        Put(step=1, value=np.zeros((4, 4)), grid=(1, 0), flush=0),
        Put(step=1, value=np.ones((4, 4)), grid=(1, 0), flush=2),
        first=0,
        last=2,
    )
    t = open_run(build.url)["x"]
    assert (t.read(step=1) == 1).all()
    assert (t.read(step=1, index=np.s_[2:]) == 1).all()


def test_chunks_of_different_saves_are_never_mixed(build: RunBuilder) -> None:
    build.writer().flush(
        Put(step=1, value=np.zeros((4, 4)), grid=(1, 0), flush=0),
        Put(step=1, value=np.ones((4, 4)), grid=(1, 0), flush=2, skip_chunks=[2]),
        first=0,
        last=2,
    )
    with pytest.raises(FormatError) as caught:
        open_run(build.url)["x"].read(step=1)
    assert caught.value.code == "malformed"


def test_the_later_writer_of_a_worker_wins(build: RunBuilder) -> None:
    build.writer(writer=9, opened_us=1).flush(Put(step=1, value=np.float32(1)))
    build.writer(writer=3, opened_us=2).flush(Put(step=1, value=np.float32(2)))
    assert open_run(build.url)["x"].read(step=1) == 2


def test_attempts_hide_later_steps_of_earlier_ones(build: RunBuilder) -> None:
    w = build.writer()
    w.flush(*(Put(step=s, value=np.float32(s), inline=True) for s in range(6)), closed=True)
    build.writer(attempt=1, resume_step=3).flush(
        Put(step=3, value=np.float32(103)), Put(step=5, value=np.float32(105))
    )
    run = open_run(build.url)
    t = run["x"]
    assert run.attempts == [0, 1]
    assert t.read().tolist() == [0, 1, 2, 103, 105]
    assert t.read(attempt=0).tolist() == [0, 1, 2, 3, 4, 5]
    assert t.read(step=4, attempt=0) == 4
    assert t.select(attempt=1).steps.tolist() == [3, 5]
    with pytest.raises(StepNotYetWrittenError):
        t.read(step=4)
    with pytest.raises(StepNotYetWrittenError):  # its writers may be recovered
        t.read(step=9, attempt=0)


def test_the_greatest_attempt_wins_also_below_its_resume_step(build: RunBuilder) -> None:
    for worker in range(2):
        build.writer(worker, num_workers=2).flush(
            *(Put(step=s, value=np.float32(10 * worker + s), inline=True) for s in range(3))
        )
    build.writer(1, attempt=1, num_workers=2, resume_step=5).flush(
        Put(step=1, value=np.float32(100), inline=True)
    )
    t = open_run(build.url)["x"]
    assert t.read(step=1) == 100
    assert t.select(worker=1).read().tolist() == [10, 100, 12]
    assert t.select(worker=0).steps.tolist() == [0, 2]
    assert t.read(step=1, worker=0, attempt=0) == 1


def test_an_attempt_without_data_hides_too(build: RunBuilder) -> None:
    build.writer().flush(Put(step=5, value=np.zeros(2)), closed=True)
    build.writer(attempt=1, resume_step=0).flush()
    t = open_run(build.url)["x"]
    assert t.steps.tolist() == []
    assert t.read(step=5, attempt=0).tolist() == [0, 0]


def test_several_modes_and_workers_have_to_be_named(build: RunBuilder) -> None:
    for worker in range(2):
        build.writer(worker, num_workers=2).flush(
            Put(step=1, mode=1, value=np.float32(10 + worker), inline=True),
            Put(step=2, mode=2, value=np.float32(20 + worker), inline=True),
            Put(step=3, mode=1, value=np.float32(30 + worker), inline=True),
            *([Put(step=3, mode=2, value=np.float32(40), inline=True)] if worker == 0 else []),
        )
    t = open_run(build.url)["x"]
    assert t.modes == ("TRAIN", "EVAL")
    assert t.workers == (0, 1)
    with pytest.raises(AmbiguousError) as caught:
        t.read(step=1)
    assert caught.value.facts["workers"] == [0, 1]
    with pytest.raises(AmbiguousError) as caught:
        t.read(step=3, worker=0)
    assert caught.value.facts["modes"] == ["TRAIN", "EVAL"]
    assert t.read(step=3, worker=0, mode="eval") == 40
    assert t.read(step=3, worker=1) == 31
    assert t.select(worker=1).read().tolist() == [11, 21, 31]
    assert t.read(worker=0, mode="TRAIN").tolist() == [10, 30]
    with pytest.raises(ArgumentError):
        t.read(step=1, mode="train2")


# --- parts ---------------------------------------------------------------------------


def put_parts(
    build: RunBuilder,
    value: np.ndarray,
    borders: list[int],
    *,
    step: int = 1,
    skip: Sequence[int] = (),
    attempt: int = 0,
    resume_step: int = 0,
) -> None:
    n = len(borders) - 1
    for worker in range(n):
        a, b = borders[worker], borders[worker + 1]
        w = build.writer(worker, num_workers=n, attempt=attempt, resume_step=resume_step)
        part = Put(
            step=step, value=value[a:b], global_shape=value.shape, origin=(a, 0), grid=(2, 0)
        )
        w.flush(*([] if worker in skip else [part]))


def test_parts_are_put_together(build: RunBuilder) -> None:
    value = np.random.default_rng(0).random((10, 6))
    put_parts(build, value, [0, 3, 4, 10])
    t = open_run(build.url)["x"]
    assert t.shape == (10, 6)
    assert t.shape_at(1) == (10, 6)
    for index in ((), np.s_[2:5], np.s_[::-3, 1], np.s_[9, 2:4], np.s_[3], np.s_[1:1]):
        np.testing.assert_array_equal(t.read(step=1, index=index), value[index])
        np.testing.assert_array_equal(t.read(index=index), value[index][None])
    np.testing.assert_array_equal(t.read(step=1, worker=2, index=np.s_[1:]), value[5:])
    assert t.select(worker=1).shape == (1, 6)


def test_holes_and_overlaps_of_parts(build: RunBuilder) -> None:
    value = np.zeros((10, 6))
    put_parts(build, value, [0, 3, 4, 10], skip=[1])
    t = open_run(build.url)["x"]
    with pytest.raises(FormatError) as caught:
        t.read(step=1)
    assert caught.value.code == "parts"
    assert t.read(step=1, index=np.s_[4:]).shape == (6, 6)
    assert t.read(step=1, index=np.s_[::5]).shape == (2, 6)
    build.writer(1, writer=77, num_workers=3).flush(
        Put(step=1, value=np.zeros((2, 6)), global_shape=(10, 6), origin=(3, 0))
    )
    t = open_run(build.url)["x"]
    with pytest.raises(FormatError) as caught:
        t.read(step=1)
    assert caught.value.code == "parts"
    assert t.read(step=1, index=np.s_[:4]).shape == (4, 6)


def test_parts_are_of_one_attempt(build: RunBuilder) -> None:
    value = np.zeros((4, 2))
    put_parts(build, value, [0, 2, 4])
    put_parts(build, value + 1, [0, 1, 4], attempt=1, resume_step=1)
    t = open_run(build.url)["x"]
    assert (t.read(step=1) == 1).all()
    assert (t.read(step=1, attempt=0) == 0).all()


def test_a_dropped_part_makes_the_step_dropped(build: RunBuilder) -> None:
    value = np.zeros((4, 2))
    put_parts(build, value, [0, 2, 4], step=1)
    part = Put(step=2, value=value[:2], global_shape=(4, 2), origin=(0, 0))
    build.writer(0, writer=50, num_workers=2).flush(part)
    build.writer(1, writer=51, num_workers=2).flush(
        Put(step=2, value=None, dtype="float64", shape=(2, 2), grid=(0, 0),
            global_shape=(4, 2), origin=(2, 0))
    )  # fmt: skip
    t = open_run(build.url)["x"]
    assert t.steps.tolist() == [1]
    with pytest.raises(StepDroppedError):
        t.read(step=2)
    assert t.read().shape == (1, 4, 2)
    assert t.read(step=2, worker=0).shape == (2, 2)
    with pytest.raises(StepDroppedError):
        t.read(step=2, worker=1)


def test_parts_of_different_tensors_do_not_go_together(build: RunBuilder) -> None:
    for worker, dtype in enumerate((np.float32, np.float64)):
        build.writer(worker, num_workers=2).flush(
            Put(value=np.zeros(2, dtype), global_shape=(4,), origin=(2 * worker,))
        )
    with pytest.raises(FormatError) as caught:
        open_run(build.url)["x"].read(step=0)
    assert caught.value.code == "parts"


@pytest.mark.parametrize("before", [0, 1, 2])
def test_the_last_step_there_can_be(tmp_path: Path, before: int) -> None:
    steps = range(layout.MAX_STEP - before, layout.MAX_STEP + 1)
    with create_run(tmp_path / "run") as writer:
        for step in steps:
            writer.log({"x": float(before)}, step=step)
    run = open_run(str(tmp_path / "run"))
    assert run["x"].read(step=layout.MAX_STEP) == before
    assert run.steps().tolist() == list(steps) == list(run.follow())


def test_a_part_beyond_its_tensor_is_refused(build: RunBuilder) -> None:
    build.writer().flush(Put(value=np.zeros((3, 2)), global_shape=(4, 2), origin=(2, 0)))
    with pytest.raises(FormatError) as caught:
        open_run(build.url)["x"].read()
    assert caught.value.code == "malformed"


# --- cost ----------------------------------------------------------------------------


def test_only_touched_chunks_are_fetched_and_each_once(build: RunBuilder) -> None:
    value = np.random.default_rng(0).random((64, 1024))
    build.writer().flush(
        Put(step=0, value=value, grid=(1, 0)), Put(step=1, value=value, grid=(1, 0))
    )
    run, storage = counting(build)
    t = run["x"]
    assert t.shape == (64, 1024)
    storage.reset()
    np.testing.assert_array_equal(t.read(index=np.s_[5, 3]), [value[5, 3]] * 2)
    ranges = [r for r in storage.requests if r.path.startswith("shards/")]
    assert sum(r.stop - r.start for r in ranges) == 2 * 8192
    storage.reset()
    t.read(step=1)
    assert storage.rounds == 1
    assert storage.nbytes <= 1.2 * value.nbytes
    storage.reset()
    results = run.read([("x", 0, np.s_[0]), ("x", 1, np.s_[0]), ("x", 0, np.s_[0, 5:7])])
    assert storage.rounds == 1
    assert storage.nbytes == 2 * 8192
    np.testing.assert_array_equal(results[0], value[0])
    np.testing.assert_array_equal(results[2], value[0, 5:7])


def test_refuses_a_name_with_suggestions(build: RunBuilder) -> None:
    build.writer().flush(Put(name="encoder.weight", value=np.zeros(2)))
    run = open_run(build.url)
    with pytest.raises(NameNotFoundError) as caught:
        run["encoder.wieght"]
    assert caught.value.facts["near"] == ["encoder.weight"]
    assert "x" not in run
    assert "encoder.weight" in run
    assert list(run) == ["encoder.weight"]
    with pytest.raises(SelectionError):
        run["encoder.weight"].read(index=3)


# --- views ----------------------------------------------------------------------------


def test_view_is_the_file_itself(build: RunBuilder) -> None:
    a = arrays(3, (64, 64))
    build.writer().flush(
        Put(step=0, value=a[0]),
        Put(step=1, value=np.stack(a[1:]), count=2),
        Put(step=9, value=a[0], grid=(8, 0)),
        Put(step=10, value=np.zeros((64, 64), np.float32), codec=1),
        Put(step=11, value=np.zeros((64, 64), np.float32), inline=True),
    )
    t = open_run(build.url)["x"]
    for step in range(3):
        view = t.view(step=step)
        np.testing.assert_array_equal(view, a[step])
        assert not view.flags.writeable
        assert not view.flags.owndata
    for step in (9, 10, 11):
        with pytest.raises(ArgumentError) as caught:
            t.view(step=step)
        assert caught.value.code == "no_view"


def test_more_chunks_than_can_be_numbered(build: RunBuilder) -> None:
    build.writer().flush(
        Put(name="x", value=np.zeros((1, 1)), shape=(2**48, 2**48), grid=(1, 1), skip_chunks=[])
    )
    with pytest.raises(FormatError) as caught:
        open_run(build.url)["x"].read(step=0, index=np.s_[2**16, 0])
    assert caught.value.code == "malformed"
