"""A storage whose process dies, or whose power fails, at the moment a test says."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterable, Sequence

from tensorstore_fmt.storage.base import Appender, BytesLike, Storage
from tensorstore_fmt.testing.storage import Operation, WrappedStorage

_WRITES = {"publish", "create", "append", "sync", "delete"}


class MortalStorage(WrappedStorage):
    """A local storage that stops to write for ever when it is told.

    The process lives on, and so do its threads: all that they still try fails. What they had
    done is there, as after ``kill -9``; what they had not synced is gone after `cut_power`.
    """

    def __init__(self, inner: Storage, root: str) -> None:
        super().__init__(inner)
        self.is_dead = False
        self._root = root
        self._changing = threading.RLock()
        self._unsynced: dict[str, int] = {}  # by file: so many of its bytes are safe; −1: no name

    def before(self, operations: Sequence[Operation]) -> Sequence[int | Exception | None]:
        if self.is_dead and any(each.op in _WRITES for each in operations):
            return [OSError(errno.EIO, "the process is dead", each.path) for each in operations]
        for each in operations:
            if each.op == "sync" and self._unsynced.get(each.path, -1) >= 0:
                self._unsynced[each.path] = os.path.getsize(f"{self._root}/{each.path}")
        return [None] * len(operations)

    def publish(
        self,
        path: str,
        buffers: Sequence[BytesLike],
        *,
        if_absent: bool = False,
        synced: bool = False,
    ) -> None:
        with self._changing:
            super().publish(path, buffers, if_absent=if_absent, synced=synced)
            self._unsynced[path] = -1

    def create(self, path: str) -> Appender:
        with self._changing:
            self._unsynced[path] = -1
            return super().create(path)

    def sync(self, paths: Iterable[str]) -> None:
        with self._changing:
            wanted = list(paths)
            super().sync(wanted)
            for path in wanted:
                self._unsynced.pop(path, None)
                if path.startswith("shards/"):  # it may grow again
                    self._unsynced[path] = os.path.getsize(f"{self._root}/{path}")

    def delete(self, paths: Iterable[str]) -> None:
        with self._changing:
            gone = list(paths)
            super().delete(gone)
            for path in gone:
                self._unsynced.pop(path, None)

    def die(self) -> None:
        """Write nothing any more."""
        with self._changing:
            self.is_dead = True

    def cut_power(self) -> None:
        """Die, and lose everything that was not synced."""
        with self._changing:
            self.is_dead = True
            for path, safe in self._unsynced.items():
                if safe < 0:
                    os.unlink(f"{self._root}/{path}")
                else:
                    os.truncate(f"{self._root}/{path}", safe)
