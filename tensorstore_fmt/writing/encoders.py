"""The threads that encode saves, and whose turn it is."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator
from typing import Final

import numpy as np

from tensorstore_fmt.format import codec
from tensorstore_fmt.writing.buffers import BufferPool
from tensorstore_fmt.writing.encoding import DigestTable, SaveEncoder
from tensorstore_fmt.writing.failures import Failures
from tensorstore_fmt.writing.options import MIB, WriterOptions
from tensorstore_fmt.writing.pending import Generation, Save
from tensorstore_fmt.writing.quota import Quota
from tensorstore_fmt.writing.shards import ShardSink

__all__ = ["EncoderPool"]

_PAYLOADS_NBYTES: Final = 32 * MIB  # a batch that is written, one that grows, two encoders' blocks
_BYTE: Final = np.dtype(np.uint8)
_LOWEST: Final = 19  # a `nice` value


def _patient(most: int) -> int:
    """Give a number of threads that leaves a core of those this process may use."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, min(most, cores - 1))


_Work = tuple[Generation, Save, SaveEncoder | None]  # None: nobody began it


class EncoderPool:
    """Threads that encode saves in the background, in two shifts.

    The patient shift has the lowest priority there is, on Linux: it takes what a training leaves. A
    thread of a training that loses its core for a moment keeps waiting all that it works
    with, so that encoding would cost several times its own time (benchmark 14). Who has
    little time may take long, though. When half of what may wait does, or while somebody waits
    for it, the urgent shift works instead, as fast as any other thread; it goes on with what the
    other one began, after the next chunk.
    """

    def __init__(
        self,
        sink: ShardSink,
        options: WriterOptions,
        *,
        quota: Quota,
        failures: Failures,
    ) -> None:
        self._sink = sink
        self._options = options
        self._quota = quota
        self._failures = failures
        self._digests = DigestTable()
        self._blocks = BufferPool(_PAYLOADS_NBYTES)
        self._lock = threading.RLock()
        self._patient = threading.Condition(self._lock)
        self._urgent = threading.Condition(self._lock)
        self._queue: deque[_Work] = deque()
        self._working = 0
        self._hurries = 0
        self._is_held = False
        self._is_stopping = False
        self._own = threading.local()
        self._threads = [
            threading.Thread(
                target=self._run,
                args=(is_patient,),
                name=f"tensorstore_fmt-{'patient' if is_patient else 'urgent'}-encoder-{i}",
                daemon=True,
            )
            for is_patient, n in ((True, _patient(options.encoders)), (False, options.encoders))
            for i in range(n)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, generation: Generation, save: Save) -> None:
        """Take a save that is closed."""
        self._put((generation, save, None))

    def has_work(self) -> bool:
        """Say whether saves wait that no encoder has taken yet."""
        return bool(self._queue)

    def committed(self, flush: int) -> None:
        """Let payloads of flushes up to this one be reused."""
        self._digests.committed(flush)

    @contextlib.contextmanager
    def hurry(self) -> Iterator[None]:
        """Let the urgent shift work: the caller waits."""
        self._hurry(1)
        try:
            yield
        finally:
            self._hurry(-1)

    def hold(self) -> None:
        """Let the patient shift wait for `release`, if it has nothing to do now."""
        with self._lock:
            if self._queue:  # an earlier `hold` was not released
                self._patient.notify_all()
            self._is_held = not self._queue and not self._working

    def release(self) -> None:
        """Undo `hold`."""
        if not self._is_held:  # as a rule: nobody is woken for nothing between two steps
            return
        with self._lock:
            self._patient.notify_all()
            self._is_held = False

    def stop(self) -> None:
        """Let the threads end when all work is done, and wait for them."""
        with self._lock:
            self._is_stopping = True
            self._patient.notify_all()
            self._urgent.notify_all()
        for thread in self._threads:
            thread.join()

    # --- whose turn it is -----------------------------------------------------------

    @property
    def _is_urgent(self) -> bool:
        return self._hurries > 0 or self._quota.is_tight

    # A signal may end what follows between any two statements. So those who have something to do
    # are woken first: they look only when the lock is free again.

    def _hurry(self, n: int) -> None:
        with self._lock:
            self._patient.notify_all()
            self._urgent.notify_all()
            self._hurries += n

    def _put(self, work: _Work) -> None:
        with self._lock:
            self._wake()
            self._queue.append(work)

    def _wake(self) -> None:
        if self._is_urgent:
            self._urgent.notify()
        elif not self._is_held:
            self._patient.notify()

    def _has_turn(self, *, is_patient: bool) -> bool:
        return not self._is_urgent and not self._is_held if is_patient else self._is_urgent

    def _take(self, *, is_patient: bool) -> _Work | None:
        own = self._patient if is_patient else self._urgent
        with self._lock:
            while not self._is_stopping and not (
                self._queue and self._has_turn(is_patient=is_patient)
            ):
                if self._queue:  # that changed after somebody was woken
                    self._wake()
                own.wait()
            self._working += bool(self._queue)
            return self._queue.popleft() if self._queue else None

    # --- in the threads -------------------------------------------------------------

    def _run(self, is_patient: bool) -> None:  # noqa: FBT001 - `args` of a thread has no keywords
        if is_patient and sys.platform == "linux":  # elsewhere processes have priorities, only
            with contextlib.suppress(OSError):  # a sandbox may forbid it
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST)
        while (work := self._take(is_patient=is_patient)) is not None:
            left = self._encode(*work, is_patient=is_patient)
            del work
            with self._lock:
                self._working -= 1
                if left is not None:
                    self._put(left)
            del left

    def _encode(
        self,
        generation: Generation,
        save: Save,
        begun: SaveEncoder | None,
        *,
        is_patient: bool,
    ) -> _Work | None:
        """Go on with a save; give what is left of it, if it is the other shift's turn."""
        if begun is None:
            if not generation.claim(save):
                return None
            self._quota.begin()
        is_done = True
        try:
            if save.rows:
                begun = begun or self._begin(generation, save)
                begun.encoder = self._encoder()
                is_done = not any(is_patient and self._is_urgent for _ in begun.chunks)
        except Exception as error:  # noqa: BLE001 - a bug here must not stop training; it is counted
            save.is_lost = True
            if begun is not None:
                begun.abandon()
            self._failures.note(error)
        finally:
            if is_done:
                rows, save.rows = save.rows, []
                self._quota.end(row[2] for row in rows)
                generation.finish()
        return None if is_done else (generation, save, begun)

    def _begin(self, generation: Generation, save: Save) -> SaveEncoder:
        return SaveEncoder(
            save,
            generation.number,
            self._sink,
            encoder=self._encoder(),
            digests=self._digests,
            compression=self._options.compression,
        )

    def _encoder(self) -> codec.Encoder:
        """Give the encoder of this thread."""
        if not hasattr(self._own, "encoder"):
            self._own.encoder = codec.Encoder(self._options.compression, empty=self._empty)
        found: codec.Encoder = self._own.encoder
        return found

    def _empty(self, nbytes: int) -> np.ndarray:
        return self._blocks.empty((nbytes,), _BYTE)
