"""When something is saved: `SaveConfig`."""

from __future__ import annotations

from collections.abc import Collection as Values
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.format import layout

__all__ = ["SaveConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveConfig:
    """At which steps something is saved: every so many from a start to an end, and at some more.

    Attributes
    ----------
    every
        Interval in steps of the mode (its own count, from 0); 0: only at `steps`.
    start, end
        First step, and the one at which it is over (None: never); `every` counts from 0, so
        ``every=10, start=5`` saves at 10, 20, …
    steps
        Saved whatever `every`, `start` and `end` say.
    modes
        Other settings for some modes, by name: ``{"EVAL": SaveConfig(every=1)}``; None for a
        mode in which nothing is saved.

    Raises
    ------
    ArgumentError
        Naming the field and what it may be.
    """

    every: int = 1
    start: int = 0
    end: int | None = None
    steps: Values[int] = ()
    modes: Mapping[str, Self | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in (("every", self.every), ("start", self.start), ("end", self.end)):
            if value is None and name == "end":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ArgumentError(
                    f"SaveConfig.{name} is {value!r}; it is an integer, 0 or greater", argument=name
                )
        object.__setattr__(self, "steps", frozenset(self.steps))
        known = [mode for mode in layout.MODES if mode]
        for mode, config in self.modes.items():
            if mode not in known:
                raise ArgumentError(
                    f"SaveConfig.modes has {mode!r}; modes are {', '.join(known)}", argument="modes"
                )
            if config is not None and config.modes:
                raise ArgumentError(
                    f"SaveConfig.modes[{mode!r}] has modes of its own", argument="modes"
                )

    def wants(self, step: int, mode: str | None) -> bool:
        """Say whether this step of the mode, counted from 0, is saved."""
        if mode is not None and mode in self.modes:
            config = self.modes[mode]
            return config is not None and config.wants(step, None)
        if step in self.steps:
            return True
        if not self.every or step < self.start or (self.end is not None and step >= self.end):
            return False
        return step % self.every == 0
