"""Caches: what was used last, up to a number of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

from tensorstore_fmt.reading.locks import ForkSafeLock

__all__ = ["Cache"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Cache(Generic[K, V]):
    """A mapping that forgets what was used longest ago. Threads share it.

    Parameters
    ----------
    max_nbytes
        Forget when the values take more than this; the last one put stays.
    """

    def __init__(self, max_nbytes: int) -> None:
        self._max_nbytes = max_nbytes
        self._lock = ForkSafeLock()
        self._values: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: K) -> V | None:
        """Give a value, if it is still here."""
        with self._lock:
            found = self._values.get(key)
            if found is None:
                return None
            self._values.move_to_end(key)
            return found[0]

    def put(self, key: K, value: V, nbytes: int) -> None:
        """Keep a value of a size; if another thread put one meanwhile, that one stays."""
        with self._lock:
            if key in self._values:
                return
            self._values[key] = (value, nbytes)
            self.nbytes += nbytes
            while self.nbytes > self._max_nbytes and len(self._values) > 1:
                _, (_, size) = self._values.popitem(last=False)
                self.nbytes -= size

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._values.clear()
            self.nbytes = 0
