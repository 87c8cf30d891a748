"""A storage that dies or fails at its k-th call, and the same for single system calls."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, TypeVar, cast

from tensorstore_fmt.storage.base import Appender, BytesLike, Lock, Request, Storage
from tensorstore_fmt.testing.storage import Operation, WrappedStorage, _operation, _total
from tensorstore_fmt.testing.system_calls import Hook, SystemCall

__all__ = [
    "CRASHED",
    "ERRORS",
    "CrashStorage",
    "Fault",
    "FaultKind",
    "crash_at",
]

T = TypeVar("T")

CRASHED: Final = 77
"""Exit status of a process that died on purpose."""

ERRORS: Final = ("EIO", "ENOSPC", "EDQUOT", "EINTR")

FaultKind: TypeAlias = Literal["before", "after", "fail", "short", "unknown", "from"]


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens at one call.

    Attributes
    ----------
    at
        Number of the call, from 1 on; 0: nothing ever happens.
    kind
        ``before`` and ``after``: the process ends there, without any goodbye. ``fail``: the call
        fails once. ``short``: half of the bytes are written, then it fails; of what appears at
        once nothing does. ``unknown``: it is done, and fails nevertheless. ``from``: this call
        and all later ones fail.
    error
        Name of the errno of failures.
    """

    at: int
    kind: FaultKind = "fail"
    error: str = "EIO"

    def exception(self, path: str) -> OSError:
        """Give the failure."""
        number = getattr(errno, self.error)
        return OSError(number, f"{os.strerror(number)} (made to fail)", path)


class CrashStorage(WrappedStorage):
    """Number all calls, and do what a `Fault` says at one of them.

    Attributes
    ----------
    operations
        What was asked for so far, the first being number 1.
    """

    def __init__(self, inner: Storage, fault: Fault) -> None:
        super().__init__(inner)
        self.fault = fault
        self.operations: list[Operation] = []
        self._order = threading.RLock()

    @property
    def was_reached(self) -> bool:
        """Whether the call of the fault was made."""
        return 0 < self.fault.at <= len(self.operations)

    def _meet(self, operation: Operation) -> FaultKind | None:
        """Number a call; say what has to happen with it."""
        with self._order:
            self.operations.append(operation)
            number = len(self.operations)
        kind, at = self.fault.kind, self.fault.at
        if not at or (number < at if kind == "from" else number != at):
            return None
        if kind == "before":
            os._exit(CRASHED)
        return kind

    def _perform(
        self,
        op: str,
        path: str,
        perform: Callable[[], T],
        *,
        half: Callable[[], object] = lambda: None,
        start: int = 0,
        stop: int = 0,
    ) -> T:
        kind = self._meet(Operation(op, path, start, stop, self._number()))
        if kind in ("fail", "from"):
            raise self.fault.exception(path)
        if kind == "short":
            half()
            raise self.fault.exception(path)
        result = perform()
        if kind == "after":
            os._exit(CRASHED)
        if kind == "unknown":
            raise self.fault.exception(path)
        return result

    def fetch_settled(self, requests: Sequence[Request[T]]) -> list[T | Exception]:
        """Do as `fetch`, but put what a request would have raised in the place of its result."""
        number = self._number()
        kinds = [self._meet(_operation(request, number)) for request in requests]
        wanted = [r for r, kind in zip(requests, kinds, strict=True) if kind in (None, "after")]
        results = iter(self.inner.fetch_settled(wanted))
        if "after" in kinds:
            os._exit(CRASHED)
        return [
            next(results) if kind is None else self.fault.exception(_operation(r, number).path)
            for r, kind in zip(requests, kinds, strict=True)
        ]

    def map(self, path: str, nbytes_needed: int) -> memoryview:
        """Map a file."""
        return self._perform("map", path, lambda: self.inner.map(path, nbytes_needed))

    def publish(
        self,
        path: str,
        buffers: Sequence[BytesLike],
        *,
        if_absent: bool = False,
        synced: bool = False,
    ) -> None:
        """Publish a file; cut short, it does not appear."""
        self._perform(
            "publish",
            path,
            lambda: self.inner.publish(path, buffers, if_absent=if_absent, synced=synced),
            stop=_total(buffers),
        )

    def create(self, path: str) -> Appender:
        """Create a file to append to."""
        inner = self._perform("create", path, lambda: self.inner.create(path))
        return _CrashAppender(self, inner)

    def reopen(self, path: str, *, nbytes: int, keep: int) -> Appender:
        """Cut a file off, to append to what is left."""
        inner = self._perform(
            "reopen", path, lambda: self.inner.reopen(path, nbytes=nbytes, keep=keep)
        )
        return _CrashAppender(self, inner)

    def sync(self, paths: Iterable[str]) -> None:
        """Sync files, one call for each."""
        for path in paths:
            self._perform("sync", path, lambda path=path: self.inner.sync([path]))  # type: ignore[misc] # bound at once

    def delete(self, paths: Iterable[str]) -> None:
        """Delete files, one call for each."""
        for path in paths:
            self._perform("delete", path, lambda path=path: self.inner.delete([path]))  # type: ignore[misc] # bound at once

    def lock(self, path: str) -> Lock:
        """Take a lock."""
        return self._perform("lock", path, lambda: self.inner.lock(path))


class _CrashAppender(Appender):
    def __init__(self, storage: CrashStorage, inner: Appender) -> None:
        self._storage = storage
        self._inner = inner

    @property
    def path(self) -> str:
        return self._inner.path

    @property
    def position(self) -> int:
        return self._inner.position

    def append(self, buffers: Sequence[BytesLike]) -> int:
        def half() -> None:
            data = b"".join(buffers)
            self._inner.append([data[: len(data) // 2]])

        start = self.position
        return self._storage._perform(
            "append",
            self.path,
            lambda: self._inner.append(buffers),
            half=half,
            start=start,
            stop=start + _total(buffers),
        )

    def sync(self) -> None:
        self._storage._perform("sync", self.path, self._inner.sync)

    def close(self) -> None:
        self._inner.close()


def crash_at(at: int, where: Literal["before", "half", "after"]) -> tuple[Hook, list[SystemCall]]:
    """Give a hook for `intercepted` that ends the process at the k-th system call.

    ``half`` writes half of the bytes first; of all calls but ``write`` it is ``before``.

    Returns
    -------
    tuple
        The hook, and the list to which it adds the calls that it saw.
    """
    seen: list[SystemCall] = []

    def hook(call: SystemCall, perform: Callable[[], object]) -> object:
        seen.append(call)
        if len(seen) != at:
            return perform()
        if where == "half" and call.op == "write":
            _append(call.path, call.data[: len(call.data) // 2])
        if where == "after":
            perform()
        os._exit(CRASHED)

    return cast("Hook", hook), seen


def _append(path: str, data: bytes) -> None:
    with open(path, "ab") as file:
        file.write(data)
