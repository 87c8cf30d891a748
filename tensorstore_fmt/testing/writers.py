"""Writers whose clock, ids, pauses and storage the test decides."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from tensorstore_fmt.storage import Storage, open_storage
from tensorstore_fmt.writing.options import MIB, check_options
from tensorstore_fmt.writing.run import RunWriter, open_writer

__all__ = ["create_test_run", "no_sleep", "ticking_clock"]


def no_sleep(seconds: float) -> None:
    """Do not wait, however long."""


def ticking_clock(start_us: int = 1_700_000_000_000_000, tick_us: int = 1000) -> Callable[[], int]:
    """Give a clock that goes on by the same amount each time it is asked."""
    return itertools.count(start_us, tick_us).__next__


def create_test_run(
    place: str | os.PathLike[str] | Storage,
    *,
    storage_options: Mapping[str, object] | None = None,
    clock_us: Callable[[], int] | None = None,
    new_id: Callable[[], int] | None = None,
    sleep: Callable[[float], None] = no_sleep,
    grace_s: float = 0.0,
    attrs: Mapping[str, object] | None = None,
    worker: int = 0,
    num_workers: int = 1,
    resume_from: int | None = None,
    attempt: int | None = None,
    join_timeout_s: float = 5.0,
    **options: Any,  # noqa: ANN401 - those of `create_run`, checked there
) -> RunWriter:
    """Begin to write as `create_run` does, on any storage and without its pauses.

    Parameters
    ----------
    place
        A URL, or a storage that is open for writing: a double that counts, delays or fails.
    clock_us, new_id, sleep
        Wall time in microseconds, random 64-bit ids, and how to wait between retries.
    grace_s
        How long covered segments stay.
    """
    storage = (
        place
        if isinstance(place, Storage)
        else open_storage(place, storage_options=storage_options, writable=True)
    )
    defaults: dict[str, Any] = {
        "flush_interval_s": 3600.0,
        "flush_bytes": 64 * MIB,
        "queue_bytes": 256 * MIB,
        "when_full": "block",
        "compression": "auto",
        "chunks": None,
        "stats": True,
        "on_error": "raise",
    }
    checked = check_options(
        is_local=storage.is_local,
        sleep=sleep,
        clock_us=clock_us or ticking_clock(),
        new_id=new_id or itertools.count(1).__next__,
        **(defaults | options),
    )
    return open_writer(
        storage,
        replace(checked, grace_s=grace_s),
        attrs=attrs or {},
        worker=worker,
        num_workers=num_workers,
        resume_from=resume_from,
        attempt=attempt,
        join_timeout_s=join_timeout_s,
    )
