"""The system calls of the local storage, one by one: to count them, fail them, crash between them.

`intercepted` puts a stand-in for the module `os` into the modules of the local storage. What
changes the disk (creating, writing, syncing, renaming …) passes through a hook of the test.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

from tensorstore_fmt.storage import appender, files, local, locks
from tensorstore_fmt.storage.base import BytesLike

__all__ = ["Hook", "SystemCall", "intercepted"]

_MODULES = (local, files, appender, locks)


@dataclass(frozen=True, slots=True)
class SystemCall:
    """A system call that changes the disk.

    Attributes
    ----------
    op
        What it does; ``open`` only where it creates a file.
    path
        Absolute path of the file or directory: of ``rename`` and ``link`` the old one.
    target
        The new path of ``rename`` and ``link``.
    data
        What ``write`` writes.
    """

    op: Literal["open", "write", "fsync", "rename", "link", "unlink", "mkdir"]
    path: str
    target: str = ""
    data: bytes = b""


Hook: TypeAlias = Callable[[SystemCall, Callable[[], object]], object]
"""Given a call and what carries it out; gives its result. One thread at a time."""


class _StandIn:
    """Behaves as the module `os`, but tells the hook what changes the disk."""

    def __init__(self, hook: Hook) -> None:
        self._hook = hook
        self._lock = threading.RLock()
        self._paths: dict[int, str] = {}

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)

    def _place(self, path: str, directory: int | None) -> str:
        return path if directory is None else os.path.join(self._paths[directory], path)

    def _call(self, call: SystemCall, perform: Callable[[], object]) -> object:
        with self._lock:
            return self._hook(call, perform)

    def open(
        self, path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None
    ) -> object:
        place = self._place(path, dir_fd)

        def perform() -> int:
            fd = os.open(path, flags, mode, dir_fd=dir_fd)
            self._paths[fd] = place
            return fd

        with self._lock:
            if flags & os.O_CREAT and not os.path.lexists(place):
                return self._hook(SystemCall("open", place), perform)
            return perform()

    def writev(self, fd: int, buffers: Sequence[BytesLike]) -> object:
        call = SystemCall("write", self._paths[fd], data=b"".join(buffers))
        return self._call(call, lambda: os.writev(fd, buffers))

    def fsync(self, fd: int) -> object:
        return self._call(SystemCall("fsync", self._paths[fd]), lambda: os.fsync(fd))

    def rename(self, old: str, new: str, *, src_dir_fd: int, dst_dir_fd: int) -> object:
        call = SystemCall("rename", self._place(old, src_dir_fd), self._place(new, dst_dir_fd))
        return self._call(
            call, lambda: os.rename(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        )

    def link(
        self, old: str, new: str, *, src_dir_fd: int, dst_dir_fd: int, follow_symlinks: bool
    ) -> object:
        call = SystemCall("link", self._place(old, src_dir_fd), self._place(new, dst_dir_fd))
        return self._call(
            call,
            lambda: os.link(
                old,
                new,
                src_dir_fd=src_dir_fd,
                dst_dir_fd=dst_dir_fd,
                follow_symlinks=follow_symlinks,
            ),
        )

    def unlink(self, path: str, *, dir_fd: int | None = None) -> None:
        place = self._place(path, dir_fd)
        if not os.path.lexists(place):
            os.unlink(path, dir_fd=dir_fd)  # raises
        else:
            self._call(SystemCall("unlink", place), lambda: os.unlink(path, dir_fd=dir_fd))

    def mkdir(self, path: str, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        place = self._place(path, dir_fd)
        if os.path.lexists(place):
            os.mkdir(path, mode, dir_fd=dir_fd)  # raises
        else:
            self._call(SystemCall("mkdir", place), lambda: os.mkdir(path, mode, dir_fd=dir_fd))

    def makedirs(self, path: str, *, exist_ok: bool = False) -> None:
        if not exist_ok or not os.path.isdir(path):
            parent = os.path.dirname(path)
            if not os.path.isdir(parent):
                self.makedirs(parent, exist_ok=True)
            self.mkdir(path)


@contextmanager
def intercepted(hook: Hook) -> Iterator[None]:
    """Send the system calls of all local storages of this process through a hook."""
    stand_in = _StandIn(hook)
    for module in _MODULES:
        setattr(module, "os", stand_in)  # noqa: B010 - what the type checker must not see
    try:
        yield
    finally:
        for module in _MODULES:
            setattr(module, "os", os)  # noqa: B010 - the same
