"""A local file that grows at its end: a shard while its writer lives."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence

from tensorstore_fmt.errors import StateError
from tensorstore_fmt.storage.base import Appender, BytesLike
from tensorstore_fmt.storage.files import write_all


def sync_descriptor(fd: int) -> None:
    """Make what was written survive power loss."""
    # On macOS fsync leaves the bytes in the drive's cache.
    full_sync = getattr(fcntl, "F_FULLFSYNC", None)
    if full_sync is not None:
        try:
            fcntl.fcntl(fd, full_sync)
        except OSError:
            pass  # a file system that does not know it: fsync is what there is
        else:
            return
    os.fsync(fd)


class LocalAppender(Appender):
    """Append to a descriptor that it owns."""

    def __init__(self, fd: int, path: str, *, position: int = 0) -> None:
        self._fd = fd
        self._path = path
        self._position = position
        self._failed = False

    @property
    def path(self) -> str:
        """Place relative to the run."""
        return self._path

    @property
    def position(self) -> int:
        """Bytes of the file so far: where the next append begins."""
        return self._position

    @property
    def is_closed(self) -> bool:
        """Whether it was closed."""
        return self._fd < 0

    def append(self, buffers: Sequence[BytesLike]) -> int:
        """Hand all of the buffers to the operating system; give the offset of the first."""
        offset = self._position
        try:
            self._position += write_all(self._usable(), buffers)
        except BaseException:  # also a signal: some of the bytes may be there
            self._failed = True
            raise
        return offset

    def sync(self) -> None:
        """Make the file's bytes survive power loss.

        After a failure the kernel may have dropped the pages it could not write and call the
        next sync a success, so there is no next one.
        """
        try:
            sync_descriptor(self._usable())
        except BaseException:  # also a signal: some of the bytes may be there
            self._failed = True
            raise

    def close(self) -> None:
        """Close the file without syncing it; more than once is fine."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _usable(self) -> int:
        if self._fd < 0:
            raise StateError(f"{self._path} was closed", code="closed", file=self._path)
        if self._failed:
            raise StateError(
                f"{self._path}: a write or sync failed before; begin a new file",
                code="storage_failed",
                file=self._path,
            )
        return self._fd

    def __del__(self) -> None:
        self.close()
