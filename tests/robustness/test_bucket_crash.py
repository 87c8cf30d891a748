"""A crash, or a failure, at every storage call of a fixed script in a bucket (goals C2 and C4)."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
from support.bucket_scripts import MODULE as PRELOADED
from support.buckets import new_key
from support.crash_running import run_trials
from support.crash_scripts import MODULE, Trial
from support.goals import COUNT, SEED, record

import tensorstore_fmt as tsf
from tensorstore_fmt.testing.crash import CRASHED, ERRORS, Fault
from tensorstore_fmt.testing.forks import ChildFailedError, ForkServer
from tensorstore_fmt.testing.servers import S3Server

CODECS = ("auto", "none", "zstd") if COUNT >= 3 else ("auto",)
SAMPLE = 10  # trials by default: each takes more than a second of CPU
BATCH = 5
LIMIT_S = 120.0
MARGIN = 4


@pytest.fixture
def place(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Give a new place for a run each time; children find the server by their environment."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint_url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return lambda: s3.url(new_key("crash"))


def calls_of(trial: Trial) -> list[str]:
    with ForkServer([PRELOADED, MODULE]) as server:
        calls: list[str] = server.call(MODULE, "write_with_fault", trial)["calls"]
    return calls


def sample(trials: list[Trial], name: str) -> Iterator[Trial]:
    """Give all trials, or some of them in each part of the script."""
    if COUNT >= 3:
        yield from trials
        return
    rng = random.Random(f"{SEED} {name}")
    for i in range(SAMPLE):
        part = trials[i * len(trials) // SAMPLE : (i + 1) * len(trials) // SAMPLE]
        yield replace(rng.choice(part), goes_on=i % 4 == 0)


def crash(server: ForkServer, trial: Trial, met: Counter[str]) -> None:
    """Let a writer crash, and check what it left."""
    child = server.start(MODULE, "write_with_fault", trial, timeout_s=LIMIT_S)
    messages = list(child.messages())
    status = child.finish()
    if messages and messages[-1][0] == "error":
        raise ChildFailedError(messages[-1][1])
    has_ended = bool(messages) and messages[-1][0] == "result"
    assert status == (0 if has_ended else CRASHED), status
    acknowledged = max((what for kind, what in messages if kind == "acknowledged"), default=0)
    server.call(MODULE, "check_trial", trial, acknowledged, timeout_s=LIMIT_S)
    met["not reached" if has_ended else "crashed"] += 1


def fail(server: ForkServer, trials: Sequence[Trial], met: Counter[str]) -> None:
    """Let writers meet failures, several in one child; each checks itself."""
    child = server.start(MODULE, "write_all_with_faults", trials, timeout_s=LIMIT_S)
    done = 0
    for kind, *what in child.messages():
        if kind in ("wrong", "error"):
            raise ChildFailedError(f"{trials[done]}: {what[-1]}")
        if kind == "done":
            done += 1
            met["failed" if what[1]["reached"] else "not reached"] += 1
            met["dropped"] += what[1]["dropped"]
    assert child.finish() == 0
    assert done == len(trials), f"{trials[done]} ended its process"


@pytest.mark.parametrize("codec", CODECS)
def test_a_crash_before_and_after_every_call(place: Callable[[], str], codec: str) -> None:
    calls = calls_of(Trial(place(), Fault(0), codec))
    every = [
        Trial(place(), Fault(k, kind), codec)
        for k in range(1, len(calls) + MARGIN)
        for kind in ("before", "after")
    ]
    trials = list(sample(every, "crash"))
    met: Counter[str] = Counter()
    wrong = run_trials([PRELOADED, MODULE], trials, lambda server, t: crash(server, t, met))
    record(f"C2 crash at calls, S3, {codec}", len(trials), of=len(every), **met, wrong=len(wrong))
    assert not wrong, f"{len(wrong)} failed; the first:\n" + "\n".join(wrong[:3])
    assert met["crashed"] > len(trials) / 2


@pytest.mark.parametrize("codec", CODECS)
def test_every_call_fails(place: Callable[[], str], codec: str) -> None:
    calls = calls_of(Trial(place(), Fault(0), codec))
    every = []
    for k in range(1, len(calls) + MARGIN):
        errors = ERRORS if COUNT >= 3 else (ERRORS[k % len(ERRORS)],)
        every += [Trial(place(), Fault(k, "fail", error), codec) for error in errors]
        every += [
            Trial(place(), Fault(k, kind, ERRORS[k % len(ERRORS)]), codec)
            for kind in ("unknown", "from")
        ]
    trials = list(sample(every, "fail"))
    batches = [trials[i : i + BATCH] for i in range(0, len(trials), BATCH)]
    met: Counter[str] = Counter()
    wrong = run_trials([PRELOADED, MODULE], batches, lambda server, b: fail(server, b, met))
    record(f"C4 calls fail, S3, {codec}", len(trials), of=len(every), **met, wrong=len(wrong))
    assert not wrong, f"{len(wrong)} failed; the first:\n" + "\n".join(wrong[:3])
    assert met["failed"] > len(trials) / 2


LEFT_OPEN = """
import sys
import tensorstore_fmt as tsf
run = tsf.create_run(sys.argv[1])
for step in range(5):
    run.log({"loss": float(step)}, step=step)
"""


def test_a_writer_that_is_left_open_is_closed_at_exit(place: Callable[[], str]) -> None:
    # moto closes each connection, so a new one is needed when the interpreter ends.
    url = place()
    done = subprocess.run(
        [sys.executable, "-c", LEFT_OPEN, url],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    with tsf.open_run(url) as run:
        assert run.is_closed
        assert run["loss"].read().tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    record("C7 left open, S3", 1)
