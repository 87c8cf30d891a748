"""Memory for snapshots that is used again: fresh pages cost several times a copy."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict

import numpy as np

__all__ = ["BufferPool"]


class _Lease:
    """A buffer on loan. Arrays made from it keep it alive; when the last is gone, it returns."""

    __slots__ = ("__array_interface__", "__weakref__", "_buffer", "_pool")

    _buffer: np.ndarray

    def __init__(self, pool: BufferPool, buffer: np.ndarray) -> None:
        self._pool = pool
        self.__array_interface__ = buffer.__array_interface__
        pool.lend(self, buffer)

    def __del__(self) -> None:
        if hasattr(self, "_buffer"):  # else a signal came while it was made
            self._pool.take_back(self._buffer)


class BufferPool:
    """Hands out arrays, and keeps what came back for arrays of the same size.

    Parameters
    ----------
    capacity
        Most bytes that are on loan and kept, together; beyond, memory is not pooled.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        # Returned from __del__, which may run in any thread at any allocation.
        self._lock = threading.RLock()
        self._kept: OrderedDict[int, list[np.ndarray]] = OrderedDict()
        self._kept_nbytes = 0
        self._lent_nbytes = 0

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Give an uninitialised C-contiguous array, as `numpy.empty` does."""
        nbytes = math.prod(shape) * dtype.itemsize
        with self._lock:
            same = self._kept.get(nbytes)
            buffer = same.pop() if same else None
            if buffer is not None:
                self._kept_nbytes -= nbytes
                self._kept.move_to_end(nbytes)
            else:
                self._make_room(nbytes)
                if self._lent_nbytes + nbytes > self._capacity:
                    return np.empty(shape, dtype)
        if buffer is None:
            buffer = np.empty(nbytes, np.uint8)
        lease = _Lease(self, buffer)
        return np.asarray(lease).view(dtype).reshape(shape)

    def lend(self, lease: _Lease, buffer: np.ndarray) -> None:
        """Count a buffer as lent; `take_back` undoes it."""
        nbytes = buffer.nbytes
        with self._lock:
            # One statement without a call: no signal comes in between.
            self._lent_nbytes, lease._buffer = self._lent_nbytes + nbytes, buffer

    def take_back(self, buffer: np.ndarray) -> None:
        """Keep a buffer that nobody uses any more."""
        with self._lock:
            self._lent_nbytes -= buffer.nbytes
            self._kept.setdefault(buffer.nbytes, []).append(buffer)
            self._kept_nbytes += buffer.nbytes

    def clear(self) -> None:
        """Give back to the system what is kept."""
        with self._lock:
            self._kept.clear()
            self._kept_nbytes = 0

    def _make_room(self, nbytes: int) -> None:
        """Let go of the sizes that were wanted least recently."""
        while self._kept and self._lent_nbytes + self._kept_nbytes + nbytes > self._capacity:
            size, buffers = next(iter(self._kept.items()))
            if buffers:
                buffers.pop()
                self._kept_nbytes -= size
            if not buffers:
                del self._kept[size]
