"""Opening: rounds, the bundle, maximal segments, damage, merges, snapshots."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.build_run import Put, RunBuilder, WriterBuilder, step_row

from tensorstore_fmt.errors import (
    ChecksumError,
    ClosedError,
    FormatError,
    NotARunError,
    StepNotYetWrittenError,
    UnsupportedError,
)
from tensorstore_fmt.format import layout
from tensorstore_fmt.reading.opening import maximal
from tensorstore_fmt.reading.run import Run, open_run
from tensorstore_fmt.reading.session import Session
from tensorstore_fmt.storage import open_storage
from tensorstore_fmt.testing.storage import CountingStorage


@pytest.fixture
def build(tmp_path: Path) -> RunBuilder:
    return RunBuilder(tmp_path / "run", attrs={"lr": 0.1})


def counting(build: RunBuilder) -> tuple[Run, CountingStorage]:
    storage = CountingStorage(open_storage(build.url, writable=False))
    return Run(Session(build.url, None, storage=storage)), storage


def value(step: int) -> np.float32:
    return np.float32(step)


def put(step: int, **more: Any) -> Put:
    return Put(step=step, value=value(step), inline=True, **more)


def test_what_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(NotARunError):
        open_run(str(tmp_path))
    with pytest.raises(NotARunError):
        open_run(str(tmp_path / "nothing"))
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(NotARunError):
        open_run(str(tmp_path))


def test_a_run_without_writers(build: RunBuilder) -> None:
    run = open_run(build.url)
    assert (run.names(), run.workers, run.attempts, run.num_workers) == ([], [], [], 0)
    assert not run.is_closed
    assert run.attrs == {"lr": 0.1}
    assert run.run_id == "000102030405060708090a0b0c0d0e0f"
    assert run.steps().tolist() == []
    assert not run.is_complete(0)


def test_rounds_of_opening_and_reading(build: RunBuilder) -> None:
    w = build.writer()
    w.flush(put(0), Put(name="y", step=0, value=np.zeros((100, 100))), closed=True)
    run, storage = counting(build)
    assert run.names() == ["x", "y"]
    assert storage.rounds == 2  # no bundle: the head of the segment
    storage.reset()
    assert run["x"].read(step=0) == 0
    assert storage.rounds == 0  # all of the segment came with its head
    run["y"].read(step=0)
    assert storage.rounds == 1
    for whole in (True, False):
        build.bundle(whole=whole)
        run, storage = counting(build)
        assert run.names() == ["x", "y"]
        assert storage.rounds == 1
        storage.reset()
        run["y"].read(step=0)
        assert storage.rounds == (1 if whole else 2)


def test_opening_touches_no_entry_page(build: RunBuilder) -> None:
    build.writer().flush(*(put(s, name=f"n{s}") for s in range(50)))
    build.bundle(whole=False)
    run, storage = counting(build)
    assert len(run.names("n4*")) == 11
    assert "n3" in run
    assert run["n3"].shape == ()
    assert run["n3"].dtype == np.float32
    assert repr(run["n3"])
    assert repr(run)
    assert run.table().num_rows == 50
    assert storage.rounds == 1


def test_refresh_without_news_is_one_listing(build: RunBuilder) -> None:
    w = build.writer()
    w.flush(put(0))
    run, storage = counting(build)
    assert run["x"].steps.tolist() == [0]
    storage.reset()
    assert run.refresh() is False
    assert [r.op for r in storage.requests] == ["listing"]
    w.flush(put(1))
    storage.reset()
    assert run["x"].steps.tolist() == [0]
    assert run.refresh() is True
    assert [r.op for r in storage.requests] == ["listing", "prefix"]
    assert run["x"].read().tolist() == [0, 1]


def test_a_bundle_never_says_what_exists(build: RunBuilder) -> None:
    w = build.writer()
    w.flush(put(0))
    w.flush(put(1))
    build.bundle()
    w.flush(put(2))
    assert open_run(build.url)["x"].read().tolist() == [0, 1, 2]
    bundle = build.root / layout.BUNDLE
    data = bytearray(bundle.read_bytes())
    for at in (3, 20, 60, 70, len(data) - 300):
        damaged = bytearray(data)
        damaged[at] ^= 0x10
        bundle.write_bytes(damaged)
        assert open_run(build.url)["x"].read().tolist() == [0, 1, 2]


def test_no_damage_of_a_bundle_matters(build: RunBuilder) -> None:
    w = build.writer()
    w.flush(put(0), Put(name="y", value=np.arange(5)))
    w.flush(put(1), closed=True)
    build.bundle()
    bundle = build.root / layout.BUNDLE
    data = bundle.read_bytes()
    for at in range(0, len(data), 23):
        damaged = bytearray(data)
        damaged[at] ^= 0x20
        bundle.write_bytes(damaged)
        run = open_run(build.url)
        assert run["x"].read().tolist() == [0, 1]
        assert run["y"].read(step=0).tolist() == [0, 1, 2, 3, 4]
        assert run.is_closed
    for cut in range(0, len(data), 97):
        bundle.write_bytes(data[:cut])
        assert open_run(build.url)["x"].read().tolist() == [0, 1]


def test_a_damaged_segment_gives_the_right_data_or_an_error(build: RunBuilder) -> None:
    name = build.writer().flush(put(0), put(1), Put(name="y", value=np.arange(5)), closed=True)
    path = build.root / name.path
    data = path.read_bytes()
    outcomes = {"right": 0, "error": 0}
    copies = [*range(0, 256 + 3 * 64, 8), *range(len(data) - 256 - 3 * 64, len(data), 8)]
    for at in {*copies, *range(256 + 3 * 64, len(data) - 256 - 3 * 64, 5)}:
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 7
        path.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            try:
                run = open_run(build.url)
                assert run["x"].read().tolist() == [0, 1]
                assert run["y"].read(step=0).tolist() == [0, 1, 2, 3, 4]
                outcomes["right"] += 1
            except FormatError:
                outcomes["error"] += 1
    assert outcomes["right"] == len(copies)  # header and root stand twice
    assert outcomes["error"]
    for cut in range(0, len(data), 41):
        path.write_bytes(data[:cut])
        with pytest.warns(RuntimeWarning), pytest.raises(FormatError):
            open_run(build.url)["x"]


def test_maximal_segments() -> None:
    key = layout.WriterKey(worker=0, attempt=0, writer=1)

    def name(first: int, last: int) -> layout.SegmentName:
        return layout.SegmentName(key=key, last=last, count=last - first + 1)

    names = [name(0, 0), name(1, 1), name(0, 1), name(2, 3), name(2, 2), name(4, 4)]
    assert maximal(reversed(names)) == [name(0, 1), name(2, 3), name(4, 4)]


# --- merges --------------------------------------------------------------------------


def merged(
    w: WriterBuilder, *, steps: Iterable[int], last: int, joined: bool = False, closed: bool = False
) -> None:
    """Publish what a merge of all flushes up to `last` would, and remove what it covers."""
    if joined:
        puts = [
            Put(value=np.array(steps, np.float32), count=len(steps), inline=True, flush=0,
                last_flush=last)
        ]  # fmt: skip
    else:
        puts = [put(s, flush=s) for s in steps]
    name = w.flush(*puts, first=0, last=last, closed=closed)
    for path in (w.run.root / "index").iterdir():
        if path.name != name.path.removeprefix("index/"):
            path.unlink()


@pytest.mark.parametrize("joined", [False, True])
def test_a_view_survives_merges_and_shows_the_same(build: RunBuilder, joined: bool) -> None:
    w = build.writer()
    for s in range(3):
        w.flush(put(s), through=s)
    run, storage = counting(build)
    assert run.names() == ["x"]
    for segment in run._session.view.segments:
        segment.kept = memoryview(b"")  # as if it had been longer than the first read
    w.flush(put(3), through=3)
    merged(w, steps=range(5), last=4, joined=joined, closed=True)
    storage.close()  # or it would go on reading removed files that it has open
    assert run["x"].read().tolist() == [0, 1, 2]
    assert run["x"].steps.tolist() == [0, 1, 2]
    assert not run.is_closed
    with pytest.raises(StepNotYetWrittenError):
        run["x"].read(step=3)
    assert run.refresh() is True
    assert run["x"].read().tolist() == [0, 1, 2, 3, 4]
    assert run.is_closed
    assert not run.damage


def test_a_pickled_view_shows_the_same_after_merges(build: RunBuilder) -> None:
    w = build.writer()
    for s in range(3):
        w.flush(put(s), through=s)
    run = open_run(build.url)
    data = pickle.dumps(run)
    tensor = pickle.dumps(run["x"].select(mode="NONE"))
    assert len(data) < 2048
    assert pickle.loads(data)["x"].read().tolist() == [0, 1, 2]
    w.flush(put(3), through=3)
    assert pickle.loads(data)["x"].read().tolist() == [0, 1, 2]
    merged(w, steps=range(5), last=4, joined=True, closed=True)
    copy = pickle.loads(data)
    assert copy["x"].read().tolist() == [0, 1, 2]
    assert not copy.is_closed
    assert pickle.loads(tensor).read().tolist() == [0, 1, 2]
    assert copy.refresh()
    assert copy["x"].steps.tolist() == [0, 1, 2, 3, 4]


def test_a_merge_is_nothing_new(build: RunBuilder) -> None:
    w = build.writer()
    for s in range(3):
        w.flush(put(s))
    run = open_run(build.url)
    merged(w, steps=range(3), last=2)
    assert run.refresh() is False
    assert run["x"].read().tolist() == [0, 1, 2]


# --- damage ----------------------------------------------------------------------------


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x04
    path.write_bytes(data)


@pytest.mark.parametrize("at", [3, 60, 130, 256 + 5])
def test_header_and_root_stand_twice(build: RunBuilder, at: int) -> None:
    w = build.writer()
    w.flush(put(0), Put(name="y", value=np.zeros(5)))
    (path,) = (build.root / "index").iterdir()
    damage(path, at)
    run = open_run(build.url)
    assert run["x"].read(step=0) == 0
    assert not run.damage


def test_a_damaged_segment_is_replaced_by_those_it_covers(build: RunBuilder) -> None:
    w = build.writer()
    for s in range(3):
        w.flush(put(s))
    name = w.flush(*(put(s, flush=s) for s in range(3)), first=0, last=2)
    path = build.root / name.path
    assert open_run(build.url)._session.view.segments[0].name == name
    catalog = 256 + 3 * 64
    damage(path, catalog + 40)
    with pytest.warns(RuntimeWarning, match="damaged"):
        run = open_run(build.url)
    assert [p.code for p in run.damage] == ["checksum"]
    assert run["x"].read().tolist() == [0, 1, 2]


def test_a_damaged_page_fails_the_questions_that_need_it(build: RunBuilder) -> None:
    name = build.writer().flush(put(0), put(0, name="y", kind=1), closed=True)
    head = open_run(build.url)._session.view.segments[0].head
    damage(build.root / name.path, int(head.root["offset"][-1]) + 30)
    run = open_run(build.url)
    assert not run.damage
    assert run["x"].shape == ()
    with pytest.raises(ChecksumError) as caught:
        run["x"].read()
    assert caught.value.facts["file"] == name.path
    assert run.state("x", 0) == "unreadable"
    assert run.state("x", 1) == "never"  # no page could hold it


def test_missing_flushes_are_reported_and_never_called_never_saved(build: RunBuilder) -> None:
    w = build.writer()
    for s in range(3):
        w.flush(put(s), through=s, closed=s == 2)
    (build.root / layout.SegmentName(key=w.key, last=1, count=1).path).unlink()
    with pytest.warns(RuntimeWarning):
        run = open_run(build.url)
    (problem,) = run.damage
    assert problem.code == "missing_segment"
    assert (problem.facts["first"], problem.facts["last"]) == (1, 1)
    assert run["x"].read(step=2) == 2
    with pytest.raises(FormatError) as caught:
        run["x"].read(step=1)
    assert caught.value.code == "missing_segment"
    assert run.state("x", 1) == "unreadable"
    assert "1 problem" in repr(run)
    with pytest.raises(FormatError) as caught:
        run["y"]
    assert caught.value.code == "missing_segment"
    build.writer(attempt=1, resume_step=1).flush(closed=True)
    with pytest.warns(RuntimeWarning):
        run = open_run(build.url)
    assert run.state("x", 1) == "never"  # hidden whatever was there


def test_a_segment_cut_short_or_of_another_run(build: RunBuilder, tmp_path: Path) -> None:
    w = build.writer()
    w.flush(put(0))
    name = w.flush(put(1))
    path = build.root / name.path
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.warns(RuntimeWarning):
        run = open_run(build.url)
    assert [p.code for p in run.damage] == ["truncated", "missing_segment"]
    assert run["x"].steps.tolist() == [0]
    assert run["x"].read(steps=[0]).tolist() == [0]
    with pytest.raises(FormatError) as caught:  # nobody knows whether these are all
        run["x"].read()
    assert caught.value.code == "missing_segment"
    path.write_bytes(data)
    other = RunBuilder(tmp_path / "other")
    other.run_id = bytes(16)
    stray = other.writer(5).flush(put(9))
    (build.root / stray.path).write_bytes((other.root / stray.path).read_bytes())
    with pytest.warns(RuntimeWarning):
        run = open_run(build.url)
    assert "wrong_run" in [p.code for p in run.damage]
    assert run["x"].read(steps=[0, 1]).tolist() == [0, 1]


def test_features_of_newer_versions_are_refused(build: RunBuilder) -> None:
    build.writer().flush(put(0), required=4)
    with pytest.raises(UnsupportedError) as caught:
        open_run(build.url)
    assert caught.value.code == "unknown_feature"


def test_segments_that_overlap_are_damage(build: RunBuilder) -> None:
    w = build.writer()
    w.flush(put(0, flush=0), put(1, flush=1), first=0, last=1)
    w.flush(put(1, flush=1), put(2, flush=2), first=1, last=2)
    with pytest.warns(RuntimeWarning):
        run = open_run(build.url)
    assert [p.code for p in run.damage] == ["malformed"]
    assert run["x"].read().tolist() == [0, 1, 2]


def test_files_with_other_names_do_not_count(build: RunBuilder) -> None:
    build.writer().flush(put(0))
    for name in ("x.seg", "000000-000000-0000000000000100-000000000000-000000000001.seg.tmp"):
        (build.root / "index" / name).write_bytes(b"nothing")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_run(build.url)["x"].read(step=0) == 0


# --- writers, completeness ---------------------------------------------------------------


def test_closed_when_all_workers_of_the_newest_attempt_are(build: RunBuilder) -> None:
    a = build.writer(0, num_workers=2)
    b = build.writer(1, num_workers=2)
    a.flush(put(0), step_row(0), through=0)
    run = open_run(build.url)
    assert not run.is_complete(0)
    with pytest.raises(StepNotYetWrittenError):
        run["x"].read(step=0, worker=1)
    b.flush(step_row(0), through=0)
    run.refresh()
    assert run.num_workers == 2
    assert run.is_complete(0)
    assert run.complete_steps().tolist() == [0]
    a.flush(closed=True)
    run.refresh()
    assert not run.is_closed
    b.flush(closed=True)
    run.refresh()
    assert run.is_closed
    assert run.is_complete(10**6)


def test_a_recovered_writer_is_closed(build: RunBuilder) -> None:
    w = build.writer(writer=0x55)
    w.flush(put(0))
    assert not open_run(build.url).is_closed
    build.writer(writer=0x66, recovers=0x55, opened_us=9).flush(closed=True)
    assert open_run(build.url).is_closed


def test_complete_in_one_mode_is_not_complete_in_another(build: RunBuilder) -> None:
    w = build.writer()
    w.flush(step_row(4, mode=1), step_row(5, mode=1), step_row(5, mode=2), through=[-1, 5, 4, -1])
    run = open_run(build.url)
    assert run.is_complete(5, "TRAIN")
    assert not run.is_complete(5, "EVAL")
    assert not run.is_complete(5)
    assert run.is_complete(4)
    assert run.complete_steps().tolist() == [4]
    assert run.complete_steps("TRAIN").tolist() == [4, 5]
    assert run.steps("EVAL").tolist() == [5]


def test_closing_the_reader(build: RunBuilder) -> None:
    build.writer().flush(put(0))
    with open_run(build.url) as run:
        t = run["x"]
    with pytest.raises(ClosedError):
        t.read()


def test_what_comes_after_missing_flushes_is_not_complete(build: RunBuilder) -> None:
    """A store that lists a flush late must not make a follower skip its steps."""
    w = build.writer()
    paths = [
        build.root / w.flush(put(step), step_row(step), through=step).path for step in range(4)
    ]
    late = paths[1].read_bytes()
    paths[1].unlink()
    with pytest.warns(RuntimeWarning, match="missing"):
        run = open_run(build.url)
    given = run.follow(poll_s=0.01, timeout_s=0.2)
    assert next(given) == 0
    assert run.complete_steps().tolist() == [0]
    assert not run.is_complete(2)
    paths[1].write_bytes(late)
    assert [next(given) for _ in range(3)] == [1, 2, 3]
    assert run.is_complete(3)
