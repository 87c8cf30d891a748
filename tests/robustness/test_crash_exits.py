"""Signals, exceptions, forks and exits: nothing acknowledged is lost, nothing hangs (goal C7)."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support import exit_scripts
from support.crash_running import quick_folder, run_trials, tell
from support.exit_scripts import MODULE
from support.goals import COUNT, SEED, trials

import tensorstore_fmt as tsf
from tensorstore_fmt.testing.forks import ForkServer
from tensorstore_fmt.testing.oracle import Event, Oracle, Seen, check_run

LIMIT_S = 40.0
HANG_S = 5.0
REPEATS = trials(1)


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as place:
        yield place


@dataclass
class Ended:
    """How a program ended, and what it had said."""

    status: int
    said: dict[str, int] = field(default_factory=dict)
    took_s: float = 0.0
    errors: str = ""


def start(name: str, url: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [sys.executable, str(exit_scripts.__file__), name, str(url)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def end(process: subprocess.Popen[str]) -> Ended:
    begin = time.monotonic()
    try:
        out, errors = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        out, errors = process.communicate()
        pytest.fail(f"it hangs; it said {out[-200:]} {errors[-2000:]}")
    said = {kind: int(count) for kind, count in (line.split() for line in out.splitlines())}
    return Ended(process.returncode, said, time.monotonic() - begin, errors)


def signalled(name: str, url: Path, number: int, delay_s: float) -> Ended:
    """Send a signal some time after the run was opened."""
    process = start(name, url)
    assert process.stdout is not None
    first = process.stdout.readline()
    assert first == "open 0\n"
    time.sleep(delay_s)
    process.send_signal(number)
    return end(process)


def check(url: Path, ended: Ended, *, least: str) -> Seen:
    """Check the prefix rule; `least` says which line tells how much has to be there."""
    events = [exit_scripts.event(step) for step in range(ended.said.get("logging", 0))]
    with tsf.open_run(url) as run:
        seen = check_run(run, Oracle(events, ended.said.get(least, 0)))
    tell(f"{ended.said}, {seen.prefix} visible, ended with {ended.status} in {ended.took_s:.2f} s")
    return seen


@pytest.mark.parametrize("repeat", range(REPEATS))
def test_sigterm_ends_the_program_at_once(folder: Path, repeat: int) -> None:
    rng = random.Random(SEED + repeat)
    ended = signalled("loop", folder / "run", signal.SIGTERM, rng.random() * 0.4)
    assert ended.status == -signal.SIGTERM
    check(folder / "run", ended, least="acknowledged")


@pytest.mark.parametrize("repeat", range(REPEATS))
def test_sigterm_that_exits_closes_the_run(folder: Path, repeat: int) -> None:
    rng = random.Random(SEED + repeat)
    ended = signalled("exit_on_sigterm", folder / "run", signal.SIGTERM, 0.1 + rng.random() * 0.3)
    assert ended.status == 3, ended.errors
    check_interrupted(folder / "run", ended)


@pytest.mark.parametrize("repeat", range(REPEATS))
@pytest.mark.parametrize("name", ["loop", "loop_without_close"])
def test_ctrl_c(folder: Path, name: str, repeat: int) -> None:
    rng = random.Random(SEED + repeat)
    ended = signalled(name, folder / "run", signal.SIGINT, 0.1 + rng.random() * 0.3)
    assert "KeyboardInterrupt" in ended.errors
    check_interrupted(folder / "run", ended)


def check_interrupted(url: Path, ended: Ended) -> None:
    """The call of `log` that was interrupted may be there in part: it never returned."""
    logged = ended.said["logged"]
    events = [exit_scripts.event(step) for step in range(logged)]
    with tsf.open_run(url) as run:
        assert run.is_closed
        for event in events:
            for name in event.values:
                assert run.state(name, event.step) == "here"
        steps = run.steps().tolist()
        assert steps[:logged] == list(range(logged))
        assert len(steps) <= logged + 1
    tell(f"{ended.said}, {len(steps)} visible, ended with {ended.status}")


@pytest.mark.parametrize("name", ["exception_in_loop", "no_close"])
def test_a_program_that_ends_by_itself(folder: Path, name: str) -> None:
    ended = end(start(name, folder / "run"))
    assert ended.status == (1 if name == "exception_in_loop" else 0), ended.errors
    assert check(folder / "run", ended, least="logged").prefix == 23
    with tsf.open_run(folder / "run") as run:
        assert run.is_closed


@pytest.mark.parametrize("repeat", range(REPEATS))
def test_the_program_ends_while_a_thread_logs(folder: Path, repeat: int) -> None:
    ended = end(start("no_close_while_logging", folder / "run"))
    assert ended.status == 0, ended.errors
    check(folder / "run", ended, least="acknowledged")


@pytest.mark.parametrize("repeat", range(REPEATS))
def test_fork_after_open(folder: Path, repeat: int) -> None:
    ended = end(start("fork_after_open", folder / "run"))
    assert ended.status == 0, ended.errors
    assert "child" not in ended.said, "a forked child hung, or could log"
    assert check(folder / "run", ended, least="closed").prefix == 210
    with tsf.open_run(folder / "run") as run:
        assert run.is_closed


@pytest.mark.parametrize("repeat", range(REPEATS))
def test_close_while_another_thread_logs(folder: Path, repeat: int) -> None:
    ended = end(start("close_while_logging", folder / "run"))
    assert ended.status == 0, ended.errors
    assert "closed" in ended.said
    seen = check(folder / "run", ended, least="logged")
    assert seen.prefix == ended.said["logged"]


@pytest.mark.parametrize("where", ["log", "flush", "close"])
def test_ctrl_c_at_every_line(folder: Path, where: str) -> None:
    with ForkServer([MODULE]) as server:
        lines = server.call(MODULE, "interrupt_at", f"{folder}/dry", 0, where)["lines"]
    met: Counter[str] = Counter()

    def one(server: ForkServer, line: int) -> None:
        url = f"{folder}/{where}-{line}"
        child = server.start(MODULE, "interrupt_at", url, line, where, timeout_s=HANG_S)
        said: dict[str, object] = {}
        try:
            said.update(child.messages())
            child.finish()
            assert "error" not in said, said["error"]
            assert said.get("flushed", True)
            check_lines(url, 3 if where == "close" else 4)
        except Exception as error:
            raise AssertionError(f"interrupted at {said.get('place')}: {error}") from error
        met["interrupted" if said["place"] else "not reached"] += 1

    most = lines if COUNT >= 3 else {"log": 250, "flush": 250, "close": 100}[where]
    numbers = range(1, lines + 3, max(1, lines // most))
    wrong = run_trials([MODULE], numbers, one)
    tell(f"C7 Ctrl-C in {where}: {len(numbers)} of {lines} lines, {dict(met)}")
    assert not wrong, f"{len(wrong)} of {len(numbers)}:\n" + "\n".join(w[:300] for w in wrong[:20])


def check_lines(url: str, safe: int) -> None:
    """What was acknowledged is there, and nothing wrong."""
    with tsf.open_run(url) as run:
        for step in range(safe):
            for name, value in exit_scripts.event(step).values.items():
                assert (run[name].read(step=step) == value).all(), (name, step)
        events = [*map(exit_scripts.event, range(5)), Event(5, {"loss": 2.5})]
        for name in run.names():
            for step in run[name].steps.tolist():
                assert (run[name].read(step=step) == events[step].values[name]).all()
