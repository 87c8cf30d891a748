"""Whether trials look for news."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from tensorstore_fmt.interop.smdebug.trials.trial import Trial

__all__ = ["no_refresh", "refresh"]


@contextmanager
def no_refresh(trials: Trial | Iterable[Trial]) -> Iterator[None]:
    """Let trials show the same, however they grow; may be nested."""
    held = [trials] if isinstance(trials, Trial) else list(trials)
    for trial in held:
        trial.freeze(1)
    try:
        yield
    finally:
        for trial in held:
            trial.freeze(-1)


@contextmanager
def refresh(trials: Trial | Iterable[Trial]) -> Iterator[None]:
    """Let trials look for news, also within `no_refresh`; they do so once at its begin."""
    held = [trials] if isinstance(trials, Trial) else list(trials)
    before = [trial.freeze_depth for trial in held]
    for trial, depth in zip(held, before, strict=True):
        trial.freeze(-depth)
        trial.refresh_data()
    try:
        yield
    finally:
        for trial, depth in zip(held, before, strict=True):
            trial.freeze(depth)
