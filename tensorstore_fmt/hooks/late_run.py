"""A run of a framework's logger: opened with the first value, gone on in after a restart."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from tensorstore_fmt.errors import ArgumentError, NotARunError, TensorStoreError
from tensorstore_fmt.hooks.guard import Guard
from tensorstore_fmt.reading.run import open_run
from tensorstore_fmt.rules.stopping import StopWatcher
from tensorstore_fmt.writing.run import RunWriter, create_run

__all__ = ["HPARAMS", "LateRun", "Opened", "open_on_all_ranks", "plain"]

HPARAMS: Final = "hparams"
"""Attribute of a run, and name of a string in it, that holds hyper-parameters."""


class LateRun:
    """A run that is opened when it is known at which step it goes on, and its hyper-parameters.

    A run that is not finished is gone on in, with a new attempt, at the first step that is logged:
    what an earlier attempt logged at that step and later is hidden, and stays readable with
    ``attempt=``. Logging after `close` opens it again and hides nothing.

    Parameters
    ----------
    url, options
        As `create_run` takes them.
    resume
        Whether to go on in a finished run, too; else that is an error.

    Attributes
    ----------
    num_workers
        Of the run; to be set before it is opened.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        resume: bool = False,
        **options: Any,  # noqa: ANN401 - those of create_run, checked there
    ) -> None:
        self.url = os.fspath(url)
        self.resume = resume
        self.num_workers = int(options.pop("num_workers", 1))
        self._options = options
        self._guard = Guard(options.get("on_error", "warn"))
        self._hparams: dict[str, object] = {}
        self._has_new_hparams = False
        self._writer: RunWriter | None = None
        self._next = 0
        self._lock = threading.RLock()

    @property
    def writer(self) -> RunWriter | None:
        """The writer, if there is one."""
        return self._writer

    @property
    def is_open(self) -> bool:
        """Whether there is a writer that takes values."""
        return self._writer is not None and not self._writer.is_closed

    @property
    def storage_options(self) -> Mapping[str, object] | None:
        """As they were given."""
        given: Mapping[str, object] | None = self._options.get("storage_options")
        return given

    @property
    def failures(self) -> Mapping[str, int]:
        """How many values could not be stored, by their names."""
        return dict(self._guard.failures)

    def set_hparams(self, values: Mapping[str, object]) -> None:
        """Keep hyper-parameters: as attribute ``hparams`` of a run that is created after this.

        In a run that has such an attribute already, or is open, they are logged as JSON, a string
        named ``hparams``, if they are others.
        """
        with self._lock:
            self._hparams |= {str(key): plain(value) for key, value in values.items()}
            self._has_new_hparams = True

    def open(self, step: int, **told: Any) -> RunWriter:  # noqa: ANN401 - options of create_run
        """Give the writer; open the run if it is not open.

        Parameters
        ----------
        step
            No step before this one is going to be logged.
        told
            More options of `create_run`; a `resume_from` among them is not found out here.

        Raises
        ------
        RunExistsError
            The run is finished, and `resume` was not given.
        """
        with self._lock:
            if self._writer is None or self._writer.is_closed:
                options = {"num_workers": self.num_workers, **self._options, **told}
                if self._writer is not None:  # it was closed here; nothing is to be hidden
                    options["resume_from"] = self._next
                elif "resume_from" not in options:
                    options["resume_from"] = self._find_resume_from(step)
                attrs = {**(options.pop("attrs", None) or {})}
                if self._hparams:
                    attrs[HPARAMS] = self._hparams
                self._writer = create_run(self.url, attrs=attrs, **options)
                kept = self._writer.attrs.get(HPARAMS, {})
                self._has_new_hparams = bool(self._hparams) and kept != self._hparams
            return self._writer

    def log(self, data: Mapping[str, object], step: int, mode: str | None = None) -> None:
        """Log values; one that cannot be stored is warned of, and the others are stored."""
        writer = self.open(step)
        with self._lock:
            self._next = max(self._next, step + 1)
            if self._has_new_hparams:
                self._has_new_hparams = False
                data = {**data, HPARAMS: json.dumps(self._hparams)}
        data = {str(name): value for name, value in data.items() if value is not None}
        try:
            writer.log(data, step=step, mode=mode)
        except ArgumentError:
            for name, value in data.items():
                self._guard.call(f"{name!r}", writer.log, {name: value}, step=step, mode=mode)

    def flush(self) -> None:
        """Make visible what was logged."""
        if self._writer is not None and not self._writer.is_closed:
            self._writer.flush()

    def close(self) -> None:
        """Close the run, if it is open."""
        if self._writer is not None:
            self._writer.close()

    def _find_resume_from(self, step: int) -> int | None:
        try:
            with open_run(self.url, storage_options=self.storage_options) as run:
                goes_on = self.resume or not run.is_closed
        except NotARunError:
            return None
        return step if goes_on else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What a rank has of a run that all ranks opened.

    Attributes
    ----------
    writer
        None on a rank that writes nothing.
    watcher
        Says whether somebody asked the training to stop; None if that is not wanted.
    """

    writer: RunWriter | None
    watcher: StopWatcher | None


def open_on_all_ranks(
    run: LateRun, step: int, *, all_write: bool, is_stoppable: bool = False
) -> Opened:
    """Open a run, on all ranks of `torch.distributed` at once; rank 0 says how it goes on.

    Parameters
    ----------
    step
        As `LateRun.open` takes it, on rank 0.
    all_write
        Whether ranks other than 0 get writers.
    """
    from torch import distributed

    is_parallel = distributed.is_available() and distributed.is_initialized()
    rank = distributed.get_rank() if is_parallel else 0
    ranks = distributed.get_world_size() if is_parallel else 1
    if all_write:
        run.num_workers = ranks
    said: list[Any] = [None]
    if rank == 0:
        try:
            said = [run.open(step).attempt]
        except (OSError, TensorStoreError) as error:
            said = [error]  # the others would wait for ever
    if is_parallel:
        distributed.broadcast_object_list(said, src=0)
    if isinstance(said[0], Exception):
        raise said[0]
    mine = None
    if rank == 0:
        mine = run.writer
    elif all_write:
        # Which attempt it is says all: it has the step that rank 0 found out.
        mine = run.open(step, worker=rank, attempt=said[0], resume_from=None)
    watcher = None
    if is_stoppable:
        watcher = StopWatcher(
            mine or run.url, worker=rank, num_workers=ranks, attempt=said[0],
            storage_options=run.storage_options,
        )  # fmt: skip
    return Opened(writer=mine, watcher=watcher)


def plain(value: object) -> object:
    """Give a value as JSON can say it; what it cannot say becomes its text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)
