"""Parameters, buffers, their gradients and the optimizer's state, at the end of a training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from tensorstore_fmt.hooks.collections import Chooser
from tensorstore_fmt.hooks.guard import Guard
from tensorstore_fmt.hooks.recorder import Recorder
from tensorstore_fmt.hooks.torch_values import walk

__all__ = ["OptimizerHooks"]


class OptimizerHooks:
    """Saves parameters and gradients as the optimizer meets them, and its state after its step.

    Without an optimizer parameters are saved where a step begins, and each gradient when backward
    has accumulated it.

    Parameters
    ----------
    stepped
        Called after an optimizer's step.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        recorder: Recorder,
        chooser: Chooser,
        guard: Guard,
        stepped: Callable[[], None],
    ) -> None:
        self._module = module
        self._optimizers = optimizers
        self._recorder = recorder
        self._chooser = chooser
        self._guard = guard
        self._stepped = stepped

    def register(self) -> list[RemovableHandle]:
        """Put the hooks on; give their handles."""
        guard = self._guard
        handles = []
        for optimizer in self._optimizers:
            after = guard("the optimizer's state", self._after_step)
            handles.append(optimizer.register_step_pre_hook(self._before_step))
            handles.append(optimizer.register_step_post_hook(after))
        if not self._optimizers and self._chooser.may_want("gradient"):
            for name, parameter in self._module.named_parameters():
                if parameter.requires_grad:
                    take = guard(f"the gradient of {name}", self._gradient_taker(name))
                    handles.append(parameter.register_post_accumulate_grad_hook(take))
        return handles

    def begin(self) -> None:
        """Save what a step begins with, if no optimizer does it."""
        if self._recorder.is_due and not self._optimizers:
            self._guard("parameters", self._take_parameters)()

    def _gradient_taker(self, name: str) -> Callable[[torch.Tensor], None]:
        def take(parameter: torch.Tensor) -> None:
            if self._recorder.is_due and parameter.grad is not None:
                self._recorder.take("gradient", f"gradient/{name}", parameter.grad)

        return take

    def _take_parameters(self) -> None:
        recorder = self._recorder
        if recorder.mode != "TRAIN":
            return
        for name, parameter in self._module.named_parameters():
            recorder.take("parameter", name, parameter)
        if self._chooser.may_want("buffer"):
            for name, buffer in self._module.named_buffers():
                recorder.take("buffer", name, buffer)

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Save now; or, if a closure computes the gradients within the step, after it did."""
        take = self._guard("parameters and gradients", self._take_step)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if not callable(closure):
            take(optimizer)
            return None

        def computed() -> object:
            loss: object = closure()
            take(optimizer)
            return loss

        if len(args) > 1:
            return (args[0], computed, *args[2:]), kwargs
        return args, {**kwargs, "closure": computed}

    def _take_step(self, optimizer: torch.optim.Optimizer) -> None:
        recorder = self._recorder
        if not recorder.is_due:
            return
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        with recorder.together():
            if optimizer is self._optimizers[0]:
                self._take_parameters()
            for name, parameter in self._module.named_parameters():
                if parameter.grad is not None and id(parameter) in mine:
                    recorder.take("gradient", f"gradient/{name}", parameter.grad)

    def _after_step(self, optimizer: torch.optim.Optimizer, _args: object, _kwargs: object) -> None:
        self._stepped()
        recorder = self._recorder
        if not recorder.is_due or not self._chooser.may_want("optimizer"):
            return
        state: dict[Any, Any] = optimizer.state
        with recorder.together():
            for name, parameter in self._module.named_parameters():
                for place, tensor in walk(state.get(parameter), f"optimizer/{name}"):
                    recorder.take("optimizer", place, tensor)
