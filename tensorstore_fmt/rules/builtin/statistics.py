"""Rules that look at one series by itself, through its statistics: no chunk is ever read."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.rules.block import Block, Column
from tensorstore_fmt.rules.parameters import parameter
from tensorstore_fmt.rules.rule import Finding, Needs, Rule

__all__ = ["AllZero", "ExplodingTensor", "StatisticsRule", "TensorVariance", "VanishingGradient"]

_Found = tuple[NDArray[np.bool_], NDArray[Any], float, str]


class StatisticsRule(Rule):
    """Looks at a column of statistics: where it fires, at which value, and in which words."""

    names: str = parameter(".", is_pattern=True)
    mode: str | None = parameter(None, choices=("TRAIN", "EVAL", "PREDICT", "NONE"))

    def needs(self) -> Sequence[Needs]:
        """Statistics of the series whose names match."""
        return [Needs(names=self.names, mode=self.mode)]

    def invoke_on(self, block: Block) -> Iterable[Finding]:
        """Look at all steps of each series at once."""
        for column in block.columns(self.names, self.mode):
            fires, value, threshold, words = self.look(column)
            for i in self.begins(column.series, fires).tolist():
                yield self.found(
                    column.series,
                    column.step[i],
                    f"{column.series.name}: {words.format(value[i])}",
                    value=value[i],
                    threshold=threshold,
                )

    @abstractmethod
    def look(self, column: Column) -> _Found:
        """Give where it fires (n,), the value at each step (n,), the threshold, the words."""


class VanishingGradient(StatisticsRule):
    """Gradients that are too small to move a weight.

    Fires where mean |g| < `threshold`, over the finite elements. Reads statistics only.
    """

    names: str = parameter(r"^gradient/", is_pattern=True)
    threshold: float = parameter(1e-7, least=0)

    def look(self, column: Column) -> _Found:
        """Compare the mean absolute value."""
        mean = column["absmean"]
        words = f"mean |x| {{:.3g}} is below {self.threshold:g}"
        return mean < self.threshold, mean, self.threshold, words


class ExplodingTensor(StatisticsRule):
    """NaN or infinite elements.

    Fires where a tensor has any; with `only_nan` infinities are fine. Reads statistics only.
    """

    only_nan: bool = False

    def look(self, column: Column) -> _Found:
        """Count what is not finite."""
        bad = column["nan"] if self.only_nan else column.not_finite
        what = "NaN" if self.only_nan else "NaN or infinite"
        return bad > 0, bad, 0.0, f"{what} elements: {{:.0f}}"


class AllZero(StatisticsRule):
    """Tensors of zeros.

    Fires where zeros / elements ≥ `share`. Reads statistics only.
    """

    share: float = parameter(1.0, least=0, most=1)

    def look(self, column: Column) -> _Found:
        """Compare the share of zeros."""
        count = column["count"]
        share = column["zero"] / np.maximum(count, 1)
        return (share >= self.share) & (count > 0), share, self.share, "{:.4g} of it is zero"


class TensorVariance(StatisticsRule):
    """Tensors whose elements vary too much, or too little.

    Fires where the variance (over n, of finite elements) is above `most` or below `least`.
    At least one of them has to be given. Reads statistics only.
    """

    least: float | None = parameter(None, least=0)
    most: float | None = parameter(None, least=0)

    def check(self) -> None:
        """Want a bound."""
        if self.least is None and self.most is None:
            raise ArgumentError(
                "rule tensor_variance needs least= or most=", code="rule_parameter",
                rule=self.name, parameter="most",
            )  # fmt: skip

    def invoke_on(self, block: Block) -> Iterable[Finding]:
        """Look at both bounds."""
        for column in block.columns(self.names, self.mode):
            variance = np.square(column["std"])
            for what, bound, fires in (
                ("above", self.most, self.most is not None and variance > self.most),
                ("below", self.least, self.least is not None and variance < self.least),
            ):
                if bound is None:
                    continue
                for i in self.begins((column.series, what), np.asarray(fires)).tolist():
                    message = (
                        f"{column.series.name}: variance {variance[i]:.3g} is {what} {bound:g}"
                    )
                    yield self.found(
                        column.series, column.step[i], message, value=variance[i], threshold=bound
                    )

    def look(self, column: Column) -> _Found:
        """Not used: there are two bounds."""
        raise NotImplementedError
