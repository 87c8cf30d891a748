"""Rules on what goes into the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.rules.block import Block, Item
from tensorstore_fmt.rules.builtin.weights import wide
from tensorstore_fmt.rules.parameters import parameter
from tensorstore_fmt.rules.rule import Finding, Needs, Rule, Series

__all__ = ["CheckInput", "NlpSequenceRatio"]


class CheckInput(Rule):
    """Inputs that are not centred.

    The mean of each channel (index along axis 1; of inputs of less than three axes all of it) over
    all samples so far is taken after `samples` of them (first axis), and at each step from then
    on. Fires where the absolute value of one is above `threshold`. Reads values.
    """

    names: str = parameter(r"^input/0$", is_pattern=True)
    mode: str | None = parameter(None, choices=("TRAIN", "EVAL", "PREDICT", "NONE"))
    threshold: float = parameter(0.2, least=0)
    samples: int = parameter(500, least=1)

    _sums: dict[Series, tuple[NDArray[Any], int, int]]

    def begin(self) -> None:
        """Forget all samples."""
        self._sums = {}

    def needs(self) -> Sequence[Needs]:
        """The inputs."""
        return [Needs(names=self.names, mode=self.mode, values=True)]

    def invoke_on(self, block: Block) -> Iterable[Finding]:
        """Add up what comes in."""
        for series, steps in block.saved(self.names, self.mode):
            items: list[Item] = [(series, step, ()) for step in steps.tolist()]
            worst = np.zeros(len(steps))
            for i, value in enumerate(block.read(items)):
                worst[i] = self._add(series, wide(value))
            for i in self.begins(series, np.abs(worst) > self.threshold).tolist():
                yield self.found(
                    series,
                    steps[i],
                    f"{series.name}: the mean of a channel is {worst[i]:.3g}",
                    value=worst[i],
                    threshold=self.threshold,
                )

    def _add(self, series: Series, value: NDArray[Any]) -> float:
        """Add samples; give the mean farthest from 0, or 0 as long as there are too few."""
        if value.ndim == 0 or value.size == 0:
            return 0.0
        if value.ndim < 3:
            value = value.reshape(len(value), 1, -1)
        sums = value.sum(axis=(0, *range(2, value.ndim)))
        each = int(value.size // (value.shape[0] * value.shape[1]))
        before, elements, samples = self._sums.get(series, (np.zeros_like(sums), 0, 0))
        if before.shape != sums.shape:
            before, elements, samples = np.zeros_like(sums), 0, 0
        state = (before + sums, elements + each * len(value), samples + len(value))
        self._sums[series] = state
        if state[2] < self.samples:
            return 0.0
        means = state[0] / state[1]
        return float(means[np.abs(means).argmax()])


class NlpSequenceRatio(Rule):
    """Sequences that are mostly padding, or another token.

    Fires where more than `ratio` of the elements of a step are one of `tokens` (ids, parted by
    ``|``). With the single token 0 it reads statistics only; else values.
    """

    names: str = parameter(r"(^|/)(input_ids|token_ids|input/0)$", is_pattern=True)
    mode: str | None = parameter(None, choices=("TRAIN", "EVAL", "PREDICT", "NONE"))
    tokens: tuple[str, ...] = ("0",)
    ratio: float = parameter(0.5, least=0, most=1)

    def check(self) -> None:
        """Want numbers."""
        for token in self.tokens:
            if not token.lstrip("-").isdigit():
                raise ArgumentError(
                    f"rule {self.name}: the token {token!r} is no number", code="rule_parameter",
                    rule=self.name, parameter="tokens",
                )  # fmt: skip

    def needs(self) -> Sequence[Needs]:
        """Ids of tokens."""
        return [Needs(names=self.names, mode=self.mode, values=self._reads)]

    @property
    def _reads(self) -> bool:
        return set(self.tokens) != {"0"}

    def invoke_on(self, block: Block) -> Iterable[Finding]:
        """Look at the share of the tokens."""
        for series, steps, share in self._shares(block):
            for i in self.begins(series, share > self.ratio).tolist():
                yield self.found(
                    series,
                    steps[i],
                    f"{series.name}: {share[i]:.0%} of it are token {' or '.join(self.tokens)}",
                    value=share[i],
                    threshold=self.ratio,
                )

    def _shares(
        self, block: Block
    ) -> Iterable[tuple[Series, NDArray[np.int64], NDArray[np.float64]]]:
        if not self._reads:
            for column in block.columns(self.names, self.mode):
                share = column["zero"] / np.maximum(column["count"], 1)
                yield column.series, column.step, share
            return
        tokens = [int(token) for token in self.tokens]
        for series, steps in block.saved(self.names, self.mode):
            items: list[Item] = [(series, step, ()) for step in steps.tolist()]
            share = np.array([np.isin(value, tokens).mean() for value in block.read(items)])
            yield series, steps, share
