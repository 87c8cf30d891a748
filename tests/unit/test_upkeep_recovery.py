"""`recover` and `compact` where little is left, somebody was there before, or the storage lies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.build_run import Put, RunBuilder, WriterBuilder, step_row

import tensorstore_fmt as tsf
from tensorstore_fmt.errors import FormatError, StateError
from tensorstore_fmt.format import layout, page, segment
from tensorstore_fmt.format.catalog import Series
from tensorstore_fmt.storage import open_storage
from tensorstore_fmt.testing.storage import FaultyStorage, Operation, WrappedStorage
from tensorstore_fmt.upkeep import claims, compact, lost, recover, recovering, verify
from tensorstore_fmt.upkeep.liveness import Liveness
from tensorstore_fmt.upkeep.rows import dropped_part, part_of_rows
from tensorstore_fmt.writing import closing

pytestmark = pytest.mark.filterwarnings("ignore:.*the index is damaged:RuntimeWarning")


@pytest.fixture(autouse=True)
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reads these runs meanwhile."""
    monkeypatch.setattr(recovering, "_GRACE_S", 0.0)


@pytest.fixture
def build(tmp_path: Path) -> RunBuilder:
    return RunBuilder(tmp_path / "run")


def put(step: int, name: str = "x", **more: Any) -> Put:
    return Put(**({"name": name, "step": step, "value": np.float32(step), "inline": True} | more))


def path_of(build: RunBuilder, name: layout.SegmentName) -> Path:
    return build.root / name.path


def files(build: RunBuilder) -> dict[str, bytes]:
    found = build.root.rglob("*")
    return {str(p.relative_to(build.root)): p.read_bytes() for p in found if p.is_file()}


def kinds(report: Any) -> list[str]:
    return [action.kind for action in report.actions]


def settled(build: RunBuilder) -> Any:
    """Recover; a dry run before and a second run behind it change nothing. Give the report."""
    before = files(build)
    planned = recover(build.url, dry_run=True)
    assert files(build) == before
    report = recover(build.url)
    assert len(report.lost) == len(planned.lost)
    after = files(build)
    assert not recover(build.url).actions
    assert files(build) == after
    return report


def damage_page(path: Path, number: int) -> None:
    """Flip a bit in an entry page; `number` counts these."""
    data = bytearray(path.read_bytes())
    head = segment.decode_head(segment.decode_header(data, where=path.name), data)
    data[int(head.root[head.entry_pages()[number]]["offset"]) + 9] ^= 1
    path.write_bytes(data)


# --- what is left of a damaged segment ------------------------------------------------------


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "cut_rows", lambda sizes: range(len(sizes) + 1))


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("earlier", [False, True])
def test_a_tensor_without_one_of_its_chunks_is_lost_as_a_whole(
    build: RunBuilder, monkeypatch: pytest.MonkeyPatch, *, earlier: bool
) -> None:
    gridded = {"value": np.arange(12.0), "grid": (5,)}
    writer = build.writer()
    if earlier:
        writer.flush(put(1, value=np.zeros(12), grid=(5,)), step_row(1), through=1)
    rows = [step_row(0), step_row(1), step_row(2)]
    name = writer.flush(*(put(s, **gridded) for s in range(3)), put(1, "y"), *rows, through=2)
    monkeypatch.undo()
    monkeypatch.setattr(recovering, "_GRACE_S", 0.0)
    number = 3 + 3 + 1  # three rows of the step table, three chunks of step 0, one of step 1
    damage_page(path_of(build, name), number)
    report = settled(build)
    gone = {(one.name, one.steps) for one in report.lost if one.kind == "data"}
    assert ("x", (1,)) in gone
    assert {n for n, _ in gone} == {"x"}
    reader = tsf.open_run(build.url)
    for step in (0, 2):
        assert reader["x"].read(step=step).tolist() == list(range(12))
    assert reader["y"].read(step=1) == 1.0
    if earlier:  # and the zeros are not taken for it
        assert reader.state("x", 1) == "dropped"
    else:
        with pytest.raises(FormatError) as caught:
            reader["x"].read(step=1)
        assert caught.value.code == "missing_segment"
    assert {p.code for p in verify(build.url).damage} == {"missing_segment"}


def dict_row(**changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": "x", "kind": 0, "mode": 0, "dtype": "uint8", "shape": [4], "grid": [0],
        "global_shape": [], "origin": [], "step": 0, "stride": 1, "count": 1, "chunk": 0,
        "flush": 1, "codec": 0, "flags": 0, "nbytes": 4, "raw_nbytes": 4, "crc32c": 1, "digest": 0,
        "offset": 64, "shard": layout.ShardName(key=KEY, number=0),
    }  # fmt: skip
    return row | changes


KEY = layout.WriterKey(worker=0, attempt=0, writer=1)


def steps_of(part: Any) -> list[int]:
    return sorted(
        int(row["step"]) + k * int(row["stride"])
        for row in part.entries.rows
        for k in range(row["count"])
    )


@pytest.mark.parametrize(
    ("more", "steps"),
    [
        ([], [0]),
        ([dict_row()], [0]),  # a batch that was written again
        ([dict_row(step=1)], [0, 1]),
        ([dict_row(crc32c=2)], []),  # saved twice in one flush: which one counts, no row says
        ([dict_row(count=2)], []),
        ([dict_row(dtype="int8")], []),
        ([dict_row(crc32c=2, flush=2)], [0, 0]),
        ([dict_row(step=3, shape=[5], nbytes=5)], [0, 3]),
        ([dict_row(step=-1)], [0]),
        ([dict_row(step=1, stride=0)], [0]),
        ([dict_row(step=1, count=0)], [0]),
        ([dict_row(step=1, count=layout.MAX_ENTRY_STEPS + 1)], [0]),
        ([dict_row(step=layout.MAX_STEP)], [0]),
        ([dict_row(step=1, offset=60)], [0]),
        ([dict_row(step=1, shape=[-1])], [0]),
        ([dict_row(step=1, chunk=1)], [0]),
    ],
)
def test_rows_that_become_entries(more: list[dict[str, Any]], steps: list[int]) -> None:
    part = part_of_rows([dict_row(), *more])
    assert steps_of(part) == steps
    if {tuple(row["shape"]) for row in more} - {(4,), (-1,)}:
        assert part.series[0].shape == (-1,)
        assert part.entries.dims.tuples() == [(4,), (5,)]
    assert all(end in (68, 69) for _, end in part.shards)


def test_entries_are_left_out_by_series_and_step() -> None:
    rows = [
        dict_row(step=0, count=4, stride=3),
        dict_row(step=20, offset=128),
        dict_row(step=0, name="y", offset=192),
        dict_row(step=5, name="z", grid=[2], chunk=1, offset=256),
    ]
    part = part_of_rows(rows)
    identity = part.series[0].identity
    assert part.series[0].name == "x"
    assert steps_of(part.without(identity, [1, 2, 4])) == steps_of(part)
    assert steps_of(part.without(identity, [9])) == [0, 5, 20]
    assert steps_of(part.without(identity, [12, 20])) == [0, 0, 3, 5, 6, 9]
    assert steps_of(part.without_grids()) == [0, 0, 3, 6, 9, 20]
    tidy = part.without(identity, [9]).tidy()
    assert [s.name for s in tidy.series] == ["x", "y", "z"]
    assert (tidy.series[0].first_step, tidy.series[0].steps) == (20, 1)


def test_dropped_steps_of_a_series_whose_shape_varies() -> None:
    series = Series(name="x", kind=0, mode=0, dtype="uint8", shape=(-1, 4), grid=(0, 0))
    part = dropped_part([(series, 3), (series, 5)], 9)
    assert steps_of(part) == [3, 5]
    assert part.entries.dims.tuples() == [(0,), (0,)]
    assert set(part.entries.rows["last_flush"].tolist()) == {9}


# --- which steps are hit --------------------------------------------------------------------


def test_steps_are_guessed_only_where_that_is_sure() -> None:
    def series(first: int, last: int, steps: int) -> Series:
        return Series(
            name="x", kind=0, mode=0, dtype="f4", shape=(), grid=(), first_step=first,
            last_step=last, steps=steps,
        )  # fmt: skip

    even = lost._even_steps
    assert even(series(0, 8, 5), 0, 8) == [0, 2, 4, 6, 8]
    assert even(series(0, 8, 4), 0, 8) == []
    assert even(series(3, 3, 1), 3, 3) == [3]
    assert even(series(3, 9, 1), 3, 9) == [3]
    assert even(series(0, 8, 5), 0, 6) == []
    assert even(series(0, 8, 5), 4, 4) == [4]
    assert even(series(0, 2, 9), 0, 2) == []
    logged = lost.Logged()
    logged.add(KEY, {0: [(0, 5, 10), (3, 1, 1)]})
    assert logged.between(KEY, 0, 7, 22) == [10, 15, 20]
    assert logged.between(KEY, 0, 1, 4) == [3]
    assert logged.between(KEY, 1, 0, 99) == []


def test_steps_are_listed_up_to_a_number() -> None:
    runs = [(100 * n, 1, 60) for n in range(20)]
    assert claims.expand(runs, most=100) == [*range(60), *range(100, 140)]
    assert claims.expand([(0, 2, 1 << 40)], most=3) == [0, 2, 4]
    assert claims.expand([]) == []


# --- writers ----------------------------------------------------------------------------


def closed_writer(build: RunBuilder, *steps: int, **options: Any) -> WriterBuilder:
    writer = build.writer(**options)
    for step in steps:
        writer.flush(put(step), step_row(step), through=step, closed=step == steps[-1])
    return writer


def test_writers_of_later_versions_are_left_alone(build: RunBuilder) -> None:
    closed_writer(build, 0, 1)
    build.writer(writer=0x200).flush(put(5), required=1)
    (build.root / layout.BUNDLE).write_bytes(b"junk")
    before = files(build)
    report = recover(build.url)
    assert len(report.left) == 1
    assert kinds(report) == ["bundle"]
    assert not report.ok
    del before[layout.BUNDLE]
    assert files(build) == before


def test_flushes_that_overlap_are_left_alone(build: RunBuilder) -> None:
    writer = build.writer()
    writer.flush(put(0), first=0, last=2)
    writer.flush(put(1), first=2, last=3)
    before = files(build)
    assert len(recover(build.url).left) == 1
    assert files(build) == before
    report = compact(build.url)
    assert len(report.left) == 1
    assert files(build) == before


def test_a_recovery_that_was_stopped_is_begun_anew(build: RunBuilder) -> None:
    """It had published some of what it was to put in the place of a damaged writer."""
    writer = build.writer()
    names = [writer.flush(put(n), step_row(n), through=n) for n in range(3)]
    damage_page(path_of(build, names[1]), 0)
    half = build.writer(writer=writer.key.writer + 7, recovers=writer.key.writer)
    left = half.flush(put(2), first=2, last=2)
    assert "delete" in kinds(recover(build.url, dry_run=True))
    for _ in range(3):
        if not recover(build.url).actions:
            break
    assert not recover(build.url).actions
    assert not path_of(build, left).exists()
    reader = tsf.open_run(build.url)
    assert [float(reader["x"].read(step=step)) for step in (0, 2)] == [0.0, 2.0]
    assert reader.is_closed


def test_a_writer_with_the_last_id_is_closed_by_a_later_one(build: RunBuilder) -> None:
    writer = build.writer(writer=2**64 - 1)
    writer.flush(put(0), step_row(0), through=0)
    report = settled(build)
    assert "close" in kinds(report)
    assert tsf.open_run(build.url).is_closed
    assert tsf.open_run(build.url)["x"].read(step=0) == 0.0


def orphan(build: RunBuilder, *, attempt: int = 0) -> layout.SegmentName:
    """Make a writer of which only shards are left."""
    writer = build.writer(1, num_workers=2, attempt=attempt)
    value = np.arange(100, dtype="i4")
    name = writer.flush(put(3, value=value, inline=False), put(4, value=value * 2, inline=False))
    path_of(build, name).unlink()
    return name


def test_only_shards_are_left_of_a_writer(build: RunBuilder) -> None:
    build.writer(num_workers=2).flush(put(0, "y"), closed=True)
    orphan(build)
    report = settled(build)
    assert report.restored_entries == 2
    assert report.is_closed
    reader = tsf.open_run(build.url)
    assert reader["x"].read(step=4).tolist() == list(range(0, 200, 2))
    assert [one.name for one in report.lost] == [None]


def test_only_shards_are_left_of_an_attempt(build: RunBuilder) -> None:
    """From which step it resumed, they do not say."""
    build.writer(num_workers=2).flush(put(0, "y"), closed=True)
    orphan(build, attempt=1)
    before = {k: v for k, v in files(build).items() if k.startswith("shards")}
    report = recover(build.url)
    assert len(report.left) == 1
    assert {k: v for k, v in files(build).items() if k.startswith("shards")} == before


@pytest.mark.parametrize("how", ["nothing", "junk", "rows", "schema", "other"])
def test_shards_that_prove_nothing(build: RunBuilder, how: str) -> None:
    build.writer(num_workers=2).flush(put(0, "y"), closed=True)
    orphan(build)
    (path,) = (build.root / "shards").iterdir()
    data = bytearray(path.read_bytes())
    if how == "nothing":
        data = bytearray()
    elif how == "junk":
        data[:8] = bytes(8)
    elif how == "rows":
        at = data.index(np.arange(100, dtype="i4").tobytes())
        data[at] ^= 1  # one of two
    elif how == "schema":
        data[16:200] = bytes(184)
    else:
        data = data.replace(RUN_ID_HEX, bytes(32))
    path.write_bytes(data)
    report = recover(build.url)
    assert bytes(data) == path.read_bytes()[: len(data)]
    assert report.restored_entries == {"rows": 1, "other": 2}.get(how, 0)
    assert not recover(build.url).restored_entries
    reader = tsf.open_run(build.url)
    assert reader["y"].read(step=0) == 0.0
    if how == "rows":
        assert reader["x"].read(step=4).tolist() == list(range(0, 200, 2))
        with pytest.raises(FormatError):
            reader["x"].read(step=3)


RUN_ID_HEX = bytes(range(16)).hex().encode()


def test_a_shard_that_is_gone_names_what_was_in_it(build: RunBuilder) -> None:
    value = np.arange(100)
    build.writer().flush(put(3, value=value, inline=False), put(4), closed=True)
    for path in (build.root / "shards").iterdir():
        path.unlink()
    report = recover(build.url)
    assert [(one.name, one.steps) for one in report.lost] == [("x", (3,))]


# --- the bundle, and a storage that lies ------------------------------------------------------


def test_a_damaged_bundle_of_an_open_run_is_removed(build: RunBuilder) -> None:
    build.writer(num_workers=2).flush(put(0), closed=True)  # the other worker never came
    build.bundle()
    assert not recover(build.url).actions
    data = bytearray((build.root / layout.BUNDLE).read_bytes())
    data[70] ^= 1
    (build.root / layout.BUNDLE).write_bytes(data)
    report = settled(build)
    assert kinds(report) == ["bundle"]
    assert not (build.root / layout.BUNDLE).exists()
    assert not report.is_closed


def test_a_bundle_that_says_something_else_goes_before_anything_changes(build: RunBuilder) -> None:
    writer = build.writer(num_workers=2)
    names = [writer.flush(put(n), step_row(n)) for n in range(2)]
    build.bundle()
    damage_page(path_of(build, names[1]), 0)
    report = recover(build.url)
    assert "rebuild" in kinds(report)
    assert not (build.root / layout.BUNDLE).exists()
    assert tsf.open_run(build.url)["x"].read(step=1) == 1.0


def test_a_bundle_too_large_to_be_of_use(
    build: RunBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(closing, "_LARGEST_BUNDLE_NBYTES", 100)
    closed_writer(build, 0, 1)
    assert not kinds(recover(build.url))
    assert not compact(build.url).has_bundle
    assert not (build.root / layout.BUNDLE).exists()


class Lying(WrappedStorage):
    """What is published into the index is not what can be read afterwards."""

    def publish(self, path: str, buffers: Sequence[Any], **options: Any) -> None:
        data = bytearray(b"".join(bytes(b) for b in buffers))
        if path.startswith("index/"):
            data[-300] ^= 1
        self.inner.publish(path, [bytes(data)], **options)


def recovery(build: RunBuilder, wrap: Callable[[Any], WrappedStorage]) -> Any:
    storage = wrap(open_storage(build.url, writable=True))
    made = recovering._Recovery(storage, lambda *_: None, dry_run=False, force=False)
    try:
        return made.run()
    finally:
        made.release()


def test_what_was_written_is_read_before_anything_is_taken_away(build: RunBuilder) -> None:
    writer = build.writer()
    names = [writer.flush(put(n), step_row(n)) for n in range(3)]
    damage_page(path_of(build, names[1]), 0)
    before = files(build)
    with pytest.raises(FormatError):
        recovery(build, Lying)
    assert {k: v for k, v in files(build).items() if not k.startswith("locks")} == before


def test_a_shard_that_vanishes_meanwhile_is_not_sealed(build: RunBuilder) -> None:
    build.writer().flush(put(0, value=np.arange(100), inline=False), closed=True)

    def hook(operation: Operation) -> None:
        if operation.path.startswith("shards/") and operation.op == "range":
            raise FileNotFoundError(operation.path)

    report = recovery(build, lambda inner: FaultyStorage(inner, hook))
    assert "seal" not in kinds(report)
    assert not report.left


# --- who lives ----------------------------------------------------------------------------


def test_without_locks_a_writer_is_dead_after_ten_silent_minutes(build: RunBuilder) -> None:
    """A file system without locks is no better than a bucket."""
    writer = build.writer()
    writer.flush(put(0))
    header = writer.header
    with open_storage(build.url, writable=True) as storage:
        minute_us = 60_000_000
        for age_us, force, is_refused in (
            (9 * minute_us, False, True),
            (9 * minute_us, True, False),
            (11 * minute_us, False, False),
        ):
            liveness = Liveness(storage, now_us=header.published_us + age_us, force=force)
            liveness.refuse_living(header.key, [header])  # a lock would have said it
            liveness._without_locks.add(header.key)
            if is_refused:
                with pytest.raises(StateError) as caught:
                    liveness.refuse_living(header.key, [header])
                assert caught.value.code == "locked"
            else:
                liveness.refuse_living(header.key, [header])
        liveness = Liveness(storage, now_us=10**15, force=False)
        liveness._without_locks.add(header.key)
        with pytest.raises(StateError):  # of one that published nothing, nothing is known
            liveness.refuse_living(header.key, [])


# --- compacting ---------------------------------------------------------------------------


def test_without_run_json_nothing_is_compacted(build: RunBuilder) -> None:
    closed_writer(build, 0, 1)
    (build.root / layout.RUN_JSON).unlink()
    with pytest.raises(FormatError) as caught:
        compact(build.url)
    assert caught.value.code == "missing_file"


def test_locks_of_dead_writers_do_not_stop_it(build: RunBuilder) -> None:
    writer = closed_writer(build, 0, 1)
    (build.root / "locks").mkdir()
    for key in (writer.key, layout.WriterKey(worker=9, attempt=0, writer=9)):
        (build.root / layout.lock_path(key)).write_text("")
    report = compact(build.url)
    assert (report.segments_before, report.segments_after) == (2, 1)
    assert tsf.open_run(build.url)["x"].read().tolist() == [0.0, 1.0]


def test_neighbours_of_a_damaged_segment_are_merged(build: RunBuilder) -> None:
    writer = build.writer()
    names = [writer.flush(put(n), closed=n == 6) for n in range(7)]
    damage_page(path_of(build, names[3]), 0)
    kept = path_of(build, names[3]).read_bytes()
    report = compact(build.url)
    assert report.segments_after == 3
    assert not report.has_bundle
    assert len(report.left) == 1
    assert path_of(build, names[3]).read_bytes() == kept
    reader = tsf.open_run(build.url)
    assert [float(reader["x"].read(step=s)) for s in (0, 2, 4, 6)] == [0, 2, 4, 6]


# --- the page that says which shards there are ------------------------------------------


def without_shard_page(build: RunBuilder, name: layout.SegmentName) -> None:
    """Damage only the page of shards of a segment."""
    path = path_of(build, name)
    data = bytearray(path.read_bytes())
    head = segment.decode_head(segment.decode_header(data, where="it"), data)
    (number,) = np.flatnonzero(head.root["kind"] == layout.PAGE_SHARDS).tolist()
    data[int(head.root[number]["offset"])] ^= 1
    path.write_bytes(data)


def shards_of_two(build: RunBuilder) -> list[layout.SegmentName]:
    """Two flushes: numbers in the index, and tensors in shards."""
    w = build.writer()
    return [
        w.flush(
            put(step),
            Put(name="y", step=step, value=np.full((100, 100), step)),
            step_row(step),
            through=step,
            closed=step == 1,
        )
        for step in range(2)
    ]


def test_without_the_page_of_shards_their_rows_tell(build: RunBuilder) -> None:
    names = shards_of_two(build)
    without_shard_page(build, names[0])
    report = settled(build)
    assert not report.lost
    with tsf.open_run(build.url) as run:
        assert run["x"].read().tolist() == [0, 1]
        assert run["y"].read(step=0)[0, 0] == 0
        assert run["y"].read(step=1)[0, 0] == 1


def test_without_the_page_of_shards_and_the_shard(build: RunBuilder) -> None:
    names = shards_of_two(build)
    without_shard_page(build, names[0])
    shard = min((build.root / "shards").iterdir())
    shard.unlink()
    report = recover(build.url)
    assert {(gone.name, gone.steps) for gone in report.lost} >= {("y", (0,))}
    assert not report.ok
    with tsf.open_run(build.url) as run:
        assert run["x"].read(step=0) == 0
        assert run["y"].read(step=1)[0, 0] == 1
        with pytest.raises(FormatError):
            run["y"].read(step=0)
    again = recover(build.url)
    assert not again.actions
