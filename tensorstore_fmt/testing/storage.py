"""Storages that count, delay and fail.

They wrap a real storage, so what passes through them is what would happen without.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

from tensorstore_fmt.errors import TruncatedError
from tensorstore_fmt.storage.base import (
    Appender,
    BytesLike,
    Listing,
    Lock,
    Prefix,
    Range,
    Request,
    Storage,
)

__all__ = [
    "CountingStorage",
    "FaultyStorage",
    "LatencyStorage",
    "Operation",
    "WrappedStorage",
]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Operation:
    """Something that a storage was asked to do.

    Attributes
    ----------
    op
        ``range prefix listing map publish create reopen append sync delete lock``.
    path
        File or directory.
    start, stop
        Bytes, where the operation has any: of an append, the place in the file.
    round
        Number of the call: the requests of one fetch have the same.
    """

    op: str
    path: str
    start: int
    stop: int
    round: int


class WrappedStorage(Storage):
    """Pass everything on to another storage; the others override `before`."""

    def __init__(self, inner: Storage) -> None:
        self.inner = inner
        self.url = inner.url
        self.is_local = inner.is_local
        self.can_list = inner.can_list
        self.can_write = inner.can_write
        self.max_gap_bytes = inner.max_gap_bytes
        self._calls = 0
        self._calls_lock = threading.Lock()

    def before(self, operations: Sequence[Operation]) -> Sequence[int | Exception | None]:
        """Learn what is about to happen.

        Returns
        -------
        sequence
            For each operation None, an exception to raise instead, or a number: only so many
            bytes get through.
        """
        return [None] * len(operations)

    def _number(self) -> int:
        with self._calls_lock:
            self._calls += 1
            return self._calls

    def _one(self, op: str, path: str, start: int = 0, stop: int = 0) -> int | None:
        verdict = self.before([Operation(op, path, start, stop, self._number())])[0]
        if isinstance(verdict, Exception):
            raise verdict
        return verdict

    def fetch_settled(self, requests: Sequence[Request[T]]) -> list[T | Exception]:
        """Do as `fetch`, but put what a request would have raised in the place of its result."""
        number = self._number()
        verdicts = self.before([_operation(request, number) for request in requests])
        wanted = [
            request
            for request, verdict in zip(requests, verdicts, strict=True)
            if not isinstance(verdict, Exception)
        ]
        got = iter(self.inner.fetch_settled(wanted))
        return [
            verdict if isinstance(verdict, Exception) else _cut(request, next(got), verdict)
            for request, verdict in zip(requests, verdicts, strict=True)
        ]

    def map(self, path: str, nbytes_needed: int) -> memoryview:
        """Map a file."""
        self._one("map", path, 0, nbytes_needed)
        return self.inner.map(path, nbytes_needed)

    def publish(
        self,
        path: str,
        buffers: Sequence[BytesLike],
        *,
        if_absent: bool = False,
        synced: bool = False,
    ) -> None:
        """Publish a file; cut short, it does not appear."""
        verdict = self._one("publish", path, 0, _total(buffers))
        if verdict is not None:
            raise _disk_full(path)
        self.inner.publish(path, buffers, if_absent=if_absent, synced=synced)

    def create(self, path: str) -> Appender:
        """Create a file to append to."""
        self._one("create", path)
        return _WrappedAppender(self, self.inner.create(path))

    def reopen(self, path: str, *, nbytes: int, keep: int) -> Appender:
        """Cut a file off, to append to what is left."""
        self._one("reopen", path, keep, nbytes)
        return _WrappedAppender(self, self.inner.reopen(path, nbytes=nbytes, keep=keep))

    def local_path(self, path: str) -> str:
        """Give the absolute path of a local file."""
        return self.inner.local_path(path)

    def sync(self, paths: Iterable[str]) -> None:
        """Sync files."""
        doomed = list(paths)
        for path in doomed:
            self._one("sync", path)
        self.inner.sync(doomed)

    def delete(self, paths: Iterable[str]) -> None:
        """Delete files."""
        doomed = list(paths)
        for path in doomed:
            self._one("delete", path)
        self.inner.delete(doomed)

    def lock(self, path: str) -> Lock:
        """Take a lock."""
        self._one("lock", path)
        return self.inner.lock(path)

    def is_locked(self, path: str) -> bool:
        """Ask for a lock."""
        return self.inner.is_locked(path)

    def is_abandoned(self, path: str) -> bool:
        """Ask whether the holder of a lock died."""
        return self.inner.is_abandoned(path)

    def close(self) -> None:
        """Close the inner storage."""
        self.inner.close()


class _WrappedAppender(Appender):
    def __init__(self, storage: WrappedStorage, inner: Appender) -> None:
        self._storage = storage
        self._inner = inner

    @property
    def path(self) -> str:
        return self._inner.path

    @property
    def position(self) -> int:
        return self._inner.position

    def append(self, buffers: Sequence[BytesLike]) -> int:
        start = self.position
        stop = start + _total(buffers)
        verdict = self._storage._one("append", self.path, start, stop)
        if verdict is not None:
            self._inner.append([b"".join(buffers)[:verdict]])
            raise _disk_full(self.path)
        return self._inner.append(buffers)

    def sync(self) -> None:
        self._storage._one("sync", self.path)
        self._inner.sync()

    def close(self) -> None:
        self._inner.close()


class CountingStorage(WrappedStorage):
    """Record every operation.

    Attributes
    ----------
    operations
        All of them, in the order in which they were asked for.
    rounds
        Number of fetches that asked for anything.
    """

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Begin to count anew."""
        self.operations: list[Operation] = []
        self.rounds = 0

    def before(self, operations: Sequence[Operation]) -> Sequence[int | Exception | None]:
        """Record them."""
        with self._lock:
            self.operations += operations
            self.rounds += any(each.op in ("range", "prefix", "listing") for each in operations)
        return super().before(operations)

    @property
    def requests(self) -> list[Operation]:
        """What was fetched."""
        return [each for each in self.operations if each.op in ("range", "prefix", "listing")]

    @property
    def nbytes(self) -> int:
        """Bytes that ranges and prefixes asked for."""
        return sum(each.stop - each.start for each in self.requests)


class LatencyStorage(WrappedStorage):
    """Let every round, and every publish and delete, take longer."""

    def __init__(self, inner: Storage, delay_s: float) -> None:
        super().__init__(inner)
        self.delay_s = delay_s

    def before(self, operations: Sequence[Operation]) -> Sequence[int | Exception | None]:
        """Wait."""
        if operations:
            time.sleep(self.delay_s)
        return super().before(operations)


class FaultyStorage(WrappedStorage):
    """Ask a hook before every operation.

    Parameters
    ----------
    inner
        What does the work.
    hook
        Called with each `Operation`. What it raises is the operation's failure. A number lets
        only so many bytes through: of a file that is read, as if it ended there; of one that is
        written, as if the disk were full then.
    """

    def __init__(self, inner: Storage, hook: Callable[[Operation], int | None]) -> None:
        super().__init__(inner)
        self.hook = hook

    def before(self, operations: Sequence[Operation]) -> Sequence[int | Exception | None]:
        """Ask the hook."""
        return [self._verdict(each) for each in operations]

    def _verdict(self, operation: Operation) -> int | Exception | None:
        try:
            return self.hook(operation)
        except Exception as error:  # noqa: BLE001 - it becomes the operation's failure
            return error


def _operation(request: Request[object], number: int) -> Operation:
    if isinstance(request, Range):
        return Operation("range", request.path, request.start, request.stop, number)
    if isinstance(request, Prefix):
        return Operation("prefix", request.path, 0, request.nbytes, number)
    assert isinstance(request, Listing)
    return Operation("listing", request.directory, 0, 0, number)


def _cut(
    request: Request[T], result: T | Exception, verdict: int | Exception | None
) -> T | Exception:
    if not isinstance(verdict, int) or isinstance(result, Exception):
        return result
    if isinstance(request, Range):
        return TruncatedError(f"{request.path}: cut short", file=request.path, offset=verdict)
    if isinstance(request, Prefix):
        data, _ = cast("tuple[bytes, int | None]", result)
        return cast("T", (data[:verdict], min(verdict, len(data))))
    return result


def _total(buffers: Sequence[BytesLike]) -> int:
    return sum(memoryview(each).nbytes for each in buffers)


def _disk_full(path: str) -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
