"""Who still writes to a run: nobody may touch the files of a writer that lives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Final

from tensorstore_fmt.errors import StateError
from tensorstore_fmt.format import layout
from tensorstore_fmt.format.segment import Header
from tensorstore_fmt.storage import Storage

__all__ = ["SILENT_US", "Liveness"]

SILENT_US: Final = 10 * 60 * 1_000_000
"""Where there are no locks, a writer that published nothing for so long counts as dead."""


class Liveness:
    """Finds out which writers are dead, and keeps others away from them.

    Parameters
    ----------
    now_us
        Wall time.
    force
        Take writers for dead that published something not long ago, where there are no locks.
    """

    def __init__(self, storage: Storage, *, now_us: int, force: bool) -> None:
        self._storage = storage
        self._now_us = now_us
        self._force = force
        self._held: set[layout.WriterKey] = set()
        self._without_locks: set[layout.WriterKey] = set()
        self._locks = contextlib.ExitStack()

    def refuse_locked(self, keys: Iterable[layout.WriterKey]) -> None:
        """Raise `StateError` if the lock of a writer is held by somebody else."""
        for key in sorted(set(keys) - self._held):
            path = layout.lock_path(key)
            if self._storage.is_locked(path):
                raise StateError(
                    f"{self._storage.describe(path)} is locked: writer {key} is alive",
                    code="locked",
                    file=path,
                    writer=str(key),
                )

    def refuse_living(self, key: layout.WriterKey, headers: Iterable[Header]) -> None:
        """Raise `StateError` if a writer that is not closed may be alive.

        A lock that was asked for before says it on a disk; elsewhere silence has to.
        """
        if self._force or (self._storage.is_local and key not in self._without_locks):
            return
        published = max((h.published_us for h in headers if h.key == key), default=self._now_us)
        silent_us = self._now_us - published
        if silent_us < SILENT_US:
            raise StateError(
                f"{self._storage.describe()}: writer {key} is not closed and published something "
                f"{silent_us / 6e7:.1f} minutes ago; it may be alive. There are no locks here: if "
                "you know that it is dead, use force=True, or wait 10 minutes",
                code="locked",
                writer=str(key),
            )

    def hold(self, key: layout.WriterKey) -> None:
        """Take a writer's lock until `release`."""
        if key in self._held:
            return
        lock = self._storage.lock(layout.lock_path(key))
        self._locks.enter_context(lock)
        self._held.add(key)
        if not lock.is_held:  # a file system without locks
            self._without_locks.add(key)

    def release(self) -> None:
        """Remove the locks that were taken, and let go."""
        self._storage.delete([layout.lock_path(key) for key in sorted(self._held)])
        self._locks.close()
        self._held.clear()
