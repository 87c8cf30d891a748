"""Keeps what fails in a hook away from the training."""

from __future__ import annotations

import functools
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Literal, ParamSpec

from tensorstore_fmt.errors import ArgumentError

__all__ = ["Guard"]

P = ParamSpec("P")

_MOST_FAILURES = 100
"""After so many at one place, the place is left alone: each costs time."""


class Guard:
    """Wraps functions that a framework calls, so that they never raise into it.

    Parameters
    ----------
    on_error
        ``"warn"``: a failure is counted, the first of its kind at each place is warned of.
        ``"raise"``: it is raised, also into the training.
    """

    def __init__(self, on_error: Literal["warn", "raise"]) -> None:
        if on_error not in ("warn", "raise"):
            raise ArgumentError(f"on_error is {on_error!r}; it is 'warn' or 'raise'")
        self._raises = on_error == "raise"
        self._lock = threading.Lock()
        self._warned: set[tuple[str, str]] = set()
        self.failures: Counter[str] = Counter()
        """How many failures there were, by place."""

    def __call__(self, place: str, function: Callable[P, object]) -> Callable[P, None]:
        """Give a function that does the same, returns None and passes no failure on.

        Only `Exception`: Ctrl-C and the exit of the program pass.
        """

        @functools.wraps(function)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
            self.call(place, function, *args, **kwargs)

        return guarded

    def call(
        self, place: str, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs
    ) -> None:
        """Call a function, and pass no failure on."""
        if self.failures[place] >= _MOST_FAILURES:
            return
        try:
            function(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - training goes on whatever a hook meets
            self.failed(place, error)

    def failed(self, place: str, error: Exception) -> None:
        """Count a failure; warn of it or raise it."""
        if self._raises:
            raise error
        kind = (place, type(error).__name__)
        with self._lock:
            self.failures[place] += 1
            is_new = kind not in self._warned
            self._warned.add(kind)
        if is_new:
            warnings.warn(
                f"the hook could not save {place}: {type(error).__name__}: {error}; training goes "
                "on, more of this kind are only counted (hook.failures)",
                RuntimeWarning,
                stacklevel=3,
            )
