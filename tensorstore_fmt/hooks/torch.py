"""Attach to PyTorch: `attach` saves what a training step computes, at the step it belongs to.

::

    from tensorstore_fmt.hooks.torch import attach

    with attach(model, "runs/first", optimizer=optimizer, every=10):
        train()

Names: ``fc1.weight`` (parameters and buffers, as PyTorch names them), ``gradient/fc1.weight``,
``fc1/output`` and ``fc1/input/0`` (``fc1/output/hidden`` where it is a dict …; ``fc1@1/output``
for the second call within a step), ``gradient/fc1/output``, ``optimizer/fc1.weight/exp_avg``,
``loss``.

Steps: a step begins with a forward of the model and ends where the next one begins; with an
optimizer, a step of mode TRAIN goes on until `optimizer.step` was called, so that gradients that
are accumulated belong to one step. What is logged in between, also after `optimizer.step`, belongs
to that step. A model in eval mode makes steps of mode EVAL. All modes share one counter.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, Self

import torch

from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.hooks.collections import Chooser, Collection, check_collections
from tensorstore_fmt.hooks.guard import Guard
from tensorstore_fmt.hooks.recorder import Recorder
from tensorstore_fmt.hooks.reductions import Reductions
from tensorstore_fmt.hooks.schedule import SaveConfig
from tensorstore_fmt.hooks.torch_modules import inner_module
from tensorstore_fmt.hooks.torch_steps import Steps
from tensorstore_fmt.hooks.torch_stopping import StopHook
from tensorstore_fmt.rules.stopping import StopWatcher
from tensorstore_fmt.writing.convert import check_mode, check_step
from tensorstore_fmt.writing.run import RunWriter, create_run
from tensorstore_fmt.writing.torch_snapshots import copy_with_torch_threads

__all__ = ["TorchHook", "attach"]

DEFAULT_COLLECTIONS = ("losses", "weights", "biases", "gradients")


def attach(
    module: torch.nn.Module,
    run: RunWriter | str | os.PathLike[str],
    *,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    loss: torch.nn.Module | None = None,
    collections: Iterable[str | Collection] = DEFAULT_COLLECTIONS,
    every: int | None = None,
    save: SaveConfig | None = None,
    reductions: Reductions | None = None,
    prefix: str = "",
    workers: Literal["all", "one"] = "all",
    start_step: int = 0,
    stoppable: bool = False,
    on_error: Literal["warn", "raise"] = "warn",
    **options: Any,  # noqa: ANN401 - those of create_run, checked there
) -> TorchHook:
    """Attach to a module, and save its tensors until the hook is removed.

    Parameters
    ----------
    module
        Also one compiled by `torch.compile` or wrapped by DistributedDataParallel: names are
        those of the module inside. Attach after compiling with ``fullgraph=True``: then of what
        goes through modules only inputs and outputs of the model itself can be saved.
    run
        A writer; or where to create a run, with `options` as `create_run` takes them (then the
        rank and number of ranks are those of `torch.distributed`, if it is initialised), which
        is closed with the hook.
    optimizer
        Whose `step` ends a training step; then gradients are saved just before it, as it gets
        them (accumulated, averaged, clipped), and its state just after it. Several may be given.
        A step that a `GradScaler` skips goes on with the next forward, unless `TorchHook.end_step`
        is called after ``scaler.update()``.
    loss
        A loss module; what it gives is saved as ``loss``. A loss that the model gives itself
        (``output.loss``) is saved without being named here.
    collections
        Names of built-in ones (`tensorstore_fmt.hooks.collections.BUILT_IN`) and `Collection`
        objects.
    every, save
        When to save what has no setting of its own: each so many steps (10 if neither is given),
        or in full.
    reductions
        In what form what has no setting of its own is saved; as it is, if not given.
    prefix
        Goes before all names, for several models in one run: ``"actor/"``.
    workers
        ``"one"``: ranks other than 0 save nothing.
    start_step
        Number of the first step, for a job that goes on (with ``resume_from=`` the same).
    stoppable
        Whether a request to stop (`tensorstore_fmt.rules.request_stop`, ``watch --stop``) ends the
        training: the forward that would begin the next step of mode TRAIN, or `set_step`, raises
        `TrainingStopped` then, on all ranks at the same step. All ranks have to attach.
    on_error
        ``"warn"``: nothing a hook meets is raised into the training.

    Raises
    ------
    ArgumentError
        A setting that makes no sense; nothing is attached then.
    """
    if not isinstance(module, torch.nn.Module):
        raise ArgumentError(f"attach to a torch.nn.Module, not to a {type(module).__qualname__}")
    if every is not None and save is not None:
        raise ArgumentError("give every= or save=, not both", argument="every")
    if workers not in ("all", "one"):
        raise ArgumentError(f"workers is {workers!r}; it is 'all' or 'one'", argument="workers")
    start_step = check_step(start_step)
    when = save or SaveConfig(every=10 if every is None else every)
    chosen = check_collections(collections, when, reductions or Reductions())
    optimizers = (
        () if optimizer is None
        else (optimizer,) if isinstance(optimizer, torch.optim.Optimizer)
        else tuple(optimizer)
    )  # fmt: skip
    guard = Guard(on_error)
    rank, ranks = _rank()
    if workers == "one" and rank != 0:
        place = options.get("storage_options")
        stop = _stop_hook(module, optimizers, run, workers, place) if stoppable else None
        return TorchHook(None, None, guard, stop=stop)
    owns_run = not isinstance(run, RunWriter)
    if options and not owns_run:
        raise ArgumentError(
            f"{', '.join(options)}: a run that is open already cannot be told; give it to "
            "create_run",
            argument=next(iter(options)),
        )
    chooser = Chooser(chosen, _paths(inner_module(module)))
    writer = (
        run
        if isinstance(run, RunWriter)
        else create_run(
            run, **{"worker": rank, "num_workers": 1 if workers == "one" else ranks, **options}
        )
    )
    steps = Steps(
        module,
        optimizers=optimizers,
        loss=loss,
        recorder=Recorder(writer, chooser, guard, prefix),
        chooser=chooser,
        guard=guard,
        first=start_step,
    )
    steps.register()
    copy_with_torch_threads()
    stop = _stop_hook(module, optimizers, writer, workers, None) if stoppable else None
    return TorchHook(writer, steps, guard, owns_run=owns_run, stop=stop)


def _stop_hook(
    module: torch.nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    run: RunWriter | str | os.PathLike[str],
    workers: str,
    storage_options: Mapping[str, object] | None,
) -> StopHook:
    """Watch for requests; where one rank writes, it tells the others which attempt this is."""
    rank, ranks = _rank()
    attempt = run.attempt if isinstance(run, RunWriter) else None
    if workers == "one" and ranks > 1:
        said = [attempt]
        torch.distributed.broadcast_object_list(said, src=0)
        attempt = said[0]
    if not isinstance(run, RunWriter):
        watcher = StopWatcher(
            run, worker=rank, num_workers=ranks, attempt=attempt, storage_options=storage_options
        )
    else:
        watcher = StopWatcher(run, worker=rank, num_workers=ranks)
    stop = StopHook(module, optimizers, watcher)
    stop.register()
    return stop


def _rank() -> tuple[int, int]:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _paths(module: torch.nn.Module) -> dict[object, str]:
    paths: dict[object, str] = {}
    for path, each in module.named_modules():
        paths[path] = path
        paths[id(each)] = path
    return paths


class TorchHook:
    """What `attach` gives: remove it, or use it in a ``with`` statement."""

    def __init__(
        self,
        run: RunWriter | None,
        steps: Steps | None,
        guard: Guard,
        *,
        owns_run: bool = False,
        stop: StopHook | None = None,
    ) -> None:
        self._run = run
        self._steps = steps
        self._guard = guard
        self._owns_run = owns_run
        self._stop = stop

    @property
    def run(self) -> RunWriter | None:
        """The writer; None on ranks that save nothing."""
        return self._run

    @property
    def step(self) -> int:
        """Number of the present step."""
        return self._steps.recorder.step if self._steps else 0

    @property
    def failures(self) -> Mapping[str, int]:
        """How many failures there were, by the place they happened at."""
        return dict(self._guard.failures)

    def log(self, data: Mapping[str, object]) -> None:
        """Log values at the present step and mode, whether or not the hook saves at it."""
        if self._steps is not None:
            self._guard("log", self._steps.recorder.log)(dict(data))

    def end_step(self) -> None:
        """End the present step here, for trainings that the rules of `attach` do not fit."""
        if self._stop is not None:
            self._stop.end()
        if self._steps is not None:
            self._steps.end()

    def skip(self) -> None:
        """Save nothing more until the next step begins."""
        if self._steps is not None:
            self._steps.recorder.is_due = False

    def set_step(self, step: int, mode: str | None = "TRAIN") -> None:
        """Begin a step with a number of the caller's; from then on only this begins steps.

        `SaveConfig` counts these numbers then.

        Raises
        ------
        ArgumentError
            A step below 0, or no mode.
        TrainingStopped
            With ``stoppable``: somebody asked for it.
        """
        step = check_step(step)
        check_mode(mode)
        if self._stop is not None:
            self._stop.tell(step, mode)
        if self._steps is not None:
            self._steps.tell(step, mode)

    @contextmanager
    def mode(self, mode: str) -> Iterator[None]:
        """Say the mode of what runs inside, instead of what ``module.training`` says.

        Raises
        ------
        ArgumentError
            No such mode.
        """
        check_mode(mode)
        told = [each for each in (self._steps, self._stop) if each is not None]
        before = [each.forced_mode for each in told]
        for each in told:
            each.forced_mode = mode
            each.end()
        try:
            yield
        finally:
            for each, forced in zip(told, before, strict=True):
                each.forced_mode = forced
                each.end()

    def remove(self) -> None:
        """Remove all hooks from module and optimizer; closes the run if `attach` created it."""
        if self._stop is not None:
            self._stop.remove()
        if self._steps is not None:
            self._steps.remove()
        if self._owns_run and self._run is not None and not self._run.is_closed:
            self._run.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        if self._steps is None:
            return "<TorchHook of a rank that saves nothing>"
        state = "attached" if self._steps.is_attached else "removed"
        return f"<TorchHook step={self.step} {state}>"
