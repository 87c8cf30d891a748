"""What is closed at the end of a `with` statement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

__all__ = ["Closeable"]


class Closeable(ABC):
    """Has something to close; a `with` statement does it, whatever happened inside."""

    __slots__ = ()

    @abstractmethod
    def close(self) -> object:
        """Close it; more than once is fine. What it gives back, `with` does not look at."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
