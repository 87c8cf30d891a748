"""Functions as hooks of modules: never compiled, and left behind when their module is copied."""

from __future__ import annotations

import contextlib
import functools
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
        _never_compile()
        self._function = function

    def __call__(self, *args: Any) -> Any:  # noqa: ANN401 - what PyTorch gives and takes
        """Call the function."""
        return self._function(*args)

    def __reduce__(self) -> tuple[object, ...]:
        # Of the standard library, so that a saved model can be loaded without this one. It takes
        # any arguments and returns None.
        return getattr, (contextlib.nullcontext(), "__exit__")


@functools.cache
def _never_compile() -> None:
    """Keep the compiler out of the call itself; not at import, which would import the compiler."""
    HookCall.__call__ = torch.compiler.disable(HookCall.__call__)  # type: ignore[method-assign]
