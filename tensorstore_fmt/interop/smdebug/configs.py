"""When to save, and in what form: `SaveConfig` and `ReductionConfig`, as in smdebug."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt.interop.importing.smdebug_names import REDUCTIONS
from tensorstore_fmt.interop.smdebug.exceptions import SMDebugValueError
from tensorstore_fmt.interop.smdebug.mode_keys import ModeKeys

__all__ = ["ReductionConfig", "SaveConfig", "SaveConfigMode", "reduce"]

_DEFAULT_INTERVAL: Final = 500
_NORMS: Final = ("l1", "l2")
_KINDS: Final = tuple(name for name in REDUCTIONS if name not in _NORMS)


def reduce(value: NDArray[Any], name: str, *, is_abs: bool = False) -> Any:  # noqa: ANN401 - a number of any dtype
    """Reduce an array to one number, over all of its axes.

    ``l1`` is the sum of absolute values, ``l2`` the root of the sum of squares, whatever the
    rank. Floats of less than 32 bits are computed in float32, booleans as 0 and 1.
    """
    kind, is_small = value.dtype.kind, value.dtype.itemsize < 4
    if kind in "bV" or (kind == "f" and is_small):
        value = value.astype(np.float32)
    elif kind == "i":  # the absolute value of the least one does not fit its type
        value = value.astype(np.int64)
    if is_abs or name in _NORMS:
        value = np.abs(value)
    if name == "l1":
        return np.sum(value)
    if name == "l2":
        return np.sqrt(np.sum(np.square(value.astype(np.float64) if kind in "iu" else value)))
    if name == "variance":
        return np.var(value)
    if name not in REDUCTIONS:
        raise SMDebugValueError(
            f"no reduction is called {name!r}; there are {', '.join(REDUCTIONS)}"
        )
    return getattr(np, name)(value)


class SaveConfigMode:
    """When to save in one mode. Steps are counted by the mode.

    Parameters
    ----------
    save_interval
        Every so many steps (those that can be divided by it).
    start_step, end_step
        From this step on, and up to, not including that one; ``end_step=0`` saves nothing.
    save_steps
        Also at these.
    """

    def __init__(
        self,
        save_interval: int | None = None,
        start_step: int | None = None,
        end_step: int | None = None,
        save_steps: Sequence[int] | None = None,
    ) -> None:
        self.save_interval = _DEFAULT_INTERVAL if save_interval is None else int(save_interval)
        self.start_step = 0 if start_step is None else int(start_step)
        self.end_step = None if end_step is None else int(end_step)
        self.save_steps = [int(step) for step in save_steps or ()]
        if self.save_interval < 1:
            raise SMDebugValueError(f"save_interval is {save_interval}; it is at least 1")

    def should_save_step(self, step_num: int) -> bool:
        """Say whether a step of this mode is saved."""
        if step_num in self.save_steps:
            return True
        is_within = step_num >= self.start_step and (
            self.end_step is None or step_num < self.end_step
        )
        return is_within and step_num % self.save_interval == 0

    def to_json_dict(self) -> dict[str, Any]:
        """Give it as JSON would say it."""
        return {
            "save_interval": self.save_interval,
            "save_steps": list(self.save_steps),
            "start_step": self.start_step,
            "end_step": self.end_step,
        }

    @classmethod
    def from_dict(cls, params: Mapping[str, Any]) -> Self:
        """Make it of what `to_json_dict` gave."""
        known = ("save_interval", "start_step", "end_step", "save_steps")
        unknown = sorted(set(params) - set(known))
        if unknown:
            raise SMDebugValueError(f"unknown settings {', '.join(unknown)}; known: {known}")
        return cls(**params)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SaveConfigMode) and self.to_json_dict() == other.to_json_dict()

    __hash__ = None  # type: ignore[assignment] # it can be changed

    def __repr__(self) -> str:
        return f"SaveConfigMode({self.to_json_dict()})"


class SaveConfig:
    """When to save: one setting for all modes, or ``{mode: SaveConfigMode}`` as first argument."""

    def __init__(
        self,
        save_interval: int | Mapping[ModeKeys, SaveConfigMode | Mapping[str, Any]] | None = None,
        start_step: int | None = None,
        end_step: int | None = None,
        save_steps: Sequence[int] | None = None,
    ) -> None:
        self.mode_save_configs: dict[ModeKeys, SaveConfigMode | None]
        if isinstance(save_interval, Mapping):
            self.mode_save_configs = dict.fromkeys(ModeKeys)
            for mode, config in save_interval.items():
                if not isinstance(mode, ModeKeys):
                    raise SMDebugValueError(f"{mode!r} is no mode; use modes.TRAIN …")
                self.mode_save_configs[mode] = (
                    config
                    if isinstance(config, SaveConfigMode)
                    else SaveConfigMode.from_dict(config)
                )
        else:
            one = SaveConfigMode(save_interval, start_step, end_step, save_steps)
            self.mode_save_configs = dict.fromkeys(ModeKeys, one)

    def get_save_config(self, mode: ModeKeys) -> SaveConfigMode:
        """Give the settings of a mode; the defaults, if there are none."""
        return self.mode_save_configs.get(mode) or SaveConfigMode()

    def should_save_step(self, mode: ModeKeys, step_num: int) -> bool:
        """Say whether a step, counted by its mode, is saved."""
        return self.get_save_config(mode).should_save_step(step_num)

    def merge_default_save_config(self, default: SaveConfig) -> None:
        """Take the settings of modes that have none from another one."""
        for mode, config in default.mode_save_configs.items():
            if self.mode_save_configs.get(mode) is None:
                self.mode_save_configs[mode] = config

    def to_json_dict(self) -> dict[str, Any]:
        """Give it as JSON would say it, by name of the mode."""
        return {
            mode.name: None if config is None else config.to_json_dict()
            for mode, config in self.mode_save_configs.items()
        }

    def to_json(self) -> str:
        """Give it as JSON."""
        return json.dumps(self.to_json_dict())

    @classmethod
    def from_dict(cls, params: Mapping[str, Any]) -> Self:
        """Make it of settings for all modes, or of those of each mode by its name."""
        names = {mode.name: mode for mode in ModeKeys}
        if params and set(params) <= set(names):
            return cls(
                {
                    names[name]: SaveConfigMode.from_dict(config)
                    for name, config in params.items()
                    if config is not None
                }
            )
        made = cls()
        one = SaveConfigMode.from_dict(params)
        made.mode_save_configs = dict.fromkeys(ModeKeys, one)
        return made

    @classmethod
    def from_json(cls, json_str: str) -> Self:
        """Make it of JSON."""
        return cls.from_dict(json.loads(json_str))

    @classmethod
    def parse(cls, config: object) -> Self:
        """Take what scripts give: one of these, a dict by mode, or None for the default."""
        if isinstance(config, cls):
            return config
        if isinstance(config, SaveConfigMode):
            return cls(dict.fromkeys(ModeKeys, config))
        if isinstance(config, Mapping):
            by_mode = any(isinstance(key, ModeKeys) for key in config)
            return cls(config) if by_mode else cls.from_dict(config)
        if config is None:
            return cls()
        raise SMDebugValueError(f"{config!r} is no SaveConfig")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SaveConfig) and self.to_json_dict() == other.to_json_dict()

    __hash__ = None  # type: ignore[assignment] # it can be changed

    def __repr__(self) -> str:
        return f"SaveConfig({self.to_json_dict()})"


class ReductionConfig:
    """In what form to save tensors.

    Parameters
    ----------
    reductions, abs_reductions
        Of min, max, mean, std, variance, sum, prod; of the values and of their absolute values.
    norms, abs_norms
        Of l1, l2.
    save_raw_tensor
        Save the tensor beside them.
    save_shape
        Save its shape.
    """

    def __init__(  # noqa: PLR0917 - smdebug's signature
        self,
        reductions: Sequence[str] | None = None,
        abs_reductions: Sequence[str] | None = None,
        norms: Sequence[str] | None = None,
        abs_norms: Sequence[str] | None = None,
        save_raw_tensor: bool = False,  # noqa: FBT001, FBT002 - smdebug's signature
        save_shape: bool = False,  # noqa: FBT001, FBT002 - the same
    ) -> None:
        self.reductions = _known("reductions", reductions, _KINDS)
        self.abs_reductions = _known("abs_reductions", abs_reductions, _KINDS)
        self.norms = _known("norms", norms, _NORMS)
        self.abs_norms = _known("abs_norms", abs_norms, _NORMS)
        self.save_raw_tensor = bool(save_raw_tensor)
        self.save_shape = bool(save_shape)

    @property
    def wanted(self) -> list[tuple[str, bool]]:
        """Names of all reductions, and whether of absolute values."""
        return [
            *((name, False) for name in (*self.reductions, *self.norms)),
            *((name, True) for name in (*self.abs_reductions, *self.abs_norms)),
        ]

    def to_json_dict(self) -> dict[str, Any]:
        """Give it as JSON would say it; the reductions as one text."""
        words = [
            *self.reductions,
            *(f"abs_{name}" for name in self.abs_reductions),
            *(f"{name}_norm" for name in self.norms),
            *(f"abs_{name}_norm" for name in self.abs_norms),
        ]
        return {
            "save_raw_tensor": self.save_raw_tensor,
            "reductions": ",".join(words),
            "save_shape": self.save_shape,
        }

    def to_json(self) -> str:
        """Give it as JSON."""
        return json.dumps(self.to_json_dict())

    @classmethod
    def from_dict(cls, params: Mapping[str, Any]) -> Self:
        """Make it of what `to_json_dict` gave."""
        unknown = sorted(set(params) - {"reductions", "save_raw_tensor", "save_shape"})
        if unknown:
            raise SMDebugValueError(f"unknown settings of a ReductionConfig: {', '.join(unknown)}")
        made = cls(
            save_raw_tensor=_flag(params.get("save_raw_tensor", False)),
            save_shape=_flag(params.get("save_shape", False)),
        )
        for word in filter(None, str(params.get("reductions") or "").replace(" ", "").split(",")):
            kind = word.removeprefix("abs_")
            is_abs = kind != word
            if kind.endswith("_norm"):
                into = made.abs_norms if is_abs else made.norms
                into += _known("norms", [kind.removesuffix("_norm")], _NORMS)
            else:
                into = made.abs_reductions if is_abs else made.reductions
                into += _known("reductions", [kind], _KINDS)
        return made

    @classmethod
    def from_json(cls, json_str: str) -> Self:
        """Make it of JSON."""
        return cls.from_dict(json.loads(json_str))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ReductionConfig) and self.to_json_dict() == other.to_json_dict()

    __hash__ = None  # type: ignore[assignment] # it can be changed

    def __repr__(self) -> str:
        return f"ReductionConfig({self.to_json_dict()})"


def _flag(value: object) -> bool:
    return value.strip().lower() == "true" if isinstance(value, str) else bool(value)


def _known(what: str, names: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    for name in names or ():
        if name not in known:
            raise SMDebugValueError(f"{what} has {name!r}; there are {', '.join(known)}")
    return list(names or ())
