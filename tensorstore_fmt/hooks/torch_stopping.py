"""Ends a training between two steps, because somebody asked for it through the run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.hooks import RemovableHandle

from tensorstore_fmt.hooks.torch_calls import HookCall
from tensorstore_fmt.hooks.torch_modules import in_backward, outer_module
from tensorstore_fmt.rules.stopping import StopWatcher

__all__ = ["StopHook"]


class StopHook:
    """Asks a watcher before each step of mode TRAIN; it is on ranks that save nothing, too.

    Steps are counted here, as `Steps` counts those of TRAIN: the others differ from rank to rank
    where one rank alone evaluates. Nothing here is guarded: `TrainingStopped` is meant to reach
    the training.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        watcher: StopWatcher,
    ) -> None:
        self.watcher = watcher
        self.forced_mode: str | None = None
        self._outer = outer_module(module)
        self._optimizers = optimizers
        self._count = 0
        self._may_go_on = False
        self._is_told = False
        self._handles: list[RemovableHandle] = []

    def register(self) -> None:
        """Put the hooks on, before others."""
        before = HookCall(self._before_forward)
        self._handles.append(self._outer.register_forward_pre_hook(before, prepend=True))
        for optimizer in self._optimizers:
            self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def remove(self) -> None:
        """Take the hooks off, and stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.watcher.close()

    def end(self) -> None:
        """Let the next forward begin a step."""
        self._may_go_on = False

    def tell(self, step: int, mode: str | None) -> None:
        """Begin a step with a number of the caller's."""
        self._is_told = True
        if mode == "TRAIN":
            self.watcher.check(step)

    def _before_forward(self, module: torch.nn.Module, _args: object) -> None:
        if self._is_told or in_backward():
            return
        if (self.forced_mode or ("TRAIN" if module.training else "EVAL")) != "TRAIN":
            self._may_go_on = False
            return
        if self._may_go_on and self._optimizers:  # gradients are accumulated
            return
        self.watcher.check(self._count)
        self._count += 1
        self._may_go_on = True

    def _after_step(self, _optimizer: object, _args: object, _kwargs: object) -> None:
        self._may_go_on = False
