"""What scripts import from ``smdebug.pytorch``."""

from __future__ import annotations

from tensorstore_fmt.interop.smdebug.collections import Collection, CollectionKeys
from tensorstore_fmt.interop.smdebug.configs import ReductionConfig, SaveConfig, SaveConfigMode
from tensorstore_fmt.interop.smdebug.hook import Hook, del_hook, get_hook, set_hook
from tensorstore_fmt.interop.smdebug.mode_keys import ModeKeys
from tensorstore_fmt.interop.smdebug.mode_keys import ModeKeys as modes  # noqa: N813 - smdebug's name
from tensorstore_fmt.interop.smdebug.trials import create_trial

__all__ = [
    "Collection",
    "CollectionKeys",
    "Hook",
    "ModeKeys",
    "ReductionConfig",
    "SaveConfig",
    "SaveConfigMode",
    "create_trial",
    "del_hook",
    "get_hook",
    "modes",
    "set_hook",
]
