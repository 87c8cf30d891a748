"""Advisory locks on local files: how a tool knows that a writer lives.

A lock belongs to the open file, so it goes with the process, however that ends.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
import weakref
from typing import Final

from tensorstore_fmt.errors import StateError
from tensorstore_fmt.storage.base import Lock
from tensorstore_fmt.storage.files import open_file

_NOT_SUPPORTED: Final = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
_PATIENCE_S: Final = 1.0  # somebody who only asks holds the lock for microseconds
_PAUSE_S: Final = 0.01


class LocalLock(Lock):
    """An exclusive lock held through a descriptor that it owns."""

    def __init__(self, fd: int, *, is_held: bool) -> None:
        self._fd = fd
        self._is_held = is_held
        _ALL.add(self)

    @property
    def is_held(self) -> bool:
        """Whether somebody else would be kept out: not where the file system has no locks."""
        return self._is_held and self._fd >= 0

    def release(self) -> None:
        """Let go; more than once is fine."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.release()


_ALL: weakref.WeakSet[LocalLock] = weakref.WeakSet()


def _forget_in_child() -> None:
    # A child shares the parent's lock: it would keep it alive after the parent was killed.
    # Closing its copy (never unlocking) leaves the parent's lock as it is.
    for lock in list(_ALL):
        lock.release()


os.register_at_fork(after_in_child=_forget_in_child)


def take(root: str, path: str) -> LocalLock:
    """Take the exclusive lock on a file, creating it."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        fd = open_file(root, path, os.O_RDWR | os.O_CREAT, create=True)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            if time.monotonic() > deadline:
                raise StateError(
                    f"{path} is locked: its writer is alive", code="locked", file=path
                ) from error
            time.sleep(_PAUSE_S)
        except OSError as error:
            if error.errno in _NOT_SUPPORTED:
                return LocalLock(fd, is_held=False)
            os.close(fd)
            raise
        else:
            if os.fstat(fd).st_nlink:
                return LocalLock(fd, is_held=True)
            os.close(fd)  # deleted in between: nobody else would see this lock


def is_taken(root: str, path: str) -> bool:
    """Say whether some process, this one included, holds the lock on a file."""
    return _is_free(root, path) is False


def is_abandoned(root: str, path: str) -> bool:
    """Say whether the file of a lock is there and nobody holds it: its holder died."""
    return _is_free(root, path) is True


def _is_free(root: str, path: str) -> bool | None:
    """Say whether a lock could be taken; None without a file, or on a file system without locks."""
    try:
        fd = open_file(root, path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NOT_SUPPORTED:
            return None
        raise
    finally:
        os.close(fd)
    return True
