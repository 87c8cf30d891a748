"""Case 12: how soon a follower sees what was logged, and what looking in vain costs."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote

import numpy as np

from cases.opening import seconds
from peers.ours import Ours
from suite.bucket import Bucket, serving
from suite.case import Case, Figures, Place, Table, Verdict
from suite.contestant import Contestant

PAUSE_S = 0.02  # between steps
ROUND_TRIP_S = 0.1
KEY = "run"
_MANY = "many"

_WRITER = """
import sys, time
import numpy as np
import tensorstore_fmt as tsf

url, interval, length, pause = sys.argv[1], *map(float, sys.argv[2:])
weights = np.random.default_rng(0).standard_normal((128, 128)).astype(np.float32)
with tsf.create_run(url, flush_interval_s=interval) as run:
    run.log({"stamp": time.monotonic(), "weights": weights}, step=0)
    run.flush()
    print("ready", flush=True)
    sys.stdin.readline()
    end = time.monotonic() + length
    step = 1
    while (now := time.monotonic()) < end:
        weights[0] += 1e-3
        run.log({"stamp": now, "weights": weights}, step=step)
        step += 1
        time.sleep(pause)
"""


class OursFollowing(Contestant):
    """Looks again as often as it thinks best."""

    name = Ours.name
    settings = "for step in run.follow()"
    needs = Ours.needs
    distributions = Ours.distributions
    environment = Ours.environment
    poll_s: ClassVar[float | None] = None


class OursPollingFast(OursFollowing):
    """Told to look very often."""

    name = "ours-poll-10ms"
    settings = "for step in run.follow(poll_s=0.01)"
    poll_s: ClassVar[float | None] = 0.01


class OursPolling(OursFollowing):
    """Told how often to look."""

    name = "ours-poll-500ms"
    settings = "for step in run.follow(poll_s=0.5)"
    poll_s: ClassVar[float | None] = 0.5


def delays(url: str | Path, poll_s: float | None, *, interval: float, length: float) -> np.ndarray:
    """Follow a writer of another process; give for each step how long it took to be seen.

    A step is complete when the next one begins: time counts from there.
    """
    import tensorstore_fmt as tsf

    command = [sys.executable, "-c", _WRITER, *map(str, (url, interval, length, PAUSE_S))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as writer:
        assert writer.stdout is not None
        assert writer.stdin is not None
        if writer.stdout.readline() != "ready\n":
            raise RuntimeError(f"{url}: the writer did not start")
        run = tsf.open_run(url)
        writer.stdin.write("\n")
        writer.stdin.flush()
        seen = [(step, time.monotonic()) for step in run.follow(poll_s=poll_s, timeout_s=60)]
    if writer.returncode:
        raise RuntimeError(f"{url}: the writer failed")
    steps = [step for step, _ in seen]
    stamps = run["stamp"].read()
    if steps != list(range(len(stamps))):
        raise RuntimeError(f"{url}: {len(steps)} steps were seen of {len(stamps)}")
    # Not the first ones, which the run was opened with, nor the last, which closing completes.
    taken = np.array([when for _, when in seen])
    return (taken[:-1] - stamps[1:])[stamps[1:] > stamps[1] + interval]


def _delay_figures(found: np.ndarray, interval: float) -> Figures:
    return {
        "p95_seconds": float(np.percentile(found, 95)),
        "median_seconds": float(np.median(found)),
        "largest_seconds": float(found.max()),
        "interval_seconds": interval,
        "steps": len(found),
    }


class FollowingLocally(Case):
    """On a disk."""

    number: ClassVar[int] = 12
    name = "following-disk"
    question = "How long after it was complete does a follower see a step, on a disk?"
    data = (
        "a writer in another process logs a number and 64 KiB every 20 ms, flushing every second, "
        "for 8 seconds; 95th percentile of the steps"
    )
    unit = "p95_seconds"

    def contestants(self) -> Sequence[type[Contestant]]:
        return [OursFollowing, OursPollingFast]

    def trial(self, contestant: Contestant, place: Place) -> Figures:
        assert isinstance(contestant, OursFollowing)
        import tensorstore_fmt as tsf

        interval, length = (0.2, 1.0) if place.quick else (1.0, 8.0)
        url = place.scratch / "run"
        found = delays(url, contestant.poll_s, interval=interval, length=length)
        run = tsf.open_run(url)
        return {**_delay_figures(found, interval), "idle_look_seconds": seconds(run.refresh, 50)}

    def judge(self, table: Table) -> list[Verdict]:
        must = "95 % of the steps within the flush interval + 30 ms"
        found = table.median(Ours.name, "p95_seconds")
        interval = table.median(Ours.name, "interval_seconds")
        if found is None or interval is None:
            return [Verdict(must, "not measured", None)]
        measured = f"interval {interval:g} s, seen after {found:.3f} s"
        fast = table.median(OursPollingFast.name, "p95_seconds")
        if fast is not None:
            measured += f"; {fast:.3f} s where told to look every 10 ms"
        return [Verdict(must, measured, found <= interval + 0.03)]


class FollowingInBucket(Case):
    """In a bucket that is 100 ms away."""

    number: ClassVar[int] = 12
    name = "following-bucket"
    question = "How long after it was complete does a follower see a step, in a bucket?"
    data = (
        "as on a disk, but every request takes 100 ms, and the writer flushes every 2 seconds, "
        "for 14 seconds; idle looks at a run of one writer, and at one of 600"
    )
    unit = "p95_seconds"

    def contestants(self) -> Sequence[type[Contestant]]:
        return [OursFollowing, OursPolling]

    def prepare(self, contestant: Contestant, place: Place) -> None:
        """Make a run of many writers, and so of many index objects; one contestant looks at it."""
        if contestant.name != Ours.name:
            return
        import tensorstore_fmt as tsf

        count = 20 if place.quick else 600
        local = place.kept / "local"
        for worker in range(count):
            # One of them never comes: the run is not closed, and its index not gathered.
            with tsf.create_run(local, worker=worker, num_workers=count + 1) as run:
                run.log({"loss": float(worker)}, step=0)
        objects = place.kept / "objects"
        objects.mkdir()
        for file in local.rglob("*"):
            if file.is_file():
                key = f"{_MANY}/{file.relative_to(local).as_posix()}"
                file.rename(objects / quote(key, safe=""))

    def trial(self, contestant: Contestant, place: Place) -> Figures:
        assert isinstance(contestant, OursFollowing)
        interval, length = (0.3, 1.5) if place.quick else (2.0, 14.0)
        with serving(place.scratch / "objects") as bucket:
            bucket.set_latency(ROUND_TRIP_S)
            found = delays(bucket.url(KEY), contestant.poll_s, interval=interval, length=length)
            figures = _delay_figures(found, interval)
            bucket.set_latency(0)
            figures |= _idle(bucket, KEY, "idle")
        if contestant.name == Ours.name:
            with serving(place.kept / "objects") as bucket:
                figures |= _idle(bucket, _MANY, "idle_many")
        return figures

    def judge(self, table: Table) -> list[Verdict]:
        poll = OursPolling.poll_s
        assert poll is not None
        must = "95 % of the steps within the flush interval + a poll + 2 round trips"
        found = table.median(OursPolling.name, "p95_seconds")
        interval = table.median(OursPolling.name, "interval_seconds")
        if found is None or interval is None:
            return [Verdict(must, "not measured", None)]
        most = interval + poll + 2 * ROUND_TRIP_S
        verdicts = [Verdict(must, f"{found:.2f} s of {most:.2f} s", found <= most)]
        for which in ("idle", "idle_many"):
            requests = table.median(Ours.name, f"{which}_requests")
            objects = table.median(Ours.name, f"{which}_index_objects")
            if requests is None or objects is None:
                continue
            due = math.ceil(objects / 1000)
            must = f"an idle look at {objects:.0f} index objects: {due} LIST"
            verdicts.append(Verdict(must, f"{requests:g} requests", requests <= due))
        return verdicts


def _idle(bucket: Bucket, key: str, label: str) -> Figures:
    """Count what a look asks for when nothing is new."""
    import tensorstore_fmt as tsf

    run = tsf.open_run(bucket.url(key))
    run.refresh()
    bucket.take_log()
    if run.refresh():
        raise RuntimeError(f"{key}: something was new")
    log = bucket.take_log()
    return {
        f"{label}_requests": len(log),
        f"{label}_lists": sum(request.op == "LIST" for request in log),
        f"{label}_received_bytes": sum(request.nbytes for request in log),
        f"{label}_index_objects": bucket.count(f"{key}/index/"),
    }


CASES: list[Case] = [FollowingLocally(), FollowingInBucket()]
