"""Stopping a training through its run: one worker, several, and what does not stop it."""

from __future__ import annotations

import json
import pickle
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from support.rule_runs import make_run, memory

import tensorstore_fmt as tsf
from tensorstore_fmt import rules
from tensorstore_fmt.cli import main
from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.rules import StopWatcher, TrainingStopped, request_stop
from tensorstore_fmt.testing.writers import create_test_run

SOON = 0.01


def until_stopped(watcher: StopWatcher, *, begin: int = 0, pause_s: float = 0.001) -> int:
    """Do steps until the watcher says that the next one must not begin; give its number."""
    for step in range(begin, 1_000_000):
        if watcher.should_stop(step):
            return step
        time.sleep(pause_s)
    raise AssertionError


def test_a_training_stops_before_its_next_step() -> None:
    with create_test_run(memory()) as run, StopWatcher(run, poll_s=SOON) as watcher:
        assert not watcher.stop_requested
        for step in range(3):
            watcher.check(step)
        path = request_stop(run, "the loss exploded", rule="exploding_tensor", step=1)
        assert path.startswith("stop/000000-")
        stopped = until_stopped(watcher, begin=3)
        assert watcher.stop_requested
        assert watcher.reason == "the loss exploded"
        assert watcher.should_stop(stopped)
        with pytest.raises(TrainingStopped) as caught:
            watcher.check(stopped)
        assert (caught.value.reason, caught.value.step) == ("the loss exploded", stopped)
        again = pickle.loads(pickle.dumps(caught.value))
        assert (again.reason, again.step) == ("the loss exploded", stopped)


def test_readers_and_tools_do_not_see_requests(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    with create_test_run(url) as run:
        run.log({"w": 1.0}, step=0)
        request_stop(url, "enough")
    assert tsf.verify(url).ok
    tsf.compact(url)
    with tsf.open_run(url) as reader:
        assert reader.names() == ["w"]


@pytest.mark.parametrize("workers", [2, 5])
def test_all_workers_stop_at_the_same_step(tmp_path: Path, workers: int) -> None:
    """They go at different speeds between barriers, and look at different times."""
    url = str(tmp_path / "run")
    make_run(range(1), url=url, w=float)
    barrier = threading.Barrier(workers)
    stopped: dict[int, int] = {}
    failed: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            with StopWatcher(
                url, worker=rank, num_workers=workers, attempt=0, poll_s=0.01 + 0.07 * rank
            ) as watcher:
                for step in range(1_000_000):
                    if watcher.should_stop(step):
                        stopped[rank] = step
                        return
                    time.sleep(0.001 * rank)
                    barrier.wait(30)  # as the exchange of gradients: all are in the same step
                    if step == 5 and rank == 0:
                        request_stop(url, "enough")
        except (AssertionError, OSError, threading.BrokenBarrierError) as error:
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(set(stopped.values())) == 1
    assert set(stopped) == set(range(workers))
    assert stopped[0] > 5


def test_a_worker_waits_for_the_others_and_then_goes_on_to_the_same_step() -> None:
    """The slow one has begun later steps when it learns of the request."""
    url = make_run(range(1), w=float)
    with (
        StopWatcher(url, worker=0, num_workers=2, attempt=0, poll_s=SOON) as early,
        StopWatcher(url, worker=1, num_workers=2, attempt=0, poll_s=0.3) as late,
    ):
        for step in range(4):
            assert not early.should_stop(step)
        for step in range(8):
            assert not late.should_stop(step)
        request_stop(url, "enough")
        while early._bound is None:
            time.sleep(SOON)
        steps = []
        while not early.should_stop(4 + len(steps)):
            steps.append(4 + len(steps))
        assert steps == [4, 5, 6, 7]
        assert late.should_stop(8)


def test_a_worker_does_not_wait_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    url = make_run(range(1), w=float)
    with StopWatcher(
        url, worker=0, num_workers=2, attempt=0, poll_s=SOON, timeout_s=0.1
    ) as watcher:
        request_stop(url, "enough")
        until_stopped(watcher)
    assert "other workers" in caplog.text


def test_a_request_is_for_one_attempt() -> None:
    url = memory()
    with create_test_run(url) as run:
        run.log({"w": 1.0}, step=0)
        request_stop(run, "the first")
    with (
        create_test_run(url, resume_from=1) as run,
        StopWatcher(run, poll_s=SOON) as watcher,
    ):
        for step in range(30):
            assert not watcher.should_stop(step)
            time.sleep(SOON / 3)
        request_stop(url, "the second")
        until_stopped(watcher, begin=30)
        assert watcher.reason == "the second"


def test_what_a_stranger_writes_as_a_request(tmp_path: Path) -> None:
    place = tmp_path / "run"
    url = make_run(range(1), url=str(place), w=float)
    (place / "stop").mkdir()
    for name in ("notes.txt", "000000-zz.json", "000001-0123456789abcdef.json"):
        (place / "stop" / name).write_text("{}")
    with StopWatcher(url, attempt=0, poll_s=SOON) as watcher:
        for step in range(10):
            assert not watcher.should_stop(step)
            time.sleep(SOON)
        for text in ("[" * 50_000,):
            (place / "stop" / "000000-0123456789abcdef.json").write_text(text)
        until_stopped(watcher, begin=10)
        assert watcher.reason == "(no reason given)"


def test_a_store_that_fails_for_a_while(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = tmp_path / "run"
    url = make_run(range(1), url=str(place), w=float)
    (place / "stop").write_text("in the way")
    with StopWatcher(url, attempt=0, poll_s=SOON) as watcher:
        while "cannot look for requests" not in caplog.text:
            assert not watcher.should_stop(0)
            time.sleep(SOON)
        (place / "stop").unlink()
        request_stop(url, "enough")
        until_stopped(watcher)


def test_wrong_arguments() -> None:
    url = memory()
    with pytest.raises(ArgumentError):
        StopWatcher(url)
    make_run(range(1), url=url, w=float)
    with pytest.raises(tsf.NotARunError):
        request_stop(memory(), "there is none")


def test_a_rule_stops_a_training(tmp_path: Path) -> None:
    """Through the run alone: `watch --stop` knows nothing of the training."""
    url = str(tmp_path / "run")
    stopped: list[int] = []

    def train() -> None:
        with (
            tsf.create_run(url, flush_interval_s=0.02) as run,
            StopWatcher(run, poll_s=SOON) as watcher,
        ):
            ready.set()
            for step in range(1_000_000):
                if watcher.should_stop(step):
                    stopped.append(step)
                    return
                run.log({"loss": np.nan if step == 20 else 1.0}, step=step, mode="TRAIN")
                time.sleep(0.001)

    ready = threading.Event()
    thread = threading.Thread(target=train)
    thread.start()
    ready.wait()
    assert main(["watch", url, "--rule", "exploding_tensor", "--stop", "--timeout", "60"]) == 1
    thread.join()
    assert stopped
    assert stopped[0] > 20
    (request,) = (p for p in (tmp_path / "run" / "stop").iterdir() if len(p.name) == 28)
    body = json.loads(request.read_text("utf-8"))
    assert (body["rule"], body["step"]) == ("exploding_tensor", 20)
    with tsf.open_run(url) as run:
        assert run.is_closed
        assert run["loss"].steps[-1] == stopped[0] - 1
        assert [f.step for f in rules.alerts(run)] == [20]
