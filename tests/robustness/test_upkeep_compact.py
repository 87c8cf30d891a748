"""`compact` makes fewer files of a run without changing a single value."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.damage import (
    Oracle,
    closed_run,
    fingerprint,
    flip,
    killed_run,
    live_copy,
    merged,
    reopened,
    segments,
    shards,
    unreadable,
    write_steps,
    zero,
)
from support.goals import record

from tensorstore_fmt.errors import StateError
from tensorstore_fmt.storage import Listing, Prefix, Range, Storage, open_storage
from tensorstore_fmt.testing.servers import S3Server
from tensorstore_fmt.testing.storage import Operation, WrappedStorage
from tensorstore_fmt.upkeep import compact, compacting, recover, verify
from tensorstore_fmt.writing.run import create_run


def whole_state(folder: Path) -> tuple[Any, ...]:
    """Give everything that a reader shows, but for values."""
    run = reopened(folder)
    return run.saved(), run.names(), run.step_table(), run.is_closed, run.attrs


def test_closed_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    oracle = closed_run(folder, 5, attrs={"lr": 0.1})
    before = whole_state(folder)
    payloads = [p.read_bytes() for p in shards(folder)]
    report = compact(folder)
    assert report.ok
    assert report.segments_before > 5
    assert report.segments_after == 1
    assert report.nbytes_after < report.nbytes_before
    assert report.has_bundle
    assert "1 now" in str(report)
    assert whole_state(folder) == before
    assert [p.read_bytes() for p in shards(folder)] == payloads
    assert not unreadable(folder, oracle)
    assert verify(folder).ok
    done = fingerprint(folder)
    assert compact(folder).segments_before == 1
    assert fingerprint(folder) == done
    assert not recover(folder).actions


def test_two_workers_two_attempts_and_a_dead_writer(tmp_path: Path) -> None:
    folder, copy = tmp_path / "run", tmp_path / "copy"
    writers = [create_run(folder, worker=w, num_workers=2, flush_interval_s=600) for w in (0, 1)]
    write_steps(writers[0], range(3))
    for step in range(3):
        writers[1].log({"other": np.arange(step + 1)}, step=step, mode="EVAL")
        writers[1].flush()
    shutil.copytree(folder, copy)
    for writer in writers:
        writer.close()
    again = create_run(copy, worker=0, num_workers=2, resume_from=2, flush_interval_s=600)
    oracle = write_steps(again, range(2, 4), seed=3)
    again.close()
    before = whole_state(copy)
    report = compact(copy)
    assert report.ok
    assert report.segments_after == 3
    assert whole_state(copy) == before
    assert not unreadable(copy, oracle)
    recover(copy)
    compact(copy)
    assert not unreadable(copy, oracle)
    assert verify(copy).ok


def test_covered_segments_are_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    oracle = live_copy(tmp_path / "live", folder, 9, wait_for_merge=True)
    assert merged(folder)
    assert compact(folder).segments_after == 1
    assert not unreadable(folder, oracle)


def test_covered_segments_of_a_damaged_one_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    oracle = live_copy(tmp_path / "live", folder, 9, wait_for_merge=True)
    (path,) = merged(folder)
    zero(path, 100, 1 << 20)
    covered = {p.name for p in segments(folder) if p.name.split("-")[3] <= path.name.split("-")[3]}
    # Itself, and as many as it says: how many there are when a merge begins depends on the machine.
    assert len(covered) == int(path.name.split("-")[4][:12]) + 1 >= 9
    report = compact(folder)
    assert not report.ok
    assert {p.name for p in segments(folder)} >= covered
    recover(folder)
    assert not unreadable(folder, oracle)
    assert compact(folder).ok
    assert not unreadable(folder, oracle)


def test_damaged_segment_is_never_merged(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    oracle = closed_run(folder, 5)
    (folder / "index.bundle").unlink()
    path = segments(folder)[2]
    data = path.read_bytes()
    flip(path, len(data) - 256 - 3 * 64 - 40)
    report = compact(folder)
    assert len(report.left) == 1
    assert not report.has_bundle
    assert path.exists()
    assert report.segments_after < report.segments_before
    assert {step for _, step in unreadable(folder, oracle)} == {1}


def test_live_writer_is_refused(tmp_path: Path) -> None:
    with create_run(tmp_path / "run", flush_interval_s=600) as writer:
        write_steps(writer, range(2))
        before = fingerprint(tmp_path / "run")
        with pytest.raises(StateError) as caught:
            compact(tmp_path / "run")
        assert caught.value.code == "locked"
        assert fingerprint(tmp_path / "run") == before


class Interrupted(WrappedStorage):
    """Lets something happen just before the k-th call."""

    def __init__(self, inner: Storage, k: int, meanwhile: Callable[[], object]) -> None:
        super().__init__(inner)
        self._k, self._meanwhile = k, meanwhile
        self.calls = 0

    def before(self, operations: Sequence[Operation]) -> Sequence[int | Exception | None]:
        self.calls += 1
        if self.calls == self._k:
            self._meanwhile()
        return super().before(operations)


def test_another_compact_before_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tools at a closed run: what one has listed the other may have deleted."""
    monkeypatch.setattr(compacting, "_GRACE_US", 0)
    oracle = closed_run(tmp_path / "run", 3)
    before = whole_state(tmp_path / "run")
    k, calls = 0, 0
    while calls >= k:
        k += 1
        folder = tmp_path / f"run-{k}"
        shutil.copytree(tmp_path / "run", folder)
        storage = Interrupted(
            open_storage(folder, writable=True), k, lambda folder=folder: compact(folder)
        )
        with monkeypatch.context() as outer:
            ways = iter([storage])
            outer.setattr(
                compacting,
                "open_storage",
                lambda url, ways=ways, **given: next(ways, None) or open_storage(url, **given),
            )
            report = compact(folder)
        calls = storage.calls
        assert report.ok, k
        assert report.segments_after == 1, k
        assert whole_state(folder) == before, k
        assert not unreadable(folder, oracle), k
    assert verify(folder).ok
    record("N4", k, kind="compact inside compact")
    assert k > 10


def test_after_a_kill(tmp_path: Path) -> None:
    oracle = killed_run(tmp_path / "run", 3)
    assert compact(tmp_path / "run").segments_after == 1
    assert not unreadable(tmp_path / "run", oracle)
    assert not reopened(tmp_path / "run").is_closed


def test_verify_while_a_writer_lives_and_merges(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = threading.Event()

    def write() -> None:
        with create_run(folder, flush_interval_s=600) as writer:
            step = 0
            while not done.is_set():
                write_steps(writer, [step])
                step += 1

    thread = threading.Thread(target=write)
    thread.start()
    try:
        while not (folder / "index").exists():
            pass
        for _ in range(4):
            report = verify(folder)
            assert report.ok, report
    finally:
        done.set()
        thread.join()
    assert verify(folder).ok


# --- other places ---------------------------------------------------------------------------


def fetched(url: str, options: dict[str, object], folder: Path) -> Path:
    """Copy a run from elsewhere to a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    with open_storage(url, storage_options=options, writable=False) as storage:
        for directory in ("index", "shards", "locks", ""):
            for file in storage.fetch([Listing(directory)])[0]:
                path = f"{directory}/{file.base}".lstrip("/")
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(storage.fetch([Range(path, 0, file.nbytes)])[0])
    return folder


def damage(
    url: str, options: dict[str, object], path: str, change: Callable[[bytes], bytes]
) -> None:
    with open_storage(url, storage_options=options, writable=True) as storage:
        data, _ = storage.fetch([Prefix(path, 1 << 30)])[0]
        storage.publish(path, [change(data)])


@pytest.fixture(params=["memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict[str, object]]:
    if request.param == "memory":
        return f"memory://upkeep/{tmp_path.name}", {}
    s3: S3Server = request.getfixturevalue("s3")
    return s3.url(f"upkeep/{tmp_path.name}"), s3.storage_options


def test_everywhere(place: tuple[str, dict[str, object]], tmp_path: Path) -> None:
    url, options = place
    arguments: dict[str, Any] = {"storage_options": options}
    writer = create_run(url, flush_interval_s=600, **arguments)
    oracle: Oracle = write_steps(writer, range(3))
    for tool in (recover, compact):
        with pytest.raises(StateError) as caught:  # it may be alive: nobody can tell
            tool(url, **arguments)
        assert caught.value.code == "locked"
    assert verify(url, **arguments).ok
    folder = fetched(url, options, tmp_path / "copy")
    broken = segments(folder)[2]
    damage(url, options, f"index/{broken.name}", lambda data: data[:300] + bytes(len(data) - 300))
    assert not verify(url, **arguments).ok
    report = recover(url, force=True, **arguments)
    assert report.is_closed
    assert not recover(url, **arguments).actions
    folder = fetched(url, options, folder)
    failed = unreadable(folder, oracle)
    assert {s for _, s in failed} == {1}
    assert not {n for n, _ in failed} & {"large", "middle"}
    assert compact(url, **arguments).segments_after == 2  # a flush is left out between them
    folder = fetched(url, options, folder)
    assert unreadable(folder, oracle) == failed
    writer.close()
