"""What runs in child processes of the tests of failed allocations."""

from __future__ import annotations

import itertools
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from support.crash_scripts import OPTIONS, check_url, events_of, fixed_script, play

import tensorstore_fmt as tsf
from tensorstore_fmt.format import codec, merge, segment, shard, statistics
from tensorstore_fmt.storage import open_storage
from tensorstore_fmt.testing.forks import Channel
from tensorstore_fmt.testing.oracle import Oracle
from tensorstore_fmt.testing.writers import create_test_run
from tensorstore_fmt.writing import (
    buffers,
    commit,
    convert,
    encoders,
    encoding,
    intake,
    pending,
    segments,
    snapshots,
    staging,
)

MODULE = __name__


class Allocations:
    """Counts what allocates, and lets one call, or some in a row, find no memory.

    Attributes
    ----------
    seen
        Names of the calls so far, the first being number 1.
    """

    def __init__(self, at: int, count: int = 1) -> None:
        self.seen: list[str] = []
        self._range = range(at, at + count)
        self._lock = threading.Lock()

    def meet(self, name: str) -> None:
        """Count a call."""
        with self._lock:
            self.seen.append(name)
            number = len(self.seen)
        if number in self._range:
            raise MemoryError(f"made to fail: {name}")

    def wrap(self, name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        """Give a function that is counted."""

        def counted(*arguments: Any, **options: Any) -> Any:
            self.meet(name)
            return inner(*arguments, **options)

        return counted


class _Module:
    """Behaves as a module, but counts the calls of its functions."""

    def __init__(self, module: types.ModuleType, allocations: Allocations) -> None:
        self._module = module
        self._allocations = allocations

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if callable(found) and not isinstance(found, type | np.ufunc):
            return self._allocations.wrap(f"{self._module.__name__}.{name}", found)
        return found


_NUMPY = (buffers, commit, convert, encoders, encoding, pending, snapshots)
_FUNCTIONS: tuple[tuple[Any, str], ...] = (
    (codec.Encoder, "__init__"),
    (codec.Encoder, "encode"),
    (shard.ShardEncoder, "batch"),
    (shard.ShardEncoder, "seal"),
    (statistics, "compute"),
    (statistics, "compute_rows"),
    (segment, "encode"),
    (merge, "merge"),
    (segments.page, "encode_entries"),
    (commit, "join_entries"),
    (commit, "pack_strings"),
    (encoding, "pack_strings"),
    (encoding, "Placed"),
    (encoding, "PendingEntry"),
    (encoding, "ShardRow"),
    (encoders, "SaveEncoder"),
    (staging, "InlineStage"),
    (staging, "Save"),
    (intake, "Held"),
    (intake, "Tensor"),
    (intake, "snapshot"),
)


@contextmanager
def failing(allocations: Allocations) -> Iterator[None]:
    """Count the allocations of writers of this process."""
    before = [(module, "np", module.np) for module in _NUMPY]
    before += [(place, name, getattr(place, name)) for place, name in _FUNCTIONS]
    for place, name, what in before:
        is_module = isinstance(what, types.ModuleType)
        wrap = _Module(what, allocations) if is_module else allocations.wrap(name, what)
        setattr(place, name, wrap)
    try:
        yield
    finally:
        for place, name, what in before:
            setattr(place, name, what)


def write_without_memory(channel: Channel, url: str, at: int, count: int) -> dict[str, Any]:
    """Write the fixed script while allocations fail; what `log` raises ends the task."""
    script = fixed_script()
    oracle = Oracle(events_of(script))

    def acknowledge(events: int, is_durable: bool) -> None:
        oracle.acknowledged = events

    allocations = Allocations(at, count)
    options: dict[str, Any] = {"new_id": itertools.count(1).__next__, **OPTIONS}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        run = create_test_run(open_storage(url, writable=True), **options)
        with failing(allocations):
            play(run, script, acknowledge)
            report = run.close()
    if report.failures == 0:
        oracle.acknowledged = len(oracle.events)
    seen = check_url(url, oracle, may_drop=True)
    assert seen is not None
    assert seen.dropped <= report.dropped
    with tsf.open_run(url) as reader:
        if reader.is_closed:
            assert seen.prefix == len(oracle.events), "what is not there is not recorded as dropped"
        else:
            assert count > 1, "one failed allocation, and the run was not closed"
    failures = [str(each.message) for each in warned if "writing failed" in str(each.message)]
    assert len(failures) == bool(report.failures), "warned more than once, or never"
    return {
        "calls": allocations.seen,
        "dropped": report.dropped,
        "seen_dropped": seen.dropped,
        "failures": report.failures,
    }
