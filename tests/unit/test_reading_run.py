"""Runs: following, tables, statistics, what they look like, threads and forks."""

from __future__ import annotations

import os
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from support.build_run import Put, RunBuilder, step_row

from tensorstore_fmt.errors import (
    AmbiguousError,
    ArgumentError,
    FormatError,
    NameNotFoundError,
    StepNotFoundError,
    StepNotYetWrittenError,
)
from tensorstore_fmt.format import layout, statistics
from tensorstore_fmt.reading import follow
from tensorstore_fmt.reading.run import open_run


@pytest.fixture
def build(tmp_path: Path) -> RunBuilder:
    return RunBuilder(tmp_path / "run")


def scalar(step: int, number: float, **more: Any) -> Put:
    return Put(step=step, value=np.float32(number), inline=True, **more)


def stats_of(array: np.ndarray, **more: Any) -> Put:
    row = statistics.compute(np.ascontiguousarray(array), dtype=str(array.dtype))
    return Put(kind=layout.KIND_STATS, value=row, inline=True, **more)


# --- following --------------------------------------------------------------------------


def test_follow_gives_complete_steps_until_the_run_is_closed(build: RunBuilder) -> None:
    w = build.writer()
    w.flush(step_row(0), step_row(2), through=1)
    steps = open_run(build.url).follow(poll_s=0.01, timeout_s=10)
    assert next(steps) == 0
    w.flush(step_row(5), through=5)
    assert next(steps) == 2
    assert next(steps) == 5
    w.flush(step_row(6), closed=True)
    assert list(steps) == [6]


def test_follow_waits_for_all_workers_and_times_out(build: RunBuilder) -> None:
    a, b = (build.writer(i, num_workers=2) for i in range(2))
    a.flush(step_row(0), through=0)
    with pytest.raises(TimeoutError):
        next(open_run(build.url).follow(poll_s=0.01, timeout_s=0.05))
    b.flush(step_row(0), through=0)
    assert next(open_run(build.url).follow(poll_s=0.01, timeout_s=10)) == 0


class Clock:
    """A clock that only sleeping and looking move on, and what happens when it does."""

    def __init__(self, look_s: float) -> None:
        self.now = 0.0
        self.look_s = look_s
        self.looks: list[float] = []
        self.then: dict[int, Any] = {}

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.looks.append(self.now)
        self.now += self.look_s
        self.then.get(len(self.looks), lambda: None)()


@pytest.mark.parametrize(("look_s", "period_s"), [(0.0, 0.5), (0.1, 0.5), (0.4, 0.8), (2.0, 2.5)])
def test_follow_counts_from_look_to_look(
    build: RunBuilder, monkeypatch: pytest.MonkeyPatch, look_s: float, period_s: float
) -> None:
    clock = Clock(look_s)
    monkeypatch.setattr(follow, "time", clock)
    build.writer().flush(step_row(0), through=-1)
    with pytest.raises(TimeoutError):
        next(open_run(build.url).follow(poll_s=0.5, timeout_s=60))
    np.testing.assert_allclose(np.diff(clock.looks)[:-1], period_s)  # the last one is cut short


def test_follow_looks_often_where_something_has_just_happened(
    build: RunBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(0.0)
    monkeypatch.setattr(follow, "time", clock)
    w = build.writer()
    w.flush(step_row(0), through=0)
    steps = open_run(build.url).follow(timeout_s=100)
    assert next(steps) == 0
    clock.then[300] = lambda: w.flush(step_row(1), through=1)
    assert next(steps) == 1
    came = clock.looks[299]
    waits = np.diff([0.0, *clock.looks])
    assert (waits[:50] <= 0.011).all()
    assert (waits <= 0.02 * came + 0.01).all()  # what nobody waits for is not looked at for long
    with pytest.raises(TimeoutError):
        next(steps)
    after = np.diff(clock.looks[300:])
    assert (after[:20] <= 0.011).all()
    assert after[:-1].max() == pytest.approx(0.5)
    assert len(after) < 1000  # of 10,000 without pauses that grow


def test_follow_in_modes_and_through_attempts(build: RunBuilder) -> None:
    w = build.writer()
    w.flush(step_row(1, mode=1), step_row(2, mode=1), step_row(2, mode=2), through=[-1, 2, -1, -1])
    run = open_run(build.url)
    steps = run.follow(poll_s=0.01, timeout_s=10)
    assert [next(steps), next(steps)] == [1, 2]
    w.flush(step_row(1, mode=2), through=[-1, 2, 2, -1])
    w.flush(step_row(4, mode=2), through=[-1, 2, 4, -1])
    assert next(steps) == 4  # 1 and 2 have come
    n = build.writer(attempt=1, resume_step=2)
    n.flush(step_row(2, mode=1), step_row(3, mode=1), through=[1, 3, 1, 1], closed=True)
    assert list(steps) == [2, 3]
    assert list(run.follow("EVAL")) == [1]


def test_wait_for_step(build: RunBuilder) -> None:
    w = build.writer()
    w.flush(step_row(0), through=0)
    run = open_run(build.url)
    run.wait_for_step(0, timeout_s=0)
    with pytest.raises(TimeoutError):
        run.wait_for_step(1, timeout_s=0.05)
    timer = threading.Timer(0.1, lambda: w.flush(step_row(1), through=1))
    timer.start()
    run.wait_for_step(1, timeout_s=30)
    timer.join()
    w.flush(step_row(5), through=5)
    with pytest.raises(StepNotFoundError):
        run.wait_for_step(3, timeout_s=30)
    w.flush(closed=True)
    with pytest.raises(StepNotFoundError):
        run.wait_for_step(99)


def test_step_table(build: RunBuilder) -> None:
    build.writer().flush(
        step_row(10, mode=1, mode_step=3, wall_us=1_500_000),
        step_row(10, mode=2, mode_step=0, wall_us=2_000_000),
        Put(name="", kind=2, step=20, count=2, stride=5, mode=1, inline=True,
            codec=layout.CODEC_DELTA, value=np.array([[4, 10], [5, 20]])),
        through=30,
    )  # fmt: skip
    run = open_run(build.url)
    assert run.steps().tolist() == [10, 20, 25]
    assert run.mode_step(10, "TRAIN") == 3
    assert run.wall_time(10, "EVAL") == 2.0
    assert run.mode_step(25) == 5
    with pytest.raises(AmbiguousError):
        run.mode_step(10)
    with pytest.raises(StepNotFoundError):
        run.mode_step(11)
    with pytest.raises(StepNotYetWrittenError):
        run.wall_time(31)


# --- statistics ---------------------------------------------------------------------------


def test_stats_come_from_series_or_from_inline_values(build: RunBuilder) -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((2, 50)).astype(np.float32)
    a[0, 0] = np.nan
    build.writer().flush(
        *(Put(step=i, value=a[i], shape=(-1,)) for i in range(2)),
        *(stats_of(a[i], step=i) for i in range(2)),
        Put(step=5, value=np.array([1, 2, 3], np.float32), inline=True, shape=(-1,)),
        Put(step=6, value=np.zeros(3, np.float32), shape=(-1,)),
        closed=True,
    )
    t = open_run(build.url)["x"]
    stats = t.stats()
    assert stats.step.tolist() == [0, 1, 5]
    assert stats["nan"].tolist() == [1, 0, 0]
    assert stats.count.tolist() == [50, 50, 3]
    np.testing.assert_allclose(stats.l2[2], 14**0.5)
    np.testing.assert_allclose(stats.mean[1], a[1].astype(float).mean(), rtol=1e-5)
    np.testing.assert_allclose(stats.std[1], a[1].astype(float).std(), rtol=1e-5)
    assert list(stats) == [
        "step", *layout.STATS_FIELDS, "mean", "std", "l2",
    ]  # fmt: skip
    assert t.stats([5, 0]).step.tolist() == [5, 0]
    assert t.stats(slice(1, 5)).step.tolist() == [1]
    assert pa.table(stats).num_rows == 3
    with pytest.raises(StepNotFoundError):
        t.stats([6])
    with pytest.raises(StepNotFoundError):
        t.stats([7])


def test_only_statistics(build: RunBuilder) -> None:
    build.writer().flush(stats_of(np.ones(4, np.float32), step=3), through=9)
    run = open_run(build.url)
    t = run["x"]
    assert t.stats().sum.tolist() == [4]
    assert not t.has_data
    assert "only statistics" in repr(t)
    with pytest.raises(StepNotFoundError, match="only statistics"):
        t.read(step=3)
    with pytest.raises(StepNotFoundError):
        t.read()
    assert run.state("x", 3) == "never"


def test_statistics_of_parts_are_added_up(build: RunBuilder) -> None:
    a = np.arange(12, dtype=np.float32).reshape(4, 3)
    for worker, (begin, end) in enumerate([(0, 1), (1, 4)]):
        build.writer(worker, num_workers=2).flush(
            stats_of(a[begin:end], step=1, global_shape=(4, 3), origin=(begin, 0)),
            *([stats_of(a[:1], step=2, global_shape=(4, 3), origin=(0, 0))] if not worker else []),
        )
    t = open_run(build.url)["x"]
    stats = t.stats()
    assert stats.step.tolist() == [1]
    assert (stats.count[0], stats.min[0], stats.max[0], stats.sum[0]) == (12, 0, 11, 66)
    assert t.stats(worker=0).step.tolist() == [1, 2]
    with pytest.raises(FormatError) as caught:
        t.stats([2])
    assert caught.value.code == "parts"


# --- tables -------------------------------------------------------------------------------


def test_tables(build: RunBuilder) -> None:
    build.writer().flush(
        scalar(1, 0.5, name="loss", mode=1), scalar(2, 0.25, name="loss", mode=1),
        scalar(2, 9, name="loss", mode=2),
        Put(name="note", step=2, value="hi", inline=True, mode=1),
        Put(name="w", step=2, value=np.ones((2, 3)), mode=1),
        stats_of(np.ones((2, 3)), name="w", step=2, mode=1),
        Put(name="v", step=2, value=np.ones((2, 3)), shape=(2, -1)),
        step_row(1, mode=1, wall_us=111), step_row(2, mode=1, wall_us=222),
    )  # fmt: skip
    run = open_run(build.url)
    index = run.table().to_pylist()
    assert [(r["name"], r["kind"], r["mode"]) for r in index] == [
        ("loss", "data", "EVAL"), ("loss", "data", "TRAIN"), ("note", "data", "TRAIN"),
        ("v", "data", "NONE"), ("w", "data", "TRAIN"), ("w", "statistics", "TRAIN"),
    ]  # fmt: skip
    assert index[3]["shape"] == [2, None]
    assert (index[1]["first_step"], index[1]["last_step"], index[1]["steps"]) == (1, 2, 2)
    scalars = run.scalars().to_pylist()
    assert [(r["name"], r["step"], r["mode"], r["value"], r["text"]) for r in scalars] == [
        ("loss", 1, "TRAIN", 0.5, None), ("loss", 2, "TRAIN", 0.25, None),
        ("loss", 2, "EVAL", 9.0, None), ("note", 2, "TRAIN", None, "hi"),
    ]  # fmt: skip
    assert [r["wall_time_us"] for r in scalars if r["mode"] == "TRAIN"] == [111, 222, 222]
    assert [r["wall_time_us"] for r in scalars if r["mode"] == "EVAL"] == [None]
    assert run.scalars(["w"]).num_rows == 0
    (row,) = run.statistics().to_pylist()
    assert (row["name"], row["step"], row["sum"], row["mean"]) == ("w", 2, 6.0, 1.0)
    assert run.statistics(["loss"]).num_rows == 0
    with pytest.raises(NameNotFoundError):
        run.scalars(["nope"])
    table = pa.table(run["loss"].select(mode="TRAIN"))
    assert table.to_pydict() == {"step": [1, 2], "value": [0.5, 0.25]}
    with pytest.raises(ArgumentError):
        run["w"].table()


def test_what_they_look_like(build: RunBuilder) -> None:
    name = "<script>\x1b[31m\n" + "é" * 100
    build.writer().flush(Put(name=name, value=np.zeros((2, 3)), mode=1))
    run = open_run(build.url)
    for text in (repr(run), repr(run[name]), repr(run[name].at(0))):
        assert text.isprintable()
    for html in (run._repr_html_(), run[name]._repr_html_()):
        assert "<script>" not in html
        assert "&lt;script&gt;" in html
        assert "\x1b" not in html
    assert "2 × 3" in repr(run[name])
    t = pickle.loads(pickle.dumps(run[name]))
    for path in (build.root / "index").iterdir():
        path.unlink()
    assert "NameNotFoundError" in repr(t)  # a repr never raises


# --- sharing --------------------------------------------------------------------------------


def test_threads_share_a_run(build: RunBuilder) -> None:
    value = np.random.default_rng(0).random((16, 64, 64))
    w = build.writer()
    for step in range(8):
        w.flush(Put(step=step, value=value + step, grid=(1, 0, 0)))
    run = open_run(build.url)
    problems = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(30):
            step, i = int(rng.integers(8)), int(rng.integers(16))
            got = run["x"].read(step=step, index=i)
            if not (got == value[i] + step).all():
                problems.append((step, i))
            run.refresh()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_can_read_on(build: RunBuilder) -> None:
    value = np.random.default_rng(0).random((64, 64, 64))
    build.writer().flush(Put(value=value, grid=(1, 0, 0)))
    run = open_run(build.url)
    assert (run["x"].read(step=0) == value).all()
    held = run._session._changing
    with held:  # as if another thread was refreshing at the moment of the fork
        pid = os.fork()
        if pid == 0:
            ok = False
            try:
                run.refresh()
                ok = bool((run["x"].read(step=0) == value).all())
            finally:
                os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
