"""`verify` of runs whose index contradicts itself or the spec: each place is found and named."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.build_run import RUN_ID, Put, RunBuilder, WriterBuilder, step_row

from tensorstore_fmt.errors import ArgumentError, NotARunError, UnsupportedError
from tensorstore_fmt.format import layout, page, segment
from tensorstore_fmt.storage import Storage, open_storage
from tensorstore_fmt.testing.storage import FaultyStorage, Operation
from tensorstore_fmt.upkeep import inventory, verify, verifying
from tensorstore_fmt.upkeep.boxes import Boxes

ROW = np.zeros(1, page.ENTRY_ROW)[0]


@pytest.fixture
def build(tmp_path: Path) -> RunBuilder:
    return RunBuilder(tmp_path / "run")


def put(step: int = 0, **more: Any) -> Put:
    return Put(**({"step": step, "value": np.float32(step), "inline": True} | more))


def codes(build: RunBuilder) -> set[str]:
    """Verify a run; give the codes of what is damaged."""
    return {p.code for p in verify(build.url).damage}


def hit(build: RunBuilder, code: str = "malformed") -> dict[str, tuple[int, ...]]:
    """Verify a run; give the names and steps that the only damage hits."""
    problems = [p for p in verify(build.url).damage if p.names or p.code != "malformed"]
    assert {p.code for p in problems} == {code}
    assert all(p.file for p in problems)
    found: dict[str, tuple[int, ...]] = {}
    for name, steps in (named for p in problems for named in p.names):
        found[name] = (*found.get(name, ()), *steps)
    return found


Change = Callable[[Any], Any]


def same(value: Any) -> Any:
    return value


def rewrite(
    path: Path,
    *,
    header: Change = same,
    series: Change = same,
    shards: Change = same,
    pages: Change = same,
) -> None:
    """Encode a segment again with other tables: header, list of `Series`, of shards, of pages."""
    data = path.read_bytes()
    found = segment.decode_header(data, where=path.name)
    head = segment.decode_head(found, data)
    entries = []
    for number in head.entry_pages().tolist():
        begin = int(head.root[number]["offset"])
        stored = data[begin : begin + int(head.root[number]["nbytes"])]
        entries += page.encode_entries(head.decode_entries(number, stored))
    catalog = [head.catalog[n] for n in range(len(head.catalog))]
    made = segment.encode(header(found), series(catalog), shards(list(head.shards)), pages(entries))
    path.write_bytes(b"".join(made))


def path_of(build: RunBuilder, name: layout.SegmentName) -> Path:
    return build.root / name.path


def changed(**values: Any) -> Change:
    """Change fields of the first series."""
    return lambda series: [series[0]._replace(**values), *series[1:]]


# --- entries ----------------------------------------------------------------------------


def test_a_whole_run(build: RunBuilder) -> None:
    writer = build.writer()
    writer.flush(put(0), put(1, name="y", value="text"), step_row(0))
    writer.flush(put(5, value=np.arange(8), inline=False), closed=True)
    assert verify(build.url).ok


ENTRIES = {
    "chunk": ({"chunk": 1}, "malformed"),
    "raw length": ({"raw_nbytes": 8}, "malformed"),
    "checksum": ({"crc32c": 1}, "checksum"),
    "codec": ({"codec": layout.CODEC_ZSTD}, "malformed"),
    "digest": ({"flags": layout.ENTRY_HAS_DIGEST, "digest": 5}, "malformed"),
    "flushes": ({"first_flush": 0}, "malformed"),
    "later codec": ({"codec": 77}, "unknown_codec"),
    "nothing": ({}, None),
}


def test_entries_that_are_wrong(build: RunBuilder) -> None:
    """Each of them is named, beside good ones and other bad ones; what nobody knows is a note."""
    value = np.arange(1.0, 65.0, dtype="f4")
    puts = [
        Put(name=f"{name} {where}", step=7, value=value, inline=where == "inline", change=change)
        for name, (change, _) in ENTRIES.items()
        for where in ("inline", "stored")
    ]
    build.writer().flush(*puts, first=0, last=1)
    report = verify(build.url)
    assert not report.ok
    found = {(name, p.code) for p in report.problems for name, steps in p.names if steps == (7,)}
    wanted = {
        (f"{name} {where}", code)
        for name, (_, code) in ENTRIES.items()
        if code is not None
        for where in ("inline", "stored")
    }
    assert found == wanted
    assert {p.code for p in report.problems if p.severity == "note"} == {
        "unknown_codec",
        "not_closed",
    }


def test_dtypes_of_later_versions_are_noted(build: RunBuilder) -> None:
    build.writer().flush(put(0, dtype="float3"), put(1, name="y"))
    report = verify(build.url)
    assert report.ok
    (problem,) = [p for p in report.problems if p.code == "unknown_dtype"]
    assert problem.names == (("x", ()),)
    assert problem.severity == "note"


def test_a_chunk_that_is_missing(build: RunBuilder) -> None:
    gridded = {"value": np.arange(12.0), "grid": (5,)}
    writer = build.writer()
    writer.flush(
        put(0, **gridded),
        put(1, **gridded, skip_chunks=[1]),
        put(2, **gridded),
        put(0, name="y", **gridded, skip_chunks=[0]),
        put(0, name="z", value=np.arange(24.0).reshape(2, 12), grid=(0, 5), shape=(-1, 12)),
        put(1, name="z", value=np.arange(12.0).reshape(1, 12), grid=(0, 5), shape=(-1, 12)),
    )
    assert hit(build) == {"x": (1,), "y": (0,)}


def boxes(*added: tuple[int, int, int, int], count: int = 2) -> list[tuple[int, str, list[int]]]:
    """Give what is found of (chunk, step, stride, count) of one series."""
    made = Boxes()
    for chunk, step, stride, steps in added:
        row = ROW.copy()
        row["chunk"], row["step"], row["stride"], row["count"] = chunk, step, stride, steps
        made.add(3, (), count, row)
    return made.finish()


def test_chunks_of_the_same_steps_in_other_runs() -> None:
    """Flushes are joined chunk by chunk: only the steps must be the same."""
    assert boxes((0, 0, 1, 4), (1, 0, 1, 4)) == []
    assert boxes((0, 0, 1, 4), (1, 0, 1, 2), (1, 2, 1, 2)) == []
    assert boxes((0, 0, 1, 4), (1, 0, 2, 2), (1, 1, 2, 2)) == []
    ((series, _, steps),) = boxes((0, 0, 1, 4), (1, 0, 1, 2), (1, 3, 1, 1))
    assert (series, steps) == (3, [2])
    ((_, _, steps),) = boxes((0, 0, 1, 2), (0, 0, 1, 1), (1, 0, 1, 2))  # one was saved twice
    assert steps == [0]
    ((_, _, steps),) = boxes((0, 0, 1, 3))
    assert steps == [0, 1, 2]
    ((_, _, steps),) = boxes(*((0, n << 20, 1, 1 << 20) for n in range(10)))
    assert steps == []


def test_series_that_say_what_cannot_be(build: RunBuilder) -> None:
    writer = build.writer()
    ten = np.zeros(10)
    stats = {"kind": layout.KIND_STATS, "inline": True}
    writer.flush(
        Put(name="a", value=ten, **stats),
        Put(name="b", value=ten.astype("f4"), **stats),
        Put(name="c", value=np.zeros(9), **stats),
        Put(name="", kind=layout.KIND_STEPS, value=np.zeros(3, "i8"), inline=True),
    )
    assert set(hit(build)) == {"b", "c", ""}


def test_a_part_that_does_not_lie_in_its_tensor(build: RunBuilder) -> None:
    writer = build.writer()
    part = {"value": np.arange(4.0), "global_shape": (8,)}
    writer.flush(put(1, origin=(4,), **part), put(1, name="y", origin=(5,), **part))
    assert hit(build) == {"y": (1,)}


def test_a_catalog_that_says_other_steps(build: RunBuilder) -> None:
    writer = build.writer()
    for field, value in (("first_step", 2), ("last_step", 9)):
        name = writer.flush(put(3), put(5), put(3, name="y"))
        rewrite(path_of(build, name), series=changed(**{field: value}))
    assert hit(build) == {"x": ()}
    assert len(verify(build.url).damage) == 2


def test_a_shard_page_with_a_shard_that_no_entry_names(build: RunBuilder) -> None:
    writer = build.writer()
    name = writer.flush(put(0, value=np.arange(9), inline=False))
    other = layout.ShardName(key=writer.key, number=9)
    rewrite(path_of(build, name), shards=lambda shards: [*shards, (other, 64)])
    assert codes(build) == {"malformed", "missing_file"}


def test_pages_out_of_order(build: RunBuilder) -> None:
    """Each page is in order; the second begins before the first one ends."""
    name = build.writer().flush(put(0), put(1))

    def twice(pages: list[page.StoredPage]) -> list[page.StoredPage]:
        return [pages[0], pages[0]]

    rewrite(path_of(build, name), pages=twice)
    (problem,) = verify(build.url).damage
    assert problem.code == "malformed"
    assert problem.offset is not None


def test_a_damaged_page_hides_what_only_all_pages_tell(build: RunBuilder) -> None:
    gridded = {"value": np.arange(12.0), "grid": (5,), "inline": True}
    writer = build.writer()
    name = writer.flush(put(0, skip_chunks=[1], **gridded))
    path = path_of(build, name)
    data = bytearray(path.read_bytes())
    head = segment.decode_head(segment.decode_header(data, where="it"), data)
    data[int(head.root[head.entry_pages()[0]]["offset"]) + 9] ^= 1
    path.write_bytes(data)
    (problem,) = verify(build.url).damage
    assert (problem.code, problem.names) == ("checksum", (("x", (0,)),))


# --- segments ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"num_workers": 1}, "malformed"),  # it is worker 1
        ({"file_nbytes": 1}, "truncated"),
    ],
)
def test_headers_that_say_what_cannot_be(
    build: RunBuilder, change: dict[str, int], code: str
) -> None:
    name = build.writer(1, num_workers=2).flush(put(0))
    if "num_workers" in change:
        rewrite(path_of(build, name), header=lambda h: replace(h, **change))
    else:
        path_of(build, name).write_bytes(path_of(build, name).read_bytes()[:-1])
    assert code in codes(build)


def test_a_header_and_another_copy_of_it(build: RunBuilder) -> None:
    writer = build.writer()
    name = writer.flush(put(0))
    path = path_of(build, name)
    data = path.read_bytes()
    rewrite(path, header=lambda h: replace(h, published_us=99))
    other = path.read_bytes()
    assert len(other) == len(data)
    path.write_bytes(data[:-256] + other[-256:])
    assert codes(build) == {"malformed"}
    path.write_bytes(data + b"\0")
    assert "malformed" in codes(build)
    path.write_bytes(data[:100])
    assert codes(build) == {"truncated"}


def test_segments_of_later_versions_are_left_to_them(build: RunBuilder) -> None:
    writer = build.writer()
    writer.flush(put(0))
    writer.flush(put(1), required=1)
    report = verify(build.url)
    assert report.ok
    assert "unknown_feature" in {p.code for p in report.problems}


def test_pages_far_apart_are_read_in_several_goes(build: RunBuilder) -> None:
    rng = np.random.default_rng(0)
    values = [rng.integers(0, 256, 60_000, np.uint8) for _ in range(90)]
    writer = build.writer()
    writer.flush(*(put(n, value=v) for n, v in enumerate(values)))
    report = verify(build.url)
    assert report.ok
    assert report.entries == 90


def test_flushes_that_overlap(build: RunBuilder) -> None:
    writer = build.writer()
    writer.flush(put(0), first=0, last=2)
    writer.flush(put(1), first=2, last=3)
    assert codes(build) == {"malformed"}


def test_attempts_that_do_not_agree(build: RunBuilder) -> None:
    build.writer(0, num_workers=2).flush(put(0))
    build.writer(1, num_workers=3).flush(put(0))
    notes = {p.code for p in verify(build.url).problems}
    assert "attempt" in notes


def test_files_that_are_not_of_the_run(build: RunBuilder) -> None:
    writer = build.writer()
    writer.flush(put(0, value=np.arange(9), inline=False), closed=True)
    (build.root / "index" / "x.seg").write_text("")
    (build.root / "shards" / "notes").write_text("")
    (build.root / "index" / "x.seg.damaged").write_text("")
    (build.root / "locks").mkdir()
    other = layout.WriterKey(worker=9, attempt=0, writer=9)
    (build.root / layout.lock_path(other)).write_text("")
    report = verify(build.url)
    assert report.ok
    found = {(p.code, p.file) for p in report.problems}
    assert found == {
        ("leftover", "index/x.seg"),
        ("leftover", "shards/notes"),
        ("leftover", layout.lock_path(other)),
        ("set_aside", "index/x.seg.damaged"),
    }


def test_a_shard_of_a_writer_that_nothing_else_is_left_of(build: RunBuilder) -> None:
    build.writer(0, num_workers=2).flush(put(0))
    gone = build.writer(1, num_workers=2).flush(put(3, value=np.arange(9), inline=False))
    path_of(build, gone).unlink()
    assert hit(build, "missing_segment") == {"x": (3,)}


# --- the bundle ----------------------------------------------------------------------------


def three(build: RunBuilder) -> tuple[WriterBuilder, list[layout.SegmentName]]:
    writer = build.writer()
    return writer, [writer.flush(put(n), closed=n == 2) for n in range(3)]


def test_a_bundle_that_was_overtaken_by_a_merge(build: RunBuilder) -> None:
    writer, names = three(build)
    build.bundle()
    writer.flush(put(0), put(1), put(2), first=0, last=2, closed=True)
    assert verify(build.url).ok
    for name in names:
        path_of(build, name).unlink()
    report = verify(build.url)
    assert report.ok
    assert {p.code for p in report.problems} == {"outdated"}


def test_a_bundle_names_what_is_missing(build: RunBuilder) -> None:
    _, names = three(build)
    build.bundle()
    path_of(build, names[2]).unlink()
    assert hit(build, "missing_segment") == {"x": (2,)}
    for name in names[:2]:
        path_of(build, name).unlink()
    assert hit(build, "missing_segment") == {"x": (0, 1, 2)}


def test_heads_that_the_bundle_still_has(build: RunBuilder) -> None:
    _, names = three(build)
    build.bundle(whole=False)
    data = bytearray(path_of(build, names[1]).read_bytes())
    data[10:60] = bytes(50)
    data[-200:-100] = bytes(100)
    path_of(build, names[1]).write_bytes(data)
    report = verify(build.url)
    assert not report.ok
    assert ("x", (1,)) in {n for p in report.damage for n in p.names}
    path_of(build, names[1]).write_bytes(b"")
    assert ("x", (1,)) in {n for p in verify(build.url).damage for n in p.names}
    bundle = bytearray((build.root / layout.BUNDLE).read_bytes())
    bundle[-150:] = bytes(150)  # now the last head in the bundle is damaged too
    (build.root / layout.BUNDLE).write_bytes(bundle)
    path_of(build, names[2]).write_bytes(b"")
    assert not verify(build.url).ok


def test_a_bundle_longer_than_the_first_read(build: RunBuilder) -> None:
    rng = np.random.default_rng(0)
    writer = build.writer()
    for n in range(10):
        writer.flush(put(n, value=rng.integers(0, 256, 60_000, np.uint8)), closed=n == 9)
    build.bundle()
    assert (build.root / layout.BUNDLE).stat().st_size > layout.PREFIX_NBYTES
    assert verify(build.url).ok
    data = bytearray((build.root / layout.BUNDLE).read_bytes())
    data[-1] ^= 1
    (build.root / layout.BUNDLE).write_bytes(data)
    assert codes(build) == {"checksum"}


def test_a_copy_longer_than_the_segment(build: RunBuilder) -> None:
    _, names = three(build)
    build.bundle()
    path = path_of(build, names[1])
    path.write_bytes(path.read_bytes()[:-5])
    assert codes(build) == {"truncated"}


# --- run.json and listings ----------------------------------------------------------------


def test_a_run_json_that_is_gone_or_of_another_version(build: RunBuilder) -> None:
    three(build)
    path = build.root / layout.RUN_JSON
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert codes(build) <= {"malformed", "checksum", "truncated"}
    path.unlink()
    assert codes(build) == {"missing_file"}
    for name in sorted((build.root / "index").iterdir())[1:]:
        name.write_bytes(bytes(300))  # one good header is enough to know whose it is
    assert "missing_file" in codes(build)
    for name in (build.root / "index").iterdir():
        name.write_bytes(bytes(300))
    with pytest.raises(NotARunError):
        verify(build.url)


def test_segments_of_two_runs_say_nothing(build: RunBuilder, tmp_path: Path) -> None:
    three(build)
    other = RunBuilder(tmp_path / "other")
    other.run_id = bytes(range(1, 17))
    name = other.writer(7, num_workers=8).flush(put(0))
    path_of(build, name).write_bytes(path_of(other, name).read_bytes())
    assert codes(build) == {"wrong_run"}
    (build.root / layout.RUN_JSON).unlink()
    with pytest.raises(NotARunError):
        verify(build.url)


def test_a_run_of_a_later_version(build: RunBuilder) -> None:
    three(build)
    path = build.root / layout.RUN_JSON
    from tensorstore_fmt.format import runfile

    info = runfile.RunInfo(run_id=RUN_ID, created_us=1, attrs={}, version=(layout.MAJOR + 1, 0))
    path.write_bytes(runfile.encode(info))
    with pytest.raises(UnsupportedError):
        verify(build.url)


def faulty(build: RunBuilder, hook: Callable[[Operation], None]) -> Storage:
    return FaultyStorage(open_storage(build.url, writable=False), hook)


def verified(storage: Storage) -> Any:
    return verifying._Verification(storage, lambda *_: None).run()


def failing(op: str, path: str, error: Exception, *, after: int = 0) -> Callable[[Operation], None]:
    seen = 0

    def hook(operation: Operation) -> None:
        nonlocal seen
        if (operation.op, operation.path) == (op, path):
            seen += 1
            if seen > after:
                raise error

    return hook


@pytest.mark.parametrize(
    ("op", "path"),
    [
        ("listing", "index"),
        ("listing", "locks"),
        ("listing", "shards"),
        ("prefix", layout.RUN_JSON),
        ("prefix", layout.BUNDLE),
    ],
)
def test_a_storage_that_fails_says_nothing_about_the_run(
    build: RunBuilder, op: str, path: str
) -> None:
    three(build)
    build.bundle()
    with pytest.raises(PermissionError):
        verified(faulty(build, failing(op, path, PermissionError(errno.EACCES, "made to fail"))))


def test_what_cannot_be_listed_cannot_be_verified(build: RunBuilder) -> None:
    storage = faulty(build, lambda _: None)
    storage.can_list = False
    with pytest.raises(ArgumentError):
        verified(storage)


def test_segments_that_are_merged_meanwhile(build: RunBuilder) -> None:
    """They vanish between the listing and the reading of them; what covers them is there then."""
    writer, names = three(build)

    def hook(operation: Operation) -> None:
        if operation.path == names[1].path and path_of(build, names[1]).exists():
            writer.flush(put(0), put(1), put(2), first=0, last=2, closed=True)
            for name in names:
                path_of(build, name).unlink()

    report = verified(faulty(build, hook))
    assert report.ok
    assert report.segments == 1
    assert report.entries >= 1


def test_segments_that_vanish_again_and_again(build: RunBuilder) -> None:
    """That is said to be missing, and ends."""
    _, names = three(build)
    hook = failing("range", names[1].path, FileNotFoundError(names[1].path))
    report = verified(faulty(build, hook))
    assert {p.code for p in report.damage} == {"missing_segment"}


def test_a_shard_that_vanishes_meanwhile(build: RunBuilder) -> None:
    writer = build.writer()
    writer.flush(put(3, value=np.arange(9), inline=False), closed=True)
    path = layout.ShardName(key=writer.key, number=0).path
    report = verified(faulty(build, failing("range", path, FileNotFoundError(path))))
    assert {p.code for p in report.damage} == {"missing_file"}


def test_a_copy_whose_segment_vanishes_while_they_are_compared(build: RunBuilder) -> None:
    _, names = three(build)
    build.bundle()
    storage = faulty(build, failing("range", names[1].path, FileNotFoundError(names[1].path)))
    found = inventory.read_inventory(storage)
    file = verifying.SegmentFile(storage, names[1], 10_000)
    assert not verifying.differs(storage, file, found.spare(names[1]))
    assert verifying.differs(storage, replace_nbytes(file, 3), found.spare(names[1]))


def replace_nbytes(file: Any, nbytes: int) -> Any:
    return verifying.SegmentFile(file.storage, file.name, nbytes)
