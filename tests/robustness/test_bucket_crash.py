"""A crash, or a failure, at every storage call of a fixed script in a bucket (goals C2 and C4)."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from support.bucket_scripts import MODULE as PRELOADED
from support.buckets import new_key
from support.crash_scripts import Trial
from support.crash_trials import CrashTrials
from support.goals import COUNT, SEED, record

import tensorstore_fmt as tsf
from tensorstore_fmt.testing.crash import ERRORS, Fault
from tensorstore_fmt.testing.servers import S3Server

CODECS = ("auto", "none", "zstd") if COUNT >= 3 else ("auto",)
SAMPLE = 10  # trials by default: each takes more than a second of CPU
BUCKET = CrashTrials(limit_s=120.0, batch=5, preloaded=(PRELOADED,))
MARGIN = 4


@pytest.fixture
def place(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Give a new place for a run each time; children find the server by their environment."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint_url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return lambda: s3.url(new_key("crash"))


def sample(trials: list[Trial], name: str) -> Iterator[Trial]:
    """Give all trials, or some of them in each part of the script."""
    if COUNT >= 3:
        yield from trials
        return
    rng = random.Random(f"{SEED} {name}")
    for i in range(SAMPLE):
        part = trials[i * len(trials) // SAMPLE : (i + 1) * len(trials) // SAMPLE]
        yield replace(rng.choice(part), goes_on=i % 4 == 0)


@pytest.mark.parametrize("codec", CODECS)
def test_a_crash_before_and_after_every_call(place: Callable[[], str], codec: str) -> None:
    calls = BUCKET.calls_of(Trial(place(), Fault(0), codec))
    every = [
        Trial(place(), Fault(k, kind), codec)
        for k in range(1, len(calls) + MARGIN)
        for kind in ("before", "after")
    ]
    trials = list(sample(every, "crash"))
    met = BUCKET.carry_out(f"C2 crash at calls, S3, {codec}", trials, of=len(every))
    assert met["crashed"] > len(trials) / 2


@pytest.mark.parametrize("codec", CODECS)
def test_every_call_fails(place: Callable[[], str], codec: str) -> None:
    calls = BUCKET.calls_of(Trial(place(), Fault(0), codec))
    every = []
    for k in range(1, len(calls) + MARGIN):
        errors = ERRORS if COUNT >= 3 else (ERRORS[k % len(ERRORS)],)
        every += [Trial(place(), Fault(k, "fail", error), codec) for error in errors]
        every += [
            Trial(place(), Fault(k, kind, ERRORS[k % len(ERRORS)]), codec)
            for kind in ("unknown", "from")
        ]
    trials = list(sample(every, "fail"))
    met = BUCKET.carry_out(f"C4 calls fail, S3, {codec}", trials, of=len(every))
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
