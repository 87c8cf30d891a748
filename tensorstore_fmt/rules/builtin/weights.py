"""Rules on how weights change from step to step, and on how they were at first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt.rules.block import Block, Column, Item
from tensorstore_fmt.rules.builtin.statistics import StatisticsRule
from tensorstore_fmt.rules.parameters import parameter
from tensorstore_fmt.rules.payloads import are_repeated
from tensorstore_fmt.rules.rule import Finding, Needs, Rule, Series

__all__ = ["PoorInitialisation", "UnchangedTensor", "WeightUpdateRatio", "close", "may_be_close"]

WEIGHTS = r"^(?!gradient/|optimizer/)(.*[./])?weight$"
_SLACK = 1e-6  # sums of statistics are rounded


def may_be_close(
    a: NDArray[Any], b: NDArray[Any], *, rtol: float, atol: float
) -> NDArray[np.bool_]:
    """Say from statistics, shape (n, 10), whether |a − b| ≤ atol + rtol·|b| can hold everywhere.

    Where this is False it does not hold; where it is True, the values decide.
    """
    count, least, most = b[:, 0], b[:, 5], b[:, 6]
    can: NDArray[np.bool_] = (a[:, 0] == count) & (a[:, 1] == 0) & (b[:, 1] == 0)
    can &= (a[:, 2:4] == b[:, 2:4]).all(axis=1)
    has_infinite = b[:, 2:4].any(axis=1)
    with np.errstate(all="ignore"):
        largest = np.fmax(np.abs(least), np.abs(most))
        room = atol + rtol * largest
        near = (np.abs(a[:, 5] - least) <= room) & (np.abs(a[:, 6] - most) <= room)
        total = count * atol + (rtol + _SLACK) * b[:, 9]
        near &= np.abs(a[:, 7] - b[:, 7]) <= total
        near &= np.abs(a[:, 9] - b[:, 9]) <= total
    can &= near | has_infinite | (count == 0)
    return can


def close(a: Any, b: Any, *, rtol: float, atol: float) -> bool:  # noqa: ANN401 - arrays
    """Say whether two values have one shape and are close everywhere; NaN is close to nothing."""
    if a is None or b is None or np.shape(a) != np.shape(b):
        return False
    if np.asarray(a).dtype == object or (rtol == 0 and atol == 0):
        return bool(np.array_equal(a, b))
    return bool(np.allclose(wide(a), wide(b), rtol=rtol, atol=atol))


def wide(value: Any) -> NDArray[Any]:  # noqa: ANN401 - an array
    """Give an array in a dtype in which differences are right."""
    array = np.asarray(value)
    return array if array.dtype.kind == "c" else array.astype(np.float64)


class UnchangedTensor(StatisticsRule):
    """Tensors that stay as they are.

    Fires where `num_steps` saved values, one after the other, are alike: |a − b| ≤ `atol` +
    `rtol`·|b| for all elements of two neighbours (`numpy.allclose`). Reads statistics, and
    values only where these leave it open and the index does not show that both are the same bytes;
    one value a series is remembered. Where only statistics
    were saved, equal ones count as alike.
    """

    num_steps: int = parameter(3, least=2)
    rtol: float = parameter(1e-5, least=0)
    atol: float = parameter(1e-8, least=0)

    _last: dict[Series, tuple[int, NDArray[Any], int]]
    _value: dict[Series, tuple[int, Any]]

    def begin(self) -> None:
        """Forget values."""
        self._last, self._value = {}, {}

    def invoke_on(self, block: Block) -> Iterable[Finding]:
        """Compare neighbours."""
        for column in block.columns(self.names, self.mode):
            runs = self._runs(block, column)
            for i in self.begins(column.series, runs >= self.num_steps).tolist():
                yield self.found(
                    column.series,
                    column.step[i],
                    f"{column.series.name}: the same at the last {runs[i]} saved steps",
                    value=runs[i],
                    threshold=self.num_steps,
                )

    def _runs(self, block: Block, column: Column) -> NDArray[np.int64]:
        """Give for each step how many alike values end there."""
        series = column.series
        last_step, last_row, run = self._last.get(series, (-1, None, 0))
        rows, steps = column.rows, column.step
        if last_row is not None:
            rows = np.concatenate([last_row[None], rows])
            steps = np.concatenate([[last_step], steps])
        alike = np.zeros(len(steps), np.bool_)
        alike[1:] = may_be_close(rows[1:], rows[:-1], rtol=self.rtol, atol=self.atol)
        candidates = np.flatnonzero(alike)
        if len(candidates):
            alike[candidates] = self._compare(block, series, steps, rows, candidates)
        runs = []
        for each in alike[len(steps) - len(column.step) :].tolist():
            run = run + 1 if each else 1
            runs.append(run)
        self._last[series] = (int(steps[-1]), rows[-1].copy(), run)
        return np.array(runs, np.int64)

    def _compare(
        self,
        block: Block,
        series: Series,
        steps: NDArray[np.int64],
        rows: NDArray[Any],
        candidates: NDArray[np.int64],
    ) -> list[bool]:
        if not block.run[series.name].has_data:
            return [bool((rows[i] == rows[i - 1]).all()) for i in candidates.tolist()]
        repeated = are_repeated(block.run, series, steps)[candidates]
        answers: list[bool] = repeated.tolist()
        candidates = candidates[~repeated]
        if not len(candidates):
            return answers
        wanted = sorted({*candidates.tolist(), *(candidates - 1).tolist()})
        kept = self._value.pop(series, None)
        items: list[Item] = [(series, int(steps[i]), ()) for i in wanted]
        if kept is not None and items[0][1] == kept[0]:
            items = items[1:]
        else:
            kept = None
        values = block.read(items)
        found: list[bool] = []
        before: tuple[int, Any] | None = None
        are = set(candidates.tolist())
        for i in wanted:
            value = kept[1] if kept is not None and i == wanted[0] else next(values)
            if i in are:
                assert before is not None
                found.append(close(value, before[1], rtol=self.rtol, atol=self.atol))
            before = (i, value)
        if before is not None and before[0] == len(steps) - 1:
            self._value[series] = (int(steps[-1]), before[1])
        rest = iter(found)
        return [answer or next(rest) for answer in answers]

    def look(self, column: Column) -> Any:  # noqa: ANN401 - not used
        """Not used: values may be read."""
        raise NotImplementedError


class WeightUpdateRatio(Rule):
    """Weights that change too much or too little from one saved step to the next.

    r = mean |w − w'| / (mean |w'| + 1e-30), with w' the value saved before. Fires where
    r > `large` or r < `small`. Reads values, each once; one value a series is remembered.
    """

    names: str = parameter(WEIGHTS, is_pattern=True)
    mode: str | None = parameter(None, choices=("TRAIN", "EVAL", "PREDICT", "NONE"))
    large: float = parameter(10.0, least=0)
    small: float = parameter(1e-8, least=0)

    _last: dict[Series, NDArray[Any]]

    def begin(self) -> None:
        """Forget values."""
        self._last = {}

    def needs(self) -> Sequence[Needs]:
        """The weights."""
        return [Needs(names=self.names, mode=self.mode, values=True)]

    def invoke_on(self, block: Block) -> Iterable[Finding]:
        """Go through the values of each series."""
        for series, steps in block.saved(self.names, self.mode):
            items: list[Item] = [(series, step, ()) for step in steps.tolist()]
            ratios = np.full(len(steps), np.nan)
            for i, value in enumerate(block.read(items)):
                now, before = wide(value), self._last.get(series)
                self._last[series] = now
                if before is not None and before.shape == now.shape and now.size:
                    with np.errstate(all="ignore"):
                        ratios[i] = np.abs(now - before).mean() / (np.abs(before).mean() + 1e-30)
            yield from self._judge(series, steps, ratios)

    def _judge(
        self, series: Series, steps: NDArray[np.int64], ratios: NDArray[Any]
    ) -> Iterator[Finding]:
        for what, bound, fires in (
            ("above", self.large, ratios > self.large),
            ("below", self.small, ratios < self.small),
        ):
            for i in self.begins((series, what), fires).tolist():
                yield self.found(
                    series,
                    steps[i],
                    f"{series.name}: mean |change| / mean |weight| {ratios[i]:.3g} is {what} "
                    f"{bound:g}",
                    value=ratios[i],
                    threshold=bound,
                )


class PoorInitialisation(Rule):
    """Weights that a training cannot well begin with. Looks at the first `steps` saved steps.

    Fires where (a) gain = variance × fan-in of the weights of two axes or more differs between
    layers by more than `gain_ratio` (fan-in: elements of a slice along the first axis); (b) an
    activation's spread, 3.29 × standard deviation (from the 5th to the 95th percentile of a normal
    distribution), is below `spread`; (c) a loss stays within `flat` × |its first value| at
    `patience` saved steps from the first on. Reads statistics only.
    """

    weights: str = parameter(WEIGHTS, is_pattern=True)
    activations: str = parameter(r"(?i)(relu|tanh|sigmoid)[^/]*/input/0$", is_pattern=True)
    losses: str = parameter(r"(^|/)loss$", is_pattern=True)
    mode: str | None = parameter("TRAIN", choices=("TRAIN", "EVAL", "PREDICT", "NONE"))
    steps: int = parameter(10, least=1)
    gain_ratio: float = parameter(10.0, least=1)
    spread: float = parameter(1e-3, least=0)
    flat: float = parameter(1e-3, least=0)
    patience: int = parameter(5, least=2)

    _seen: dict[Series, int]
    _loss: dict[Series, list[float]]

    def begin(self) -> None:
        """Begin with the first step."""
        self._seen, self._loss = {}, {}

    def needs(self) -> Sequence[Needs]:
        """Statistics of weights, activations and losses."""
        patterns = (self.weights, self.activations, self.losses)
        return [Needs(names=pattern, mode=self.mode) for pattern in patterns]

    def invoke_on(self, block: Block) -> Iterable[Finding]:
        """Look at the first steps; later ones cost nothing."""
        yield from self._look_at_gains(block, self._first(block, self.weights))
        for column in self._first(block, self.activations):
            spread = 3.29 * column["std"]
            for i in self.begins(column.series, spread < self.spread).tolist():
                yield self.found(
                    column.series,
                    column.step[i],
                    f"{column.series.name}: spread {spread[i]:.3g} is below {self.spread:g}",
                    value=spread[i],
                    threshold=self.spread,
                )
        for column in self._first(block, self.losses):
            yield from self._look_at_loss(column)

    def _first(self, block: Block, pattern: str) -> Iterator[Column]:
        """Give what is left of the first steps of each series."""
        for series in block.series(pattern, self.mode):
            seen = self._seen.get(series, 0)
            if seen >= self.steps:
                continue
            for column in block.of(series):
                left = column.step[: self.steps - seen]
                self._seen[series] = seen + len(left)
                yield Column(series, left, column.rows[: len(left)])

    def _look_at_gains(self, block: Block, columns: Iterable[Column]) -> Iterator[Finding]:
        gains: dict[tuple[int, str], list[tuple[float, Series]]] = {}
        for column in columns:
            shape = block.shape(column.series)
            if len(shape) < 2:
                continue
            gain = np.square(column["std"]) * math.prod(shape[1:])
            for step, value in zip(column.step.tolist(), gain.tolist(), strict=True):
                gains.setdefault((step, column.series.mode), []).append((value, column.series))
        for (step, mode), found in sorted(gains.items()):
            least, most = min(found, key=_first_of), max(found, key=_first_of)
            ratio = most[0] / least[0] if least[0] else math.inf
            fires = np.array([ratio > self.gain_ratio])
            for _ in self.begins(("gain", mode), fires):
                yield self.found(
                    least[1],
                    step,
                    f"variance times fan-in is {least[0]:.3g} in {least[1].name}, "
                    f"{most[0]:.3g} in {most[1].name}",
                    value=ratio,
                    threshold=self.gain_ratio,
                )

    def _look_at_loss(self, column: Column) -> Iterator[Finding]:
        values = self._loss.setdefault(column.series, [])
        for step, value in zip(column.step.tolist(), column["mean"].tolist(), strict=True):
            values.append(value)
            if len(values) != self.patience:
                continue
            change = (max(values) - min(values)) / max(abs(values[0]), 1e-30)
            if change < self.flat:
                yield self.found(
                    column.series,
                    step,
                    f"{column.series.name}: changed by {change:.2%} in the first {len(values)} "
                    "saved steps",
                    value=change,
                    threshold=self.flat,
                )


def _first_of(pair: tuple[float, Series]) -> float:
    return pair[0]
