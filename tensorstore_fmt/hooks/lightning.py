"""Lightning: `RunLogger` saves what modules log, `RunCallback` saves tensors.

::

    from tensorstore_fmt.hooks.lightning import RunCallback, RunLogger

    trainer = Trainer(logger=RunLogger("runs/first"), callbacks=[RunCallback(["gradients"])])

Step k is the batch that Lightning logs as step k: metrics and tensors have the same numbers. (With
accumulated gradients, several batches are one step.) Names are those the module logs, without a
mode; tensors have the modes TRAIN and EVAL. A training that goes on from a checkpoint
(``ckpt_path=``) goes on in the run.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.hooks.collections import Collection
from tensorstore_fmt.hooks.late_run import LateRun, Opened, open_on_all_ranks
from tensorstore_fmt.hooks.reductions import Reductions
from tensorstore_fmt.hooks.schedule import SaveConfig
from tensorstore_fmt.hooks.torch import DEFAULT_COLLECTIONS, TorchHook, attach

__all__ = ["RunCallback", "RunLogger"]


class RunLogger(Logger):  # type: ignore[misc] # the library ships no types here
    """Saves metrics, on rank 0; hyper-parameters become the attribute ``hparams`` of the run.

    Parameters
    ----------
    run, resume, options
        Where the run is; `resume` allows to go on in a finished one without a checkpoint; and
        options of `create_run`.
    """

    def __init__(
        self,
        run: str | os.PathLike[str],
        *,
        resume: bool = False,
        **options: Any,  # noqa: ANN401 - those of create_run, checked there
    ) -> None:
        super().__init__()
        self.run = LateRun(run, resume=resume, **options)
        self._model: LightningModule | None = None
        self._next = 0

    @property
    def name(self) -> str:
        """Name of the folder, beside the run, in which Lightning puts checkpoints."""
        return "lightning_logs"

    @property
    def version(self) -> str:
        """Last part of where the run is."""
        return os.path.basename(self.run.url.rstrip("/"))

    @property
    def save_dir(self) -> str:
        """The folder that the run is in."""
        return os.path.dirname(self.run.url.rstrip("/"))

    @property
    def log_dir(self) -> str:
        """Where the run is."""
        return self.run.url

    @property
    @rank_zero_experiment  # type: ignore[untyped-decorator] # the library's
    def experiment(self) -> LateRun:
        """What takes other values: ``experiment.log({name: value}, step)``."""
        return self.run

    @rank_zero_only  # type: ignore[untyped-decorator] # the library's, as below
    def log_metrics(self, metrics: Mapping[str, object], step: int | None = None) -> None:
        """Save metrics; without a step, at the one after the last."""
        if self._model is not None:
            trainer, self._model = self._model.trainer, None
            self.run.resume |= trainer.ckpt_path is not None
        step = self._next if step is None else int(step)
        self._next = max(self._next, step + 1)
        self.run.log(metrics, step)

    @rank_zero_only  # type: ignore[untyped-decorator]
    def log_hyperparams(
        self, params: Mapping[str, object] | Namespace, *_args: object, **_kwargs: object
    ) -> None:
        """Keep hyper-parameters."""
        self.run.set_hparams(vars(params) if isinstance(params, Namespace) else params)

    @rank_zero_only  # type: ignore[untyped-decorator]
    def log_graph(self, model: LightningModule, _input_array: torch.Tensor | None = None) -> None:
        """Learn who trains, to ask whether it goes on from a checkpoint; no graph is saved."""
        self._model = model

    @rank_zero_only  # type: ignore[untyped-decorator]
    def save(self) -> None:
        """Leave it to the run, which flushes itself."""

    @rank_zero_only  # type: ignore[untyped-decorator]
    def finalize(self, status: str) -> None:  # noqa: ARG002 - Lightning's
        """Close the run. A test after the training opens it again, and hides nothing."""
        self.run.close()


class RunCallback(Callback):  # type: ignore[misc] # the library ships no types here
    """Saves tensors on all ranks, and stops the training if the run is asked to.

    A request (`tensorstore_fmt.rules.request_stop`, ``watch --stop``) sets `Trainer.should_stop`
    on all ranks after the same step.

    Parameters
    ----------
    collections
        Tensors to save, as `tensorstore_fmt.hooks.torch.attach` takes them; none: only requests
        to stop are looked for.
    every, save, reductions
        When and in what form tensors are saved: with `every`, also at the first batch of each
        validation, in mode EVAL.
    run, options
        If the trainer has no `RunLogger`, as that takes them.
    stoppable
        Whether to look for requests to stop.
    """

    def __init__(
        self,
        collections: Iterable[str | Collection] = DEFAULT_COLLECTIONS,
        *,
        every: int | None = None,
        save: SaveConfig | None = None,
        reductions: Reductions | None = None,
        stoppable: bool = True,
        run: str | os.PathLike[str] | None = None,
        **options: Any,  # noqa: ANN401 - those of RunLogger, checked there
    ) -> None:
        super().__init__()
        if every is not None and save is not None:
            raise ArgumentError("give every= or save=, not both", argument="every")
        self._collections = tuple(collections)
        self._save = save or SaveConfig(
            every=10 if every is None else every, modes={"EVAL": SaveConfig(every=1)}
        )
        self._reductions = reductions
        self._stoppable = stoppable
        self._own = None if run is None else LateRun(run, **options)
        self._opened: Opened | None = None
        self._hook: TorchHook | None = None
        self._step: int | None = None

    @property
    def hook(self) -> TorchHook | None:
        """The hook, while the training runs, if there are `collections`."""
        return self._hook

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Say how many ranks are going to write, before the logger opens the run."""
        if stage == "fit" and self._collections:
            self._run_of(trainer).num_workers = trainer.world_size

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: object,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Open the run and attach, if not yet; begin a step."""
        step = _step(trainer)
        if self._opened is None:
            self._open(trainer, pl_module, step)
        if self._hook is not None and step != self._step:
            self._hook.set_step(step)
        self._step = step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        outputs: object,  # noqa: ARG002
        batch: object,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Stop here, if somebody asked."""
        watcher = self._opened.watcher if self._opened is not None else None
        if watcher is not None and watcher.should_stop(_step(trainer) + 1):
            trainer.should_stop = True

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        batch: object,  # noqa: ARG002
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Begin an evaluation."""
        if self._hook is not None and batch_idx == dataloader_idx == 0:
            self._step = None
            self._hook.set_step(_step(trainer), "EVAL")

    def on_validation_batch_end(self, *_args: object, **_kwargs: object) -> None:
        """Save nothing of an evaluation after its first batch."""
        if self._hook is not None:
            self._hook.skip()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Detach."""
        self._detach(trainer)

    def on_exception(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        exception: BaseException,  # noqa: ARG002
    ) -> None:
        """Detach."""
        self._detach(trainer)

    def _run_of(self, trainer: Trainer) -> LateRun:
        logger = next((each for each in trainer.loggers if isinstance(each, RunLogger)), None)
        run = self._own or (logger.run if logger is not None else None)
        if run is None:
            raise ArgumentError(
                "the trainer has no RunLogger: give it one (logger=RunLogger(...)), or say where "
                "the run is (RunCallback(..., run=...))",
                argument="run",
            )
        return run

    def _open(self, trainer: Trainer, model: LightningModule, step: int) -> None:
        run = self._run_of(trainer)
        run.resume |= trainer.ckpt_path is not None
        self._opened = open_on_all_ranks(
            run, step, all_write=bool(self._collections), is_stoppable=self._stoppable
        )
        if self._collections and self._opened.writer is not None:
            self._hook = attach(
                model,
                self._opened.writer,
                optimizer=trainer.optimizers,
                collections=self._collections,
                save=self._save,
                reductions=self._reductions,
            )

    def _detach(self, trainer: Trainer) -> None:
        if self._hook is not None:
            self._hook.remove()
        opened, self._opened, self._hook, self._step = self._opened, None, None, None
        if opened is None:
            return
        if opened.watcher is not None:
            opened.watcher.close()
        is_loggers = self._own is None and trainer.is_global_zero  # the logger closes it
        if opened.writer is not None and not is_loggers:
            opened.writer.close()


def _step(trainer: Trainer) -> int:
    """Give the number that Lightning logs metrics under; its own callbacks take it from here."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)
