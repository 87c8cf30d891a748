"""What stands in the index after a flush: order, shapes, and which save of a step counts."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.damage import reopened, segments

import tensorstore_fmt as tsf
from tensorstore_fmt.format import layout, segment
from tensorstore_fmt.format.progressions import runs_of_steps
from tensorstore_fmt.storage import open_storage
from tensorstore_fmt.testing.storage import FaultyStorage, Operation
from tensorstore_fmt.testing.writers import create_test_run
from tensorstore_fmt.upkeep import verify


def saved(place: Path, *logged: tuple[int, dict[str, Any]], **options: Any) -> tsf.Run:
    """Log all of it in one flush; the independent reader and `verify` are content with it."""
    with create_test_run(place, stats=False, **options) as run:
        for step, values in logged:
            run.log(values, step=step)
    assert verify(place).ok
    assert not reopened(place).damage
    return tsf.open_run(place)


def entries_of(place: Path) -> list[tuple[str, int, int, int, int]]:
    """Give name, step, stride, count and codec of all entries."""
    found = []
    for path in segments(place):
        data = path.read_bytes()
        head = segment.decode_head(segment.decode_header(data, where=path.name), data)
        for number in head.entry_pages().tolist():
            row = head.root[number]
            begin = int(row["offset"])
            entries = head.decode_entries(number, data[begin : begin + int(row["nbytes"])])
            found += [
                (
                    head.catalog.names[r["series"]],
                    *(int(r[k]) for k in ("step", "stride", "count", "codec")),
                )
                for r in entries.rows
            ]
    return found


@pytest.mark.parametrize(
    ("steps", "runs"),
    [
        ([], [(0, 0)]),
        ([7], [(0, 1)]),
        ([7, 9], [(0, 2)]),
        ([7, 9, 11], [(0, 3)]),
        ([7, 9, 12], [(0, 2), (2, 3)]),
        ([1, 2, 3, 10, 20, 30, 31], [(0, 3), (3, 6), (6, 7)]),
        ([1, 2, 4, 8, 16], [(0, 2), (2, 4), (4, 5)]),
    ],
)
def test_steps_are_cut_into_progressions(steps: list[int], runs: list[tuple[int, int]]) -> None:
    assert list(runs_of_steps(np.array(steps, np.int64))) == runs


@pytest.mark.parametrize(
    "of",
    [
        float,
        str,
        lambda s: np.array([s, -s], "i2"),
        lambda s: np.empty((0, 3)),
        lambda s: np.full((20, 20), s),
        lambda s: np.full((300, 300), s, "f8"),
    ],
    ids=["number", "text", "array", "nothing", "middle", "large"],
)
def test_steps_in_any_order(tmp_path: Path, of: Any) -> None:
    order = [9, 3, 5, 4, 0, 100, 7]
    reader = saved(tmp_path / "run", *((step, {"x": of(step)}) for step in order))
    assert reader["x"].steps.tolist() == sorted(order)
    for step in order:
        assert np.array_equal(reader["x"].read(step=step), np.asarray(of(step)))
    assert reader.steps().tolist() == sorted(order)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (1.5, 2.5),
        (1.5, np.arange(3)),
        (np.arange(3), 1.5),
        ("a", "b"),
        ("a", ["b", "c"]),
        (1.5, np.ones((300, 300))),
        (np.ones((300, 300)), 1.5),
        (np.ones((300, 300)), np.zeros((300, 300))),
        (np.ones(500), np.zeros(500)),
        (np.ones(500), np.zeros(501)),
        (np.ones((300, 300)), np.zeros((300, 301))),
    ],
)
def test_the_last_save_of_a_step_in_a_flush_counts(tmp_path: Path, first: Any, then: Any) -> None:
    reader = saved(tmp_path / "run", (1, {"x": first, "y": 1}), (1, {"x": then}), (2, {"y": 2}))
    assert reader["x"].steps.tolist() == [1]
    found = reader["x"].read(step=1)
    assert np.array_equal(found, np.asarray(then))
    assert np.asarray(found).dtype.kind == np.asarray(then).dtype.kind or isinstance(
        then, str | list
    )


def test_shapes_that_vary_within_a_flush(tmp_path: Path) -> None:
    shapes = [(3,), (4,), (4,), (0,), (7,)]
    large = [(300, 300), (300, 301), (200, 300)]
    logged = [
        (step, {"small": np.arange(n), "text": ["é"] * n}) for step, (n,) in enumerate(shapes)
    ]
    logged += [(step, {"large": np.full(shape, step, "f4")}) for step, shape in enumerate(large)]
    reader = saved(tmp_path / "run", *logged)
    for step, (n,) in enumerate(shapes):
        assert reader["small"].read(step=step).tolist() == list(range(n))
        assert list(reader["text"].read(step=step)) == ["é"] * n
    for step, shape in enumerate(large):
        assert np.array_equal(reader["large"].read(step=step), np.full(shape, step, "f4"))


def test_many_steps_of_a_flush_are_few_entries(tmp_path: Path) -> None:
    steps = [*range(0, 6000, 2), *range(7001, 7005)]
    saved(tmp_path / "run", *((s, {"a": float(s), "t": "é", "z": np.empty(0)}) for s in steps))
    found = entries_of(tmp_path / "run")
    for name, most in (("a", 8), ("t", 100), ("", 8)):
        mine = [e for e in found if e[0] == name]
        assert sum(e[3] for e in mine) == len(steps)
        assert len(mine) <= most
        covered = [e[1] + k * e[2] for e in mine for k in range(e[3])]
        assert sorted(covered) == steps


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_lost_tensors_whose_shape_varies_are_dropped(tmp_path: Path) -> None:
    """In one segment with others: their entries have no lengths to say."""

    def hook(operation: Operation) -> None:
        in_index = operation.op == "publish" and operation.path.startswith("index/")
        if (operation.op == "append" and step == 1) or (in_index and 0 <= step < 3):
            raise OSError(errno.ENOSPC, "made to fail")

    step = -1
    storage = FaultyStorage(open_storage(tmp_path / "run", writable=True), hook)
    run = create_test_run(storage, on_error="warn", stats=False)
    values = [np.arange(300.0 * (300 + n)).reshape(300, -1) for n in range(4)]
    for step, value in enumerate(values):
        run.log({"x": value, "loss": 1.0}, step=step)
        assert run.flush() is (step == 3)
    step = -1
    assert run.close().dropped == 1
    assert verify(tmp_path / "run").ok
    reader = tsf.open_run(tmp_path / "run")
    assert [reader.state("x", n) for n in range(4)] == ["here", "dropped", "here", "here"]
    dropped = [e for e in entries_of(tmp_path / "run") if e[4] == layout.CODEC_DROPPED]
    assert {e[:4] for e in dropped} == {("x", 1, 1, 1)}
    for n in (0, 2, 3):
        assert np.array_equal(reader["x"].read(step=n), values[n])


def test_a_step_that_is_visited_again_counts_with_its_last_visit(tmp_path: Path) -> None:
    ticks = iter(range(1_000_000, 10_000_000, 1000))
    visits = (4, 2, 4, 3, 2)
    with create_test_run(tmp_path / "run", clock_us=ticks.__next__) as run:
        for step in visits:
            run.log({"loss": float(step)}, step=step)
    table = {row[2]: row[4] for row in reopened(tmp_path / "run").step_table()}
    assert sorted(table) == [2, 3, 4]
    assert table[4] < table[3] < table[2]


def test_reports_of_what_was_logged() -> None:
    values: dict[str, Any] = {
        "steps": 3, "raw_nbytes": 10_000_000, "stored_nbytes": 2_000_000, "dropped": 0,
        "failures": 0, "stalled_s": 0.0, "log_s": 0.5,
    }  # fmt: skip
    assert "ratio 5.00" in str(tsf.CloseReport(**values))
    assert "ratio 1.00" in str(tsf.CloseReport(**values | {"stored_nbytes": 0}))
    for change, word in (
        ({"stalled_s": 2.0}, "waiting"), ({"dropped": 2}, "DROPPED"), ({"failures": 1}, "failures"),
    ):  # fmt: skip
        assert word not in str(tsf.CloseReport(**values))
        assert word in str(tsf.CloseReport(**values | change))
