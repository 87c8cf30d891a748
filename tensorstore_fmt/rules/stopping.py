"""Stopping a training through its run: requests, and who obeys them (spec, "Requests to stop").

A request is a small file in the folder ``stop`` of the run. A `StopWatcher` on the training side
looks for it in a thread. All workers have to stop before the same step, or they would wait for each
other for ever: so each worker that sees the request publishes a step that it will not begin before
it knows what the others published; the greatest of these is where all stop.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from tensorstore_fmt.closeable import Closeable
from tensorstore_fmt.errors import ArgumentError, StateError, TensorStoreError
from tensorstore_fmt.rules.places import STOP, reopen
from tensorstore_fmt.storage import Listing, Prefix, Storage, open_storage

if TYPE_CHECKING:
    from tensorstore_fmt.reading.run import Run
    from tensorstore_fmt.writing.run import RunWriter

__all__ = ["StopWatcher", "TrainingStopped", "request_stop"]

_logger = logging.getLogger("tensorstore_fmt")

_REQUEST: Final = re.compile(r"(\d{6})-([0-9a-f]{16})\.json")
_BOUND: Final = re.compile(r"(\d{6})-(\d{6})-(\d{19})\.json")
_MOST_NBYTES: Final = 64 * 1024
_POLL_S: Final = (1.0, 30.0)  # on a disk, elsewhere
_SOON_S: Final = (0.05, 1.0)  # the same, between a request and the decision


class TrainingStopped(Exception):  # noqa: N818 - no error: somebody wanted it
    """Raised in the training, between two steps, because somebody asked it to stop.

    Attributes
    ----------
    reason
        What the request says.
    step
        The step that does not begin any more.
    """

    def __init__(self, reason: str, step: int) -> None:
        super().__init__(f"training stops before step {step}: {reason}")
        self.reason = reason
        self.step = step

    def __reduce__(self) -> tuple[object, ...]:
        return TrainingStopped, (self.reason, self.step)


def request_stop(
    run: Run | RunWriter | str | os.PathLike[str],
    reason: str,
    *,
    rule: str | None = None,
    step: int | None = None,
    storage_options: Mapping[str, object] | None = None,
) -> str:
    """Ask the training that writes a run to stop; its newest attempt, no later one.

    Parameters
    ----------
    reason
        For people.
    rule, step
        Who asks, and what about.

    Returns
    -------
    str
        Path of the request in the run.

    Raises
    ------
    ArgumentError
        The run has no attempt yet.
    OSError
        The storage refuses to be written to.
    """
    from tensorstore_fmt.reading.run import Run, open_run  # NumPy and Arrow, if not there yet
    from tensorstore_fmt.writing.run import RunWriter

    if isinstance(run, RunWriter):
        storage, attempt = run._storage, run.attempt
    elif isinstance(run, Run):
        storage, attempt = run._session.storage, _newest(run)
    else:
        with open_run(run, storage_options=storage_options) as opened:
            storage, attempt = opened._session.storage, _newest(opened)
    body = {
        "reason": reason, "rule": rule, "step": step, "created_us": time.time_ns() // 1000,
    }  # fmt: skip
    path = f"{STOP}/{attempt:06d}-{secrets.token_hex(8)}.json"
    place = reopen(storage, writable=True)
    try:
        place.publish(path, [json.dumps(body).encode()], if_absent=True)
    finally:
        place.close()
    return path


def _newest(run: Run) -> int:
    if not run.attempts:
        raise ArgumentError(f"{run.describe()} has no attempt that could be stopped")
    return run.attempts[-1]


class StopWatcher(Closeable):
    """Looks, in a thread, whether a training is asked to stop.

    Parameters
    ----------
    run
        The run that the training writes: its writer, or where it lies.
    worker, num_workers
        Of this process; by default the writer's. All of them must watch.
    attempt
        Needed without a writer.
    poll_s
        Seconds between looks, each one LIST of a small folder; 1 on a disk, 30 elsewhere.
    timeout_s
        How long to wait for what other workers say, before stopping without them.
    """

    def __init__(
        self,
        run: RunWriter | str | os.PathLike[str],
        *,
        worker: int | None = None,
        num_workers: int | None = None,
        attempt: int | None = None,
        poll_s: float | None = None,
        timeout_s: float = 300.0,
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        if isinstance(run, str | os.PathLike):
            if attempt is None:
                raise ArgumentError("without a writer, say which attempt= this is")
            self._storage = open_storage(run, storage_options=storage_options, writable=True)
        else:
            self._storage = reopen(run._storage, writable=True)
            attempt = run.attempt if attempt is None else attempt
            worker = run.worker if worker is None else worker
            num_workers = run.num_workers if num_workers is None else num_workers
        self._attempt = attempt
        self._worker = worker or 0
        self._num_workers = num_workers or 1
        remote = not self._storage.is_local
        self._poll_s = _POLL_S[remote] if poll_s is None else poll_s
        self._soon_s = min(_SOON_S[remote], self._poll_s)
        self._timeout_s = timeout_s
        self._lock = threading.Condition()
        self._begun = -1  # the last step that began
        self._bound: int | None = None  # no step from here on begins before `_stop_at` is known
        self._is_published = False
        self._stop_at: int | None = None
        self._reason: str | None = None
        self._has_warned = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="tsf-stop", daemon=True)
        self._thread.start()

    @property
    def stop_requested(self) -> bool:
        """Whether a request was seen. With several workers ask `should_stop` when to stop."""
        return self._reason is not None

    @property
    def reason(self) -> str | None:
        """What the request says; None if there is none."""
        return self._reason

    def should_stop(self, step: int) -> bool:
        """Say whether to stop before a step begins; the same on all workers.

        Ask before every step, with a number that is the same on all workers. Returns at once
        as long as nobody asked to stop; then it may wait once for the other workers.
        """
        with self._lock:
            must_wait = self._bound is not None and step >= self._bound
            if must_wait and not self._lock.wait_for(self._is_decided, self._timeout_s):
                _logger.warning("other workers do not say where they stop; this one stops")
                self._stop_at = step
            if self._stop_at is not None and step >= self._stop_at:
                return True
            self._begun = max(self._begun, step)
            return False

    def _is_decided(self) -> bool:
        return self._stop_at is not None or self._end.is_set()

    def check(self, step: int) -> None:
        """Raise if the training is to stop before this step.

        Raises
        ------
        TrainingStopped
        """
        if self.should_stop(step):
            raise TrainingStopped(self._reason or "", step)

    def close(self) -> None:
        """Stop watching; more than once is fine."""
        self._end.set()
        with self._lock:
            self._lock.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._storage.close()

    # --- the thread -----------------------------------------------------------------------

    def _watch(self) -> None:
        while True:
            try:
                self._look()
            except (OSError, TensorStoreError) as error:  # the next look may fare better
                if not self._has_warned:
                    self._has_warned = True
                    _logger.warning("cannot look for requests to stop: %s", error)
            pause = self._poll_s if self._bound is None else self._soon_s
            if self._is_decided() or self._end.wait(pause):
                return

    def _look(self) -> None:
        (files,) = self._storage.fetch([Listing(STOP)])
        if not files:
            return
        bounds: dict[int, int] = {}
        requests = []
        for file in files:
            if (match := _BOUND.fullmatch(file.base)) and int(match[1]) == self._attempt:
                worker = int(match[2])
                bounds[worker] = max(bounds.get(worker, -1), int(match[3]))
            elif (match := _REQUEST.fullmatch(file.base)) and int(match[1]) == self._attempt:
                requests.append(f"{STOP}/{file.base}")
        if not requests:
            return
        if self._reason is None:
            self._reason = _reason(self._storage, requests[0])
        mine = self._publish_bound()
        bounds[self._worker] = max(mine, bounds.get(self._worker, -1))
        if len(bounds) >= self._num_workers:
            with self._lock:
                self._stop_at = max(bounds.values())
                self._lock.notify_all()

    def _publish_bound(self) -> int:
        """Promise where this worker waits; the promise holds before anybody can read it."""
        with self._lock:
            if self._bound is None:
                self._bound = self._begun + 1
            bound = self._bound
        if not self._is_published:
            name = f"{self._attempt:06d}-{self._worker:06d}-{bound:019d}.json"
            with contextlib.suppress(FileExistsError):  # the same promise of a writer before this
                self._storage.publish(f"{STOP}/{name}", [b"{}\n"], if_absent=True)
            self._is_published = True
        return bound


def _reason(storage: Storage, path: str) -> str:
    """Read what a request says; a stranger may have written it, so that it may say nothing."""
    (found,) = storage.fetch_settled([Prefix(path, _MOST_NBYTES)])
    if isinstance(found, StateError | OSError):
        raise found
    try:
        text = json.loads(found[0])["reason"] if isinstance(found, tuple) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        text = None
    return text if isinstance(text, str) else "(no reason given)"
