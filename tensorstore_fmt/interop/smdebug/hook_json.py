"""Configuration files of hooks, as SageMaker and users of smdebug write them.

::

    {
      "LocalPath": "runs/job",
      "HookParameters": {"save_interval": "10", "eval.save_interval": "1", "reductions": "min,max"},
      "CollectionConfigurations": [
        {"CollectionName": "relu",
         "CollectionParameters": {"include_regex": "relu", "save_steps": "1,2,3"}}
      ]
    }

All values may be texts. What is about one mode has its name before it. The environment variable
``SMDEBUG_CONFIG_FILE_PATH`` may name the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, Final

from tensorstore_fmt.interop.smdebug.collections import BUILT_IN, Collection
from tensorstore_fmt.interop.smdebug.configs import ReductionConfig, SaveConfig, SaveConfigMode
from tensorstore_fmt.interop.smdebug.exceptions import SMDebugValueError
from tensorstore_fmt.interop.smdebug.mode_keys import ModeKeys

__all__ = ["VARIABLE", "read_configuration"]

VARIABLE: Final = "SMDEBUG_CONFIG_FILE_PATH"

_SAVE: Final = ("save_interval", "start_step", "end_step")
_MODES: Final = {mode.name.lower(): mode for mode in ModeKeys}


def read_configuration(path: str | None) -> tuple[dict[str, Any], list[Collection]]:
    """Read a file; give the arguments of `Hook`, and the collections to add.

    Raises
    ------
    SMDebugValueError
        No file was named, it is no JSON, or has a value that cannot be used.
    """
    place = path or os.environ.get(VARIABLE)
    if not place:
        raise SMDebugValueError(f"name a configuration file, or set {VARIABLE}")
    with open(place, encoding="utf-8") as file:
        try:
            document = json.load(file)
        except ValueError as error:
            raise SMDebugValueError(f"{place} is no JSON: {error}", file=place) from None
    if not isinstance(document, Mapping):
        raise SMDebugValueError(f"{place}: an object is needed", file=place)
    out = document.get("LocalPath") or document.get("S3OutputPath")
    if not out:
        raise SMDebugValueError(f"{place} says no LocalPath to write to", file=place)
    hook = document.get("HookParameters") or {}
    arguments: dict[str, Any] = {
        "out_dir": out,
        "save_config": _save_config(hook),
        "reduction_config": _reductions(hook),
        "include_regex": _words(hook.get("include_regex")) or None,
        "save_all": _flag(hook.get("save_all")),
        "dry_run": _flag(hook.get("dry_run")),
        "include_workers": hook.get("include_workers") or "one",
    }
    collections = []
    for row in document.get("CollectionConfigurations") or ():
        given = row.get("CollectionParameters") or {}
        name = str(row["CollectionName"])
        patterns = _words(given.get("include_regex"))
        collections.append(
            Collection(
                name,
                patterns or BUILT_IN.get(name),
                reduction_config=_reductions(given),
                save_config=_save_config(given),
            )
        )
    return arguments, collections


def _save_config(given: Mapping[str, Any]) -> SaveConfig | None:
    """Give when to save; None if nothing is said of it."""
    common = _mode(given, "")
    own = {mode: found for name, mode in _MODES.items() if (found := _mode(given, f"{name}."))}
    if not common and not own:
        return None
    modes = {mode: {**common, **own.get(mode, {})} for mode in ModeKeys}
    return SaveConfig({mode: SaveConfigMode(**params) for mode, params in modes.items()})


def _mode(given: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: _number(prefix + name, given[prefix + name])
        for name in _SAVE
        if prefix + name in given
    }
    steps = _words(given.get(f"{prefix}save_steps"))
    if steps:
        found["save_steps"] = [_number(f"{prefix}save_steps", step) for step in steps]
    return found


def _reductions(given: Mapping[str, Any]) -> ReductionConfig | None:
    names = ("reductions", "save_raw_tensor", "save_shape")
    found = {name: given[name] for name in names if name in given}
    return ReductionConfig.from_dict(found) if found else None


def _words(value: object) -> list[str]:
    if isinstance(value, str):
        return [word.strip() for word in value.split(",") if word.strip()]
    return [str(word) for word in value] if isinstance(value, list) else []


def _number(name: str, value: object) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise SMDebugValueError(f"{name} is {value!r}; it is a whole number") from None


def _flag(value: object) -> bool:
    return str(value).strip().lower() == "true"
