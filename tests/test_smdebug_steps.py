"""Steps as smdebug's scripts ask for them: complete or not, there, coming, never.

What `MATRIX` expects was observed with smdebug 1.0.34 on runs of its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from support.event_files import smdebug_collections, smdebug_step

import tensorstore_fmt as tsf
from tensorstore_fmt.interop.importing import import_smdebug
from tensorstore_fmt.interop.smdebug import StepState, create_trial, modes, no_refresh, refresh
from tensorstore_fmt.interop.smdebug.exceptions import (
    MissingCollectionFiles,
    NoMoreData,
    StepNotYetAvailable,
    StepUnavailable,
    TensorUnavailableForStep,
)
from tensorstore_fmt.interop.smdebug.trials import Trial

ALL = (0, 1, 2)

# workers, which of them wrote which steps, whether the run has ended, the states of steps 0 to 8,
# and the complete steps.
MATRIX = {
    "one worker, ended": (1, {0: (0,), 2: (0,), 5: (0,)}, True, "AUAUUAUUU", [0, 2, 5]),
    "one worker": (1, {0: (0,), 2: (0,), 5: (0,)}, False, "AUAUUANNN", [0, 2, 5]),
    "all wrote all, ended": (3, {0: ALL, 2: ALL, 5: ALL}, True, "AUAUUAUUU", [0, 2, 5]),
    "all wrote all": (3, {0: ALL, 2: ALL, 5: ALL}, False, "AUAUUANNN", [0, 2, 5]),
    "some wrote one between, ended": (
        3, {0: ALL, 2: (0, 1), 5: ALL}, True, "AUAUUAUUU", [0, 2, 5]),
    "some wrote one between": (3, {0: ALL, 2: (0, 1), 5: ALL}, False, "AUAUUANNN", [0, 2, 5]),
    "some wrote the last, ended": (3, {0: ALL, 2: ALL, 5: (0,)}, True, "AUAUUAUUU", [0, 2, 5]),
    "some wrote the last": (3, {0: ALL, 2: ALL, 5: (0,)}, False, "AUANNNNNN", [0, 2]),
    "some wrote two, ended": (3, {0: ALL, 2: (0,), 5: (1,)}, True, "AUAUUAUUU", [0, 2, 5]),
    "some wrote two": (3, {0: ALL, 2: (0,), 5: (1,)}, False, "ANNNNNNNN", [0]),
    "between and last, ended": (
        3, {0: ALL, 2: (0, 1), 5: ALL, 7: (2,)}, True, "AUAUUAUAU", [0, 2, 5, 7]),
    "between and last": (
        3, {0: ALL, 2: (0, 1), 5: ALL, 7: (2,)}, False, "AUAUUANNN", [0, 2, 5]),
    "none by all, ended": (3, {0: (0,), 2: (1,)}, True, "AUAUUUUUU", [0, 2]),
    "none by all": (3, {0: (0,), 2: (1,)}, False, "NNNNNNNNN", []),
    "late begin, ended": (1, {3: (0,)}, True, "UUUAUUUUU", [3]),
    "late begin": (1, {3: (0,)}, False, "UUUANNNNN", [3]),
    "nothing, ended": (3, {}, True, "UUUUUUUUU", []),
    "nothing": (3, {}, False, "NNNNNNNNN", []),
}  # fmt: skip

LETTERS = {
    StepState.AVAILABLE: "A",
    StepState.UNAVAILABLE: "U",
    StepState.NOT_YET_AVAILABLE: "N",
}


@contextmanager
def job(
    url: str, num_workers: int, wrote: dict[int, tuple[int, ...]], *, is_ended: bool
) -> Iterator[list[tsf.RunWriter]]:
    """Write steps of several workers; end all of them, or let them live as long as this does."""
    with ExitStack() as stack:
        writers = []
        for worker in range(num_workers):
            writer = tsf.create_run(url, worker=worker, num_workers=num_workers)
            stack.callback(writer.close)
            writers.append(writer)
        for step, workers in wrote.items():
            for worker in workers:
                value = np.full((2, 3), 10 * step + worker, np.float32)
                writers[worker].log({"foo": value}, step=step, mode="TRAIN")
        for writer in writers:
            if is_ended:
                writer.close()
            else:
                writer.flush()
        yield writers


@pytest.mark.parametrize("case", MATRIX)
def test_has_passed_step(case: str) -> None:
    num_workers, wrote, is_ended, states, complete = MATRIX[case]
    url = f"memory://matrix/{case.replace(' ', '-')}"
    with job(url, num_workers, wrote, is_ended=is_ended):
        trial = create_trial(url)
        assert trial.num_workers == num_workers
        assert "".join(LETTERS[trial.has_passed_step(step)] for step in range(9)) == states
        assert trial.steps() == complete
        assert trial.steps(show_incomplete_steps=True) == list(wrote)
        assert trial.loaded_all_steps == is_ended
        assert trial.last_complete_step == (complete[-1] if complete else -1)
        if not wrote:
            assert trial.tensor_names() == []
            return
        tensor = trial.tensor("foo")
        assert tensor.steps() == complete
        for step, letter in enumerate(states):
            if letter == "A":
                assert (tensor.value(step) == 10 * step + wrote[step][0]).all()
                assert tensor.workers(step) == [f"worker_{w}" for w in wrote[step]]
            else:
                missing = {"U": StepUnavailable, "N": StepNotYetAvailable}[letter]
                with pytest.raises(missing) as caught:
                    tensor.value(step)
                assert (caught.value.step, caught.value.mode) == (step, modes.GLOBAL)


@pytest.mark.parametrize("case", [c for c in MATRIX if "ended" in c and MATRIX[c][1]])
def test_has_passed_step_of_an_imported_run(case: str, tmp_path: Path) -> None:
    num_workers, wrote, _, states, complete = MATRIX[case]
    for worker in range(num_workers):
        smdebug_collections(tmp_path, {}, worker=f"worker_{worker}", num_workers=num_workers)
    for step, workers in wrote.items():
        for worker in workers:
            smdebug_step(tmp_path, step, {"foo": np.ones(3)}, worker=f"worker_{worker}")
    url = f"memory://matrix-imported/{case.replace(' ', '-')}"
    import_smdebug(tmp_path, url)
    trial = create_trial(url)
    assert trial.num_workers == num_workers
    assert "".join(LETTERS[trial.has_passed_step(step)] for step in range(9)) == states
    assert trial.steps() == complete


def test_partly_written_tensors() -> None:
    """A tensor that some workers did not save is complete where its step is."""
    with job("memory://partly", 3, {0: ALL, 1: ALL, 2: (0, 1)}, is_ended=False) as writers:
        writers[1].log({"bar": 1.0}, step=1, mode="TRAIN")
        writers[1].log({"bar": 1.0}, step=2, mode="TRAIN")
        writers[1].flush()
        trial = create_trial("memory://partly")
        assert trial.tensor("bar").steps() == [1]
        assert trial.tensor("bar").steps(show_incomplete_steps=True) == [1, 2]
        assert trial.tensor("bar").workers(1) == ["worker_1"]
        with pytest.raises(TensorUnavailableForStep):
            trial.tensor("bar").value(0)


def test_steps_that_wait_too_long_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMDEBUG_INCOMPLETE_STEP_WAIT_WINDOW", "10")
    lonely = dict.fromkeys(range(1, 12), (0,))
    with job("memory://window", 2, {0: (0, 1), **dict(list(lonely.items())[:10])}, is_ended=False):
        trial = create_trial("memory://window")
        assert trial.steps() == [0]
        assert trial.has_passed_step(1) is StepState.NOT_YET_AVAILABLE
    with job("memory://window2", 2, {0: (0, 1), **lonely}, is_ended=False):
        trial = create_trial("memory://window2")
        assert trial.steps() == [0, 1, 2, 3, 4, 5]
        assert trial.has_passed_step(5) is StepState.AVAILABLE
        assert trial.has_passed_step(6) is StepState.NOT_YET_AVAILABLE


# --- modes ---------------------------------------------------------------------------------
def test_modes_and_their_steps() -> None:
    with tsf.create_run("memory://modes") as run:
        for step in range(20):
            mode, count = ("TRAIN", step // 10 * 5 + step % 10) if step % 10 < 5 else ("EVAL", 0)
            if mode == "EVAL":
                count = step // 10 * 5 + step % 10 - 5
            run.stamp(step, mode, mode_step=count, wall_time_us=1)
            run.log({"loss": float(step)}, step=step, mode=mode)
    trial = create_trial("memory://modes")
    assert trial.modes() == [modes.TRAIN, modes.EVAL]
    assert trial.steps(mode=modes.TRAIN) == trial.steps(mode=modes.EVAL) == list(range(10))
    assert trial.steps() == list(range(20))
    for step in range(20):
        mode = modes.TRAIN if step % 10 < 5 else modes.EVAL
        assert trial.mode(step) is mode
        number = trial.mode_step(step)
        assert trial.global_step(mode, number) == step
        assert trial.mode_modestep(step) == (mode, number)
        assert trial.tensor("loss").value(number, mode=mode) == step
        assert trial.tensor("loss").value(step) == step
        assert trial.has_passed_step(number, mode) is StepState.AVAILABLE
    assert trial.mode(20) is trial.mode_step(20) is trial.global_step(modes.PREDICT, 0) is None
    assert trial.tensor_names(mode=modes.PREDICT) == []
    assert list(trial.tensor("loss").values(mode=modes.EVAL)) == list(range(10))
    with pytest.raises(StepUnavailable) as caught:
        trial.tensor("loss").value(12, mode=modes.TRAIN)
    assert caught.value.mode is modes.TRAIN


def test_runs_without_modes() -> None:
    with tsf.create_run("memory://modeless") as run:
        for step in (0, 5, 10):
            run.log({"x": float(step)}, step=step)
    trial = create_trial("memory://modeless")
    assert trial.modes() == [modes.GLOBAL]
    assert trial.mode(5) is modes.GLOBAL
    assert trial.mode_step(5) == 5
    assert trial.tensor("x").steps() == [0, 5, 10]


# --- while it grows ------------------------------------------------------------------------
def test_a_reader_that_was_there_first_sees_each_step(tmp_path: Path) -> None:
    with tsf.create_run(tmp_path / "run") as run:
        trial = create_trial(tmp_path / "run")
        assert trial.steps() == trial.tensor_names() == []
        for step in range(5):
            run.log({f"t{step}": 1.0, "x": float(step)}, step=step, mode="TRAIN")
            run.flush()
            assert trial.steps() == list(range(step + 1))
            assert f"t{step}" in trial.tensor_names()
            assert trial.tensor("x").value(step) == step
        assert not trial.loaded_all_steps
    assert trial.loaded_all_steps


def test_no_refresh_shows_the_same(tmp_path: Path) -> None:
    with tsf.create_run(tmp_path / "run") as run:
        run.log({"x": 0.0}, step=0)
        run.flush()
        trial = create_trial(tmp_path / "run")
        assert trial.steps() == [0]
        with no_refresh(trial):
            run.log({"x": 1.0, "y": 1.0}, step=1)
            run.flush()
            assert trial.steps() == trial.tensor("x").steps() == [0]
            assert trial.tensor_names() == ["x"]
            assert not trial.has_tensor("y")
            with pytest.raises(StepNotYetAvailable):
                trial.tensor("x").value(1)
            with pytest.raises(StepNotYetAvailable):
                trial.wait_for_steps([1])
            with refresh([trial]):
                assert trial.steps() == [0, 1]
                run.log({"x": 2.0}, step=2)
                run.flush()
            assert trial.steps() == [0, 1]
            with no_refresh([trial]):
                assert trial.steps() == [0, 1]
            assert trial.steps() == [0, 1]
        assert trial.steps() == [0, 1, 2]


def test_a_range_of_steps_stays_while_the_run_grows(tmp_path: Path) -> None:
    with tsf.create_run(tmp_path / "run") as run:
        run.log({"x": 0.0}, step=0)
        run.flush()
        trial = create_trial(tmp_path / "run", range_steps=(0, 5))
        tail = create_trial(tmp_path / "run", range_steps=(7, None))
        for step in range(1, 10):
            run.log({"x": float(step), "late": 1.0} if step > 5 else {"x": 1.0}, step=step)
            run.flush()
        assert trial.steps() == trial.tensor("x").steps() == [0, 1, 2, 3, 4]
        assert trial.tensor_names() == ["x"]
        assert tail.steps() == [7, 8, 9]
        with pytest.raises(ValueError, match="range_steps"):
            create_trial(tmp_path / "run", range_steps=(5, 0))


def test_waiting_for_steps(tmp_path: Path) -> None:
    run = tsf.create_run(tmp_path / "run")
    run.log({"x": 0.0}, step=0)
    run.flush()
    trial = create_trial(tmp_path / "run")

    def work() -> None:
        for step in (1, 3):
            time.sleep(0.1)
            run.log({"x": float(step)}, step=step)
            run.flush()
        time.sleep(0.1)
        run.close()

    thread = threading.Thread(target=work)
    thread.start()
    trial.wait_for_steps([0, 1, 3])
    assert trial.tensor("x").value(3) == 3
    with pytest.raises(StepUnavailable):
        trial.wait_for_steps([2])
    with pytest.raises(NoMoreData) as caught:
        trial.wait_for_steps([4])
    assert caught.value.last_step == 3
    thread.join()


def test_a_run_that_comes_later(tmp_path: Path) -> None:
    found: list[Trial] = []
    thread = threading.Thread(target=lambda: found.append(create_trial(tmp_path / "run")))
    thread.start()
    time.sleep(0.1)
    assert not found
    with tsf.create_run(tmp_path / "run", num_workers=2) as run:
        run.log({"x": 1.0}, step=0)
        run.flush()
        time.sleep(0.1)
        assert not found  # the second worker is not there
        with tsf.create_run(tmp_path / "run", worker=1, num_workers=2) as other:
            other.log({"x": 1.0}, step=0)
            other.flush()
            thread.join(30)
            assert found[0].steps() == [0]
            assert found[0].workers() == ["worker_0", "worker_1"]


def test_what_never_comes_is_said(tmp_path: Path) -> None:
    with pytest.raises(MissingCollectionFiles):
        create_trial(tmp_path / "nothing", timeout_s=0.05)
    with tsf.create_run(tmp_path / "run", num_workers=2) as run:
        run.log({"x": 1.0}, step=0)
        run.flush()
        with pytest.raises(MissingCollectionFiles) as caught:
            create_trial(tmp_path / "run", timeout_s=0.05)
    assert "1 of 2 workers" in str(caught.value)


def test_two_thousand_workers(tmp_path: Path) -> None:
    for worker in range(2001):
        smdebug_collections(tmp_path / "all", {}, worker=f"worker_{worker}", num_workers=2001)
    smdebug_step(tmp_path / "all", 0, {"x": np.ones(2)}, worker="worker_7")
    report = import_smdebug(tmp_path / "all", "memory://workers/all")
    assert (report.ok, report.missing_workers) == (True, 0)
    trial = create_trial("memory://workers/all")
    assert trial.num_workers == 2001
    assert trial.tensor("x").workers(0) == trial.workers() == ["worker_7"]
    for worker in range(1446, 2001):
        (tmp_path / "all/collections/000000000" / f"worker_{worker}_collections.json").unlink()
    report = import_smdebug(tmp_path / "all", "memory://workers/some")
    assert report.missing_workers == 555
    with pytest.raises(MissingCollectionFiles) as caught:
        create_trial("memory://workers/some")
    assert "555 of 2001" in str(caught.value)
    assert tsf.open_run("memory://workers/some")["x"].read(step=0).tolist() == [1, 1]


def test_a_folder_of_smdebug_is_to_be_imported_first() -> None:
    data = Path(__file__).parent / "data" / "smdebug" / "torch"
    with pytest.raises(tsf.NotARunError) as caught:
        create_trial(data)
    assert "tensorstore-fmt import smdebug" in str(caught.value)
