"""Modes and states of steps, as smdebug calls them."""

from __future__ import annotations

from enum import Enum
from typing import Final

__all__ = ["ModeKeys", "StepState", "mode_of", "name_of"]


class ModeKeys(Enum):
    """What a step was made for. `GLOBAL` stands for all, and for steps without a mode."""

    TRAIN = 1
    EVAL = 2
    PREDICT = 3
    GLOBAL = 4


class StepState(Enum):
    """Whether a step can be read."""

    UNAVAILABLE = 0
    AVAILABLE = 1
    NOT_YET_AVAILABLE = 2


_NAMES: Final = {ModeKeys.TRAIN: "TRAIN", ModeKeys.EVAL: "EVAL", ModeKeys.PREDICT: "PREDICT"}
_BY_NUMBER: Final = (ModeKeys.GLOBAL, ModeKeys.TRAIN, ModeKeys.EVAL, ModeKeys.PREDICT)


def name_of(mode: ModeKeys) -> str | None:
    """Give the name of a mode in a run; None for `GLOBAL`."""
    return _NAMES.get(mode)


def mode_of(number: int) -> ModeKeys:
    """Give the mode that has a number in the format."""
    return _BY_NUMBER[number]
