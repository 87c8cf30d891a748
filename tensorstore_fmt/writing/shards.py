"""Putting payloads into shards: one growing file on a disk, an object a batch in a bucket."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Final

from tensorstore_fmt.format import layout
from tensorstore_fmt.format.shard import ShardEncoder, ShardRow
from tensorstore_fmt.storage import Appender, Storage
from tensorstore_fmt.writing.failures import Failures
from tensorstore_fmt.writing.options import MIB, WriterOptions
from tensorstore_fmt.writing.pending import Placed, ShardFile

__all__ = ["ShardSink"]

_BATCH_NBYTES: Final = 8 * MIB
_OBJECT_NBYTES: Final = 32 * MIB
_FULL_NBYTES: Final = 1024 * MIB


class ShardSink:
    """Takes rows from the encoders and writes them in batches; all threads may use it."""

    def __init__(
        self,
        storage: Storage,
        options: WriterOptions,
        *,
        run_id: bytes,
        key: layout.WriterKey,
        failures: Failures,
    ) -> None:
        self._storage = storage
        self._options = options
        self._run_id = run_id
        self._key = key
        self._failures = failures
        self._lock = threading.Lock()  # of what waits
        self._write_lock = threading.Lock()  # of the shard
        self._rows: list[tuple[ShardRow, Placed]] = []
        self._nbytes = 0
        self._number = 0
        self._encoder: ShardEncoder | None = None
        self._appender: Appender | None = None
        self._file: ShardFile | None = None  # the open shard
        self._is_named = False  # whether the open shard's name was synced
        self._unsynced: list[ShardFile] = []  # shards that were left without being synced
        self.stored_nbytes = 0
        self.failed_syncs = 0

    def add(self, rows: Sequence[tuple[ShardRow, Placed]]) -> None:
        """Take the chunks of one save; may write a batch."""
        limit = _BATCH_NBYTES if self._storage.is_local else _OBJECT_NBYTES
        for at in _cut([row.nbytes for row, _ in rows], limit):
            with self._lock:
                self._rows += rows[at]
                self._nbytes += sum(row.nbytes for row, _ in rows[at])
                if self._nbytes < limit:
                    continue
                pairs = self._take()
                self._write_lock.acquire()  # before others can take: batches are never passed by
            try:
                self._write(pairs)
            finally:
                self._write_lock.release()

    def flush(self, *, durable: bool) -> None:
        """Write what waits; with `durable`, sync all that was written since the last time."""
        with self._lock, self._write_lock:
            self._write(self._take())
            if durable:
                self._sync()

    def close(self) -> None:
        """Write what waits and seal the open shard."""
        with self._lock, self._write_lock:
            self._write(self._take())
            self._seal()

    def _take(self) -> list[tuple[ShardRow, Placed]]:
        pairs, self._rows, self._nbytes = self._rows, [], 0
        return pairs

    # --- under the write lock -------------------------------------------------------

    def _write(self, pairs: list[tuple[ShardRow, Placed]]) -> None:
        if not pairs:
            return
        is_there = False
        try:
            is_there = self._failures.attempt(lambda: self._put(pairs), undo=self._drop_shard)
        finally:
            if not is_there:  # whatever went wrong: nothing may name bytes that are not there
                self._drop_shard()
                for _, placed in pairs:
                    placed.is_dropped = True

    def _put(self, pairs: list[tuple[ShardRow, Placed]]) -> None:
        encoder = self._encoder
        if encoder is None:
            name = layout.ShardName(key=self._key, number=self._number)
            self._number += 1  # a number is never used twice, also if this fails
            encoder = ShardEncoder(self._run_id, name)
            if self._storage.is_local:
                self._appender = self._storage.create(name.path)
                self._is_named = False
            self._encoder, self._file = encoder, ShardFile(name)
        if self._appender is None:
            # An object appears as a whole, so what order its rows came in means nothing, and
            # readers take neighbours with one request: steps of a name are asked for together.
            pairs = sorted(pairs, key=lambda pair: _place(pair[0]))
        parts, offsets = encoder.batch([row for row, _ in pairs])
        if self._appender is not None:
            self._appender.append(parts)
        else:
            parts += encoder.seal()
            self._encoder = None
            self._storage.publish(encoder.name.path, parts)
        for (_, placed), offset in zip(pairs, offsets, strict=True):
            placed.shard, placed.offset = self._file, offset
            self.stored_nbytes += placed.nbytes
        if self._appender is not None and encoder.position >= _FULL_NBYTES:
            self._seal()

    def _sync(self) -> None:
        left, self._unsynced = self._unsynced, []
        if left:
            try:
                self._storage.sync([file.name.path for file in left])
            except BaseException:
                self._abandon(*left)
                raise
        if self._appender is None or self._file is None:
            return
        try:
            self._appender.sync()
            if not self._is_named:
                self._storage.sync([self._appender.path])
                self._is_named = True
        except BaseException:
            self._abandon(self._file)
            self._file = None
            self._drop_shard()
            raise
        self._file.synced_nbytes = self._appender.position

    def _abandon(self, *files: ShardFile) -> None:
        """What no segment names yet may be gone (spec, "Duties of a writer", 4)."""
        self.failed_syncs += 1
        for file in files:
            file.is_abandoned = True

    def _seal(self) -> None:
        if self._appender is not None and self._encoder is not None:
            try:
                self._appender.append(self._encoder.seal())
                self._sync()
            except (OSError, MemoryError) as error:
                # Without its footer the shard is still complete as far as segments say.
                self._failures.note(error)
        self._drop_shard()

    def _drop_shard(self) -> None:
        self._encoder = None
        file, self._file = self._file, None
        if self._appender is not None:
            if file is not None and self._appender.position > file.synced_nbytes:
                self._unsynced.append(file)
            self._appender.close()
            self._appender = None


def _place(row: ShardRow) -> tuple[str, int, int, int, int]:
    return row.series.name, row.series.kind, row.series.mode, row.step, row.chunk


def _cut(sizes: Sequence[int], limit: int) -> list[slice]:
    """Cut rows into stretches of at most about `limit` bytes."""
    stretches, begin, total = [], 0, 0
    for i, size in enumerate(sizes):
        total += size
        if total >= limit:
            stretches.append(slice(begin, i + 1))
            begin, total = i + 1, 0
    if begin < len(sizes):
        stretches.append(slice(begin, len(sizes)))
    return stretches
