"""H1: each limit of the spec is enforced before anything of the claimed size is allocated."""

from __future__ import annotations

import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from robustness.fuzz_corpus import by_hand, copied
from support.editing import SegmentEditor, mended_bundle
from support.goals import record
from support.mutate import SPEC, Files, opened

import tensorstore_fmt as tsf
from tensorstore_fmt.errors import LimitError, TensorStoreError
from tensorstore_fmt.format import bundle, layout

MIB = 1 << 20
ROOM_NBYTES = 3 * MIB  # what opening and reading the small run itself takes, and some more

Change = Callable[[SegmentEditor], object]


def _header(field: str, value: int) -> Change:
    return lambda editor: editor.header.update({field: value})


def _root(row: int, field: str, value: int) -> Change:
    return lambda editor: editor.root.update({(row % len(editor.rows), field): value})


def _cell(kind: int, column: str, value: Any) -> Change:
    """Change the last row of a page."""

    def change(editor: SegmentEditor) -> None:
        page = editor.pages(kind)[0]
        batch = editor.batch(page)
        values = batch.column(column).to_pylist()
        values[-1] = value
        editor.set_columns(page, {column: values})

    return change


def _entry(**values: Any) -> Change:
    """Change the first entry, which lies in the index."""

    def change(editor: SegmentEditor) -> None:
        page = editor.pages(layout.PAGE_ENTRIES)[0]
        batch = editor.batch(page)
        columns = {name: batch.column(name).to_pylist() for name in values}
        for name, value in values.items():
            columns[name][0] = value
        editor.set_columns(page, columns)

    return change


def _shape(shape: list[int]) -> Change:
    def change(editor: SegmentEditor) -> None:
        for column in ("shape", "grid"):
            _cell(layout.PAGE_CATALOG, column, shape)(editor)

    return change


def _raw_heads(editor: SegmentEditor) -> None:
    """65 catalog pages of 16 MiB, one behind the other, of which no byte is stored but one."""
    pages, size = 65, layout.MAX_PAGE_RAW_NBYTES
    rows = np.repeat(editor.rows[:1], pages)
    rows["first_series"] = np.arange(pages)
    rows["last_series"], rows["rows"], rows["raw_nbytes"] = np.arange(pages), 1, size
    editor.rows = np.concatenate([rows, editor.rows[1:]])
    editor.stored[:1] = [b"x"] * pages


CASES: dict[str, list[Change]] = {
    "MAX_NAME_NBYTES": [_cell(layout.PAGE_CATALOG, "name", "~" * (layout.MAX_NAME_NBYTES + 1))],
    "MAX_RANK": [_shape([1] * (layout.MAX_RANK + 1))],
    "MAX_WORKER": [
        _header("num_workers", layout.MAX_WORKER + 2),
        _cell(layout.PAGE_SHARDS, "worker", layout.MAX_WORKER + 1),
        _cell(layout.PAGE_SHARDS, "attempt", layout.MAX_WORKER + 1),
    ],
    "MAX_NUMBER": [_cell(layout.PAGE_SHARDS, "number", layout.MAX_NUMBER + 1)],
    "MAX_STEP": [
        _header("resume_step", layout.MAX_STEP + 1),
        _header("complete_through", layout.MAX_STEP + 1),
        _root(-1, "max_step", layout.MAX_STEP + 1),
        _cell(layout.PAGE_CATALOG, "last_step", layout.MAX_STEP + 1),
        lambda editor: (
            _entry(count=4, stride=2**61)(editor),
            _root(-1, "max_step", layout.MAX_STEP)(editor),
        ),
    ],
    "MAX_AXIS": [_shape([layout.MAX_AXIS + 1])],
    "MAX_CHUNK_RAW_NBYTES": [_entry(raw_nbytes=layout.MAX_CHUNK_RAW_NBYTES + 1)],
    "MAX_CHUNK_NBYTES": [_entry(nbytes=layout.MAX_CHUNK_NBYTES + 1)],
    "MAX_INLINE_NBYTES": [
        _entry(inline=bytes(layout.MAX_INLINE_NBYTES + 1), nbytes=layout.MAX_INLINE_NBYTES + 1)
    ],
    "MAX_PAGE_RAW_NBYTES": [
        _root(row, "raw_nbytes", layout.MAX_PAGE_RAW_NBYTES + 1) for row in (0, -1)
    ],
    "MAX_PAGE_NBYTES": [_root(row, "nbytes", layout.MAX_PAGE_NBYTES + 1) for row in (0, -1)],
    "MAX_PAGE_ROWS": [_root(row, "rows", layout.MAX_PAGE_ROWS + 1) for row in (0, -1)],
    "MAX_ROOT_NBYTES": [_header("root_nbytes", layout.MAX_ROOT_NBYTES + 64)],
    "MAX_HEAD_NBYTES": [_header("head_nbytes", layout.MAX_HEAD_NBYTES + 1), _raw_heads],
    "MAX_SERIES": [_header("series", layout.MAX_SERIES + 1)],
    "MAX_ENTRY_STEPS": [_entry(count=layout.MAX_ENTRY_STEPS + 1)],
}
OTHERS = {"MAX_RUN_JSON_NBYTES", "MAX_BUNDLE_ROWS"}  # below
NO_LIMITS = {"PREFIX_NBYTES"}


def limits() -> dict[str, tuple[int, str]]:
    """Give the spec's table: value, and what the limit defends against."""
    lines = SPEC.read_text("utf-8").splitlines()
    found = {}
    for line in lines[lines.index("<!-- table: limits -->") + 3 :]:
        if not line.startswith("|"):
            break
        name, value, attack = (cell.strip() for cell in line.strip("|").split("|"))
        found[name] = (int(value), attack)
    return found


def test_each_limit_has_its_attack_and_its_test() -> None:
    assert limits().keys() == CASES.keys() | OTHERS | NO_LIMITS
    comments = {
        line.split(":")[0]: line.partition("#")[2].strip()
        for line in (SPEC.parents[1] / "tensorstore_fmt/format/layout.py").read_text().splitlines()
        if line.startswith("MAX_")
    }
    for name, (value, attack) in limits().items():
        assert getattr(layout, name) == value
        if name not in NO_LIMITS:
            assert comments[name].replace("*", "·") == attack


def _edited(change: Change) -> Files:
    files = by_hand()[0]
    path = [p for p in files if p.startswith("index/")][1]
    editor = SegmentEditor(files[path])
    change(editor)
    return {**files, path: editor.encode()}


def _used(files: Files) -> tuple[set[str], int]:
    """Open a run and read all; give the codes of failures, and the most memory that took."""
    codes = set()
    tracemalloc.start()
    try:
        with warnings.catch_warnings(action="ignore"):
            run = opened(files)
        codes |= {problem.code for problem in run.damage}
        for name in run.names():
            try:
                run[name].read()
            except TensorStoreError as error:
                codes.add(error.code)
        return codes, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_what_the_run_itself_takes() -> None:
    codes, nbytes = _used(by_hand()[0])
    assert (codes, nbytes < ROOM_NBYTES) == (set(), True)


@pytest.mark.parametrize("name", CASES)
def test_a_limit_is_checked_before_memory_is_taken(name: str) -> None:
    for change in CASES[name]:
        codes, nbytes = _used(_edited(change))
        assert "limit" in codes
        assert codes <= {"limit", "missing_segment"}
        assert nbytes < ROOM_NBYTES
    record("H1", len(CASES[name]), limit=name)


def _most(work: Callable[[], object]) -> int:
    """Give the memory that something took until a limit stopped it."""
    tracemalloc.start()
    try:
        with pytest.raises(LimitError):
            work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_limit_of_run_json(tmp_path: Path) -> None:
    """Of a sparse file of 1 GiB no more is read than what may be one."""
    folder = copied(by_hand()[0], tmp_path / "run")
    with (folder / layout.RUN_JSON).open("r+b") as file:
        file.truncate(1 << 30)
    most = _most(lambda: tsf.open_run(folder))
    assert most < 2 * layout.MAX_RUN_JSON_NBYTES + ROOM_NBYTES


def test_the_limit_of_a_bundle() -> None:
    data = b"".join(bundle.encode(bytes(16), []))
    many = (layout.MAX_BUNDLE_ROWS + 1).to_bytes(4, "little")
    data = mended_bundle(data, header={12: many}, table={})
    most = _most(lambda: bundle.decode(data, run_id=bytes(16), nbytes=len(data)))
    assert most < MIB
