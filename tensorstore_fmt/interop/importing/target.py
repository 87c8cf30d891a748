"""The run that an import makes: one writer at a time, values as they come."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt.errors import NotARunError, RunExistsError, TensorStoreError
from tensorstore_fmt.format import layout
from tensorstore_fmt.interop.importing.report import ImportReport
from tensorstore_fmt.reading.run import open_run
from tensorstore_fmt.storage.base import without_credentials
from tensorstore_fmt.writing.run import RunWriter, create_run

__all__ = ["REPORT_NAME", "Key", "Target", "wall_time_us"]

REPORT_NAME: Final = "import/report"
"""Name of the string that holds the report as JSON, saved at the last step imported."""

Key: TypeAlias = tuple[int, str | None]
"""Step and mode."""

_QUEUE_NBYTES: Final = 128 * 1024 * 1024
_BATCH_NBYTES: Final = 1024 * 1024
_MAX_TIME_S: Final = 2.0**40


def wall_time_us(seconds: float) -> int:
    """Take seconds since 1970 as found in a file; 1 µs after for what is no time."""
    return int(seconds * 1e6) if 0 < seconds < _MAX_TIME_S else 1


class Target:
    """Writes what an import reads. Use it in a ``with`` statement.

    Values are collected up to a megabyte or to the next step and logged then; the later of two
    values for the same name, step and mode stays.

    Parameters
    ----------
    url, storage_options
        Of the run, which must not exist.
    attrs
        Of the run.
    num_workers
        How many there will be.
    report
        Counts what comes.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        storage_options: Mapping[str, object] | None,
        attrs: Mapping[str, object],
        num_workers: int,
        report: ImportReport,
    ) -> None:
        self._url = url
        self._options = storage_options
        self._attrs = attrs
        self._num_workers = num_workers
        self._report = report
        self._writer: RunWriter | None = None
        self._key: Key | None = None
        self._batch: dict[str, object] = {}
        self._batch_nbytes = 0
        self._names: set[str] = set()
        self._keys: set[Key] = set()  # of this worker
        _refuse_existing(url, storage_options)

    def begin(self, worker: int) -> None:
        """End the worker before, and go on as this one."""
        self._end()
        self._key = None
        self._keys = set()
        self._writer = create_run(
            self._url,
            attrs=self._attrs,
            worker=worker,
            num_workers=self._num_workers,
            storage_options=self._options,
            queue_bytes=_QUEUE_NBYTES,
            on_error="raise",
        )

    def stamp(self, key: Key, *, mode_step: int, seconds: float) -> None:
        """Say when a step was made, and its number in its mode."""
        self._send()
        assert self._writer is not None
        step, mode = key
        us = wall_time_us(seconds)
        self._writer.stamp(step, mode, mode_step=min(mode_step, layout.MAX_STEP), wall_time_us=us)

    def put(self, key: Key, name: str, value: NDArray[Any] | str | float) -> None:
        """Save a value; arrays are copied before this returns, or when `stamp` or `put` is next."""
        nbytes = self.add(key, name, value)
        self._report.values += 1
        self._report.nbytes += nbytes
        if name not in self._names:
            self._names.add(name)
            self._report.names += 1

    def add(self, key: Key, name: str, value: NDArray[Any] | str | float) -> int:
        """Save something of the import's own, which the report does not count."""
        if key != self._key or name in self._batch:
            self._send()
            self._report.steps += key not in self._keys
            self._keys.add(key)
        self._key = key
        nbytes = _nbytes(value)
        if nbytes > _BATCH_NBYTES:
            self._send()
            self._log(key, {name: value})
        else:
            # A view of a window that is about to go must not wait.
            self._batch[name] = value.copy() if isinstance(value, np.ndarray) else value
            self._batch_nbytes += nbytes
            if self._batch_nbytes >= _BATCH_NBYTES:
                self._send()
        return nbytes

    def _send(self) -> None:
        if self._batch and self._key is not None:
            self._log(self._key, self._batch)
        self._batch = {}
        self._batch_nbytes = 0

    def _log(self, key: Key, data: Mapping[str, object]) -> None:
        assert self._writer is not None
        step, mode = key
        self._writer.log(data, step=step, mode=mode)

    def finish(self) -> None:
        """Save the report at the last step, and close."""
        self._send()
        if self._key is not None:
            self._log(self._key, {REPORT_NAME: json.dumps(self._report.as_dict())})
        self._end()

    def _end(self) -> None:
        self._send()
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.finish()
        elif self._writer is not None:
            self._report.skip("", None, "aborted", f"the import ended here: {error!r:.500}")
            with contextlib.suppress(TensorStoreError):  # what went wrong first is what counts
                self.finish()
            error.add_note("the run that was begun is not complete: delete it before trying again")


def _nbytes(value: NDArray[Any] | str | float) -> int:
    if isinstance(value, str):
        return len(value.encode())
    if not isinstance(value, np.ndarray):
        return 8
    if value.dtype == object:
        return sum(len(text.encode()) for text in value.flat)
    return value.nbytes


def _refuse_existing(
    url: str | os.PathLike[str], storage_options: Mapping[str, object] | None
) -> None:
    """Raise if there is a run, for what is imported must not mix with it."""
    try:
        with open_run(url, storage_options=storage_options) as run:
            where = run.describe()
    except NotARunError as error:
        if error.code == NotARunError.default_code:
            return
        raise
    raise RunExistsError(
        f"{where} holds a run already; an import makes a new one: choose another place",
        url=without_credentials(os.fspath(url)),
    )
