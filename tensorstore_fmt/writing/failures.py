"""What happens when the storage fails: try again, count, warn once; or raise, if asked to."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

from tensorstore_fmt.errors import StorageFailedError, TensorStoreError
from tensorstore_fmt.writing.options import WriterOptions

__all__ = ["Failures"]


class Failures:
    """Counts the failures of one writer; all its threads tell it.

    Parameters
    ----------
    place
        The run, for messages.
    """

    def __init__(self, options: WriterOptions, place: str) -> None:
        self._options = options
        self._place = place
        self._lock = threading.Lock()
        self._first: Exception | None = None
        self._has_warned = self._is_down = False
        self.count = 0

    @property
    def is_quiet(self) -> bool:
        """Whether failures are warned of, and never raised into training."""
        return self._options.on_error == "warn"

    def attempt(self, operation: Callable[[], object], *, undo: Callable[[], object]) -> bool:
        """Do something with the storage, again after pauses if it fails; False: it was in vain.

        `undo` is called after each failure, before the next attempt. While the storage is down,
        as the last operation has shown, there are no further attempts: training must not wait for
        each of many operations.
        """
        pauses = () if self._is_down else self._options.retry_s
        for pause in (*pauses, None):
            try:
                operation()
            except (OSError, MemoryError) as error:
                undo()
                self.note(error, is_final=pause is None)
                if pause is not None:
                    self._options.sleep(pause)
            else:
                self._is_down = False
                return True
        self._is_down = True
        return False

    def note(self, error: Exception, *, is_final: bool = True) -> None:
        """Count a failure; warn of the first, or keep it for `check`."""
        with self._lock:
            self.count += 1
            if self._options.on_error == "raise":
                if is_final and self._first is None:
                    self._first = error
                return
            if self._has_warned:
                return
            self._has_warned = True
        try:
            self._warn(error)
        except RuntimeWarning:  # the user wants warnings raised; not in a thread of ours
            with self._lock:
                self._first = error

    def _warn(self, error: Exception) -> None:
        warnings.warn(
            f"{self._place}: writing failed ({type(error).__name__}: {error}); it is tried again, "
            "what cannot be stored is dropped and counted, and training goes on. Further failures "
            "are only counted; close() reports them",
            RuntimeWarning,
            stacklevel=3,
        )

    def check(self) -> None:
        """Raise what failed, if the user wants failures raised.

        Raises
        ------
        StorageFailedError
            Or the library's own error that was met.
        """
        error = self._first
        if error is None:
            return
        if isinstance(error, TensorStoreError):
            raise error
        raise StorageFailedError(
            f"{self._place}: writing failed ({type(error).__name__}: {error}); what was flushed "
            "before is safe",
            url=self._place,
        ) from error
