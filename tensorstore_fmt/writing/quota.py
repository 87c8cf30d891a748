"""How many raw bytes may wait in memory, and what happens when it is too many."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, Literal

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

    def reserve(self, nbytes: int, *, ask_flush: Callable[[], None]) -> bool:
        """Wait until so many bytes may be copied; False: they have to be dropped.

        `ask_flush` is called if nothing is being encoded: what is held then waits for a flush.
        """
        if not nbytes:
            return True
        with self._changed:
            if self._is_over(nbytes):
                if self._when_full == "drop":
                    return False
                begin = time.perf_counter()
                while self._is_over(nbytes):
                    if self._active:
                        self._changed.wait()
                        continue
                    ask_flush()
                    if not self._changed.wait_for(lambda: self._active, timeout=_IDLE_S):
                        break  # all that is held belongs to this very call
                self.stalled_s += time.perf_counter() - begin
            self._held_nbytes += nbytes
        return True

    def _is_over(self, nbytes: int) -> bool:
        return self._held_nbytes > 0 and self._held_nbytes + nbytes > self._limit

    def release(self, nbytes: int) -> None:
        """Give bytes back."""
        with self._changed:
            self._held_nbytes -= nbytes
            self._changed.notify_all()

    def begin(self) -> None:
        """Note that an encoder has something to do."""
        with self._changed:
            self._active += 1
            self._changed.notify_all()

    def end(self, nbytes: int) -> None:
        """Note that an encoder is done with so many bytes."""
        with self._changed:
            self._active -= 1
            self._held_nbytes -= nbytes
            self._changed.notify_all()
