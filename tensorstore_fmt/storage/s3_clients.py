"""Clients of S3, which runs share: botocore takes longer to make one than many a read takes.

A client stays open when the last run that used it is closed, for the next one. Nothing is
remembered of what a store holds: s3fs keeps no listings here, and who was told what is with the
run.
"""

from __future__ import annotations

import asyncio
import atexit
import copy
import ctypes
import os
import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from contextlib import suppress
from typing import Any, Final

import s3fs

__all__ = ["Client", "Clients", "shared_clients"]

_MOST_IDLE: Final = 4
_CLOSE_TIMEOUT_S: Final = 0.5
_PLAIN: Final = (type(None), bool, int, float, str, bytes)


class Client:
    """A file system of s3fs, and how many use it."""

    __slots__ = ("filesystem", "key", "loop", "users")

    def __init__(
        self,
        filesystem: Any,  # noqa: ANN401 - untyped
        loop: asyncio.AbstractEventLoop,
        key: Hashable | None,
    ) -> None:
        self.filesystem = filesystem
        self.loop = loop
        self.key = key
        self.users = 0

    async def close(self) -> None:
        """Close connections."""
        creator = getattr(self.filesystem, "_s3creator", None)
        if creator is not None:
            await creator.__aexit__(None, None, None)


class Clients:
    """The clients of one process. Threads share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shared: OrderedDict[Hashable, Client] = OrderedDict()  # the last used at the end
        self._most_idle = _MOST_IDLE

    def lease(self, loop: asyncio.AbstractEventLoop, options: Mapping[str, Any]) -> Client:
        """Give the client for these options on this loop, to be given back.

        One that holds objects (a session, say) is not shared: nobody can tell whether two mean
        the same.
        """
        try:
            key: Hashable | None = (loop, _frozen(options), _surroundings())
        except TypeError:
            key = None
        else:
            options = copy.deepcopy(dict(options))  # who changes theirs must not change the key's
        with self._lock:
            found = None if key is None else self._shared.get(key)
            if found is not None:
                found.users += 1
                return found
        made = Client(_filesystem(loop, options), loop, key)
        if key is None:
            made.users = 1
            return made
        with self._lock:
            client = self._shared.setdefault(key, made)
            client.users += 1
            return client

    async def give_back(self, client: Client) -> None:
        """Say that one user less has it; awaited on the client's loop."""
        with self._lock:
            client.users -= 1
            if client.key is None:
                closing = [] if client.users else [client]
            else:
                self._shared.move_to_end(client.key)
                closing = self._take_idle(self._most_idle)
        for each in closing:
            if each.loop is client.loop:
                await each.close()
            elif each.loop.is_running():
                asyncio.run_coroutine_threadsafe(each.close(), each.loop)

    def unshare(self, client: Client) -> None:
        """Let no other have it: it was denied access, and a new one may have other credentials."""
        with self._lock:
            if client.key is not None:
                self._shared.pop(client.key, None)
                client.key = None

    def close_idle(self) -> None:
        """Close those that nobody uses, now and from now on: for the exit."""
        with self._lock:
            self._most_idle = 0
            idle = self._take_idle(0)
        for each in idle:
            if each.loop.is_running():
                closing = asyncio.run_coroutine_threadsafe(each.close(), each.loop)
                with suppress(Exception):  # nothing depends on a polite goodbye
                    closing.result(_CLOSE_TIMEOUT_S)

    def _take_idle(self, most: int) -> list[Client]:
        """Remove the longest unused of those that nobody uses; the lock is held."""
        idle = [key for key, client in self._shared.items() if not client.users]
        return [self._shared.pop(key) for key in idle[: max(len(idle) - most, 0)]]


def _filesystem(loop: asyncio.AbstractEventLoop, options: Mapping[str, Any]) -> Any:  # noqa: ANN401 - untyped
    filesystem = s3fs.S3FileSystem(
        **options,
        # Otherwise s3fs registers a finalizer that closes inherited connections in
        # forked children, which makes the parent deaf.
        asynchronous=True,
        loop=loop,
        skip_instance_cache=True,
        use_listings_cache=False,
    )
    filesystem.retries = 1
    return filesystem


def _frozen(value: object) -> Hashable:
    """Give what is equal for equal options only; `TypeError` for what is not plain data."""
    if isinstance(value, Mapping):
        return dict, frozenset((_frozen(k), _frozen(v)) for k, v in value.items())
    if isinstance(value, list | tuple):
        return list, tuple(map(_frozen, value))
    if type(value) in _PLAIN:
        return type(value), value  # True is equal to 1
    raise TypeError(f"{value!r} is no plain data")


def _surroundings() -> Hashable:
    """Give what botocore reads when it makes a client: credentials, proxies, certificates, ..."""
    files = []
    for variable, usual in (
        ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"),
        ("AWS_CONFIG_FILE", "~/.aws/config"),
    ):
        try:
            status = os.stat(os.path.expanduser(os.environ.get(variable, usual)))
        except OSError:
            files.append((0, 0, 0))
        else:
            files.append((status.st_ino, status.st_mtime_ns, status.st_size))
    return frozenset(os.environ.items()), tuple(files)


_of_process: Final = [Clients()]


def shared_clients() -> Clients:
    """Give the clients of this process."""
    return _of_process[0]


def _begin_in_child() -> None:
    # Loops and connections belong to the parent. Freeing them would close what it reads from,
    # so these copies are never freed, not even at exit; nor is a lock that is held forever.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(shared_clients()))
    _of_process[0] = Clients()


def _close_at_exit() -> None:
    shared_clients().close_idle()


os.register_at_fork(after_in_child=_begin_in_child)
atexit.register(_close_at_exit)
