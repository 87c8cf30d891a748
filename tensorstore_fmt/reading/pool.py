"""The few threads that decode, shared by all runs of a process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

__all__ = ["THREADS", "run_all"]

T = TypeVar("T")

THREADS: Final = min(8, os.cpu_count() or 1)

_pool: ThreadPoolExecutor | None = None
_lock = threading.Lock()


def _shared() -> ThreadPoolExecutor:
    global _pool  # noqa: PLW0603 - one pool for all runs of the process, made when first needed
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(THREADS, thread_name_prefix="tensorstore_fmt-decode")
        return _pool


def _after_fork() -> None:
    global _pool, _lock  # noqa: PLW0603 - threads and held locks do not survive a fork
    _pool = None
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def run_all(work: Callable[[T], None], items: Sequence[T]) -> None:
    """Do the work on each item, the first one in this thread; raise the first error.

    Returns when nothing runs any more, also if something was raised.
    """
    pending: list[Future[None]] = []
    rest = items[1:]
    try:
        while rest:
            pending.append(_shared().submit(work, rest[0]))
            rest = rest[1:]
    except RuntimeError:  # the interpreter is shutting down and starts no threads
        pass
    error: BaseException | None = None
    try:
        for item in (*items[:1], *rest):
            work(item)
    except BaseException as raised:  # noqa: BLE001 - raised again when all have ended
        error = raised
    for future in pending:
        if error is not None:
            future.cancel()
        raised_there = None if future.cancelled() else future.exception()
        error = error or raised_there
    if error is not None:
        raise error
