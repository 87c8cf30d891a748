"""Which step and mode the training is at, from what the model and the optimizer do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.hooks import RemovableHandle

from tensorstore_fmt.hooks.collections import Chooser
from tensorstore_fmt.hooks.guard import Guard
from tensorstore_fmt.hooks.recorder import Recorder
from tensorstore_fmt.hooks.torch_calls import HookCall
from tensorstore_fmt.hooks.torch_modules import (
    ModuleHooks,
    in_backward,
    inner_module,
    outer_module,
)
from tensorstore_fmt.hooks.torch_optimizer import OptimizerHooks

__all__ = ["Steps"]


class Steps:
    """All hooks of one `attach`, and the count of steps that they save at.

    Parameters
    ----------
    first
        Number of the first step.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        optimizers: Sequence[torch.optim.Optimizer],
        loss: torch.nn.Module | None,
        recorder: Recorder,
        chooser: Chooser,
        guard: Guard,
        first: int,
    ) -> None:
        self.recorder = recorder
        self.forced_mode: str | None = None
        self._inner = inner_module(module)
        self._outer = outer_module(module)
        self._guard = guard
        self._next = first
        self._mode_steps: dict[str | None, int] = {}
        self._may_go_on = False
        self._is_told = False
        self._ends_by_optimizer = bool(optimizers)
        self._modules = ModuleHooks(
            self._inner,
            outer=self._outer,
            loss=loss,
            recorder=recorder,
            chooser=chooser,
            guard=guard,
        )
        self._optimizers = OptimizerHooks(
            self._inner,
            optimizers,
            recorder=recorder,
            chooser=chooser,
            guard=guard,
            stepped=self.end,
        )
        self._handles: list[RemovableHandle] = []

    def register(self) -> None:
        """Put all hooks on."""
        before = HookCall(self._guard("a step's begin", self._before_forward))
        self._handles.append(self._outer.register_forward_pre_hook(before, prepend=True))
        self._handles += self._modules.register()
        self._handles += self._optimizers.register()

    def remove(self) -> None:
        """Take all hooks off; what the last step computed later is not saved."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.recorder.is_due = False
        self.recorder.end()
        self.recorder.close()

    @property
    def is_attached(self) -> bool:
        """Whether the hooks are on."""
        return bool(self._handles)

    def end(self) -> None:
        """Let the next forward begin a step."""
        self._may_go_on = False
        self.recorder.end()

    def tell(self, step: int, mode: str | None) -> None:
        """Begin a step with a number of the caller's; forwards begin none from now on."""
        self._is_told = True
        self._begin(step, step, mode)

    def _goes_on(self, mode: str) -> bool:
        """Say whether a forward belongs to the step before: gradients are accumulated."""
        is_same = mode == self.recorder.mode == "TRAIN"
        return self._may_go_on and is_same and self._ends_by_optimizer

    def _before_forward(self, module: torch.nn.Module, _args: object) -> None:
        if self._is_told or in_backward():  # checkpointing computes again what was there
            return
        mode = self.forced_mode or ("TRAIN" if module.training else "EVAL")
        if self._goes_on(mode):
            return
        number = self._mode_steps.get(mode, 0)
        self._mode_steps[mode] = number + 1
        self._begin(self._next, number, mode)

    def _begin(self, step: int, mode_step: int, mode: str | None) -> None:
        self._next = step + 1
        self._may_go_on = True
        self.recorder.end()  # a step that a scaler skipped has not said so
        self.recorder.begin(step, mode_step, mode)
        if self._ends_by_optimizer and mode == "TRAIN":
            self.recorder.hold()
        self._modules.begin()
        self._optimizers.begin()
