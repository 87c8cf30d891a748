"""The API of smdebug (Amazon SageMaker Debugger) on the runs of this library.

Scripts written for it run with one import changed: ``smdebug`` becomes
``tensorstore_fmt.interop.smdebug``, in every import.

::

    from tensorstore_fmt.interop.smdebug import modes
    from tensorstore_fmt.interop.smdebug.trials import create_trial

    trial = create_trial("runs/job")
    for step in trial.steps(mode=modes.TRAIN):
        print(trial.tensor("CrossEntropyLoss_output_0").value(step, mode=modes.TRAIN))

    import tensorstore_fmt.interop.smdebug.pytorch as smd

    hook = smd.Hook("runs/job", include_collections=["weights", "gradients"])
    hook.register_module(net)

A run is one of this library's, or what ``tensorstore-fmt import smdebug`` made. In a run of our
own, what was logged without a mode counts as `modes.GLOBAL`; the torch hook's reductions are
found by `Tensor.reduction_value`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from tensorstore_fmt.interop.smdebug.mode_keys import ModeKeys, StepState
from tensorstore_fmt.interop.smdebug.mode_keys import ModeKeys as modes  # noqa: N813 - smdebug's name

if TYPE_CHECKING:
    from tensorstore_fmt.interop.smdebug.analysis.utils import no_refresh, refresh
    from tensorstore_fmt.interop.smdebug.collections import Collection, CollectionKeys
    from tensorstore_fmt.interop.smdebug.configs import (
        ReductionConfig,
        SaveConfig,
        SaveConfigMode,
    )
    from tensorstore_fmt.interop.smdebug.hook import Hook
    from tensorstore_fmt.interop.smdebug.rules import Rule, invoke_rule
    from tensorstore_fmt.interop.smdebug.tensor import Tensor
    from tensorstore_fmt.interop.smdebug.trials import Trial, create_trial

__all__ = [
    "Collection",
    "CollectionKeys",
    "Hook",
    "ModeKeys",
    "ReductionConfig",
    "Rule",
    "SaveConfig",
    "SaveConfigMode",
    "StepState",
    "Tensor",
    "Trial",
    "create_trial",
    "invoke_rule",
    "modes",
    "no_refresh",
    "refresh",
]

_PLACES = {
    "Collection": "collections",
    "CollectionKeys": "collections",
    "Hook": "hook",
    "ReductionConfig": "configs",
    "Rule": "rules",
    "SaveConfig": "configs",
    "SaveConfigMode": "configs",
    "Tensor": "tensor",
    "Trial": "trials",
    "create_trial": "trials",
    "invoke_rule": "rules",
    "no_refresh": "analysis.utils",
    "refresh": "analysis.utils",
}


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value
