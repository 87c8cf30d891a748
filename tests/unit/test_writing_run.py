"""The writer's lifecycle: creating, joining, resuming, closing; what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import tensorstore_fmt as tsf
from tensorstore_fmt.format import layout
from tensorstore_fmt.storage import open_storage
from tensorstore_fmt.testing.storage import Operation, WrappedStorage
from tensorstore_fmt.testing.writers import create_test_run
from tensorstore_fmt.writing import committer


def child(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def segments(run: Path) -> list[layout.SegmentName]:
    found = [layout.parse_segment_name(f.name) for f in (run / "index").iterdir()]
    return [name for name in found if name is not None]


# --- what it refuses ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"flush_interval_s": float("nan")}, "flush_interval_s"),
        ({"flush_interval_s": 0}, "flush_interval_s"),
        ({"queue_bytes": -1}, "queue_bytes"),
        ({"flush_bytes": True}, "flush_bytes"),
        ({"when_full": "wait"}, "when_full"),
        ({"compression": "gzip"}, "compression"),
        ({"on_error": "ignore"}, "on_error"),
        ({"stats": "all"}, "stats"),
        ({"chunks": {"w": (1, float("nan"))}}, "chunks"),
        ({"chunks": {"w": (-1,)}}, "chunks"),
        ({"chunks": {"w": 5}}, "chunks"),
        ({"chunks": {3: (1,)}}, "chunks"),
        ({"worker": -1}, "worker"),
        ({"worker": 2, "num_workers": 2}, "worker"),
        ({"num_workers": 0}, "num_workers"),
        ({"attempt": "1"}, "attempt"),
        ({"resume_from": -3}, "step"),
        ({"attrs": {"x": float("inf")}}, "attrs"),
        ({"attrs": {"x": {1, 2}}}, "attrs"),
        ({"storage_options": {"key": "x"}}, "storage_options"),
    ],
)
def test_options_are_checked(tmp_path: Path, options: dict, named: str) -> None:
    with pytest.raises(tsf.ArgumentError) as caught:
        tsf.create_run(tmp_path / "run", **options)
    assert named in str(caught.value)
    assert not (tmp_path / "run" / "index").exists()


def test_values_that_cannot_be_stored_lose_nothing(tmp_path: Path) -> None:
    with tsf.create_run(tmp_path / "run") as run:
        run.log({"a": 1.0}, step=0)
        for data in (
            {"a": 2.0, "b": object()},
            {"a": 2.0, "b": np.array([object()])},
            {"a": 2.0, "": 1.0},
            {"a": 2.0, "x" * 1025: 1.0},
            {"a": 2.0, "\ud800": 1.0},
            {"a": 2.0, "b": np.array(["2020-01-01"], "M8[D]")},
            {"a": 2.0, "b": [[1, 2], [3]]},
            {"a": 2.0, "b": None},
        ):
            with pytest.raises(tsf.ArgumentError):
                run.log(data, step=1)
        for step in (-1, 1.5, "2", True, 2**62):
            with pytest.raises(tsf.ArgumentError):
                run.log({"a": 2.0}, step=step)  # type: ignore[arg-type] # that is the test
        with pytest.raises(tsf.ArgumentError):
            run.log({"a": 2.0}, step=1, mode="VALIDATE")
        run.log({"a": 3.0}, step=2)
    reader = tsf.open_run(tmp_path / "run")
    assert reader.names() == ["a"]
    assert reader["a"].read().tolist() == [1.0, 3.0]


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(tsf.NotARunError) as caught:
        tsf.create_run(tmp_path)
    assert "notes.txt" in str(caught.value)
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]


def test_no_permission(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        place = Path("/proc/no-such-place/run")  # root may write anywhere else
    else:
        place = tmp_path / "shut" / "run"
        place.parent.mkdir(mode=0o500)
    with pytest.raises(OSError):
        tsf.create_run(place)


def test_a_finished_run_is_not_joined(tmp_path: Path) -> None:
    tsf.create_run(tmp_path / "run").close()
    with pytest.raises(tsf.RunExistsError) as caught:
        tsf.create_run(tmp_path / "run")
    assert "resume_from" in str(caught.value)


def test_a_closed_writer(tmp_path: Path) -> None:
    run = tsf.create_run(tmp_path / "run")
    run.log({"a": 1.0}, step=0)
    report = run.close()
    assert run.close() is report
    assert (report.steps, report.dropped, report.failures) == (1, 0, 0)
    for use in (lambda: run.log({"a": 1.0}, step=1), run.flush):
        with pytest.raises(tsf.ClosedError):
            use()


def test_the_other_workers_wait_for_the_run(tmp_path: Path) -> None:
    with pytest.raises(tsf.NotARunError) as caught:
        tsf.create_run(tmp_path / "run", worker=1, num_workers=2, join_timeout_s=0.1)
    assert "worker 0" in str(caught.value)


# --- several writers -------------------------------------------------------------------


def test_workers_of_one_run(tmp_path: Path) -> None:
    writers = [
        create_test_run(tmp_path / "run", worker=w, num_workers=3, new_id=lambda w=w: 100 + w)
        for w in range(3)
    ]
    assert {w.attempt for w in writers} == {0}
    for w, writer in enumerate(writers):
        writer.log({"loss": float(w), f"only/{w}": np.full((200, 200), w)}, step=7)
    for writer in writers[:2]:
        writer.close()
    reader = tsf.open_run(tmp_path / "run")
    assert not reader.is_closed
    assert not reader.is_complete(7)
    writers[2].close()
    assert not (tmp_path / "run" / "locks").exists() or not list(
        (tmp_path / "run" / "locks").iterdir()
    )
    reader = tsf.open_run(tmp_path / "run")
    assert reader.is_closed
    assert reader.workers == [0, 1, 2]
    for w in range(3):
        assert reader["loss"].read(step=7, worker=w) == w
        assert (reader[f"only/{w}"].read(step=7) == w).all()
    with pytest.raises(tsf.AmbiguousError):
        reader["loss"].read(step=7)


def test_processes_with_the_same_worker_number(tmp_path: Path) -> None:
    code = """
        import sys, warnings
        import numpy as np, tensorstore_fmt as tsf
        warnings.simplefilter("ignore")
        folder, me = sys.argv[1], int(sys.argv[2])
        with tsf.create_run(folder) as run:
            print("open", flush=True)
            sys.stdin.readline()
            for step in range(me, 200, 4):
                run.log({"x": float(step), "big": np.full(100_000, step)}, step=step)
    """
    children = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "run"), str(i)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(4)
    ]
    for process in children:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
    for process in children:
        _, errors = process.communicate("go\n", timeout=120)
        assert process.returncode == 0, errors
    reader = tsf.open_run(tmp_path / "run")
    assert reader["x"].steps.tolist() == list(range(200))
    assert reader["x"].read().tolist() == [float(s) for s in range(200)]
    assert (reader["big"].read(step=123) == 123).all()
    assert reader.is_closed


def test_resuming_hides_what_was_beyond(tmp_path: Path) -> None:
    with tsf.create_run(tmp_path / "run") as run:
        for step in range(10):
            run.log({"loss": float(step)}, step=step, mode="TRAIN")
    with tsf.create_run(tmp_path / "run", resume_from=5) as run:
        assert run.attempt == 1
        assert not (tmp_path / "run" / "index.bundle").exists()
        run.log({"loss": 50.0}, step=5, mode="TRAIN")
        run.log({"loss": 70.0}, step=7, mode="TRAIN")
    reader = tsf.open_run(tmp_path / "run")
    assert reader["loss"].steps.tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert reader["loss"].read().tolist() == [0, 1, 2, 3, 4, 50, 70]
    assert reader["loss"].read(step=8, attempt=0) == 8.0
    with pytest.raises(tsf.StepNotFoundError):
        reader["loss"].read(step=8)
    assert reader.mode_step(7, mode="TRAIN") == 6


def test_resuming_with_another_number_of_workers(tmp_path: Path) -> None:
    place = tmp_path / "run"
    for w in range(2):
        with create_test_run(place, worker=w, num_workers=2, new_id=lambda w=w: 10 + w) as run:
            run.log({f"a/{w}": 1.0}, step=0)
    writers = [
        create_test_run(place, worker=w, num_workers=3, resume_from=1, new_id=lambda w=w: 20 + w)
        for w in (2, 0, 1)  # in whatever order they start
    ]
    assert [w.attempt for w in writers] == [1, 1, 1]
    for writer in writers:
        writer.log({f"a/{writer.worker}": 2.0}, step=1)
        writer.close()
    reader = tsf.open_run(place)
    assert reader.attempts == [0, 1]
    assert reader.num_workers == 3
    assert reader["a/0"].steps.tolist() == [0, 1]
    assert reader["a/2"].steps.tolist() == [1]
    assert reader.is_closed


# --- threads, forks, exits -----------------------------------------------------------------


def test_threads_log_at_once(tmp_path: Path) -> None:
    run = create_test_run(tmp_path / "run")

    def work(me: int) -> None:
        for step in range(200):
            run.log({f"t{me}": float(step), f"w{me}": np.full((70, 70), step)}, step=step)
            if step % 50 == 0:
                run.flush()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run.close()
    reader = tsf.open_run(tmp_path / "run")
    for i in range(8):
        assert reader[f"t{i}"].read().tolist() == [float(s) for s in range(200)]
        assert (reader[f"w{i}"].read(index=np.s_[3, 4]) == np.arange(200)).all()


def test_a_forked_child_cannot_write(tmp_path: Path) -> None:
    done = child(
        """
        import os, sys
        import tensorstore_fmt as tsf
        run = tsf.create_run(sys.argv[1])
        run.log({"a": 1.0}, step=0)
        pid = os.fork()
        if pid == 0:
            try:
                run.log({"a": 2.0}, step=1)
            except tsf.ClosedError:
                run.close()
                os._exit(7)
            os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        run.log({"a": 3.0}, step=2)
        run.close()
        sys.exit(status)
        """,
        tmp_path / "run",
    )
    assert done.returncode == 7, done.stderr
    assert tsf.open_run(tmp_path / "run")["a"].read().tolist() == [1.0, 3.0]


def test_the_interpreter_ends_without_close(tmp_path: Path) -> None:
    done = child(
        """
        import sys
        import tensorstore_fmt as tsf
        run = tsf.create_run(sys.argv[1], flush_interval_s=1000)
        for step in range(100):
            run.log({"a": float(step)}, step=step)
        raise SystemError("training failed")
        """,
        tmp_path / "run",
    )
    assert "training failed" in done.stderr
    reader = tsf.open_run(tmp_path / "run")
    assert reader["a"].steps.tolist() == list(range(100))
    assert reader.is_closed


def test_a_killed_writer_loses_nothing_that_was_flushed(tmp_path: Path) -> None:
    child(
        """
        import os, sys
        import numpy as np, tensorstore_fmt as tsf
        run = tsf.create_run(sys.argv[1], flush_interval_s=1000)
        for step in range(30):
            run.log({"a": float(step), "w": np.full((400, 400), step)}, step=step)
            if step == 20:
                run.flush()
        os._exit(9)
        """,
        tmp_path / "run",
    )
    reader = tsf.open_run(tmp_path / "run")
    assert reader["w"].steps.tolist() == list(range(21))
    assert (reader["w"].read(index=np.s_[7, 9]) == np.arange(21)).all()
    assert not reader.is_closed
    with pytest.raises(tsf.StepNotYetWrittenError):
        reader["a"].read(step=25)


# --- when it becomes visible -----------------------------------------------------------------


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_flushed_by_time(tmp_path: Path) -> None:
    with tsf.create_run(tmp_path / "run", flush_interval_s=0.05) as run:
        run.log({"a": 1.0}, step=0)
        wait_until(lambda: "a" in tsf.open_run(tmp_path / "run"))


def test_the_interval_counts_from_the_beginning_of_a_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(committer, "time", SimpleNamespace(monotonic=lambda: now[0]))

    class Slow(WrappedStorage):
        def before(self, operations: Sequence[Operation]) -> list[None]:
            if operations[0].op == "publish" and "index" in operations[0].path:
                published.append(operations[0].path)
                if len(published) == 2:  # as if this one took an hour, in which training went on
                    run.log({"b": 2.0}, step=1)
                    now[0] += 3600
            return [None] * len(operations)

    published: list[str] = []
    storage = Slow(open_storage(tmp_path / "run", writable=True))
    with create_test_run(storage, flush_interval_s=3600) as run:
        run.log({"a": 1.0}, step=0)
        run.flush()
        wait_until(lambda: "b" in tsf.open_run(tmp_path / "run"))


def test_flushed_by_bytes(tmp_path: Path) -> None:
    with tsf.create_run(tmp_path / "run", flush_interval_s=3600, flush_bytes=1_000_000) as run:
        run.log({"small": np.zeros(1000)}, step=0)
        assert tsf.open_run(tmp_path / "run").names() == []
        run.log({"large": np.random.default_rng(0).standard_normal(200_000)}, step=1)
        wait_until(lambda: tsf.open_run(tmp_path / "run").names() == ["large", "small"])


def test_all_of_one_call_becomes_visible_at_once(tmp_path: Path) -> None:
    names = [f"w{i}" for i in range(20)]
    with create_test_run(tmp_path / "run", flush_interval_s=0.005, stats=False) as run:
        data = np.random.default_rng(0).standard_normal(50_000)
        for step in range(40):
            run.log(dict.fromkeys(names, data + step), step=step)
            reader = tsf.open_run(tmp_path / "run")
            seen = {tuple(reader[n].steps.tolist()) if n in reader else () for n in names}
            assert len(seen) == 1


def test_statistics_of_one_name(tmp_path: Path) -> None:
    weight = np.arange(1000, dtype=np.float32)
    with tsf.create_run(tmp_path / "run") as run:
        run.set_stats("a", "only")
        run.set_stats("b", choice=False)
        run.log({"a": weight, "b": weight, "c": weight}, step=0)
        run.set_stats("c", choice=True)  # as it is
        with pytest.raises(tsf.StateError) as caught:
            run.set_stats("c", choice=False)
        assert caught.value.code == "logged"
        with pytest.raises(tsf.ArgumentError):
            run.set_stats("d", "some")  # type: ignore[arg-type]
    with tsf.open_run(tmp_path / "run") as reader:
        assert reader["a"].stats()["max"].tolist() == [999]
        with pytest.raises(tsf.NotThereError):
            reader["a"].read(step=0)
        assert reader["b"].read(step=0)[1] == 1
        assert set(reader.statistics().column("name").to_pylist()) == {"a", "c"}


NUMBERS = {
    "a float": 0.25,
    "a NumPy float": np.float64(0.5),
    "an array": np.array(0.75),
    "an integer": 3,
    "a bool": True,
    "float32": np.float32(1.5),
}


@pytest.mark.parametrize("first", NUMBERS)
@pytest.mark.parametrize("second", NUMBERS)
def test_numbers_of_any_two_kinds_in_one_flush(tmp_path: Path, first: str, second: str) -> None:
    with create_test_run(tmp_path / "run") as run:
        for step, kind in enumerate([first, second, first, first]):
            run.log({"loss": NUMBERS[kind]}, step=step)
    loss = tsf.open_run(tmp_path / "run")["loss"]
    for step, kind in enumerate([first, second, first, first]):
        assert loss.read(step=step) == NUMBERS[kind]
        assert loss.read(step=step).dtype == np.asarray(NUMBERS[kind]).dtype


@pytest.mark.parametrize("flushes", [False, True])
def test_statistics_are_those_of_the_last_save(tmp_path: Path, *, flushes: bool) -> None:
    large, small = np.arange(3000.0), np.array([5.0, 7.0])
    with create_test_run(tmp_path / "run", stats={"only": "only"}) as run:
        for step in range(3):
            run.log({"x": large, "only": large}, step=step)
        run.log({"only": 1.0}, step=3)
        if flushes:
            run.flush()
        run.log({"x": small, "only": small}, step=0)
        run.log({"x": "text"}, step=1)
        run.log({"x": large + 1, "only": large + 1}, step=2)
        run.log({"only": large}, step=3)
    reader = tsf.open_run(tmp_path / "run")
    stats = reader["x"].stats()
    assert stats.step.tolist() == [0, 2]
    assert stats.count.tolist() == [2, 3000]
    assert stats.max.tolist() == [7, 3000]
    with pytest.raises(tsf.NotThereError):
        reader["x"].stats(steps=[1])
    assert reader["only"].stats().max.tolist() == [7, 2999, 3000, 2999]
    assert reader["only"].read(step=0).tolist() == [5, 7]
    for step in (1, 2, 3):  # the number that was there at step 3 is not what was saved last
        with pytest.raises(tsf.NotThereError):
            reader["only"].read(step=step)


def test_small_values_have_statistics_whatever_the_grid_of_others(tmp_path: Path) -> None:
    with create_test_run(tmp_path / "run", chunks={"x": (1000,)}) as run:
        for step, n in enumerate((3000, 3, 1000, 2)):
            run.log({"x": np.arange(float(n))}, step=step)
    assert tsf.open_run(tmp_path / "run")["x"].stats().count.tolist() == [3000, 3, 1000, 2]


@pytest.mark.parametrize("cut", [2, 30, 998])
def test_statistics_of_parts_small_and_large(tmp_path: Path, cut: int) -> None:
    whole = np.arange(4000.0).reshape(1000, 4)
    parts = [(whole[:cut], (0, 0)), (whole[cut:], (cut, 0))]
    for worker, (value, origin) in enumerate(parts):
        with create_test_run(tmp_path / "run", worker=worker, num_workers=2) as run:
            part = tsf.Part(value=value, global_shape=whole.shape, origin=origin)
            run.log({"x": part}, step=3)
            if worker == 0:
                run.log({"x": part}, step=4)  # of which the other has nothing
    tensor = tsf.open_run(tmp_path / "run")["x"]
    stats = tensor.stats()
    assert stats.step.tolist() == [3]
    assert (stats.count[0], stats.min[0], stats.max[0]) == (4000, 0, 3999)
    assert stats.sum[0] == whole.sum()
    assert tensor.stats(worker=0).count.tolist() == [4 * cut] * 2
    assert tensor.stats(worker=1).min.tolist() == [4 * cut]
