"""Putting payloads into shards: appended to a growing file on a disk, one object a batch in a bucket."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final

from tensorstore_fmt.format import layout
from tensorstore_fmt.format.shard import ShardEncoder, ShardRow
from tensorstore_fmt.storage import Appender, Storage
from tensorstore_fmt.writing.options import MIB, WriterOptions
from tensorstore_fmt.writing.pending import Placed

__all__ = ["ShardSink"]

_BATCH_NBYTES: Final = 16 * MIB
_OBJECT_NBYTES: Final = 32 * MIB
_FULL_NBYTES: Final = 1024 * MIB


class ShardSink:
    """Takes rows from the encoders and writes them in batches; all threads may use it.

    Parameters
    ----------
    on_failure
        Told of every failure of the storage, with whether it will be tried again.
    """

    def __init__(
        self,
        storage: Storage,
        options: WriterOptions,
        *,
        run_id: bytes,
        key: layout.WriterKey,
        on_failure: Callable[[Exception, bool], None],
    ) -> None:
        self._storage = storage
        self._options = options
        self._run_id = run_id
        self._key = key
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._rows: list[tuple[ShardRow, Placed]] = []
        self._nbytes = 0
        self._number = 0
        self._encoder: ShardEncoder | None = None
        self._appender: Appender | None = None
        self._unsynced: list[str] = []
        self._in_shard: list[Placed] = []  # of the open shard, not yet synced
        self.stored_nbytes = 0

    def add(self, rows: Sequence[tuple[ShardRow, Placed]]) -> None:
        """Take the chunks of one save; may write a batch."""
        nbytes = sum(row.nbytes for row, _ in rows)
        limit = _BATCH_NBYTES if self._storage.is_local else _OBJECT_NBYTES
        with self._lock:
            if self._rows and self._nbytes + nbytes > limit:
                self._write()
            for pair in rows:  # a save larger than a batch is cut
                self._rows.append(pair)
                self._nbytes += pair[0].nbytes
                if self._nbytes >= limit:
                    self._write()

    def flush(self, *, durable: bool) -> None:
        """Write what waits; with `durable`, sync all that was written since the last time."""
        with self._lock:
            self._write()
            if durable:
                self._sync()

    def close(self) -> None:
        """Write what waits and seal the open shard."""
        with self._lock:
            self._write()
            self._seal()

    def abandon(self) -> None:
        """Drop everything without writing."""
        with self._lock:
            self._rows, self._nbytes = [], 0
            self._drop_shard()

    def take_unsynced(self) -> list[str]:
        """Give paths of shards whose directory entries were not synced yet."""
        paths, self._unsynced = self._unsynced, []
        return paths

    # --- under the lock -----------------------------------------------------------

    def _write(self) -> None:
        if not self._rows:
            return
        pairs, self._rows, self._nbytes = self._rows, [], 0
        for pause in (*self._options.retry_s, None):
            try:
                self._put(pairs)
            except OSError as error:
                self._drop_shard()
                self._on_failure(error, pause is not None)
                if pause is not None:
                    self._options.sleep(pause)
            else:
                return
        for _, placed in pairs:
            placed.is_lost = True

    def _put(self, pairs: list[tuple[ShardRow, Placed]]) -> None:
        encoder = self._encoder
        if encoder is None:
            name = layout.ShardName(key=self._key, number=self._number)
            self._number += 1  # a number is never used twice, also if this fails
            encoder = ShardEncoder(self._run_id, name)
            if self._storage.is_local:
                self._appender = self._storage.create(name.path)
                self._unsynced.append(name.path)
            self._encoder = encoder
        parts, offsets = encoder.batch([row for row, _ in pairs])
        if self._appender is not None:
            self._appender.append(parts)  # type: ignore[arg-type] # all of them are buffers
        else:
            parts += encoder.seal()
            self._encoder = None
            self._storage.publish(encoder.name.path, parts)  # type: ignore[arg-type] # the same
        for (_, placed), offset in zip(pairs, offsets, strict=True):
            placed.shard, placed.offset = encoder.name, offset
            self.stored_nbytes += placed.nbytes
            self._in_shard.append(placed)
        if self._appender is None:
            self._in_shard.clear()
        elif encoder.position >= _FULL_NBYTES:
            self._seal()

    def _sync(self) -> None:
        if self._appender is None:
            return
        try:
            self._appender.sync()
        except OSError:
            # What of it no segment names yet may be gone (spec, "Duties of a writer", 4).
            for placed in self._in_shard:
                placed.is_lost = True
            self._drop_shard()
            raise
        self._in_shard.clear()

    def _seal(self) -> None:
        if self._appender is not None and self._encoder is not None:
            try:
                self._appender.append(self._encoder.seal())  # type: ignore[arg-type] # buffers
                self._sync()
            except OSError as error:
                # Without its footer the shard is still complete as far as segments say.
                self._on_failure(error, False)
        self._drop_shard()

    def _drop_shard(self) -> None:
        self._encoder = None
        self._in_shard.clear()
        if self._appender is not None:
            self._appender.close()
            self._appender = None
