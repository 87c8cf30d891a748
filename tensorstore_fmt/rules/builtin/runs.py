"""Rules on whole runs: time, and other runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt.reading.steptable import step_rows
from tensorstore_fmt.rules.block import Block, Column, Item, load
from tensorstore_fmt.rules.builtin.statistics import StatisticsRule
from tensorstore_fmt.rules.builtin.weights import WEIGHTS, close, may_be_close
from tensorstore_fmt.rules.parameters import parameter
from tensorstore_fmt.rules.rule import Finding, Rule, Series

__all__ = ["SimilarAcrossRuns", "StalledTraining"]


class SimilarAcrossRuns(StatisticsRule):
    """Tensors that are the same in two runs, as if one had not been trained differently.

    Compares with each of the other runs at the same step. Fires where |a − b| ≤ `atol` +
    `rtol`·|b| for all elements. Reads statistics of both, and values only where these leave it
    open; where only statistics were saved, equal ones count as alike.
    """

    names: str = parameter(WEIGHTS, is_pattern=True)
    rtol: float = parameter(0.0, least=0)
    atol: float = parameter(0.0, least=0)

    def invoke_on(self, block: Block) -> Iterable[Finding]:
        """Compare all series with those of the other runs."""
        columns = block.columns(self.names, self.mode)
        for number, other in enumerate(block.others):
            theirs = {
                column.series: column
                for column in load(other, [c.series for c in columns], block.low, block.high)
            }
            for column in columns:
                yield from self._compare(block, number, column, theirs[column.series])

    def _compare(
        self, block: Block, number: int, ours: Column, theirs: Column
    ) -> Iterator[Finding]:
        steps, i, j = np.intersect1d(ours.step, theirs.step, return_indices=True)
        a, b = ours.rows[i], theirs.rows[j]
        alike = may_be_close(a, b, rtol=self.rtol, atol=self.atol)
        candidates = np.flatnonzero(alike).tolist()
        other = block.others[number]
        if (
            candidates
            and block.run[ours.series.name].has_data
            and other[theirs.series.name].has_data
        ):
            items: list[Item] = [(ours.series, int(steps[k]), ()) for k in candidates]
            pairs = zip(block.read(items), block.read(items, other=number), strict=True)
            alike[candidates] = [close(x, y, rtol=self.rtol, atol=self.atol) for x, y in pairs]
        else:
            alike &= (a == b).all(axis=1)
        for k in self.begins((ours.series, number), alike).tolist():
            yield self.found(
                ours.series,
                steps[k],
                f"{ours.series.name}: the same as in {other.describe()}",
                value=0.0,
                threshold=self.atol,
            )

    def look(self, column: Column) -> Any:  # noqa: ANN401 - not used
        """Not used: another run is needed."""
        raise NotImplementedError


class StalledTraining(Rule):
    """A training from which nothing comes any more.

    Fires where between one logged step and the next, of any mode, more than `threshold` seconds
    passed; and, while the run is open, where so many have passed since the last one. Reads the
    step table only.
    """

    threshold: float = parameter(1800.0, least=0)

    _last: tuple[int, float]
    _reported: set[int]

    def begin(self) -> None:
        """Begin to wait."""
        self._last, self._reported = (-1, 0.0), set()

    def invoke_on(self, block: Block) -> Iterable[Finding]:
        """Look at the times of all modes between the first step here and the last."""
        rows = step_rows(block.run._session, None, block.low, block.high)
        order = np.lexsort((rows.step, rows.wall_time_us))
        steps, times = rows.step[order], rows.wall_time_us[order] / 1e6
        if not len(times):
            return
        last_step, last_time = self._last
        if last_step >= 0 and last_time < times[0] and last_step < block.low:
            steps, times = np.append(last_step, steps), np.append(last_time, times)
        yield from self._gaps(steps, times)
        if times[-1] > last_time:
            self._last = (int(steps[-1]), float(times[-1]))

    def _gaps(self, steps: NDArray[np.int64], times: NDArray[Any]) -> Iterator[Finding]:
        gaps = np.diff(times)
        for i in np.flatnonzero(gaps > self.threshold).tolist():
            after = int(steps[i])
            if after not in self._reported:
                self._reported.add(after)
                yield self._finding(
                    int(steps[i + 1]), gaps[i], f"{gaps[i]:.0f} s passed after step {after}"
                )

    def invoke_when_quiet(self, now: float) -> Iterable[Finding]:
        """Compare the clock with the last step."""
        step, time = self._last
        if step >= 0 and now - time > self.threshold and step not in self._reported:
            self._reported.add(step)
            yield self._finding(
                step, now - time, f"nothing came for {now - time:.0f} s after step {step}"
            )

    def _finding(self, step: int, value: float, message: str) -> Finding:
        nowhere = Series("", "NONE", None)
        return self.found(nowhere, step, message, value=value, threshold=self.threshold)
