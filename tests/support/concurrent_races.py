"""What runs in child processes of the races about views: merges, deletion, compacting, closing."""

from __future__ import annotations

import os
import random
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from support.concurrent_scripts import Tally, attempt_in, value_of, warm_up

import tensorstore_fmt as tsf
from tensorstore_fmt.format import bundle, layout
from tensorstore_fmt.storage import open_storage
from tensorstore_fmt.testing.forks import Channel
from tensorstore_fmt.testing.writers import create_test_run
from tensorstore_fmt.upkeep import compact, compacting
from tensorstore_fmt.writing.run import RunWriter

__all__ = ["KINDS", "MODULE", "check", "closing", "compacting_race", "log", "merging", "warm_up"]

MODULE: Final = __name__
KINDS: Final = ("merging", "compacting_race", "closing")
_STEPS: Final = 18


def log(run: RunWriter, step: int, prefix: str = "") -> None:
    """Log something inline, and something that lies in shards."""
    names = [f"{prefix}loss", f"{prefix}middle"]
    run.log({name: value_of(name, step, run.attempt) for name in names}, step=step)


def check(
    run: tsf.Run, steps: int, prefix: str = "", kinds: Sequence[str] = ("loss", "middle")
) -> int:
    """Read all that a view shows: so many steps, each with its value."""
    if run.damage:
        raise run.damage[0]
    for name in [prefix + kind for kind in kinds] if steps else []:
        tensor = run[name]
        assert tensor.steps.tolist() == list(range(steps)), (name, steps, tensor.steps.tolist())
        for step, value in enumerate(tensor.read()):
            attempt_in(name, step, value)
    return 2 * steps


def together(*tasks: Callable[[], object]) -> list[Any]:
    """Run tasks in threads that begin at the same moment."""
    barrier = threading.Barrier(len(tasks))

    def run(task: Callable[[], object]) -> object:
        barrier.wait()
        return task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        return [done.result() for done in [pool.submit(run, task) for task in tasks]]


def merging(channel: Channel, url: str, seed: int) -> Counter[str]:
    """Keep views while their segments are merged and deleted at once; refresh, follow."""
    warnings.simplefilter("error", RuntimeWarning)
    rng = random.Random(seed)
    met: Counter[str] = Counter()
    storage = Tally(open_storage(url, writable=True))
    writer = create_test_run(storage, grace_s=0.0)
    followed: list[int] = []

    def write() -> None:
        for step in range(_STEPS):
            log(writer, step)
            assert writer.flush()
            time.sleep(rng.random() * 0.004)
        writer.close()

    def read() -> None:
        views = []
        while not views or not views[-1][0].is_closed:
            run = tsf.open_run(url)
            views.append((run, len(run.steps())))
            met["values"] += check(*views[rng.randrange(len(views))])
            time.sleep(0.02)
        for run, seen in views:
            met["values"] += check(run, seen)
            met["old views"] += seen < _STEPS
            run.refresh()
            met["values"] += check(run, _STEPS)
            run.close()

    def follow() -> None:
        with tsf.open_run(url) as run:
            for step in run.follow(poll_s=0.005, timeout_s=30.0):
                if step % 5 == 0:
                    attempt_in("middle", step, run["middle"].read(step=step))
                followed.append(step)

    together(write, read, follow)
    assert followed == list(range(_STEPS)), followed
    met.update(merges=storage.merged, deleted=storage.deleted)
    return met


def compacting_race(channel: Channel, url: str, seed: int) -> Counter[str]:
    """Compact a run of dead and closed writers while it is opened, read and compacted again."""
    warnings.simplefilter("error", RuntimeWarning)
    compacting._GRACE_US = 0  # type: ignore[misc] # this process ends with the race
    met: Counter[str] = Counter()
    with create_test_run(url) as writer:
        for step in range(7):
            log(writer, step)
            writer.flush()
    old = tsf.open_run(url)
    kept = [(tsf.open_run(url), 7) for _ in range(2)]

    def tidy() -> None:
        compact(url)  # all writers are closed, so that nothing keeps two tools apart
        met["compacted"] += 1

    def read() -> None:
        for _ in range(2):
            with tsf.open_run(url) as run:
                assert run.is_closed
                met["values"] += check(run, 7)
            for view in kept:
                met["values"] += check(*view)

    def follow() -> None:
        with tsf.open_run(url) as run:
            assert list(run.follow(timeout_s=30.0)) == list(range(7))
            run.refresh()
            met["values"] += check(run, 7)

    together(tidy, tidy, read, follow)
    for run in (old, *(view for view, _ in kept)):
        met["values"] += check(run, 7)
        run.refresh()
        met["values"] += check(run, 7)
        met["old views"] += 1
        run.close()
    segments = [name for name in os.listdir(f"{url}/index") if name.endswith(".seg")]
    assert len(segments) == 1, segments
    return met


def closing(channel: Channel, url: str, seed: int) -> Counter[str]:
    """Let the last two workers close at the same moment; both may write the bundle."""
    warnings.simplefilter("error", RuntimeWarning)
    workers = 2 + seed % 2
    writers = [
        create_test_run(url, worker=i, num_workers=workers, new_id=lambda i=i: i + 1)
        for i in range(workers)
    ]
    for i, writer in enumerate(writers):
        for step in range(3):
            log(writer, step, f"{i}/")
            writer.flush()
    before = tsf.open_run(url)
    together(*(writer.close for writer in writers))
    met: Counter[str] = Counter(closed=workers)
    before.refresh()
    for run in (before, tsf.open_run(url)):
        assert run.is_closed
        for i in range(workers):
            met["values"] += check(run, 3, f"{i}/")
        run.close()
    with open(f"{url}/{layout.BUNDLE}", "rb") as file:
        rows = bundle.decode(file.read(), run_id=bytes.fromhex(before.run_id))
    listed = {name for name in os.listdir(f"{url}/index") if name.endswith(".seg")}
    assert {row.name.path.rpartition("/")[2] for row in rows} == listed
    assert not os.listdir(f"{url}/locks")
    return met
