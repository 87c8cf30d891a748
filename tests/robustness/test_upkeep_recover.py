"""`recover` closes dead writers, brings back what is left, and says what is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from support.damage import (
    closed_run,
    cut,
    fingerprint,
    flip,
    killed_run,
    live_copy,
    merged,
    reopened,
    segments,
    shards,
    unreadable,
    values,
    write_steps,
    zero,
)

from tensorstore_fmt.errors import StateError
from tensorstore_fmt.format import layout
from tensorstore_fmt.upkeep import recover, recovering, verify
from tensorstore_fmt.writing.run import create_run

IN_SHARDS = {"large", "frozen", "middle"}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("runs") / "closed"
    return folder, closed_run(folder)


@pytest.fixture(scope="module")
def pristine_merged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run as a writer leaves it that is killed while covered segments are still there."""
    base = tmp_path_factory.mktemp("runs")
    return base / "copy", live_copy(base / "live", base / "copy", 9, wait_for_merge=True)


@pytest.fixture(autouse=True)
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reads these runs meanwhile: no time is needed to let readers go on."""
    monkeypatch.setattr(recovering, "_GRACE_S", 0.0)


def copied(pristine: tuple[Path, Any], folder: Path) -> tuple[Path, Any]:
    shutil.copytree(pristine[0], folder)
    return folder, pristine[1]


@pytest.fixture
def run(pristine: tuple[Path, Any], tmp_path: Path) -> tuple[Path, Any]:
    return copied(pristine, tmp_path / "run")


@pytest.fixture
def merging(pristine_merged: tuple[Path, Any], tmp_path: Path) -> tuple[Path, Any]:
    return copied(pristine_merged, tmp_path / "run")


def twice(folder: Path, **options: Any) -> Any:
    """Recover, and see that a dry run before and a second run after change nothing."""
    before = fingerprint(folder)
    planned = recover(folder, dry_run=True, **options)
    assert fingerprint(folder) == before
    report = recover(folder, **options)
    assert [a.kind for a in planned.actions if a.kind != "bundle"] == [
        a.kind for a in report.actions if a.kind != "bundle"
    ]
    assert len(planned.lost) == len(report.lost)
    after = fingerprint(folder)
    again = recover(folder, **options)
    assert not again.actions, again
    assert fingerprint(folder) == after
    assert json.loads(json.dumps(report.as_dict()))["actions"] is not None
    assert str(report)
    return report


def test_whole_closed_run_is_left_alone(run: tuple[Path, Any]) -> None:
    folder, _ = run
    before = fingerprint(folder)
    report = twice(folder)
    assert not report.actions
    assert report.ok
    assert report.is_closed
    assert fingerprint(folder) == before


def test_killed_writer_is_closed_and_its_shard_sealed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    oracle = killed_run(folder)
    assert not reopened(folder).is_closed
    payloads = shards(folder)[0].read_bytes()
    report = twice(folder)
    assert {a.kind for a in report.actions} == {"close", "seal", "delete", "bundle"}
    assert report.ok
    assert report.is_closed
    assert reopened(folder).is_closed
    assert not unreadable(folder, oracle)
    assert reopened(folder).state("loss", 5) == "never_saved"  # never flushed: not brought back
    sealed = shards(folder)[0].read_bytes()
    assert sealed.startswith(payloads)
    with pa.ipc.open_file(sealed) as reader:
        names = reader.read_all().column("name").to_pylist()
    assert set(names) == IN_SHARDS
    assert verify(folder).ok
    assert not list((folder / "locks").iterdir())
    assert (folder / "index.bundle").exists()


def test_torn_tail_is_cut_off_and_sealed(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    oracle = live_copy(tmp_path / "live", folder, 3)
    (shard,) = shards(folder)
    whole = shard.read_bytes()
    shard.write_bytes(whole + whole[1600:9000])  # a batch that never came to its end
    report = twice(folder)
    assert report.ok
    assert shard.read_bytes().startswith(whole)
    assert pa.ipc.open_file(shard.read_bytes()).num_record_batches == 3
    assert not unreadable(folder, oracle)
    assert verify(folder).ok


def test_named_bytes_are_never_cut(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    oracle = live_copy(tmp_path / "live", folder, 3)
    (shard,) = shards(folder)
    data = shard.read_bytes()
    with pa.ipc.open_stream(data[8:]) as stream:
        size = len(stream.read_next_batch())
    assert size
    at = data.index(b"\xff\xff\xff\xff", 100_000)  # the next message, in the middle of the file
    zero(shard, at, 64)
    damaged = shard.read_bytes()
    report = twice(folder)
    assert shard.read_bytes() == damaged
    assert any(shard.name in what for what in report.left)
    assert not unreadable(folder, oracle)  # readers never parse a shard


def test_cut_shard_names_what_is_gone(run: tuple[Path, Any]) -> None:
    folder, oracle = run
    (shard,) = shards(folder)
    cut(shard, shard.stat().st_size // 2)
    kept = shard.read_bytes()
    report = recover(folder)
    assert shard.read_bytes() == kept
    gone = {(lost.name, s) for lost in report.lost for s in lost.steps}
    assert gone == set(unreadable(folder, oracle))
    assert gone


def test_live_writer_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with create_run(folder, flush_interval_s=600) as writer:
        write_steps(writer, range(2))
        before = fingerprint(folder)
        for options in ({}, {"force": True}, {"dry_run": True}):
            with pytest.raises(StateError) as caught:
                recover(folder, **options)
            assert caught.value.code == "locked"
        assert fingerprint(folder) == before
    assert recover(folder).ok


@pytest.mark.parametrize("place", ["header", "root", "head", "page", "end root", "end header"])
def test_one_flipped_bit_in_a_segment(run: tuple[Path, Any], place: str) -> None:
    """With the bundle there, nothing at all is lost."""
    folder, oracle = run
    path = segments(folder)[3]
    nbytes = path.stat().st_size
    n_root = int.from_bytes(path.read_bytes()[104:108], "little")
    head = int.from_bytes(path.read_bytes()[96:104], "little")
    offset = {
        "header": 40,
        "root": 300,
        "head": 256 + n_root + 20,
        "page": head + 30,
        "end root": nbytes - 256 - 10,
        "end header": nbytes - 100,
    }[place]
    flip(path, offset)
    report = twice(folder)
    assert not report.lost
    assert report.is_closed
    assert not unreadable(folder, oracle)
    assert not reopened(folder).damage
    assert reopened(folder).state("nobody", 1) == "never_saved"
    assert verify(folder).ok
    assert [p for p in (folder / "index").iterdir() if p.name.endswith(".damaged")]


def test_damaged_page_without_bundle(run: tuple[Path, Any]) -> None:
    folder, oracle = run
    (folder / "index.bundle").unlink()
    path = segments(folder)[3]
    head = int.from_bytes(path.read_bytes()[96:104], "little")
    flip(path, head + 30)
    assert len(unreadable(folder, oracle)) == 6
    report = twice(folder)
    failed = unreadable(folder, oracle)
    assert {key for key in failed if key[1] != 2} == set()
    assert set(failed.values()) == {"missing_segment"}  # and not "never saved"
    gone = {(lost.name, s) for lost in report.lost if lost.kind == "data" for s in lost.steps}
    assert gone == set(failed)
    assert ("large", 2) not in failed  # its rows were in the shard
    assert ("loss", 2) in failed
    (problem,) = verify(folder).damage
    assert problem.code == "missing_segment"
    assert reopened(folder).is_closed


@pytest.mark.parametrize(
    ("which", "how"), [(0, "delete"), (2, "cut"), (2, "zero"), (-1, "delete"), (-1, "zero")]
)
def test_lost_segment(run: tuple[Path, Any], which: int, how: str) -> None:
    """From the bundle everything comes back; from the shards alone what lies in them."""
    folder, oracle = run
    path = segments(folder)[which]
    data = path.read_bytes()

    if how == "delete":
        path.unlink()
    elif how == "cut":
        cut(path, len(data) // 3)
    else:
        path.write_bytes(bytes(len(data)))
    report = twice(folder)
    assert not report.lost
    assert not unreadable(folder, oracle)
    assert verify(folder).ok
    assert reopened(folder).is_closed


@pytest.mark.parametrize("how", ["delete", "zero"])
def test_lost_segment_without_bundle(run: tuple[Path, Any], how: str) -> None:
    folder, oracle = run
    (folder / "index.bundle").unlink()
    path = segments(folder)[3]
    if how == "delete":
        path.unlink()
    else:
        zero(path, 0, 1 << 20)
    report = twice(folder)
    failed = unreadable(folder, oracle)
    assert {step for _, step in failed} <= {2}
    assert {name for name, _ in failed} == {"loss", "text", "counts", "frozen"}
    assert report.lost
    assert report.restored_entries >= 3
    assert reopened(folder).is_closed
    with pytest.raises(Exception, match="missing_segment"):
        reopened(folder).state("nobody", 1)


def test_damaged_merged_segment_comes_back_from_what_it_covers(
    merging: tuple[Path, Any],
) -> None:
    folder, oracle = merging
    (path,) = merged(folder)
    for offset in (20, path.stat().st_size // 2):
        flip(path, offset)
    zero(path, path.stat().st_size - 256, 256)
    report = twice(folder)
    assert not report.lost
    assert not unreadable(folder, oracle)
    assert verify(folder).ok
    assert reopened(folder).is_closed


def test_damaged_covered_segment_is_deleted(merging: tuple[Path, Any]) -> None:
    folder, oracle = merging
    path = segments(folder)[1]
    flip(path, 300)
    assert not verify(folder).ok
    report = twice(folder)
    assert report.ok
    assert not path.exists()
    assert not unreadable(folder, oracle)
    assert verify(folder).ok


def test_merged_and_one_covered_are_damaged(merging: tuple[Path, Any]) -> None:
    folder, oracle = merging
    (path,) = merged(folder)
    zero(path, 0, 1 << 20)
    inner = [p for p in segments(folder) if p != path]
    zero(inner[3], 0, 1 << 20)
    twice(folder)
    failed = unreadable(folder, oracle)
    assert {step for _, step in failed} == {2}
    assert not {name for name, _ in failed} & {"large", "middle"}


def test_all_segments_gone(run: tuple[Path, Any]) -> None:
    folder, oracle = run
    shutil.rmtree(folder / "index")
    (folder / "index.bundle").unlink()
    assert verify(folder).damage
    report = twice(folder)
    assert report.lost
    failed = unreadable(folder, oracle)
    assert not {name for name, _ in failed} & {"large", "middle"}
    assert ("frozen", 0) not in failed
    assert set(failed.values()) == {"missing_segment"}


def test_damaged_run_json_is_written_again(run: tuple[Path, Any]) -> None:
    folder, oracle = run
    flip(folder / "run.json", 30)
    report = twice(folder)
    assert [a.kind for a in report.actions] == ["run_json"]
    assert not unreadable(folder, oracle)
    assert (folder / "run.json.damaged").exists()
    (folder / "run.json").unlink()
    recover(folder)
    assert not unreadable(folder, oracle)


def test_damaged_bundle_is_written_again(run: tuple[Path, Any]) -> None:
    folder, oracle = run
    for offset in (3, 80, 5000):
        flip(folder / "index.bundle", offset)
        assert not verify(folder).ok
        assert [a.kind for a in recover(folder).actions] == ["bundle"]
        assert verify(folder).ok
    assert verify(folder).ok
    assert not unreadable(folder, oracle)


@pytest.mark.parametrize("which", [2, 3, 4])
def test_no_older_value_is_taken_for_a_lost_one(tmp_path: Path, which: int) -> None:
    folder = tmp_path / "run"
    with create_run(folder, flush_interval_s=600) as writer:
        write_steps(writer, range(2))
        write_steps(writer, [1], seed=7)
        last = write_steps(writer, [1], seed=8)
    (folder / "index.bundle").unlink()
    path = segments(folder)[which]
    flip(path, path.stat().st_size - 256 - 3 * 64 - 40)  # in its entry page
    report = twice(folder)
    failed = unreadable(folder, last)
    gone = {"loss", "text", "counts", "frozen"}
    assert failed == ({(name, 1): "dropped" for name in gone} if which == 4 else {})
    assert {lost.name for lost in report.lost if lost.kind == "data"} == gone


def test_stopped_recovery_is_finished_or_undone(merging: tuple[Path, Any]) -> None:
    """Any part of what a recovery publishes, with all of the old files: the next one ends it."""
    folder, oracle = merging
    (path,) = merged(folder)
    zero(path, 100, 1 << 20)
    before = {p: p.read_bytes() for p in segments(folder)}
    recover(folder)
    made = {p: p.read_bytes() for p in segments(folder)}
    assert not before.keys() & made.keys()
    newest_first = sorted(made, key=lambda p: p.name.split("-")[3], reverse=True)
    for n in (1, len(made) // 2, len(made)):
        for p in segments(folder):
            p.unlink()
        for p, data in before.items():
            p.write_bytes(data)
        for p in newest_first[:n]:
            p.write_bytes(made[p])
        assert not unreadable(folder, oracle)
        for _ in range(3):
            if not recover(folder).actions:
                break
        assert not recover(folder).actions
        assert not unreadable(folder, oracle)
        assert verify(folder).ok


def test_two_workers_and_attempts(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = create_run(folder, worker=0, num_workers=2, flush_interval_s=600)
    second = create_run(folder, worker=1, num_workers=2, flush_interval_s=600)
    write_steps(first, range(2))
    second.log({"other": np.arange(3)}, step=0)
    second.flush()
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    first.close()
    second.close()
    report = twice(copy)
    assert len([a for a in report.actions if a.kind == "close"]) == 2
    assert report.is_closed
    with create_run(copy, worker=0, resume_from=1, flush_interval_s=600) as again:
        oracle = write_steps(again, range(1, 3), seed=5)
    oracle |= {(n, 0): v for n, v in values(0).items()}
    assert not twice(copy).actions
    assert not unreadable(copy, oracle)


def test_flushes_that_were_never_committed_stay_invisible(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    oracle = live_copy(tmp_path / "live", folder, 4)
    newest = segments(folder)[-1]
    newest.unlink()  # as if the writer had died before it published it
    report = twice(folder)
    assert report.ok
    failed = unreadable(folder, oracle)
    assert {step for _, step in failed} == {3}
    assert set(failed.values()) == {"never_saved"}
    assert verify(folder).ok
    assert layout.parse_segment_name(newest.name) is not None
