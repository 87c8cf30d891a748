"""A run in any place that is not a local disk, through fsspec's event loop.

`RemoteStorage` holds what all such places have in common: rounds of requests, retries, and one
connection per process. An `ObjectStore` makes single requests and says which failures may pass.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import secrets
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import (
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Mapping,
    Sequence,
)
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, Final, TypeVar, cast

import fsspec.asyn
from fsspec.core import split_protocol

from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.storage.base import (
    BytesLike,
    FileInfo,
    Listing,
    Prefix,
    Range,
    Request,
    Storage,
    check_path,
    without_credentials,
)
from tensorstore_fmt.storage.retry import RetryPolicy, with_retries

T = TypeVar("T")

_CLOSE_TIMEOUT_S: Final = 0.5


class ObjectStore(ABC):
    """Single requests to one place, which may be for reading only.

    Each is tried once, and awaited on fsspec's loop.

    Whatever may pass is raised as `TransientError`, a missing file as `FileNotFoundError`, a
    missing bucket as `StoreNotFoundError`, a refusal as `PermissionError`.
    """

    max_in_flight: int = 64

    @abstractmethod
    async def read(self, path: str, start: int, stop: int) -> bytes:
        """Get exactly these bytes, at least one."""

    @abstractmethod
    async def read_prefix(self, path: str, nbytes: int) -> tuple[bytes, int | None]:
        """Get the first bytes, and the length of the file if the answer tells it."""

    async def close(self) -> None:  # noqa: B027 - some have nothing to close
        """Close connections."""


class WritableStore(ObjectStore):
    """A place that can also be listed and written to."""

    @abstractmethod
    async def list_page(
        self, directory: str, token: str | None
    ) -> tuple[list[FileInfo], str | None]:
        """Get files of a directory, and a token if there are more."""

    @abstractmethod
    async def write(self, path: str, data: bytes, *, once: str | None, attempt: int) -> None:
        """Put a whole file.

        ``once`` is None, or a random id of this put, which then must not replace a file of
        anybody else. ``attempt`` is 0 at the first try of the same put.
        """

    @abstractmethod
    async def delete(self, paths: Sequence[str]) -> None:
        """Remove files, missing ones too."""


OpenStore = Callable[[asyncio.AbstractEventLoop], ObjectStore]


class RemoteStorage(Storage):
    """A run behind an `ObjectStore`.

    Parameters
    ----------
    url, options, writable
        As given to `open_storage`.
    open_store
        Makes the store; called once in every process that uses this storage.
    can_list
        Whether that is a `WritableStore`, though the run may be opened for reading only.
    retry
        How long to go on when requests fail.
    """

    is_local = False
    max_gap_bytes = 1024 * 1024

    def __init__(
        self,
        url: str,
        options: Mapping[str, object],
        *,
        writable: bool,
        open_store: OpenStore,
        can_list: bool = True,
        retry: RetryPolicy | None = None,
    ) -> None:
        self.url = url
        self.can_write = writable
        self.can_list = can_list
        self.retry = retry or RetryPolicy()
        self._options = dict(options)
        self._open_store = open_store
        self._start_process()

    def _start_process(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._store: ObjectStore | None = None
        self._finalizer: weakref.finalize[..., RemoteStorage] | None = None

    def __reduce__(self) -> tuple[Callable[..., Storage], tuple[object, ...]]:
        return partial(_reopen, writable=self.can_write), (self.url, self._options)

    # --- reading --------------------------------------------------------------
    def fetch_settled(self, requests: Sequence[Request[T]]) -> list[T | Exception]:
        """Do as `fetch`, but put what a request would have raised in the place of its result."""
        if not requests:
            return []
        results = self._run(lambda store: self._round(store, requests))
        return cast("list[T | Exception]", results)

    def fetch_each(
        self, ranges: Sequence[Range], *, most_nbytes: int
    ) -> Generator[tuple[int, BytesLike | Exception]]:
        """Do as `fetch_settled`, but give each result, and its number, when it is there."""
        loop = fsspec.asyn.get_loop()
        if threading.current_thread() is fsspec.asyn.iothread[0]:
            raise ArgumentError(
                f"{self.describe()} cannot be read inside of fsspec's event loop: it would wait "
                "for itself"
            )
        store = self._connected(loop)
        arrived: SimpleQueue[tuple[int, Future[Any]]] = SimpleQueue()
        on_the_way: dict[int, Future[Any]] = {}
        nbytes = following = 0

        def has_room() -> bool:
            if not on_the_way:
                return True
            is_small = nbytes + ranges[following].nbytes <= most_nbytes
            return is_small and len(on_the_way) < store.max_in_flight

        try:
            while on_the_way or following < len(ranges):
                while following < len(ranges) and has_room():
                    coming = asyncio.run_coroutine_threadsafe(
                        self._answer(store, ranges[following]), loop
                    )
                    on_the_way[following] = coming
                    coming.add_done_callback(partial(_put, arrived, following))
                    nbytes += ranges[following].nbytes
                    following += 1
                number, coming = arrived.get()
                del on_the_way[number]
                nbytes -= ranges[number].nbytes
                failure = coming.exception()
                if failure is not None and not isinstance(failure, Exception):
                    raise failure
                yield number, coming.result() if failure is None else failure
                del coming  # or its bytes stay while the next ones are waited for
        finally:
            for coming in on_the_way.values():
                coming.cancel()

    async def _round(
        self, store: ObjectStore, requests: Sequence[Request[T]]
    ) -> list[object | BaseException]:
        # more at once would only wait for a connection, and perhaps time out waiting
        slots = asyncio.Semaphore(store.max_in_flight)

        async def one(request: Request[T]) -> object:
            async with slots:
                return await self._answer(store, request)

        results = await asyncio.gather(*map(one, requests), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, Exception):
                raise result
        return results

    async def _answer(self, store: ObjectStore, request: Request[T]) -> Any:  # noqa: ANN401 - as asked
        if isinstance(request, Range):
            path, start, stop = check_path(request.path), request.start, request.stop
            if start == stop:
                return b""
            return await self._retried(lambda: store.read(path, start, stop), stop - start)
        if isinstance(request, Prefix):
            path, nbytes = check_path(request.path), request.nbytes
            return await self._retried(lambda: store.read_prefix(path, nbytes), nbytes)
        if isinstance(request, Listing):
            return await self._list(store, request.directory)
        raise ArgumentError(f"{request!r} is not a request")

    async def _list(self, store: ObjectStore, directory: str) -> list[FileInfo]:
        if not isinstance(store, WritableStore):
            raise ArgumentError(f"{self.describe()} cannot be listed")
        if directory:
            check_path(directory)
        found: list[FileInfo] = []
        token: str | None = None
        while True:
            # each page by itself: one failure must not cost the pages before it
            page, token = await self._retried(partial(store.list_page, directory, token))
            found += page
            if token is None:
                break
        found.sort(key=lambda info: info.base)
        return found

    # --- writing --------------------------------------------------------------
    def publish(
        self,
        path: str,
        buffers: Sequence[BytesLike],
        *,
        if_absent: bool = False,
        synced: bool = False,  # noqa: ARG002 - what a store acknowledged is safe
    ) -> None:
        """Make a whole file appear at once under its name: one PUT."""
        self._check_writable()
        check_path(path)
        only = buffers[0] if len(buffers) == 1 else None
        data = only if isinstance(only, bytes) else b"".join(buffers)
        once = secrets.token_hex(16) if if_absent else None

        async def put(store: ObjectStore) -> None:
            into = self._writable(store)
            await with_retries(
                lambda attempt: into.write(path, data, once=once, attempt=attempt),
                self.retry,
                nbytes=len(data),
            )

        self._run(put)

    def sync(self, paths: Iterable[str]) -> None:
        """Do nothing: what the store acknowledged is safe."""

    def delete(self, paths: Iterable[str]) -> None:
        """Remove files; those that do not exist are fine."""
        self._check_writable()
        doomed = [check_path(path) for path in paths]
        if doomed:
            self._run(lambda store: self._retried(lambda: self._writable(store).delete(doomed)))

    def _check_writable(self) -> None:
        if not self.can_write:
            raise ArgumentError(f"{self.describe()} was opened for reading only")

    def _writable(self, store: ObjectStore) -> WritableStore:
        if not isinstance(store, WritableStore):
            raise ArgumentError(f"{self.describe()} is for reading only")
        return store

    # --- the event loop -------------------------------------------------------
    async def _retried(self, attempt: Callable[[], Awaitable[T]], nbytes: int = 0) -> T:
        return await with_retries(lambda _: attempt(), self.retry, nbytes=nbytes)

    def _run(self, work: Callable[[ObjectStore], Coroutine[Any, Any, T]]) -> T:
        loop = fsspec.asyn.get_loop()
        store = self._connected(loop)
        return cast("T", fsspec.asyn.sync(loop, work, store))

    def _connected(self, loop: asyncio.AbstractEventLoop) -> ObjectStore:
        if os.getpid() != self._pid:
            # Loop and connections belong to the parent; its thread does not run here. See
            # _discard for why they must not even be closed.
            self._start_process()
        with self._lock:
            if self._store is None:
                self._store = self._open_store(loop)
                self._finalizer = weakref.finalize(self, _discard, self._store, loop, os.getpid())
            return self._store

    def close(self) -> None:
        """Close connections; using the storage again opens new ones."""
        if os.getpid() != self._pid:
            self._start_process()
        with self._lock:
            finalizer, self._finalizer, self._store = self._finalizer, None, None
        if finalizer is not None:
            finalizer()


def _put(arrived: SimpleQueue[tuple[int, Future[Any]]], number: int, coming: Future[Any]) -> None:
    arrived.put((number, coming))


def _discard(store: ObjectStore, loop: asyncio.AbstractEventLoop, pid: int) -> None:
    if os.getpid() != pid:
        # Forked: the selector is shared with the parent, and closing a connection here would
        # make the parent deaf on its own. So this copy is never freed, not even at exit.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(store))
        return
    if not loop.is_running():
        return
    closing = asyncio.run_coroutine_threadsafe(store.close(), loop)
    if threading.current_thread() is fsspec.asyn.iothread[0]:
        return  # the garbage collector ran on the loop's own thread: waiting would never end
    with suppress(Exception):  # nothing depends on a polite goodbye
        closing.result(_CLOSE_TIMEOUT_S)


def open_remote(
    url: str,
    options: dict[str, object],
    *,
    writable: bool,
    retry: RetryPolicy | None = None,
) -> RemoteStorage:
    """Choose the store for a URL and check the options; sends no request."""
    protocol = "" if "::" in url else split_protocol(url)[0]
    if protocol in ("http", "https"):
        from tensorstore_fmt.storage.http import http_opener  # aiohttp costs 0.2 s to import

        if writable:
            raise ArgumentError(f"{without_credentials(url)}: HTTP is for reading only")
        return RemoteStorage(
            url,
            options,
            writable=False,
            open_store=http_opener(url, options),
            can_list=False,
            retry=retry,
        )
    if protocol in ("s3", "s3a"):
        from tensorstore_fmt.storage.s3 import s3_opener  # botocore costs 0.4 s to import

        opener = s3_opener(url, options)
    else:
        from tensorstore_fmt.storage.generic import generic_opener  # like its two siblings

        opener = generic_opener(url, options)
    return RemoteStorage(url, options, writable=writable, open_store=opener, retry=retry)


def _reopen(url: str, options: dict[str, object], *, writable: bool) -> RemoteStorage:
    return open_remote(url, options, writable=writable)


def check_options(options: Mapping[str, object], known: Iterable[str], where: str) -> None:
    """Refuse options that nobody would look at."""
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ArgumentError(
            f"{where}: unknown storage_options {', '.join(unknown)}; "
            f"known are {', '.join(sorted(known)) or 'none'}",
            options=unknown,
        )
