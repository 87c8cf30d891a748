"""Commits that fail: what was promised stays, what is lost is recorded, nothing stops the loop."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.damage import reopened

import tensorstore_fmt as tsf
from tensorstore_fmt.storage import open_storage
from tensorstore_fmt.testing.storage import FaultyStorage, Operation
from tensorstore_fmt.testing.writers import create_test_run
from tensorstore_fmt.writing import closing, committer, segments

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # what `log` warns of

WEIGHT = np.arange(1, 60_000, dtype="i4")


class Trouble:
    """Fails operations while it is switched on."""

    def __init__(self, op: str, folder: str, error: Exception | None = None) -> None:
        self.op, self.folder = op, folder
        self.error = error or OSError(errno.EIO, "made to fail")
        self.is_on = False
        self.seen = 0

    def __call__(self, operation: Operation) -> None:
        if self.is_on and operation.op == self.op and operation.path.startswith(self.folder):
            self.seen += 1
            raise self.error


def faulty_run(place: Path, hook: Callable[[Operation], None], **options: Any) -> tsf.RunWriter:
    storage = FaultyStorage(open_storage(place, writable=True), hook)
    return create_test_run(storage, on_error="warn", stats=False, **options)


# --- publishing -------------------------------------------------------------------------


def test_an_error_that_nobody_expected_loses_nothing(tmp_path: Path) -> None:
    trouble = Trouble("publish", "index/", RuntimeError("not of the storage"))
    run = faulty_run(tmp_path / "run", trouble)
    flushed = []
    for step in range(6):
        trouble.is_on = step in (2, 3)
        run.log({"loss": float(step), "w": WEIGHT * step}, step=step)
        flushed.append(run.flush())
    report = run.close()
    assert flushed == [True, True, False, False, True, True]
    assert (report.failures, report.dropped) == (2, 0)
    reader = tsf.open_run(tmp_path / "run")
    for step in range(6):
        assert reader["loss"].read(step=step) == step
        assert (reader["w"].read(step=step) == WEIGHT * step).all()
    assert "2 storage failures" in str(report)


def test_what_cannot_be_carried_any_more_is_recorded_as_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index cannot be written for long: the oldest goes, and no reader says "never saved"."""
    monkeypatch.setattr(committer, "_CARRIED_NBYTES", 4000)
    trouble = Trouble("publish", "index/")
    run = faulty_run(tmp_path / "run", trouble)
    for step in range(40):
        trouble.is_on = 5 <= step < 35
        values = {"loss": float(step), "text": "x" * step, "w": np.arange(600) + step}
        run.log(values, step=step, mode="TRAIN" if step % 4 else "EVAL")
        run.flush()
    report = run.close()
    reader = tsf.open_run(tmp_path / "run")
    for name in ("loss", "text", "w"):
        states = [reader.state(name, step) for step in range(40)]
        gone = [step for step, state in enumerate(states) if state == "dropped"]
        assert {*states} == {"here", "dropped"}
        assert gone == list(range(5, 5 + len(gone)))
        assert 10 < len(gone) < 30
    assert report.dropped == 3 * len(gone)
    assert reader["loss"].read(step=39) == 39.0
    assert f"{report.dropped} tensors DROPPED" in str(report)
    assert not reopened(tmp_path / "run").damage


# --- syncing ----------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["run.json", "index/"])
def test_a_failed_sync_is_never_forgotten(tmp_path: Path, folder: str) -> None:
    """The page cache may say that all is well the next time: it is not (spec, duty 4)."""
    trouble = Trouble("sync", folder)
    run = faulty_run(tmp_path / "run", trouble)
    run.log({"loss": 1.0}, step=0)
    trouble.is_on = True
    assert not run.flush(durable=True)
    trouble.is_on = False
    run.log({"loss": 2.0}, step=1)
    assert not run.flush(durable=True)
    run.log({"loss": 3.0}, step=2)
    assert run.flush()  # visible, for what that is worth
    assert run.close().failures == trouble.seen == 1
    assert tsf.open_run(tmp_path / "run")["loss"].read().tolist() == [1.0, 2.0, 3.0]


def test_a_shard_that_cannot_be_sealed_is_as_good_without_its_footer(tmp_path: Path) -> None:
    """Only what was not synced before is in doubt: the footer."""
    trouble = Trouble("append", "shards/")
    run = faulty_run(tmp_path / "run", trouble)
    run.log({"w": WEIGHT}, step=0)
    assert run.flush(durable=True)
    trouble.is_on = True
    assert run.close().failures == trouble.seen == 1
    assert (tsf.open_run(tmp_path / "run")["w"].read(step=0) == WEIGHT).all()


def test_payloads_that_cannot_be_written_are_dropped_alone(tmp_path: Path) -> None:
    trouble = Trouble("append", "shards/")
    run = faulty_run(tmp_path / "run", trouble)
    big = np.random.default_rng(0).integers(0, 256, 9 << 20, np.uint8)
    trouble.is_on = True
    run.log({"big": big, "loss": 1.0}, step=0)  # more than a batch: written before the flush
    deadline = threading.Event()
    for _ in range(1000):
        if trouble.seen >= 4:
            break
        deadline.wait(0.01)
    trouble.is_on = False
    run.log({"w": WEIGHT, "loss": 2.0}, step=1)
    assert not run.flush()  # something of it was lost
    assert run.flush()
    report = run.close()
    assert report.dropped == 1
    reader = tsf.open_run(tmp_path / "run")
    assert reader.state("big", 0) == "dropped"
    assert (reader["w"].read(step=1) == WEIGHT).all()
    assert reader["loss"].read().tolist() == [1.0, 2.0]


def test_what_cannot_be_gathered_is_recorded_as_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No memory for the entries of a flush, also not later: its steps are there, as dropped."""
    real = committer.collect

    def collect(generation: Any) -> Any:
        if generation.number == 2:
            raise MemoryError("made to fail")
        return real(generation)

    monkeypatch.setattr(committer, "collect", collect)
    run = create_test_run(tmp_path / "run", on_error="warn")
    flushed = []
    for step in range(4):
        run.log({"loss": float(step), "w": WEIGHT + step, "text": "x"}, step=step)
        flushed.append(run.flush())
    report = run.close()
    assert flushed == [True, False, True, True]
    assert report.dropped == 3
    reader = tsf.open_run(tmp_path / "run")
    assert reader.steps().tolist() == [0, 1, 2, 3]
    for name in ("loss", "w", "text"):
        assert [reader.state(name, step) for step in range(4)] == [
            "here", "dropped", "here", "here",
        ]  # fmt: skip


def test_retries_are_few_and_ever_later(tmp_path: Path) -> None:
    """One operation is tried four times; while the storage stays down, later ones once each."""
    slept: list[float] = []
    trouble = Trouble("publish", "index/")
    run = faulty_run(tmp_path / "run", trouble, sleep=slept.append)
    trouble.is_on = True
    run.log({"loss": 1.0}, step=0)
    assert not run.flush()
    assert (trouble.seen, len(slept)) == (4, 3)
    assert slept == sorted(slept)
    assert slept[-1] > 4 * slept[0]
    for step in range(1, 6):
        run.log({"loss": 1.0}, step=step)
        assert not run.flush()
    assert trouble.seen == 4 + 5
    assert run.close().failures == 10  # closing tries, too


def test_the_report_says_how_long_log_waited(tmp_path: Path) -> None:
    """A storage that takes nothing fills the queue: `log` waits, and says so at the end."""
    released = threading.Event()

    def slow(operation: Operation) -> None:
        if operation.op == "append":
            released.wait(30)

    run = faulty_run(tmp_path / "run", slow, queue_bytes=4 << 20, compression="none")

    def release_later() -> None:
        wait_for(lambda: run._pool._hurries > 0)  # `log` waits
        time.sleep(0.1)
        released.set()

    threading.Thread(target=release_later).start()
    for step in range(12):
        run.log({"w": np.full(1 << 18, step, "f4")}, step=step)
    report = run.close()
    assert 0.05 < report.stalled_s <= report.log_s
    assert "waiting for the storage" in str(report)
    assert report.dropped == 0
    assert tsf.open_run(tmp_path / "run")["w"].read(step=11)[0] == 11


# --- merging ----------------------------------------------------------------------------


def log_flushes(run: tsf.RunWriter, steps: range) -> None:
    for step in steps:
        run.log({"loss": float(step)}, step=step)
        assert run.flush()


def wait_for(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(1000):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("it did not happen")


def index_of(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "index").iterdir())


def test_a_merge_that_fails_is_not_tried_again(tmp_path: Path) -> None:
    failed: list[str] = []

    def hook(operation: Operation) -> None:
        is_one = operation.path.endswith("-000000000001.seg")
        if operation.op == "publish" and operation.path.startswith("index/") and not is_one:
            failed.append(operation.path)
            raise OSError(errno.ENOSPC, "made to fail")

    run = faulty_run(tmp_path / "run", hook)
    log_flushes(run, range(8))
    wait_for(lambda: bool(failed))
    log_flushes(run, range(8, 20))
    report = run.close()
    assert report.failures == len(failed) == len(set(failed))
    assert tsf.open_run(tmp_path / "run")["loss"].read().tolist() == list(map(float, range(20)))


def test_covered_segments_that_cannot_be_deleted_are_garbage(tmp_path: Path) -> None:
    trouble = Trouble("delete", "index/")
    trouble.is_on = True
    run = faulty_run(tmp_path / "run", trouble)
    log_flushes(run, range(20))
    report = run.close()
    assert report.failures == trouble.seen >= 1
    assert len(index_of(tmp_path / "run")) > 20
    reader = tsf.open_run(tmp_path / "run")
    assert reader["loss"].read().tolist() == list(map(float, range(20)))
    assert reader.is_closed


def test_closing_merges_what_is_many_into_one(tmp_path: Path) -> None:
    """More than the fan-out, that no merge in the background took."""
    slept: list[float] = []
    run = create_test_run(tmp_path / "run", sleep=slept.append, grace_s=30.0)
    log_flushes(run, range(70))  # nine segments of eight flushes are more than eight
    run.close()
    assert len(index_of(tmp_path / "run")) < 9
    assert slept
    assert max(slept) <= 1.0  # not the 30 s
    reader = tsf.open_run(tmp_path / "run")
    assert reader["loss"].read().tolist() == list(map(float, range(70)))


def test_segments_are_merged_and_deleted_while_the_run_goes_on(tmp_path: Path) -> None:
    run = create_test_run(tmp_path / "run")
    log_flushes(run, range(8))
    wait_for(lambda: len(index_of(tmp_path / "run")) < 4)
    log_flushes(run, range(8, 70))
    wait_for(lambda: len(index_of(tmp_path / "run")) < 20)
    reader = tsf.open_run(tmp_path / "run")
    assert reader["loss"].read().tolist() == list(map(float, range(70)))
    run.close()


def test_covered_segments_go_after_their_grace_time(tmp_path: Path) -> None:
    run = create_test_run(tmp_path / "run", grace_s=0.1)
    log_flushes(run, range(8))
    wait_for(lambda: len(index_of(tmp_path / "run")) < 4)
    run.close()
    reader = tsf.open_run(tmp_path / "run")
    assert reader["loss"].read().tolist() == list(map(float, range(8)))


def test_segments_that_are_large_together_stay_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "_LARGEST_NBYTES", 12_000)  # a few of these
    texts = [np.random.default_rng(step).bytes(1000).hex() for step in range(20)]
    noise = [{f"t{k}": text[k : k + 200] for k in range(0, 2000, 200)} for text in texts]
    run = create_test_run(tmp_path / "run")
    for step, logged in enumerate(noise):
        run.log({"loss": float(step), **logged}, step=step)
        assert run.flush()
    assert len(index_of(tmp_path / "run")) == 21  # each is too large to be one of eight
    run.close()
    assert 3 < len(index_of(tmp_path / "run")) < 15
    reader = tsf.open_run(tmp_path / "run")
    for step, logged in enumerate(noise):
        assert {name: str(reader[name].read(step=step)) for name in logged} == logged
    assert reader["loss"].read().tolist() == list(map(float, range(20)))


def test_merging_from_an_object_store_reads_small_segments_at_once(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}-{id(tmp_path)}/run"
    run = create_test_run(url)
    log_flushes(run, range(20))
    run.log({"w": WEIGHT}, step=20)
    run.close()
    reader = tsf.open_run(url)
    assert reader["loss"].read().tolist() == list(map(float, range(20)))
    assert (reader["w"].read(step=20) == WEIGHT).all()


# --- the end ----------------------------------------------------------------------------


def closed(place: Path, before: Callable[[tsf.RunWriter], object] | None = None) -> tsf.CloseReport:
    run = create_test_run(place, on_error="warn")
    run.log({"loss": 1.0}, step=0)
    run.flush()
    if before is not None:
        before(run)
    return run.close()


def test_no_bundle_of_damaged_segments(tmp_path: Path) -> None:
    first = create_test_run(tmp_path / "run", worker=0, num_workers=2)
    second = create_test_run(tmp_path / "run", worker=1, num_workers=2)
    for run in (first, second):
        run.log({"loss": 1.0}, step=0)
        run.flush()
    first.close()
    for path in (tmp_path / "run" / "index").iterdir():
        if path.name.startswith("000000"):
            data = bytearray(path.read_bytes())
            data[40] ^= 1
            path.write_bytes(data)
    assert second.close().failures == 0
    assert not (tmp_path / "run" / "index.bundle").exists()


def test_no_bundle_while_segments_vanish(tmp_path: Path) -> None:
    def hook(operation: Operation) -> None:
        if operation.op == "range" and operation.stop == 256 and state["closing"]:
            raise FileNotFoundError(operation.path)

    state = {"closing": False}
    run = faulty_run(tmp_path / "run", hook)
    run.log({"loss": 1.0}, step=0)
    run.flush()
    state["closing"] = True
    assert run.close().failures == 0
    assert not (tmp_path / "run" / "index.bundle").exists()
    assert tsf.open_run(tmp_path / "run").is_closed


def test_a_storage_that_fails_at_the_end_is_counted(tmp_path: Path) -> None:
    def hook(operation: Operation) -> None:
        if operation.op == "range" and operation.stop == 256 and state["closing"]:
            raise PermissionError(errno.EACCES, "made to fail")

    state = {"closing": False}
    run = faulty_run(tmp_path / "run", hook)
    run.log({"loss": 1.0}, step=0)
    run.flush()
    state["closing"] = True
    assert run.close().failures == 1
    assert not (tmp_path / "run" / "index.bundle").exists()
    assert tsf.open_run(tmp_path / "run").is_closed


def test_other_files_in_the_index_do_not_matter(tmp_path: Path) -> None:
    run = create_test_run(tmp_path / "run")
    run.log({"loss": 1.0}, step=0)
    (tmp_path / "run" / "index" / "notes.txt").write_text("mine")
    run.close()
    assert (tmp_path / "run" / "index.bundle").exists()


def test_a_bundle_too_large_to_be_of_use_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(closing, "_LARGEST_BUNDLE_NBYTES", 1000)
    assert closed(tmp_path / "run").failures == 0
    assert not (tmp_path / "run" / "index.bundle").exists()
    assert tsf.open_run(tmp_path / "run").is_closed


def test_a_storage_that_cannot_list_gets_no_bundle(tmp_path: Path) -> None:
    storage = FaultyStorage(open_storage(tmp_path / "run", writable=True), lambda _: None)
    run = create_test_run(storage)
    run.log({"loss": 1.0}, step=0)
    storage.can_list = False
    run.close()
    assert not (tmp_path / "run" / "index.bundle").exists()
    assert tsf.open_run(tmp_path / "run").is_closed
