"""Sessions: an open run's storage, its current view and its decoded pages."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping
from typing import Final, TypeVar

from tensorstore_fmt.errors import ClosedError, FormatError
from tensorstore_fmt.reading import opening
from tensorstore_fmt.reading.entries import LostSegmentsError, Pages
from tensorstore_fmt.reading.locks import ForkSafeLock
from tensorstore_fmt.reading.opening import WriterSnapshot
from tensorstore_fmt.reading.view import View
from tensorstore_fmt.storage import Storage, open_storage

__all__ = ["Session"]

T = TypeVar("T")

_HEALINGS: Final = 8


class Session:
    """What a `Run` and its tensors share. Threads and forked processes may use it at once.

    Parameters
    ----------
    url, storage_options
        Of the run.
    kept
        Show what was seen then; it is looked up at the first use.
    """

    def __init__(
        self,
        url: str,
        storage_options: Mapping[str, object] | None,
        kept: tuple[WriterSnapshot, ...] | None = None,
        *,
        storage: Storage | None = None,
    ) -> None:
        self.url = url
        self.storage_options = storage_options
        self.storage = storage or open_storage(url, storage_options=storage_options, writable=False)
        self.pages = Pages(self.storage)
        self._kept = kept
        self._view: View | None = None
        self._changing = ForkSafeLock()
        self._is_closed = False
        self.checked: set[tuple[str, int, int]] = set()  # payloads of views that are right

    def __reduce__(self) -> tuple[object, ...]:
        return Session, (self.url, self.storage_options, self.snapshot())

    def snapshot(self) -> tuple[WriterSnapshot, ...]:
        """Remember what is seen now."""
        if self._view is None and self._kept is not None:
            return self._kept
        return opening.snapshot(self.view)

    @property
    def view(self) -> View:
        """The current view; looks at the run if that was not done yet."""
        view = self._view
        if view is not None:
            return view
        with self._changing:
            self._check_open()
            if self._view is None:
                if self._kept is None:
                    self._view = opening.open_view(self.storage)
                else:
                    self._view = opening.restore(self.storage, self._kept)
                _warn(self.storage, self._view)
            return self._view

    def refresh(self) -> bool:
        """Look again; True if there is something new."""
        before = self.view
        with self._changing:
            self._check_open()
            after = opening.refresh(self.storage, before)
            self._view = after
        if len(after.damage) > len(before.damage):
            _warn(self.storage, after)
        return after.last_flushes() != before.last_flushes()

    def do(self, work: Callable[[View], T]) -> T:
        """Do something with the view; if segments were merged meanwhile, once more with others.

        The new segments show the same as the old ones did.
        """
        for _ in range(_HEALINGS):
            view = self.view
            self._check_open()
            try:
                return work(view)
            except LostSegmentsError as error:
                lost = error.lost
            with self._changing:
                if self._view is view:
                    self._view = opening.heal(self.storage, view, lost)
        raise next(iter(lost.values()))

    def close(self) -> None:
        """Give everything back."""
        self._is_closed = True
        self.pages.forget()
        with contextlib.suppress(OSError):
            self.storage.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedError(f"{self.storage.describe()}: this reader was closed; open it again")


def _warn(storage: Storage, view: View) -> None:
    """Report damage, which must never be passed over in silence."""
    problems: tuple[FormatError, ...] = view.damage
    if problems:
        more = f" (and {len(problems) - 1} more, see .damage)" if len(problems) > 1 else ""
        warnings.warn(
            f"{storage.describe()}: the index is damaged: {problems[0]}{more}",
            RuntimeWarning,
            stacklevel=4,
        )
