"""What goes through modules: inputs, outputs, gradients of outputs, losses."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Protocol

import torch
from torch.utils.hooks import RemovableHandle

from tensorstore_fmt.hooks.collections import Kind
from tensorstore_fmt.hooks.guard import Guard
from tensorstore_fmt.hooks.torch_calls import HookCall
from tensorstore_fmt.hooks.torch_values import walk

__all__ = ["Chooses", "ModuleHooks", "Takes", "in_backward", "inner_module", "outer_module"]


class Takes(Protocol):
    """What is given the tensors: a `Recorder`, or one that knows them by other names."""

    @property
    def step(self) -> int:
        """Number of the present step."""

    @property
    def is_due(self) -> bool:
        """Whether anything is saved at the present step."""

    def take(
        self, kind: Kind, name: str, tensor: torch.Tensor, path: str = "", *, is_leaf: bool = False
    ) -> None:
        """Save a tensor, if it is wanted."""

    def is_awaited(self, name: str) -> bool:
        """Say whether another tensor waits for it."""


class Chooses(Protocol):
    """What says which are wanted: a `Chooser`, or the like."""

    def may_want(self, kind: Kind) -> bool:
        """Say whether any tensor of this kind may be wanted."""

    def wanted(self, kind: Kind, name: str, path: str = "", *, is_leaf: bool = False) -> object:
        """Give None if a tensor is not wanted."""


def inner_module(module: torch.nn.Module) -> torch.nn.Module:
    """Give the module inside what `torch.compile` and DistributedDataParallel put around it."""
    while True:
        original = getattr(module, "_orig_mod", None)
        if original is None and isinstance(
            module, torch.nn.parallel.DistributedDataParallel | torch.nn.DataParallel
        ):
            original = module.module
        if not isinstance(original, torch.nn.Module):
            return module
        module = original


def outer_module(module: torch.nn.Module) -> torch.nn.Module:
    """Give the module whose calls hooks can see: the one inside, or what is one graph.

    Nothing may run inside what was compiled with ``fullgraph=True``; its call would fail.
    """
    inner = inner_module(module)
    while module is not inner:
        if getattr(getattr(module, "dynamo_ctx", None), "fullgraph", False):
            return module
        original = getattr(module, "_orig_mod", None)
        module = module.module if original is None else original
    return inner


def in_backward() -> bool:
    """Say whether autograd runs backward in this thread: checkpointing recomputes there."""
    return bool(torch._C._current_graph_task_id() != -1)


class ModuleHooks:
    """Forward hooks on all modules whose inputs or outputs any collection may want.

    Parameters
    ----------
    outer
        Its `outer_module`, if that is another one: then hooks are on this one alone.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        outer: torch.nn.Module | None = None,
        loss: torch.nn.Module | None,
        recorder: Takes,
        chooser: Chooses,
        guard: Guard,
    ) -> None:
        self._module = module
        self._outer = module if outer is None else outer
        self._loss = loss
        self._recorder = recorder
        self._chooser = chooser
        self._guard = guard
        self._calls: Counter[str] = Counter()
        self._recalls: Counter[str] = Counter()
        self._has_gradient: set[str] = set()
        self._was_forward = False
        self._has_warned = False
        self._watched: set[str] = set()  # paths of what has hooks inside the model

    def begin(self) -> None:
        """Forget the calls of the step before; warn if modules that were chosen never ran."""
        if (
            self._was_forward
            and self._watched
            and not self._has_warned
            and self._watched.isdisjoint(self._calls)
        ):
            self._has_warned = True
            warnings.warn(
                "no module inside the model called its hooks during a step: attach before the "
                "first call of a compiled model, or call torch._dynamo.reset() after attaching",
                RuntimeWarning,
                stacklevel=3,
            )
        self._calls.clear()
        self._recalls.clear()
        self._has_gradient.clear()
        self._was_forward = False

    def register(self) -> list[RemovableHandle]:
        """Put the hooks on; give their handles."""
        handles = []
        wants_inputs = self._chooser.may_want("input")
        wants_outputs = self._chooser.may_want("output") or self._chooser.may_want(
            "output_gradient"
        )
        for path, module in self._reachable(is_wanted=wants_inputs or wants_outputs):
            is_leaf = next(module.children(), None) is None
            if wants_inputs or wants_outputs:
                if path:
                    self._watched.add(path)
                if wants_inputs:
                    handles.append(self._hook_inputs(module, path, is_leaf=is_leaf))
                handles.append(self._hook_outputs(module, path, is_leaf=is_leaf))
            elif not path and self._chooser.may_want("loss"):
                handles.append(self._hook_outputs(module, path, is_leaf=is_leaf))
        if self._loss is not None and self._chooser.may_want("loss"):
            hook = HookCall(self._guard("the loss", self._after_loss))
            handles.append(self._loss.register_forward_hook(hook))
        return handles

    def _reachable(self, *, is_wanted: bool) -> list[tuple[str, torch.nn.Module]]:
        if self._outer is self._module:
            return list(self._module.named_modules())
        if is_wanted:
            warnings.warn(
                "the model was compiled with fullgraph=True: of what goes through modules only the "
                "model's own inputs and outputs are saved; attach to the model without it to save "
                "the others",
                RuntimeWarning,
                stacklevel=2,
            )
        return [("", self._outer)]

    def _hook_inputs(self, module: torch.nn.Module, path: str, *, is_leaf: bool) -> RemovableHandle:
        # Before the forward: a module may change its inputs in place.
        def before(_module: object, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            if self._recorder.is_due and not in_backward():
                for value in (args, kwargs):
                    for name, tensor in walk(value, _place(path, self._calls[path], "input")):
                        self._recorder.take("input", name, tensor, path, is_leaf=is_leaf)

        hook = HookCall(self._guard(f"the inputs of {path or 'the model'}", before))
        return module.register_forward_pre_hook(hook, with_kwargs=True)

    def _hook_outputs(
        self, module: torch.nn.Module, path: str, *, is_leaf: bool
    ) -> RemovableHandle:
        def after(_module: object, _args: object, output: object) -> None:
            if self._recorder.is_due:
                self._take_output(path, output, is_leaf=is_leaf)

        hook = HookCall(self._guard(f"the outputs of {path or 'the model'}", after))
        return module.register_forward_hook(hook)

    def _take_output(self, path: str, output: object, *, is_leaf: bool) -> None:
        recorder = self._recorder
        if not path:
            self._was_forward = True
        is_again = in_backward()
        counts = self._recalls if is_again else self._calls
        call = counts[path]
        counts[path] += 1
        for name, tensor in walk(output, _place(path, call, "output")):
            if not is_again:
                recorder.take("output", name, tensor, path, is_leaf=is_leaf)
                if not path and name == "output/loss" and tensor.numel() == 1:
                    recorder.take("loss", "loss", tensor)
            self._watch_gradient(name, tensor, path, is_leaf=is_leaf)

    def _watch_gradient(self, name: str, tensor: torch.Tensor, path: str, *, is_leaf: bool) -> None:
        name = f"gradient/{name}"
        if not tensor.requires_grad or name in self._has_gradient:
            return
        wanted = self._chooser.wanted("output_gradient", name, path, is_leaf=is_leaf)
        if wanted is None and not self._recorder.is_awaited(name):
            return
        self._has_gradient.add(name)
        recorder, step = self._recorder, self._recorder.step

        def take(gradient: torch.Tensor) -> None:
            if recorder.is_due and recorder.step == step:
                recorder.take("output_gradient", name, gradient, path, is_leaf=is_leaf)

        # The closure holds names only: no tensor, no graph.
        tensor.register_hook(self._guard(f"the gradient of {name}", take))

    def _after_loss(self, _module: torch.nn.Module, _args: object, output: object) -> None:
        if not self._recorder.is_due or in_backward():
            return
        for name, tensor in walk(output, "loss"):
            self._recorder.take("loss", name, tensor)


def _place(path: str, call: int, what: str) -> str:
    place = f"{path}@{call}" if call else path
    return f"{place}/{what}" if place else what
