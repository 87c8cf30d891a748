"""What runs in child processes of the soak, and of the tests of leaks."""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import shutil
import threading
import time
import warnings
from typing import Any, Final

import numpy as np
import pyarrow as pa
from support.concurrent_scripts import warm_up
from support.memory import peak_kib

import tensorstore_fmt as tsf
from tensorstore_fmt.testing.forks import Channel

__all__ = ["MODULE", "cycles", "follow_values", "fork_readers", "many_threads", "warm_up"]

MODULE: Final = __name__
SCALARS: Final = 44
TENSORS: Final = {"small": (16,), "bias": (64,), "weight": (32, 16)}
STEPS_PER_S: Final = 100


def soak_values(step: int) -> dict[str, Any]:
    """Give 50 values that tell their step: 44 numbers, 6 small tensors."""
    values: dict[str, Any] = {f"scalar/{i}": float(step * 64 + i) for i in range(SCALARS)}
    for i, (name, shape) in enumerate(TENSORS.items()):
        size = int(np.prod(shape))
        for j in range(2):
            flat = step * 64.0 + 10 * i + j + np.arange(size) / 4096
            values[f"{name}/{j}"] = flat.reshape(shape)
    return values


def health() -> tuple[int, int, int]:
    """Give memory in use in bytes, open descriptors and threads of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    return resident, len(os.listdir("/proc/self/fd")) - 1, threading.active_count()


class Times:
    """Counts of times by the microsecond: memory that does not grow with them."""

    def __init__(self) -> None:
        self._counts = np.ones(100_001, np.int64) - 1  # written to, so that it is there

    def add(self, seconds: float) -> None:
        self._counts[min(int(seconds * 1e6), 100_000)] += 1

    def percentile(self, percent: float) -> int:
        """Give microseconds; 100,000 stands for all that is more."""
        ends = np.cumsum(self._counts)
        return int(np.searchsorted(ends, ends[-1] * percent / 100))


def write_steadily(channel: Channel, url: str, seconds: float) -> dict[str, Any]:
    """Write 100 steps a second; say every second how this process is."""
    warnings.simplefilter("error")
    run = tsf.create_run(url, flush_interval_s=0.5, on_error="raise")
    begin = time.monotonic()
    log_us, late_us = Times(), Times()  # of ten scalars, and of the forty other values
    total = round(seconds * STEPS_PER_S)
    queued = 0
    for step in range(total):
        values = soak_values(step)
        ten = {f"scalar/{i}": values.pop(f"scalar/{i}") for i in range(10)}
        start = time.perf_counter()
        run.log(ten, step=step)
        middle = time.perf_counter()
        run.log(values, step=step)
        log_us.add(middle - start)
        late_us.add(time.perf_counter() - middle)
        queued = max(queued, run._intake._generation.raw_nbytes)
        if step % STEPS_PER_S == 0:
            ctypes.CDLL(None).malloc_trim(0)  # what allocators keep of freed memory is not ours
            pa.default_memory_pool().release_unused()
            channel.send(("health", (time.monotonic() - begin, *health(), queued)))
            queued = 0
        time.sleep(max(0.0, begin + (step + 1) / STEPS_PER_S - time.monotonic()))
    report = run.close()
    return {
        "steps": report.steps,
        "dropped": report.dropped,
        "stalled_s": report.stalled_s,
        "p99_us": log_us.percentile(99),
        "p99_of_40_us": late_us.percentile(99),
        "segments": len(os.listdir(f"{url}/index")),
    }


def follow_values(channel: Channel, url: str, kind: str) -> dict[str, int]:
    """Follow a run to its end: check values step by step, or statistics as a rule would."""
    warnings.simplefilter("error")
    begin = last = time.monotonic()
    followed = 0
    with tsf.open_run(url) as run:
        for step in run.follow(timeout_s=60.0):
            assert step == followed, (step, followed)
            followed += 1
            if kind == "rule":
                if step % 10 == 9:
                    stats = run["weight/0"].stats(steps=range(step - 9, step + 1))
                    wanted = [np.max(soak_values(s)["weight/0"]) for s in range(step - 9, step + 1)]
                    assert stats["max"].tolist() == wanted
            elif step % 3 == 0:
                name = ("scalar/7", "small/1", "weight/0")[step % 9 // 3]
                assert np.array_equal(run[name].read(step=step), soak_values(step)[name])
            if time.monotonic() > last + 1.0:
                last = time.monotonic()
                channel.send(("health", (last - begin, *health(), followed)))
    return {"followed": followed}


def check_soak(channel: Channel, url: str, steps: int) -> int:
    """Compare everything that was written; give the number of values."""
    with tsf.open_run(url) as run:
        assert run.is_closed
        assert not run.damage
        assert run.steps().tolist() == list(range(steps))
        names = run.names()
        assert names == sorted(soak_values(0))
        for name in names:
            wanted = np.array([soak_values(step)[name] for step in range(0, steps, 97)])
            found = run[name].read(steps=range(0, steps, 97))
            assert np.array_equal(found, wanted), name
            assert len(run[name].steps) == steps
    return steps * len(names)


def cycles(channel: Channel, folder: str, count: int) -> tuple[Any, Any, list[str]]:
    """Open and close writers and readers; give the health before and after, and what is left."""
    warnings.simplefilter("error")
    before = None
    for number in range(count + 20):
        if number == 20:  # what is made once per process is there now
            gc.collect()
            before = health()
        url = f"{folder}/run-{number % 2}"
        run = tsf.create_run(url, flush_interval_s=60.0)
        run.log({"loss": 0.5, "large": np.arange(1000.0)}, step=number)
        run.flush()
        with tsf.open_run(url) as reader:
            assert reader["loss"].read(step=number) == 0.5
            reader.refresh()
        run.close()
        with tsf.open_run(url) as reader:
            assert list(reader.follow()) == [number]
            assert reader["large"].read(step=number)[-1] == 999.0
        left = [name for _, _, files in os.walk(url) for name in files]
        known = (".seg", ".arrow", "run.json", "index.bundle")
        if extra := [name for name in left if not name.endswith(known)]:
            return before, health(), extra
        shutil.rmtree(url)
    gc.collect()
    return before, health(), []


# --- one reader, many users ------------------------------------------------------------------


def write_small(url: str) -> None:
    """Write a run of which all steps are right if they follow from their number."""
    with tsf.create_run(url) as run:
        for step in range(30):
            run.log(soak_values(step), step=step)
            run.log({"large": step + np.arange(30_000.0)}, step=step)
            if step % 4 == 0:
                run.flush()


def read_ten(run: tsf.Run, seed: int) -> None:
    """Read ten values with a reader that others use too."""
    for i in range(10):
        step = (seed * 7 + i * 11) % 30
        name = ("scalar/3", "weight/1", "small/0", "large")[(seed + i) % 4]
        found = run[name].read(step=step)
        wanted = step + np.arange(30_000.0) if name == "large" else soak_values(step)[name]
        if not np.array_equal(found, wanted):
            raise AssertionError(f"{name} at {step}: {found!r:.100}")


def many_threads(channel: Channel, url: str, count: int) -> tuple[int, int, list[int], list[str]]:
    """Read in so many threads at once, and again in as many.

    Returns
    -------
    tuple
        Threads that came to their end; by how many bytes memory grew at most; what was kept of it
        after each time; what went wrong.
    """
    write_small(url)
    threading.stack_size(256 * 1024)
    wrong: list[str] = []
    done: list[int] = []
    kept: list[int] = []

    def work(number: int, start: threading.Event) -> None:
        start.wait()
        try:
            read_ten(run, number)
            done.append(number)
        except Exception as error:  # noqa: BLE001 - all that is wrong is gathered
            wrong.append(repr(error))

    with tsf.open_run(url) as run:
        before = health()[0]
        for _ in range(2):
            start = threading.Event()
            threads = [threading.Thread(target=work, args=(i, start)) for i in range(count)]
            for thread in threads:
                thread.start()
            start.set()
            for thread in threads:
                thread.join()
            threads.clear()
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what the C library keeps of freed memory is not ours
            kept.append(health()[0] - before)
        return len(done), peak_kib() * 1024 - before, kept, wrong


def fork_readers(channel: Channel, url: str, count: int) -> tuple[list[int], bytes]:
    """Fork while threads read; the children read on. Give their ends, and the reader pickled."""
    write_small(url)
    run = tsf.open_run(url)
    stop = threading.Event()

    def work(number: int) -> None:
        while not stop.is_set():
            read_ten(run, number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    ends = []
    for number in range(count):
        time.sleep(0.01)
        child = os.fork()
        if child == 0:
            end = 1
            try:
                read_ten(run, number)
                run.refresh()
                read_ten(run, number + 1)
                end = 0
            finally:
                os._exit(end)
        ends.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in ends]
    stop.set()
    for thread in threads:
        thread.join()
    return statuses, pickle.dumps(run)
