"""Writers at full speed are killed at random times, and start again (goal C1)."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.crash_running import quick_folder, run_trials
from support.crash_scripts import MODULE, stream_event
from support.goals import COUNT, SEED, record, trials

from tensorstore_fmt.testing.forks import Child, ChildFailedError, ForkServer
from tensorstore_fmt.testing.oracle import Oracle

LIMIT_S = 60.0
ATTEMPTS = 10
SLOWEST_S = 0.2


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as place:
        yield place


@dataclass(frozen=True, slots=True)
class Job:
    """A run that is killed and resumed several times."""

    url: str
    num_workers: int
    seed: int


@dataclass(slots=True)
class Met:
    """What was counted."""

    kills: int = 0
    events: int = 0
    acknowledged: int = 0
    beyond: int = 0
    values: int = 0
    unopened: int = 0


def listen(child: Child, into: dict[str, int]) -> None:
    """Take what the writer says until its death."""
    for kind, what in child.messages():
        if kind == "error":
            raise ChildFailedError(what)
        into[kind] = what
    into["status"] = child.finish()


def attempt(
    server: ForkServer, job: Job, number: int, resume: int | None, rng: random.Random
) -> dict[int, dict[str, int]]:
    """Start all workers, kill each at a time of its own, and give what they said."""
    children = {}
    for worker in range(job.num_workers):
        arguments = (job.url, (worker, job.num_workers), resume, number)
        children[worker] = server.start(MODULE, "write_stream", *arguments, timeout_s=LIMIT_S)
    heard: dict[int, dict[str, int]] = {w: {} for w in children}
    threads = [
        threading.Thread(target=listen, args=(child, heard[w])) for w, child in children.items()
    ]
    for thread in threads:
        thread.start()
    begin = time.monotonic()
    times = {w: rng.random() ** 1.5 * SLOWEST_S * (1 + job.num_workers / 4) for w in children}
    for worker, when in sorted(times.items(), key=lambda item: item[1]):
        time.sleep(max(0.0, begin + when - time.monotonic()))
        children[worker].kill()
    for thread in threads:
        thread.join()
    assert {said["status"] for said in heard.values()} == {-9}
    return heard


def run_job(server: ForkServer, job: Job, met: Met) -> None:
    """Kill a run's writers again and again; after each time look at what is there."""
    rng = random.Random(job.seed)
    visible = {w: Oracle() for w in range(job.num_workers)}
    resume: int | None = None
    for number in range(ATTEMPTS):
        heard = attempt(server, job, number, resume, rng)
        oracles = {}
        for worker, said in heard.items():
            logged, acknowledged = said.get("logging", 0), said.get("acknowledged", 0)
            kept = visible[worker].resumed(len(visible[worker].events), resume or 0)
            kept.acknowledged += acknowledged
            kept.events += [stream_event(worker, number, resume or 0, i) for i in range(logged)]
            oracles[worker] = kept
            met.events += logged
            met.acknowledged += acknowledged
        arguments = (job.url, visible, oracles, number)
        has_begun, seen = server.call(MODULE, "check_stream", *arguments, timeout_s=LIMIT_S)
        assert has_begun or not any("acknowledged" in said for said in heard.values())
        met.kills += job.num_workers
        met.values += sum(each.values for each in seen.values())
        met.unopened += not has_begun
        if has_begun:
            met.beyond += sum(seen[w].prefix - o.acknowledged for w, o in oracles.items())
            visible = {
                w: Oracle(o.events[: seen[w].prefix], seen[w].prefix) for w, o in oracles.items()
            }
        steps = [event.step for oracle in visible.values() for event in oracle.events]
        if steps or resume is not None:
            resume = max(0, max(steps, default=0) + 1 - rng.randrange(6))


def test_killed_at_any_time(folder: Path) -> None:
    rng = random.Random(SEED)
    single, several = trials(6), trials(1)
    workers = [1] * single + [4] * several
    jobs = [Job(f"{folder}/run-{i}", n, rng.randrange(2**32)) for i, n in enumerate(workers)]
    met = Met()
    wrong = run_trials([MODULE], jobs, lambda server, job: run_job(server, job, met))
    record(
        "C1",
        met.kills,
        runs=len(jobs),
        runs_of_4_workers=several,
        logged=met.events,
        acknowledged=met.acknowledged,
        seen_beyond=met.beyond,
        never_began=met.unopened,
        values_compared=met.values,
        wrong=len(wrong),
    )
    assert not wrong, "\n".join(wrong[:3])
    assert met.kills >= 100 * COUNT
    assert met.acknowledged > met.kills
