"""Modules and losses of PyTorch, saved by a `Hook` under the names that smdebug gave them.

========================== ==========================================================
``Net_fc.weight``          parameter, after the class of the module that was registered
``gradient/Net_fc.weight`` its gradient, of one backward
``fc_input_0``             input of the module ``fc``; a second tensor, or one of its second
                           call within a step, is ``fc_input_1``
``fc_output_0``            its output; ``fc_output_logits`` where it is a dict (a second one
                           within a step: ``fc_output_logits_1``)
``Net_output_0``           output of the module that was registered
``MSELoss_output_0``       output of a loss; its inputs likewise
========================== ==========================================================
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

import torch
from torch.utils.hooks import RemovableHandle

from tensorstore_fmt.hooks.collections import Kind
from tensorstore_fmt.hooks.guard import Guard
from tensorstore_fmt.hooks.torch_calls import HookCall
from tensorstore_fmt.hooks.torch_modules import (
    ModuleHooks,
    in_backward,
    inner_module,
    outer_module,
)
from tensorstore_fmt.hooks.torch_values import walk
from tensorstore_fmt.interop.smdebug.collections import Collection
from tensorstore_fmt.interop.smdebug.exceptions import SMDebugValueError

if TYPE_CHECKING:
    from tensorstore_fmt.interop.smdebug.hook import Hook

__all__ = ["Modules"]

_KINDS: Final = ("input", "output")


class Modules:
    """What a hook was told to watch. Each forward of a registered module begins a step.

    Nothing that fails here reaches the training.
    """

    def __init__(self, hook: Hook) -> None:
        self.hook = hook
        self.guard = Guard("warn")
        self._known: dict[torch.nn.Module, str] = {}
        self._hooks: list[ModuleHooks] = []
        self._handles: list[RemovableHandle] = []
        self._used: Counter[str] = Counter()  # within a step

    def register(self, module: object) -> None:
        """Watch a module and all in it: inputs, outputs, parameters, gradients.

        One that is watched already, also as part of another one, is left as it is.

        Raises
        ------
        SMDebugValueError
            It is no module.
        """
        model = self._checked(module)
        if model in self._known:
            return
        outer = outer_module(module)
        root = self._know(model, outer)
        before = HookCall(self.guard("a step's begin", self._begin(model, root)))
        self._handles.append(outer.register_forward_pre_hook(before, prepend=True))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                tensor = f"gradient/{root}_{name}"
                save = self.guard(tensor, self._gradient_saver(tensor))
                self._handles.append(parameter.register_hook(save))

    def register_loss(self, loss: object) -> None:
        """Watch a loss: inputs and outputs. Its forward begins no step.

        Raises
        ------
        SMDebugValueError
            It is no module.
        """
        module = self._checked(loss)
        if module not in self._known:
            self._know(module, module)

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._known.clear()
        self._hooks.clear()

    def record(self, name: str, value: object) -> None:
        """Save what a function gave, as if a module of this name had."""
        for place, tensor in walk(value, "output"):
            self.hook.save_if_due(self.name_of(name, place), tensor)

    def resolve(self, collections: Iterable[Collection]) -> None:
        """Let collections include the tensors of the modules that they were given."""
        for collection in collections:
            for module, ways in list(collection.modules.items()):
                path = self._known.get(inner_module(module))
                if path is not None:
                    kinds = [kind for kind, wanted in zip(_KINDS, ways, strict=True) if wanted]
                    collection.include([f"^{re.escape(path)}_{kind}_" for kind in kinds])
                    del collection.modules[module]

    def name_of(self, module: str, place: str) -> str:
        """Give the name of a tensor, the next one that is free within the step.

        Parameters
        ----------
        place
            ``input`` or ``output``, and where it lies in that: ``output/0``, ``input/mask``.
        """
        kind, *keys = place.split("/")
        name = f"{module}_{kind}"
        is_counted = all(key.isdigit() for key in keys)
        if not is_counted:
            name += f"_{'_'.join(keys)}"
        count = self._used[name]
        self._used[name] += 1
        return f"{name}_{count}" if count or is_counted else name

    @staticmethod
    def _checked(module: object) -> torch.nn.Module:
        if not isinstance(module, torch.nn.Module):
            raise SMDebugValueError(
                f"{type(module).__qualname__} is no torch.nn.Module, so that nothing can be "
                "attached to it; hand values to save_tensor or record_tensor_value"
            )
        return inner_module(module)

    def _know(self, module: torch.nn.Module, outer: torch.nn.Module) -> str:
        """Put hooks on; give the name of the module itself."""
        root: str = module._get_name()
        for path, each in module.named_modules():
            self._known.setdefault(each, path or root)
        hooks = ModuleHooks(
            module, outer=outer, loss=None, recorder=(taker := _Taker(self, root)), chooser=taker,
            guard=self.guard,
        )  # fmt: skip
        self._handles += hooks.register()
        self._hooks.append(hooks)
        return root

    def _begin(self, model: torch.nn.Module, root: str) -> Callable[..., None]:
        def begin(*_args: object) -> None:
            if in_backward():  # checkpointing computes again what was there
                return
            self._used.clear()
            for hooks in self._hooks:
                hooks.begin()
            hook = self.hook
            hook.begin_forward()
            self.resolve(hook.get_collections().values())
            if hook.is_due:
                for name, parameter in model.named_parameters():
                    tensor = f"{root}_{name}"
                    self.guard.call(tensor, hook.save_if_due, tensor, parameter.detach())

        return begin

    def _gradient_saver(self, tensor: str) -> Callable[[torch.Tensor], None]:
        def save(gradient: torch.Tensor) -> None:
            if self.hook.is_due:
                self.hook.save_if_due(tensor, gradient.detach())

        return save


class _Taker:
    """Takes tensors of modules, and gives them smdebug's names."""

    def __init__(self, modules: Modules, root: str) -> None:
        self._modules = modules
        self._root = root

    @property
    def step(self) -> int:
        return self._modules.hook.step_num

    @property
    def is_due(self) -> bool:
        return self._modules.hook.is_due

    def take(
        self, kind: Kind, name: str, tensor: torch.Tensor, path: str = "", *, is_leaf: bool = False
    ) -> None:
        del is_leaf
        _, place, within = name[len(path) :].partition(kind)  # after the path, maybe a call's @1
        theirs = self._modules.name_of(path or self._root, place + within)
        self._modules.guard.call(theirs, self._modules.hook.save_if_due, theirs, tensor.detach())

    def is_awaited(self, name: str) -> bool:
        del name
        return False

    def may_want(self, kind: Kind) -> bool:
        return kind in _KINDS

    def wanted(self, kind: Kind, name: str, path: str = "", *, is_leaf: bool = False) -> object:
        del kind, name, path, is_leaf
        return None
