"""Functions as hooks of modules: never compiled, and left behind when their module is copied."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["HookCall"]


class HookCall:
    """A function that PyTorch calls as a hook.

    `torch.compile` does not trace into it: it runs as it is, between compiled parts. A copy of
    the module (`copy.deepcopy` for an average of weights, `pickle`, `torch.save`) has in its place
    a function that does nothing: what the copy computes is not the training's, and writers cannot
    be copied.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    # Not the function alone: this frame would be compiled then, for nothing.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any) -> Any:  # noqa: ANN401 - what PyTorch gives and takes
        """Call the function."""
        return self._function(*args)

    def __reduce__(self) -> tuple[object, ...]:
        # Of the standard library, so that a saved model can be loaded without this one. It takes
        # any arguments and returns None.
        return getattr, (contextlib.nullcontext(), "__exit__")
