"""Keras 3, with any backend: `RunCallback` saves what `fit` reports, and weights.

::

    from tensorstore_fmt.hooks.keras import RunCallback

    model.fit(x, y, validation_split=0.2, epochs=5, callbacks=[RunCallback("runs/first")])

Step k is the state after k updates, as the optimizer counts them; so a training that goes on from
a backup goes on in the run. Names are those of Keras (the value of a batch is Keras' mean over its
epoch so far); ``val_`` becomes the mode EVAL.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from tensorstore_fmt.hooks.late_run import LateRun
from tensorstore_fmt.hooks.schedule import SaveConfig
from tensorstore_fmt.rules.stopping import StopWatcher

__all__ = ["RunCallback"]


class RunCallback(keras.callbacks.Callback):  # type: ignore[misc] # the library ships no types here
    """Saves a training; its optimizer's settings become the attribute ``hparams``.

    A request to stop (`tensorstore_fmt.rules.request_stop`, ``watch --stop``) sets the model's
    ``stop_training``.

    Parameters
    ----------
    run, resume, options
        Where the run is; `resume` allows to go on in a finished one with a model that was never
        trained; and options of `create_run`.
    every
        Interval, in steps, of what is saved within an epoch; 0: nothing is. What comes at the end
        of an epoch is always saved.
    weights
        Regular expressions (`re.search`) on the paths of weights, which are their names
        (``sequential/dense/kernel``): these are saved every so many steps.
    stoppable
        Whether to look for requests to stop.
    """

    def __init__(
        self,
        run: str | os.PathLike[str],
        *,
        every: int = 10,
        weights: str | Sequence[str] = (),
        stoppable: bool = True,
        resume: bool = False,
        **options: Any,  # noqa: ANN401 - those of create_run, checked there
    ) -> None:
        super().__init__()
        self._run = LateRun(run, resume=resume, **options)
        self._every = SaveConfig(every=every).every  # checked there
        self._patterns = [
            re.compile(p) for p in ((weights,) if isinstance(weights, str) else weights)
        ]
        self._stoppable = stoppable
        self._watcher: StopWatcher | None = None
        self._is_training = False
        self._step: int | None = None
        self._begin = 0

    def on_train_begin(self, logs: Mapping[str, object] | None = None) -> None:  # noqa: ARG002
        """Forget the training before."""
        self._is_training, self._step = True, None

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, object] | None = None) -> None:  # noqa: ARG002
        """Open the run, if not yet: only now all callbacks have restored what they restore."""
        self._begin = batch
        if self._step is None:
            self._open()

    def on_train_batch_end(self, batch: int, logs: Mapping[str, object] | None = None) -> None:
        """Save what is due, and stop if somebody asked."""
        assert self._step is not None
        before, self._step = self._step, self._step + batch - self._begin + 1  # several at once
        if self._every and self._step // self._every > before // self._every:
            self._log(logs)
            self._save_weights()
        if self._watcher is not None and self._watcher.should_stop(self._step + 1):
            self.model.stop_training = True

    def on_epoch_end(self, epoch: int, logs: Mapping[str, object] | None = None) -> None:
        """Save the values of the epoch and its validation."""
        self._log({"epoch": epoch, **(logs or {})})

    def on_test_end(self, logs: Mapping[str, object] | None = None) -> None:
        """Save the result of `evaluate`; `fit` gives its own at the end of the epoch."""
        if not self._is_training:
            self._log({f"val_{name}": value for name, value in (logs or {}).items()})
            self._run.close()

    def on_train_end(self, logs: Mapping[str, object] | None = None) -> None:  # noqa: ARG002
        """Close the run."""
        self._is_training = False
        if self._watcher is not None:
            self._watcher.close()
            self._watcher = None
        self._run.close()

    def _open(self) -> None:
        optimizer = self.model.optimizer
        step = int(optimizer.iterations)
        self._step = step
        self._run.resume |= step > 0
        self._run.set_hparams({**(self.params or {}), "optimizer": optimizer.get_config()})
        writer = self._run.open(step + 1 if step else 0)
        if self._stoppable:
            self._watcher = StopWatcher(writer)

    def _log(self, logs: Mapping[str, object] | None) -> None:
        train, evaluated = {}, {}
        for name, value in (logs or {}).items():
            if name.startswith("val_"):
                evaluated[name.removeprefix("val_")] = value
            else:
                train[name] = value
        for mode, values in (("TRAIN", train), ("EVAL", evaluated)):
            if values:
                self._run.log(values, self._step or 0, mode)

    def _save_weights(self) -> None:
        if self._patterns:
            self._run.log(
                {
                    variable.path: keras.ops.convert_to_numpy(variable.value)
                    for variable in self.model.weights  # in step with what the backend holds
                    if any(pattern.search(variable.path) for pattern in self._patterns)
                },
                self._step or 0,
                "TRAIN",
            )
