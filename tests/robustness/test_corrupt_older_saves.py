"""A step that was saved twice, where the index of the second save is damaged.

The rule (spec, "Damage and merges"): the damage is reported when the run is opened, `verify` finds
it, and what is found of the step is a value that was saved for it. Where only pages of entries or
payloads are damaged, the index knows of the second save, and nothing older is given.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from robustness.fuzz_corpus import by_hand, copied
from support.build_run import Put, RunBuilder
from support.editing import SegmentEditor
from support.mutate import Files, load, opened

from tensorstore_fmt.errors import FormatError
from tensorstore_fmt.format import layout
from tensorstore_fmt.upkeep import verify


def newest(files: Files) -> str:
    """Give the segment that saves "t" at step 0 again."""
    return max(path for path in files if path.startswith("index/"))


def flipped(data: bytes, offset: int) -> bytes:
    return data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]


def head_offsets() -> list[int]:
    """Give places in the pages of the head: of the catalog and of the shards."""
    files, _ = by_hand()
    rows = SegmentEditor(files[newest(files)]).rows
    heads = rows[rows["kind"] != layout.PAGE_ENTRIES]
    return [int(row["offset"]) + int(row["nbytes"]) // 2 for row in heads]


@pytest.mark.parametrize("number", range(len(head_offsets())))
def test_an_older_save_is_given_only_with_a_warning(number: int, tmp_path: Path) -> None:
    files, _ = by_hand()
    path = newest(files)
    changed = {**files, path: flipped(files[path], head_offsets()[number])}
    with pytest.warns(RuntimeWarning, match="damaged"):
        run = opened(changed)
    assert {problem.code for problem in run.damage} == {"checksum", "missing_segment"}
    assert np.array_equal(run["t"].read(step=0), np.zeros(3))  # what was saved first
    for ask in (run["t"].read, run["t"].stats):
        with pytest.raises(FormatError) as caught:
            ask()  # nobody knows whether these are all
        assert caught.value.code == "missing_segment"
    report = verify(copied(changed, tmp_path / "run"))
    assert not report.ok
    assert path in {problem.file for problem in report.damage}


def test_an_older_save_does_not_come_back_where_the_index_knows_of_a_newer() -> None:
    files, _ = by_hand()
    path = newest(files)
    rows = SegmentEditor(files[path]).rows
    (entries,) = rows[rows["kind"] == layout.PAGE_ENTRIES]
    with pytest.raises(FormatError) as caught:
        opened({**files, path: flipped(files[path], int(entries["offset"]) + 9)})["t"].read(step=0)
    assert caught.value.code == "checksum"
    shard = max(p for p in files if p.startswith("shards/"))
    begin = files[shard].index(np.ones(3).tobytes())
    with pytest.raises(FormatError) as caught:
        opened({**files, shard: flipped(files[shard], begin)})["t"].read(step=0)
    assert caught.value.code == "checksum"


def test_tables_of_all_steps_are_not_given_while_some_may_be_missing(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run")
    writer = builder.writer()
    statistics = np.zeros(10)
    for step in range(2):
        writer.flush(
            Put(name="loss", step=step, value=np.float64(step), inline=True),
            Put(name="w", step=step, kind=layout.KIND_STATS, value=statistics, inline=True),
        )
    whole = load(tmp_path / "run")
    assert len(opened(whole).scalars()) == len(opened(whole).statistics()) == 2
    path = newest(whole)
    with pytest.warns(RuntimeWarning, match="damaged"):
        run = opened({**whole, path: flipped(whole[path], 700)})
    assert run["loss"].read(step=0) == 0
    assert len(run.table())
    for ask in (run.scalars, run.statistics, run["w"].stats):
        with pytest.raises(FormatError) as caught:
            ask()
        assert caught.value.code == "missing_segment"
