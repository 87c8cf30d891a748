"""Many questions at once: the answers are those of one by one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import tensorstore_fmt as tsf
from tensorstore_fmt.errors import ChecksumError
from tensorstore_fmt.format.page import ENTRY_ROW, Entries
from tensorstore_fmt.format.ragged import Ragged
from tensorstore_fmt.reading.entries import Page
from tensorstore_fmt.reading.view import MANY
from tensorstore_fmt.testing.writers import create_test_run


def value(name: int, step: int) -> np.ndarray:
    """Give what a series has at a step: a scalar, a vector, or something in shards."""
    if name % 3 == 2:
        return np.random.default_rng([name, step]).standard_normal((40, 50))
    return np.arange(name % 3 * 4, dtype="i4") + step if name % 3 else np.float32(name * step)


@pytest.fixture(params=["closed", "live"])
def run(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tsf.Run]:
    """60 series; each has its own steps, some of them in flushes of their own."""
    writer = create_test_run(tmp_path / "run", stats=False)
    for step in range(40):
        names = [n for n in range(60) if step % (n % 5 + 1) == 0]
        writer.log({f"x{n}": value(n, step) for n in names}, step=step)
        if request.param == "live" and step % 9 == 8:
            writer.flush()
    writer.flush()
    if request.param == "closed":
        writer.close()
    with tsf.open_run(tmp_path / "run") as run:
        yield run
    writer.close()


def test_many_are_read_as_one_by_one(run: tsf.Run) -> None:
    rng = np.random.default_rng(5)
    names, steps = rng.integers(60, size=400).tolist(), rng.integers(40, size=400).tolist()
    asked = [(n, step - step % (n % 5 + 1)) for n, step in zip(names, steps, strict=True)]
    for size in (1, MANY - 1, MANY, 400):
        found = run.read([(f"x{n}", step, ()) for n, step in asked[:size]])
        for (n, step), array in zip(asked[:size], found, strict=True):
            expected = value(n, step)
            assert array.dtype == expected.dtype
            np.testing.assert_array_equal(array, expected)


def test_parts_of_many(run: tsf.Run) -> None:
    items = [(f"x{n}", 0, np.s_[3:5] if n % 2 else ()) for n in range(2, 60, 3)]
    for (name, step, index), array in zip(items, run.read(items), strict=True):
        np.testing.assert_array_equal(array, value(int(name[1:]), step)[index])


def test_one_that_is_not_there_is_said(run: tsf.Run) -> None:
    there = [(f"x{n}", 0, ()) for n in range(60)]
    with pytest.raises(tsf.StepNotFoundError, match="step 3"):
        run.read([*there, ("x1", 3, ())])
    with pytest.raises(tsf.NameNotFoundError, match="x60"):
        run.read([*there, ("x60", 0, ())])


@pytest.mark.parametrize("item", [("x0",), ("x0", 1), "x0", ("x0", 1, (), ()), 5])
def test_what_is_no_item(run: tsf.Run, item: object) -> None:
    with pytest.raises(tsf.ArgumentError, match=r"\(name, step, index\)"):
        run.read([("x0", 0, ()), item])  # type: ignore[list-item]


def test_last_steps_are_those_of_the_catalogs(run: tsf.Run) -> None:
    for n in range(60):
        steps = [step for step in range(40) if step % (n % 5 + 1) == 0]
        assert run[f"x{n}"].step_summary == (len(steps), steps[0], steps[-1])


def page_of(series: np.ndarray, step: np.ndarray, count: np.ndarray) -> Page:
    rows = np.zeros(len(series), ENTRY_ROW)
    rows["series"], rows["step"], rows["count"], rows["stride"] = series, step, count, 3
    none = np.zeros(len(rows) + 1, np.int64)
    empty = np.empty(0, np.int64)
    return Page.of(Entries(rows, Ragged(none, empty), Ragged(none, empty.astype(np.uint8))))


@pytest.mark.parametrize("shift", [0, 2**50, 2**61])
def test_rows_are_found_as_one_by_one(shift: int) -> None:
    """With steps so large that a series and a step do not fit one word, too."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(1, 300))
        series = np.sort(rng.integers(5, 5 + int(rng.integers(1, 40)), n)).astype(np.uint32)
        step = rng.integers(0, 60, n) + shift
        order = np.lexsort([step, series])
        page = page_of(series, step[order], rng.integers(1, 5, n))
        asked = rng.integers(0, 50, 500).tolist()
        steps = (rng.integers(-5, 75, 500) + shift).clip(0).tolist()
        one_by_one = [page.only_row(a, b) for a, b in zip(asked, steps, strict=True)]
        many = page.only_rows(asked, steps)
        alike = [a == b for a, b in zip(one_by_one, many, strict=True)]
        # A row that is not the last one to begin may be left to the plan.
        assert all(same or found == -1 for same, found in zip(alike, many, strict=True))
        assert sum(found >= 0 for found in many) > 0
        assert sum(alike) > 400


def test_damage_among_many_pages_is_found(tmp_path: Path) -> None:
    """Pages that are decoded in several threads; the first one that is damaged is named."""
    rng = np.random.default_rng(0)
    with create_test_run(tmp_path / "run", stats=False) as writer:
        for step in range(700):
            row = rng.standard_normal(300).tolist()
            writer.log({f"x{n}": x for n, x in enumerate(row)}, step=step)
    (tmp_path / "run" / "bundle").unlink(missing_ok=True)
    names = [f"x{n}" for n in range(300)]
    with tsf.open_run(tmp_path / "run") as run:
        assert len(run.read([(name, 699, ()) for name in names])) == 300
        (segment,) = [s for s in run._session.view.segments if len(s._numbers) > 4]
        rows = segment.head.root[segment._numbers]
        path = tmp_path / "run" / segment.name.path
    data = bytearray(path.read_bytes())
    for row in rows[2:5]:
        data[int(row["offset"]) + int(row["nbytes"]) // 2] ^= 1
    path.write_bytes(data)
    with tsf.open_run(tmp_path / "run") as run:
        with pytest.raises(ChecksumError, match=f"page at {int(rows[2]['offset'])} ") as caught:
            run.read([(name, 699, ()) for name in names])
        assert caught.value.facts["file"] == segment.name.path
