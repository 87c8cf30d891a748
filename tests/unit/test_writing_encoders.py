"""Whose turn it is to encode: threads that take what a training leaves, and threads that hurry."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tensorstore_fmt as tsf
from tensorstore_fmt.errors import StepDroppedError
from tensorstore_fmt.format import codec
from tensorstore_fmt.testing.writers import create_test_run
from tensorstore_fmt.writing import encoders
from tensorstore_fmt.writing.shards import ShardSink

KIB = 1024
CHUNK = (64, None)  # 64 KiB
NAMES = {True: "tensorstore_fmt-patient-encoder", False: "tensorstore_fmt-urgent-encoder"}


def wait_until(is_so: Callable[[], bool]) -> None:
    """Wait for what other threads do; not for ever."""
    end = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.001)


class Gate:
    """Lets encoders of one shift pass chunk by chunk, and notes which thread encoded what."""

    def __init__(self) -> None:
        self.may_pass = threading.Event()
        self.seen: list[str] = []
        self.names: list[str] = []
        self._encode = codec.Encoder.encode

    @staticmethod
    def encode_of(
        encoder: codec.Encoder, gate: Gate, raw: np.ndarray, **how: object
    ) -> codec.Encoded:
        """Take the place of the encoder's method."""
        return gate.encode(encoder, raw, **how)

    def encode(self, encoder: codec.Encoder, raw: np.ndarray, **how: object) -> codec.Encoded:
        name = threading.current_thread().name
        self.seen.append(name)
        if name.startswith(NAMES[True]):
            self.may_pass.wait(30)
        self.names.append(name)
        return self._encode(encoder, raw, **how)  # type: ignore[arg-type]

    def pass_when_hurried(self, run: tsf.RunWriter) -> None:
        """Let the patient ones go on once somebody waits for them."""

        def work() -> None:
            wait_until(lambda: run._pool._hurries > 0)
            self.may_pass.set()

        threading.Thread(target=work).start()

    def shifts(self) -> list[bool]:
        """Whether the patient shift did it, for each chunk that is encoded."""
        return [name.startswith(NAMES[True]) for name in self.names]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(codec.Encoder, "encode", partialmethod(Gate.encode_of, gate))
    yield gate
    gate.may_pass.set()


def create(path: Path, **options: object) -> tsf.RunWriter:
    return create_test_run(path, chunks={"*": CHUNK}, stats=False, flush_interval_s=1e6, **options)


def tensor(seed: int, chunks: int = 8) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((64 * chunks, 256))
    return values.astype(np.float32)


def test_a_save_changes_hands_between_two_chunks(tmp_path: Path, gate: Gate) -> None:
    value = tensor(0)
    with create(tmp_path / "run") as run:
        run.log({"x": value}, step=0)
        wait_until(lambda: len(gate.seen) == 1)  # the patient one has begun
        flush = threading.Thread(target=run.flush)
        flush.start()
        wait_until(lambda: run._pool._is_urgent)
        gate.may_pass.set()
        flush.join(30)
        assert not flush.is_alive()
        # One chunk was begun; whoever is in a hurry did the others.
        assert gate.shifts() == [True] + [False] * 7
        assert not run._pool._is_urgent
    with tsf.open_run(tmp_path / "run") as found:
        np.testing.assert_array_equal(found["x"].read(step=0), value)


def test_nothing_hurries_while_nobody_waits(tmp_path: Path, gate: Gate) -> None:
    gate.may_pass.set()
    with create(tmp_path / "run") as run:
        for step in range(4):
            run.log({"x": tensor(step)}, step=step)
            wait_until(lambda done=8 * (step + 1): len(gate.names) == done)  # type: ignore[misc]
        assert all(gate.shifts())


def test_what_is_held_waits_until_it_is_released(tmp_path: Path, gate: Gate) -> None:
    gate.may_pass.set()
    with create(tmp_path / "run") as run:
        for step in range(2):
            run.hold_encoding()
            run.log({"x": tensor(step)}, step=step)
            run.log({"y": tensor(step)}, step=step)
            time.sleep(0.05)
            assert len(gate.seen) == 16 * step
            run.release_encoding()
            wait_until(lambda done=16 * (step + 1): len(gate.names) == done)  # type: ignore[misc]
            wait_until(lambda: not run._pool._working)
        assert all(gate.shifts())
        run.release_encoding()  # once more is nothing


def test_nobody_waits_for_what_is_held(tmp_path: Path, gate: Gate) -> None:
    gate.may_pass.set()
    with create(tmp_path / "run", queue_bytes=4 * tensor(0).nbytes) as run:
        run.hold_encoding()
        run.log({"x": tensor(0)}, step=0)
        assert run.flush()
        assert len(gate.seen) == 8
        for step in range(1, 9):  # more than there is room for
            run.log({"x": tensor(step)}, step=step)
        assert len(gate.seen) > 8
    assert not any(gate.shifts())
    with tsf.open_run(tmp_path / "run") as found:
        np.testing.assert_array_equal(found["x"].read(), [tensor(step) for step in range(9)])


def test_who_holds_again_lets_go_of_what_waits(tmp_path: Path, gate: Gate) -> None:
    gate.may_pass.set()
    with create(tmp_path / "run") as run:
        run.hold_encoding()
        run.log({"x": tensor(0)}, step=0)
        run.hold_encoding()
        wait_until(lambda: len(gate.names) == 8)
        run.hold_encoding()
    assert all(gate.shifts())


def test_older_work_is_not_held(tmp_path: Path, gate: Gate) -> None:
    with create(tmp_path / "run") as run:
        run.log({"x": tensor(0)}, step=0)
        wait_until(lambda: len(gate.seen) == 1)  # it is being encoded
        run.hold_encoding()
        run.log({"x": tensor(1)}, step=1)
        gate.may_pass.set()
        wait_until(lambda: len(gate.names) == 16)
    assert all(gate.shifts())


def test_who_is_blocked_is_helped(tmp_path: Path, gate: Gate) -> None:
    """A full queue, while the patient ones have no time at all but for the chunk they have."""
    value = tensor(0)
    with create(tmp_path / "run", queue_bytes=value.nbytes + 1) as run:
        run.log({"x": value}, step=0)
        gate.pass_when_hurried(run)
        run.log({"x": value + 1}, step=1)
        run.flush()
    assert gate.shifts().count(False) >= 8
    with tsf.open_run(tmp_path / "run") as found:
        np.testing.assert_array_equal(found["x"].read(), [value, value + 1])


def test_half_of_a_queue_is_a_reason_to_hurry(tmp_path: Path, gate: Gate) -> None:
    value = tensor(0)
    with create(tmp_path / "run", queue_bytes=value.nbytes * 10) as run:
        patient = len([t for t in run._pool._threads if t.name.startswith(NAMES[True])])
        for step in range(4):
            run.log({f"x{step}": value}, step=0)
        wait_until(lambda: len(gate.seen) == patient)
        assert gate.names == []
        for step in range(4, 8):
            run.log({f"x{step}": value + step}, step=0)
        # Those whom nobody began, until half of the queue is free again.
        wait_until(lambda: len(gate.names) >= 8 * 3)
        assert not any(gate.shifts())
        gate.may_pass.set()
    with tsf.open_run(tmp_path / "run") as found:
        for step in range(8):
            expected = value + step if step > 3 else value
            np.testing.assert_array_equal(found[f"x{step}"].read(step=0), expected)


def test_an_interval_is_as_long_as_the_patient_ones_may_take(tmp_path: Path, gate: Gate) -> None:
    value = tensor(0)
    run = create_test_run(tmp_path / "run", chunks={"*": CHUNK}, flush_interval_s=0.2)
    with run:
        run.log({"x": value}, step=0)
        wait_until(lambda: run._pool._is_urgent)
        gate.may_pass.set()
        wait_until(lambda: len(gate.names) == 8)
        assert gate.shifts().count(False) >= 6
    with tsf.open_run(tmp_path / "run") as found:
        np.testing.assert_array_equal(found["x"].read(step=0), value)


def test_a_failure_after_a_change_of_hands_is_counted(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(encoder: codec.Encoder, raw: np.ndarray, **how: object) -> codec.Encoded:
        encoded = gate.encode(encoder, raw, **how)
        if len(gate.names) == 5:
            raise MemoryError
        return encoded

    monkeypatch.setattr(codec.Encoder, "encode", encode)
    run = create(tmp_path / "run", on_error="warn")
    run.log({"x": tensor(0)}, step=0)
    wait_until(lambda: len(gate.seen) == 1)
    gate.pass_when_hurried(run)
    with pytest.warns(RuntimeWarning, match="MemoryError"):
        assert run.flush() is False
    with pytest.warns(RuntimeWarning, match="1 tensors DROPPED"):
        report = run.close()
    assert (report.dropped, report.failures) == (1, 1)
    assert gate.shifts()[:2] == [True, False]
    with tsf.open_run(tmp_path / "run") as found, pytest.raises(StepDroppedError):
        found["x"].read(step=0)


def test_what_was_lost_is_not_found_by_its_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes are stored once, but these were not."""
    value, add = tensor(0), ShardSink.add
    left = [MemoryError("made to fail")]

    def fail_once(sink: ShardSink, rows: Any) -> None:
        if left:
            raise left.pop()
        add(sink, rows)

    monkeypatch.setattr(ShardSink, "add", fail_once)
    with create(tmp_path / "run", on_error="warn") as run:
        run.log({"x": value}, step=0)
        with pytest.warns(RuntimeWarning, match="made to fail"):
            assert run.flush() is False
        for step in (1, 2):
            run.log({"x": value}, step=step)
            assert run.flush() is True
        with pytest.warns(RuntimeWarning, match="1 tensors DROPPED"):
            run.close()
    with tsf.open_run(tmp_path / "run") as found:
        assert found["x"].steps.tolist() == [1, 2]
        np.testing.assert_array_equal(found["x"].read(), [value, value])
        with pytest.raises(StepDroppedError):
            found["x"].read(step=0)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere processes have priorities, only")
def test_priorities(tmp_path: Path) -> None:
    with create(tmp_path / "run") as run:
        run.log({"x": tensor(0)}, step=0)
        run.flush()
        threads = run._pool._threads
        urgent = [t for t in threads if t.name.startswith(NAMES[False])]
        patient = [t for t in threads if t.name.startswith(NAMES[True])]
        assert len(urgent) == 2
        assert 1 <= len(patient) <= max(1, len(os.sched_getaffinity(0)) - 1)
        own = os.getpriority(os.PRIO_PROCESS, 0)
        wait_until(
            lambda: all(os.getpriority(os.PRIO_PROCESS, t.native_id or 0) == 19 for t in patient)
        )
        for thread in urgent:
            assert os.getpriority(os.PRIO_PROCESS, thread.native_id or 0) == own
        assert os.getpriority(os.PRIO_PROCESS, os.getpid()) == own


def test_a_sandbox_may_forbid_priorities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(encoders.os, "setpriority", refuse)
    value = tensor(0)
    with create(tmp_path / "run") as run:
        run.log({"x": value}, step=0)
    with tsf.open_run(tmp_path / "run") as found:
        np.testing.assert_array_equal(found["x"].read(step=0), value)
