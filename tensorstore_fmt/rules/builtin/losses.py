"""Rules on losses and accuracies: scalars, read as statistics from the index alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from tensorstore_fmt.rules.block import Block, Column
from tensorstore_fmt.rules.builtin.statistics import StatisticsRule
from tensorstore_fmt.rules.parameters import parameter
from tensorstore_fmt.rules.rule import Finding, Needs, Rule, Series

__all__ = ["AccuracyDrop", "LossNotDecreasing", "Overfit", "Overtraining"]

LOSS = r"(^|/)loss$"


class LossNotDecreasing(StatisticsRule):
    """A loss that does not go down.

    Two windows of `num_steps` saved values follow each other; m₀ and m₁ are their means. Fires
    where (m₀ − m₁) / |m₀| < `decrease`, or where m₁ rises by more than `increase`: (m₁ − m₀) /
    |m₀| > `increase`, which is said apart. A value of several elements counts with its mean.
    Reads statistics only.
    """

    names: str = parameter(LOSS, is_pattern=True)
    num_steps: int = parameter(10, least=1)
    decrease: float = parameter(0.001)
    increase: float = parameter(0.05, least=0)

    _last: dict[Series, NDArray[Any]]

    def begin(self) -> None:
        """Forget the values."""
        self._last = {}

    def invoke_on(self, block: Block) -> Iterable[Finding]:
        """Look at all windows that end here."""
        n = self.num_steps
        for column in block.columns(self.names, self.mode):
            series = column.series
            before = self._last.get(series, np.empty(0))
            values = np.concatenate([before, column["mean"]])
            self._last[series] = values[-(2 * n - 1) :].copy()
            if len(values) < 2 * n:
                continue
            means = sliding_window_view(values, n).mean(axis=-1)
            first, second = means[:-n], means[n:]
            with np.errstate(all="ignore"):
                drop = (first - second) / np.abs(first)
            steps = column.step[len(column.step) - len(drop) :]
            fires = drop < self.decrease
            for i in self.begins(series, fires).tolist():
                rises = -drop[i] > self.increase
                what = (
                    f"rose by {-drop[i]:.2%}" if rises else f"fell by {drop[i]:.3%} only"
                )  # of the mean of a window
                yield self.found(
                    series,
                    steps[i],
                    f"{series.name}: {what} in {n} values, to {second[i]:.4g}",
                    value=drop[i],
                    threshold=-self.increase if rises else self.decrease,
                )

    def look(self, column: Column) -> Any:  # noqa: ANN401 - not used
        """Not used: windows reach over blocks."""
        raise NotImplementedError


@dataclass(slots=True)
class _Mean:
    total: float = 0.0
    n: int = 0
    last: int = -1

    def add(self, value: float, step: int) -> None:
        self.total += value
        self.n += 1
        self.last = step

    @property
    def value(self) -> float:
        return self.total / self.n if self.n else float("nan")


@dataclass(slots=True)
class _Round:
    """A stretch of training and the evaluation after it."""

    train: _Mean = field(default_factory=_Mean)
    evaluation: _Mean = field(default_factory=_Mean)


class RoundsRule(Rule):
    """Compares training and evaluation in rounds: steps of TRAIN, then steps of EVAL."""

    joins_modes: ClassVar[bool] = True

    names: str = parameter(LOSS, is_pattern=True)

    _rounds: dict[tuple[str, int | None], _Round]

    def begin(self) -> None:
        """Forget all rounds."""
        self._rounds = {}

    def needs(self) -> Sequence[Needs]:
        """Statistics of the losses in both modes."""
        return [Needs(names=self.names, mode="TRAIN"), Needs(names=self.names, mode="EVAL")]

    def invoke_on(self, block: Block) -> Iterable[Finding]:
        """Go through values of both modes by step; TRAIN first where they share one."""
        parts: dict[tuple[str, int | None], list[tuple[Column, bool]]] = {}
        for mode in ("TRAIN", "EVAL"):
            for column in block.columns(self.names, mode):
                key = (column.series.name, column.series.worker)
                parts.setdefault(key, []).append((column, mode == "EVAL"))
        for key, columns in parts.items():
            yield from self._go(key, columns)

    def _go(
        self, key: tuple[str, int | None], columns: list[tuple[Column, bool]]
    ) -> Iterator[Finding]:
        step = np.concatenate([column.step for column, _ in columns])
        value = np.concatenate([column["mean"] for column, _ in columns])
        is_eval = np.concatenate([np.full(len(column.step), e) for column, e in columns])
        order = np.lexsort((is_eval, step))
        current = self._rounds.setdefault(key, _Round())
        for s, x, e in zip(
            step[order].tolist(), value[order].tolist(), is_eval[order].tolist(), strict=True
        ):
            if e:
                current.evaluation.add(x, s)
                continue
            if current.evaluation.n:
                yield from self._ended(key, current)
                current = self._rounds[key] = _Round()
            current.train.add(x, s)

    def invoke_at_end(self) -> Iterable[Finding]:
        """Look at the last round."""
        for key, current in list(self._rounds.items()):
            if current.evaluation.n:
                yield from self._ended(key, current)
                self._rounds[key] = _Round()

    def _ended(self, key: tuple[str, int | None], current: _Round) -> Iterator[Finding]:
        if current.train.n:
            series = Series(key[0], "EVAL", key[1])
            yield from self.look_at_round(
                series, current.evaluation.last, current.train.value, current.evaluation.value
            )

    @abstractmethod
    def look_at_round(
        self, series: Series, step: int, train: float, evaluation: float
    ) -> Iterator[Finding]:
        """Look at the mean losses of a round; `step` is its last one."""


class Overfit(RoundsRule):
    """A model that does much better on what it was trained with.

    A round is a stretch of steps of TRAIN and the steps of EVAL after it. Fires where
    (mean EVAL − mean TRAIN) / |mean TRAIN| > `ratio` in `patience` rounds one after the other.
    Reads statistics only.
    """

    ratio: float = parameter(0.1)
    patience: int = parameter(1, least=1)

    _bad: dict[Series, int]

    def begin(self) -> None:
        """Forget all rounds."""
        super().begin()
        self._bad = {}

    def look_at_round(
        self, series: Series, step: int, train: float, evaluation: float
    ) -> Iterator[Finding]:
        """Compare the means."""
        excess = (evaluation - train) / max(abs(train), 1e-30)
        bad = self._bad[series] = self._bad.get(series, 0) + 1 if excess > self.ratio else 0
        for _ in self.begins(series, np.array([bad >= self.patience])):
            yield self.found(
                series,
                step,
                f"{series.name}: {evaluation:.4g} in evaluation, {train:.4g} in training",
                value=excess,
                threshold=self.ratio,
            )


class Overtraining(RoundsRule):
    """A training that goes on although nothing improves.

    Of each round (see `Overfit`) the mean losses are taken; one improves if it falls more than
    `delta` below the best so far. Fires where TRAIN did not for `patience_train` rounds and EVAL
    did not for `patience_eval`. Reads statistics only.
    """

    delta: float = parameter(0.01, least=0)
    patience_train: int = parameter(5, least=1)
    patience_eval: int = parameter(10, least=1)

    _best: dict[Series, list[float]]

    def begin(self) -> None:
        """Forget all rounds."""
        super().begin()
        self._best = {}

    def look_at_round(
        self, series: Series, step: int, train: float, evaluation: float
    ) -> Iterator[Finding]:
        """Count rounds without an improvement."""
        inf = float("inf")
        state = self._best.setdefault(series, [inf, inf, -1, -1])  # bests, rounds since
        for i, value in enumerate((train, evaluation)):
            if value < state[i] - self.delta:
                state[i], state[2 + i] = value, 0
            else:
                state[2 + i] += 1
        over = state[2] >= self.patience_train and state[3] >= self.patience_eval
        for _ in self.begins(series, np.array([over])):
            yield self.found(
                series,
                step,
                f"{series.name}: no improvement of more than {self.delta:g} for "
                f"{state[3]:.0f} evaluations; the best were {state[0]:.4g} in training, "
                f"{state[1]:.4g} in evaluation",
                value=evaluation,
                threshold=state[1] - self.delta,
            )


class AccuracyDrop(StatisticsRule):
    """An accuracy that falls below what it was.

    Fires where (best so far − accuracy) > `drop`. Reads statistics only.
    """

    names: str = parameter(r"(^|/)accuracy$", is_pattern=True)
    mode: str | None = parameter("EVAL", choices=("TRAIN", "EVAL", "PREDICT", "NONE"))
    drop: float = parameter(0.05, least=0)

    _best: dict[Series, float]

    def begin(self) -> None:
        """Forget the best."""
        self._best = {}

    def look(self, column: Column) -> Any:  # noqa: ANN401 - as in the base class
        """Compare with the best before."""
        values = column["mean"]
        best = np.fmax.accumulate(
            np.concatenate([[self._best.get(column.series, -np.inf)], values])
        )
        self._best[column.series] = float(best[-1])
        fall = best[1:] - values
        words = "it fell by {:.3g} from its best"
        return fall > self.drop, fall, self.drop, words
