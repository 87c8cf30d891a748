"""The thread that commits: every so often, and when asked to (spec, "Duties of a writer")."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from tensorstore_fmt.format import layout, segment
from tensorstore_fmt.storage import Storage
from tensorstore_fmt.writing.carried import Carried, bound, tensors
from tensorstore_fmt.writing.commit import collect, collect_dropped, tables
from tensorstore_fmt.writing.encoders import EncoderPool
from tensorstore_fmt.writing.failures import Failures
from tensorstore_fmt.writing.options import MIB, WriterOptions
from tensorstore_fmt.writing.pending import Generation, PendingEntry
from tensorstore_fmt.writing.segments import SegmentLog
from tensorstore_fmt.writing.shards import ShardSink

__all__ = ["Committer", "Taken"]

_CARRIED_NBYTES: Final = 64 * MIB


@dataclass(frozen=True, slots=True)
class Taken:
    """A generation to which nothing is added any more, and what its header says of steps."""

    generation: Generation
    complete_through: tuple[int, int, int, int]


class Committer:
    """Publishes generations one after the other.

    Parameters
    ----------
    header
        What all segments of this writer have in common; flush 0 is published with it.
    take
        Closes the current generation and begins the next; told whether it is the last.
    has_news
        Whether the current generation holds anything.
    """

    def __init__(
        self,
        storage: Storage,
        options: WriterOptions,
        header: segment.Header,
        *,
        sink: ShardSink,
        segments: SegmentLog,
        pool: EncoderPool,
        failures: Failures,
        take: Callable[[bool], Taken],
        has_news: Callable[[], bool],
    ) -> None:
        self._storage = storage
        self._options = options
        self._header = header
        self._sink = sink
        self._segments = segments
        self._pool = pool
        self._failures = failures
        self._take = take
        self._has_news = has_news
        self._changed = threading.Condition()
        self._committed = self._attempted = self._wanted = 0
        self._synced = -1
        self._wanted_synced = -1
        self._is_stopping = False
        self._lossy = 0  # the last generation that lost tensors to a failure
        self._is_tainted = False
        self._failed_syncs = 0
        self._uncollected: list[Generation] = []
        self._carried: Carried = []
        self.dropped = 0
        self._thread = threading.Thread(
            target=self._run, name="tensorstore_fmt-committer", daemon=True
        )
        self._thread.start()

    def request(self, number: int, *, durable: bool = False) -> None:
        """Ask for a commit of the generations up to this one."""
        with self._changed:
            self._wanted = max(self._wanted, number)
            if durable:
                self._wanted_synced = max(self._wanted_synced, number)
            self._changed.notify_all()

    def wait(self, number: int, *, durable: bool = False) -> bool:
        """Wait for the attempt to commit a generation; say whether it is safe now."""
        with self._changed:
            self._changed.wait_for(lambda: self._attempted >= number)
            is_whole = self._committed >= number > self._lossy
            return is_whole and (not durable or self._synced >= number)

    def close(self) -> None:
        """Commit all that is left, durably, and mark the writer as closed."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        self._thread.join()
        self._flush(durable=True, is_last=True)
        # What could not be published until now never will be.
        for generation in self._uncollected:
            self.dropped += len(generation.inline) + len(generation.saves)
        self.dropped += sum(tensors(entries) for _, entries in self._carried)

    def _run(self) -> None:
        began = time.monotonic()
        while True:
            with self._changed:
                # From the beginning of the last flush, which takes its time in a bucket.
                due = began + self._options.flush_interval_s
                self._changed.wait_for(
                    lambda: self._is_stopping or self._wanted > self._attempted,
                    timeout=max(0.0, due - time.monotonic()),
                )
                began = time.monotonic()
                is_wanted = self._wanted > self._attempted
                durable = self._wanted_synced > self._attempted
                if self._is_stopping and not is_wanted:
                    return
            if is_wanted or self._has_news():
                self._flush(durable=durable, is_last=False)

    def _flush(self, *, durable: bool, is_last: bool) -> None:
        """Commit the current generation; only one thread at a time calls this."""
        number = self._wanted
        is_there = is_synced = False
        try:
            taken = self._take(is_last)
            number = taken.generation.number
            self._uncollected.append(taken.generation)
            self._wait_encoded(taken.generation)
            is_stored = self._store(durable=durable)
            is_there = self._commit(taken, is_last=is_last)
            if is_there and is_stored and durable:
                is_synced = self._sync()
        except Exception as error:  # noqa: BLE001 - whatever it is, training goes on; it is counted
            self._failures.note(error)
        with self._changed:
            self._attempted = number
            if is_there:
                self._committed = number
            if is_synced:
                self._synced = number
            self._changed.notify_all()

    def _wait_encoded(self, generation: Generation) -> None:
        # Those who look at the run are to wait no longer than two intervals, whoever else works.
        if not generation.wait(self._options.flush_interval_s):
            with self._pool.hurry():
                generation.wait()

    def _store(self, *, durable: bool) -> bool:
        """Write the payloads that wait; what is lost by a failure is known to its entries."""
        is_stored = True
        try:
            self._sink.flush(durable=durable)
        except OSError as error:
            self._failures.note(error)
            is_stored = False
        if self._sink.failed_syncs > self._failed_syncs:
            self._failed_syncs = self._sink.failed_syncs
            # What was published before, and not synced, cannot be made safe any more.
            self._is_tainted |= self._committed > max(self._synced, 0)
        return is_stored and not self._is_tainted

    def _commit(self, taken: Taken, *, is_last: bool) -> bool:
        generation = taken.generation
        # What an earlier flush could not publish, or had nothing to: the range covers it.
        while self._uncollected:
            entries, dropped = self._collect(self._uncollected[0])
            if dropped > len(self._uncollected[0].dropped):  # more than there was no room for
                self._lossy = generation.number
            self._carried.append((self._uncollected.pop(0).number, entries))
            self.dropped += dropped
        if not is_last and not any(part for _, part in self._carried):
            return True
        header = replace(
            self._header,
            first_flush=self._carried[0][0],
            last_flush=generation.number,
            published_us=self._options.clock_us(),
            complete_through=taken.complete_through,
            is_closed=is_last,
        )
        if not self._failures.attempt(
            lambda: self._segments.publish(header, tables(self._carried)), undo=lambda: None
        ):
            self.dropped += bound(self._carried, _CARRIED_NBYTES)
            return False
        self._carried = []
        self._pool.committed(generation.number)
        return True

    def _collect(self, generation: Generation) -> tuple[list[PendingEntry], int]:
        for pause in self._options.retry_s:
            try:
                return collect(generation)
            except Exception as error:  # noqa: BLE001 - no memory, or a bug: the rest must not be lost with it
                self._failures.note(error)
                self._options.sleep(pause)
        return collect_dropped(generation)

    def _sync(self) -> bool:
        """Sync what is published; what a failed sync was to write is not safe ever after."""
        try:
            if self._synced < 0:
                self._storage.sync([layout.RUN_JSON])
            self._segments.sync()
        except OSError as error:
            self._is_tainted = True
            self._failures.note(error)
            return False
        return True
