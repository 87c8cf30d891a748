"""Rules on what comes out of, or goes into, activation functions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt.rules.block import Block, Item
from tensorstore_fmt.rules.builtin.weights import wide
from tensorstore_fmt.rules.parameters import parameter
from tensorstore_fmt.rules.rule import Finding, Needs, Rule

__all__ = ["DeadRelu", "SaturatedActivation"]


class UnitsRule(Rule):
    """Looks at how active each unit is: along axis 1, over all other axes."""

    mode: str | None = parameter(None, choices=("TRAIN", "EVAL", "PREDICT", "NONE"))
    inactivity: float = parameter(0.01, least=0, most=1)
    layer: float = parameter(0.5, least=0, most=1)

    def judge(
        self, block: Block, pattern: str, words: str, low: float, high: float
    ) -> Iterator[Finding]:
        """Read what statistics leave open, and give where a layer is inactive."""
        skipped = {
            (column.series, step)
            for column in block.columns(pattern, self.mode)
            for step in column.step[self.is_fine(column.rows, low, high)].tolist()
        }
        for series, steps in block.saved(pattern, self.mode):
            wanted = [s for s in steps.tolist() if (series, s) not in skipped]
            items: list[Item] = [(series, step, ()) for step in wanted]
            share = dict.fromkeys(steps.tolist(), 0.0)
            for step, value in zip(wanted, block.read(items), strict=True):
                share[step] = self.inactive(wide(value), low, high)
            shares = np.array(list(share.values()))
            for i in self.begins(series, shares > self.layer).tolist():
                yield self.found(
                    series,
                    steps[i],
                    f"{series.name}: {shares[i]:.0%} of its units are {words}",
                    value=shares[i],
                    threshold=self.layer,
                )

    def inactive(self, value: NDArray[Any], low: float, high: float) -> float:
        """Give the share of units that are active in less than `inactivity` of their elements."""
        if value.size == 0:
            return 0.0
        with np.errstate(invalid="ignore"):
            active = (value > low) & (value < high)
        if value.ndim < 2:
            active = active.reshape(1, -1)
        units = np.moveaxis(active, 1, 0).reshape(active.shape[1], -1)
        return float((units.mean(axis=1) < self.inactivity).mean())

    @abstractmethod
    def is_fine(self, rows: NDArray[Any], low: float, high: float) -> NDArray[np.bool_]:
        """Say from the statistics (n, 10) at which steps the rule cannot fire."""


class DeadRelu(UnitsRule):
    """ReLUs whose units are hardly ever active.

    A unit (index along axis 1 of the output; of a vector each element) is dead if less than
    `inactivity` of its elements are above 0. Fires where more than `layer` of the units are dead.
    Reads statistics, and values where there are so many zeros that it could fire.
    """

    names: str = parameter(r"(?i)relu[^/]*/output$", is_pattern=True)

    def needs(self) -> Sequence[Needs]:
        """The outputs."""
        return [Needs(names=self.names, mode=self.mode, values=True)]

    def invoke_on(self, block: Block) -> Iterable[Finding]:
        """Look at the outputs."""
        return self.judge(block, self.names, "dead", 0.0, np.inf)

    def is_fine(self, rows: NDArray[Any], low: float, high: float) -> NDArray[np.bool_]:  # noqa: ARG002 - bounds are fixed
        """Few zeros cannot make many dead units, where nothing is below zero."""
        zeros = rows[:, 4] / np.maximum(rows[:, 0], 1)
        is_plain = (rows[:, 5] >= 0) & (rows[:, 1:4].sum(axis=1) == 0)
        fine: NDArray[np.bool_] = is_plain & (zeros < self.layer * (1 - self.inactivity))
        return fine


class SaturatedActivation(UnitsRule):
    """Inputs of tanh and sigmoid so large that their gradient is zero.

    A unit (index along axis 1 of the input) is saturated if less than `inactivity` of its elements
    lie inside (`tanh_low`, `tanh_high`), or (`sigmoid_low`, `sigmoid_high`): there a float32
    output still differs from its limit. Fires where more than `layer` of the units are saturated.
    Reads statistics, and values where the least or the greatest element lies outside.
    """

    tanh: str = parameter(r"(?i)tanh[^/]*/input/0$", is_pattern=True)
    sigmoid: str = parameter(r"(?i)sigmoid[^/]*/input/0$", is_pattern=True)
    tanh_low: float = -9.4999
    tanh_high: float = 9.4999
    sigmoid_low: float = -23.0
    sigmoid_high: float = 16.99999

    def needs(self) -> Sequence[Needs]:
        """The inputs."""
        patterns = (self.tanh, self.sigmoid)
        return [Needs(names=pattern, mode=self.mode, values=True) for pattern in patterns]

    def invoke_on(self, block: Block) -> Iterable[Finding]:
        """Look at the inputs of both kinds."""
        yield from self.judge(block, self.tanh, "saturated", self.tanh_low, self.tanh_high)
        yield from self.judge(block, self.sigmoid, "saturated", self.sigmoid_low, self.sigmoid_high)

    def is_fine(self, rows: NDArray[Any], low: float, high: float) -> NDArray[np.bool_]:
        """Nothing lies outside."""
        fine: NDArray[np.bool_] = (rows[:, 5] > low) & (rows[:, 6] < high) & (rows[:, 1] == 0)
        return fine
