"""How many raw bytes may wait in memory, and what happens when it is too many."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Final, Literal

from tensorstore_fmt.writing.pending import Held

__all__ = ["Quota"]

_IDLE_S: Final = 0.05


class Quota:
    """Counts bytes that were copied and not yet stored; all threads use it.

    Parameters
    ----------
    limit
        Most bytes; a single tensor may be larger, if nothing else waits.
    """

    def __init__(self, limit: int, when_full: Literal["block", "drop"]) -> None:
        self._limit = limit
        self._when_full = when_full
        self._changed = threading.Condition()
        self._held_nbytes = 0
        self._active = 0
        self.stalled_s = 0.0

    def reserve(
        self,
        held: Held,
        nbytes: int,
        *,
        ask_flush: Callable[[], None],
        has_work: Callable[[], bool],
        hurry: Callable[[], AbstractContextManager[None]],
    ) -> bool:
        """Wait until so many bytes may be copied; False: they have to be dropped.

        `ask_flush` is called if nothing is being encoded and, as `has_work` says, nothing waits
        for that: what is held then waits for a flush. `hurry` is entered while this waits.
        """
        if not nbytes:
            return True
        with self._changed:
            if self._is_over(nbytes):
                if self._when_full == "drop":
                    return False
                begin = time.perf_counter()
                with hurry():
                    self._wait(nbytes, ask_flush, has_work)
                self.stalled_s += time.perf_counter() - begin
            self._set(held, nbytes)
        return True

    def _wait(
        self, nbytes: int, ask_flush: Callable[[], None], has_work: Callable[[], bool]
    ) -> None:
        while self._is_over(nbytes):
            if self._active or has_work():
                self._changed.wait(_IDLE_S)
                continue
            ask_flush()
            if not self._changed.wait_for(lambda: self._active, timeout=_IDLE_S):
                break  # all that is held belongs to this very call

    @property
    def is_tight(self) -> bool:
        """Whether more than half of what may wait does."""
        return 2 * self._held_nbytes > self._limit

    def _is_over(self, nbytes: int) -> bool:
        return self._held_nbytes > 0 and self._held_nbytes + nbytes > self._limit

    def _set(self, held: Held, nbytes: int) -> None:
        # One statement without a call: no signal comes in between, so nothing is counted that
        # nobody gives back.
        self._held_nbytes, held.nbytes = self._held_nbytes - held.nbytes + nbytes, nbytes

    def correct(self, held: Held, nbytes: int) -> None:
        """Hold this many bytes instead."""
        with self._changed:
            self._set(held, nbytes)
            self._changed.notify_all()

    def release(self, holds: Iterable[Held]) -> None:
        """Give bytes back; more than once is fine."""
        with self._changed:
            for held in holds:
                self._set(held, 0)
            self._changed.notify_all()

    def begin(self) -> None:
        """Note that an encoder has something to do."""
        with self._changed:
            self._active += 1
            self._changed.notify_all()

    def end(self, holds: Iterable[Held]) -> None:
        """Note that an encoder is done with these."""
        with self._changed:
            self._active -= 1
            for held in holds:
                self._set(held, 0)
            self._changed.notify_all()
