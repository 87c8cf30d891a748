"""Merging: the same entries come out, whatever the windows and the pages were."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.build_run import Put, RunBuilder

from tensorstore_fmt.format import layout, merge, page, segment
from tensorstore_fmt.format.catalog import CatalogTable
from tensorstore_fmt.format.join import is_alone, join_entries
from tensorstore_fmt.format.page import Entries

Entry = tuple[Any, ...]


def source(root: Path, name: layout.SegmentName) -> merge.MergeInput:
    data = (root / name.path).read_bytes()
    header = segment.decode_header(data, where=name.path, name=name, nbytes=len(data))
    head = segment.decode_head(header, data)

    def read_page(number: int) -> bytes:
        row = head.root[number]
        return data[int(row["offset"]) : int(row["offset"]) + int(row["nbytes"])]

    return merge.MergeInput(head, read_page)


def decoded(inputs: Iterable[merge.MergeInput]) -> list[Entry]:
    """Give all entries: of which series, all columns, varying lengths, payload."""
    found = []
    for one in inputs:
        catalog, shards = one.head.catalog, [name for name, _ in one.head.shards]
        for number in one.head.entry_pages().tolist():
            entries = one.head.decode_entries(number, one.read_page(number))
            for i, row in enumerate(entries.rows):
                series = catalog[int(row["series"])]
                shard = None if row["shard"] == layout.INLINE_SHARD else shards[row["shard"]]
                shape = series.full_shape(entries.dims.row(i))
                columns = tuple(
                    int(row[c]) for c in row.dtype.names if c not in ("series", "shard")
                )
                found.append((series.identity, columns, shard, shape, entries.inline[i].tobytes()))
    return found


def encoded(merged: merge.Merged, name: layout.SegmentName, root: Path) -> merge.MergeInput:
    header = segment.Header(
        run_id=bytes(16), key=name.key, num_workers=1, resume_step=0, first_flush=name.first,
        last_flush=name.last, opened_us=0, published_us=0,
    )  # fmt: skip
    parts = segment.encode(header, merged.series, merged.shards, merged.pages)
    (root / name.path).write_bytes(b"".join(parts))
    return source(root, name)


@pytest.fixture
def three(tmp_path: Path) -> tuple[Path, list[layout.SegmentName]]:
    """Three flushes of many series: fixed and varying shapes, inline and not, some but once."""
    writer = RunBuilder(tmp_path).writer()
    names = []
    for flush in range(3):
        puts = [
            Put(name=f"s{n:02d}", step=10 * flush + k, value=np.int16(n + k), inline=True)
            for n in range(0, 40, flush + 1)
            for k in range(0, 1 + n % 3 * 2, 2)
        ]
        puts += [
            Put(name="varying", step=flush, value=np.arange(3 + flush), inline=True),
            Put(name="both", step=2 * flush, value=np.ones((flush + 1, 2)), shape=(-1, 2)),
            Put(name="both", step=2 * flush + 1, value=np.ones((7, 2)), shape=(-1, 2)),
            Put(name=f"only{flush}", step=3, value=np.arange(100)),
            Put(name="gone", step=flush, value=None, shape=(4,)),
        ]
        names.append(writer.flush(*puts))
    return tmp_path, names


def test_windows_and_pages_change_nothing(
    three: tuple[Path, list[layout.SegmentName]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, names = three
    inputs = [source(root, name) for name in names]
    everything = decoded(inputs)
    name = layout.SegmentName(key=names[0].key, last=2, count=3)
    whole = encoded(merge.merge(inputs), name, root)
    wanted = decoded([whole])
    assert {e[0] for e in wanted} == {e[0] for e in everything}
    assert len(wanted) < len(everything)  # what could be joined was
    shapes = {s.name: s.shape for s in (whole.head.catalog[n] for n in range(len(names)))}
    assert shapes["both"] == (-1, 2)
    for rows in (1, 2, 7, 40):
        monkeypatch.setattr(merge, "_WINDOW_ROWS", rows)
        for page_rows in (1, 3, 1000):
            monkeypatch.setattr(layout, "TARGET_PAGE_ROWS", page_rows)
            made = merge.merge([source(root, n) for n in names])
            assert len(made.pages) >= sum(p.rows for p in made.pages) // (page_rows + 60)
            assert decoded([encoded(made, name, root)]) == wanted


def test_pages_of_one_row_each_are_merged_in_any_window(
    three: tuple[Path, list[layout.SegmentName]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, names = three
    name = layout.SegmentName(key=names[0].key, last=2, count=3)
    wanted = decoded([encoded(merge.merge([source(root, n) for n in names]), name, root)])
    monkeypatch.setattr(page, "cut_rows", lambda sizes: range(len(sizes) + 1))
    for n in names:  # the same entries in as many pages as there can be
        one = source(root, n)
        many = encoded(merge.merge([one]), n, root)
        assert len(many.head.entry_pages()) == len(decoded([many]))
    for rows in (1, 5, 1000):
        monkeypatch.setattr(merge, "_WINDOW_ROWS", rows)
        made = merge.merge([source(root, n) for n in names])
        assert decoded([encoded(made, name, root)]) == wanted


def test_merging_nothing_and_merging_again(three: tuple[Path, list[layout.SegmentName]]) -> None:
    root, names = three
    assert not merge.merge([]).pages
    name = layout.SegmentName(key=names[0].key, last=2, count=3)
    inputs = [source(root, n) for n in names]
    once = encoded(merge.merge(inputs), name, root)
    assert decoded([encoded(merge.merge([once]), name, root)]) == decoded([once])
    stepwise = encoded(
        merge.merge(inputs[:2]),
        layout.SegmentName(key=names[0].key, last=1, count=2),
        root,
    )
    assert decoded([encoded(merge.merge([stepwise, inputs[2]]), name, root)]) == decoded([once])


def test_shards_are_as_long_as_the_longest_says(tmp_path: Path) -> None:
    writer = RunBuilder(tmp_path).writer()
    a = writer.flush(Put(name="a", value=np.arange(8)))
    b = writer.flush(Put(name="a", step=1, value=np.arange(80)))
    sizes = [source(tmp_path, n).head.shards for n in (a, b)]
    merged = merge.merge([source(tmp_path, n) for n in (a, b)])
    assert merged.shards == [*sizes[0], *sizes[1]]
    shorter = [(sizes[0][0][0], 64)]
    found, maps = merge._unify_shards([sizes[0], shorter, sizes[1]])
    assert found == merged.shards
    assert [m.tolist() for m in maps] == [[0], [0], [1]]


def test_no_entry_and_one_entry_are_joined_to_nothing() -> None:
    series = CatalogTable.of([])
    assert len(join_entries(Entries.empty(), series, is_alone(series))) == 0
    assert is_alone(series).tolist() == []


def test_dropped_steps_of_a_shape_that_comes_to_vary(tmp_path: Path) -> None:
    """What was dropped has no lengths, also where its segment's catalog had one for all."""
    writer = RunBuilder(tmp_path).writer()
    puts = [
        Put(name="w", step=0, value=np.arange(50)),
        Put(name="w", step=1, value=None, dtype="int64", shape=(800,)),
        Put(name="w", step=2, value=np.arange(20)),
    ]
    names = [writer.flush(put) for put in puts]
    inputs = [source(tmp_path, name) for name in names]
    name = layout.SegmentName(key=writer.key, last=2, count=3)
    found = encoded(merge.merge(inputs), name, tmp_path)
    shapes = {columns[0]: shape for _, columns, _, shape, _ in decoded([found])}
    assert shapes == {0: (50,), 1: (0,), 2: (20,)}
