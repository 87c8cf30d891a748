"""Hugging Face Transformers: `RunCallback` saves what a `Trainer` logs, and tensors.

::

    from tensorstore_fmt.hooks.transformers import RunCallback

    trainer = Trainer(model, args, train_dataset=data, callbacks=[RunCallback("runs/first")])

Step k is the k-th update of the model: its forwards and gradients, what the trainer logs after it,
and evaluations after it. Names are those of the trainer; ``eval_`` and ``test_`` become the modes
EVAL and PREDICT. A training that goes on from a checkpoint goes on in the run.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from transformers import TrainerCallback

from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.hooks.collections import Collection
from tensorstore_fmt.hooks.late_run import LateRun, Opened, open_on_all_ranks
from tensorstore_fmt.hooks.reductions import Reductions
from tensorstore_fmt.hooks.schedule import SaveConfig
from tensorstore_fmt.hooks.torch import TorchHook, attach
from tensorstore_fmt.hooks.torch_calls import HookCall

__all__ = ["RunCallback"]

_MODES: Final = {"eval_": "EVAL", "test_": "PREDICT"}


class RunCallback(TrainerCallback):  # type: ignore[misc] # the library ships no types here
    """Saves a training, and tensors of its model.

    The training arguments and the model's configuration become the attribute ``hparams``. A
    request to stop (`tensorstore_fmt.rules.request_stop`, ``watch --stop``) sets the trainer's
    ``control.should_training_stop``, on all ranks after the same step.

    Parameters
    ----------
    run, resume, options
        Where the run is; `resume` allows to go on in a finished one without a checkpoint; and
        options of `create_run`.
    collections
        Tensors to save, as `tensorstore_fmt.hooks.torch.attach` takes them; then all ranks write,
        else only rank 0. With ``losses``, each step's own loss is ``loss``, and what the trainer
        logs, the mean of several, is ``trainer/loss``.
    every, save, reductions
        When and in what form tensors are saved: with `every`, also at the first batch of each
        evaluation, in mode EVAL.
    stoppable
        Whether to look for requests to stop.
    """

    def __init__(
        self,
        run: str | os.PathLike[str],
        *,
        collections: Iterable[str | Collection] = (),
        every: int | None = None,
        save: SaveConfig | None = None,
        reductions: Reductions | None = None,
        stoppable: bool = True,
        resume: bool = False,
        **options: Any,  # noqa: ANN401 - those of create_run, checked there
    ) -> None:
        if every is not None and save is not None:
            raise ArgumentError("give every= or save=, not both", argument="every")
        self._run = LateRun(run, resume=resume, **options)
        self._collections = tuple(collections)
        self._save = save or every_step_and_evaluation(10 if every is None else every)
        self._reductions = reductions
        self._stoppable = stoppable
        self._resume = resume
        self._opened = Opened(writer=None, watcher=None)
        self._hook: TorchHook | None = None
        self._handle: Any = None
        self._is_training = False
        self._is_evaluating = False
        self._step = 0

    @property
    def hook(self) -> TorchHook | None:
        """The hook, while the training runs, if there are `collections`."""
        return self._hook

    def on_train_begin(
        self,
        args: Any,  # noqa: ANN401 - the library's, as below
        state: Any,  # noqa: ANN401
        control: Any,  # noqa: ANN401
        model: Any = None,  # noqa: ANN401
        optimizer: Any = None,  # noqa: ANN401
        **_kwargs: object,
    ) -> None:
        """Open the run and attach."""
        self._detach()
        self._is_training = True
        config: Any = getattr(model, "config", None)
        of_model = {"model": config.to_dict()} if hasattr(config, "to_dict") else {}
        self._run.set_hparams({**args.to_sanitized_dict(), **of_model})
        self._run.resume = self._resume or state.global_step > 0
        self._step = state.global_step
        self._opened = open_on_all_ranks(
            self._run,
            state.global_step + 1 if state.global_step else 0,
            all_write=bool(self._collections),
            is_stoppable=self._stoppable,
        )
        if self._collections and self._opened.writer is not None:
            self._attach(model, optimizer)
        self._stop_if_asked(control)

    def on_step_begin(self, _args: object, state: Any, _control: object, **_kwargs: object) -> None:  # noqa: ANN401
        """Begin a step."""
        self._step = state.global_step
        self._is_evaluating = False
        if self._hook is not None:
            self._hook.set_step(state.global_step + 1)

    def on_step_end(self, _args: object, state: Any, control: Any, **_kwargs: object) -> None:  # noqa: ANN401
        """End a step."""
        self._step = state.global_step
        if self._hook is not None:
            self._hook.skip()
        self._stop_if_asked(control)

    def on_prediction_step(self, *_args: object, **_kwargs: object) -> None:
        """Save nothing of an evaluation after its first batch."""
        if self._hook is not None:
            self._hook.skip()

    def on_evaluate(self, *_args: object, **_kwargs: object) -> None:
        """End an evaluation."""
        self._end_evaluation()

    def on_predict(
        self,
        args: object,
        state: Any,  # noqa: ANN401
        control: object,
        metrics: Mapping[str, object],
        **_kwargs: object,
    ) -> None:
        """Save the result of a prediction, which the trainer does not log."""
        self.on_log(args, state, control, metrics)
        self._end_evaluation()

    def on_log(
        self,
        _args: object,
        state: Any,  # noqa: ANN401
        _control: object,
        logs: Mapping[str, object] | None = None,
        **_kwargs: object,
    ) -> None:
        """Save what the trainer logs."""
        if not state.is_world_process_zero or not logs:
            return
        by_mode: dict[str, dict[str, object]] = {}
        for name, value in logs.items():
            mode = next((m for prefix, m in _MODES.items() if name.startswith(prefix)), "TRAIN")
            short = name if mode == "TRAIN" else name.split("_", 1)[1]
            if mode == "TRAIN" and name == "loss" and self._saves_losses():
                short = "trainer/loss"
            by_mode.setdefault(mode, {})[short] = value
        for mode, values in by_mode.items():
            self._run.log(values, state.global_step, mode)

    def on_train_end(self, *_args: object, **_kwargs: object) -> None:
        """Close the run."""
        self._is_training = False
        self._detach()
        self._run.close()

    def _end_evaluation(self) -> None:
        self._is_evaluating = False
        if not self._is_training:
            self._run.close()

    def _attach(self, model: torch.nn.Module, optimizer: Any) -> None:  # noqa: ANN401
        while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = inner  # accelerate's is around it, and calls no hooks
        assert self._opened.writer is not None
        self._hook = attach(
            model,
            self._opened.writer,
            optimizer=optimizer,
            collections=self._collections,
            save=self._save,
            reductions=self._reductions,
        )
        self._hook.set_step(self._step)
        self._hook.skip()
        self._handle = model.register_forward_pre_hook(HookCall(self._before_forward), prepend=True)

    def _before_forward(self, model: torch.nn.Module, _args: object) -> None:
        """Begin an evaluation: the trainer calls nobody before its first batch."""
        if not model.training and not self._is_evaluating and self._hook is not None:
            self._is_evaluating = True
            self._hook.set_step(self._step, "EVAL")

    def _saves_losses(self) -> bool:
        names = {c if isinstance(c, str) else c.name for c in self._collections}
        return not names.isdisjoint(("losses", "all"))

    def _stop_if_asked(self, control: Any) -> None:  # noqa: ANN401
        watcher = self._opened.watcher
        if watcher is not None and watcher.should_stop(self._step + 1):
            control.should_training_stop = True

    def _detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._opened.watcher is not None:
            self._opened.watcher.close()
        self._opened = Opened(writer=None, watcher=None)


def every_step_and_evaluation(every: int) -> SaveConfig:
    """Give when to save: each so many steps of training, and at each evaluation."""
    return SaveConfig(every=every, modes={"EVAL": SaveConfig(every=1)})
