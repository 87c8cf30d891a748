"""Hugging Face Accelerate: `RunTracker` saves what an `Accelerator` logs.

::

    from tensorstore_fmt.hooks.accelerate import RunTracker

    accelerator = Accelerator(log_with=RunTracker("runs/first"))
    accelerator.init_trackers("project", config={"lr": 0.1})
    accelerator.log({"loss": loss}, step=step)

For tensors, attach `tensorstore_fmt.hooks.torch` to the model, with ``tracker.open(step)`` as its
run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

from accelerate.tracking import GeneralTracker, on_main_process

from tensorstore_fmt.hooks.late_run import LateRun
from tensorstore_fmt.writing.run import RunWriter

__all__ = ["RunTracker"]


class RunTracker(GeneralTracker):  # type: ignore[misc] # the library ships no types here
    """Saves on the main process what is logged; the configuration is the attribute ``hparams``.

    Parameters
    ----------
    run, options
        Where the run is, and options of `create_run`.
    resume
        Whether to go on in a finished run, at the first step that is logged. A run that is not
        finished is gone on in anyway.
    """

    name: Final = "tensorstore_fmt"
    requires_logging_directory: Final = False
    main_process_only: Final = True

    def __init__(
        self,
        run: str | os.PathLike[str],
        *,
        resume: bool = False,
        **options: Any,  # noqa: ANN401 - those of create_run, checked there
    ) -> None:
        super().__init__()
        self._run = LateRun(run, resume=resume, **options)
        self._next = 0

    @property
    def tracker(self) -> LateRun:
        """What takes other values, too: ``tracker.log({name: value}, step, mode)``."""
        return self._run

    def open(self, step: int) -> RunWriter:
        """Give the writer, for hooks; `step` is the first one that is going to be logged."""
        return self._run.open(step)

    @on_main_process  # type: ignore[untyped-decorator] # the library's, as below
    def store_init_configuration(self, values: Mapping[str, object]) -> None:
        """Keep the configuration."""
        self._run.set_hparams(values)

    @on_main_process  # type: ignore[untyped-decorator]
    def log(
        self,
        values: Mapping[str, object],
        step: int | None = None,
        *,
        mode: str | None = None,
        **_kwargs: object,
    ) -> None:
        """Save values; without a step, at the one after the last.

        Parameters
        ----------
        mode
            ``accelerator.log(values, step, log_kwargs={"tensorstore_fmt": {"mode": "EVAL"}})``.
        """
        step = self._next if step is None else int(step)
        self._next = max(self._next, step + 1)
        self._run.log(values, step, mode)

    @on_main_process  # type: ignore[untyped-decorator]
    def finish(self) -> None:
        """Close the run."""
        self._run.close()
