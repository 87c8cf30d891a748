"""Views: what a rule sees at a step. Nothing that came later can be reached through one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt.errors import ArgumentError, NotThereError
from tensorstore_fmt.reading.entries import Query
from tensorstore_fmt.reading.modes import MODE_NAMES, mode_number
from tensorstore_fmt.reading.selection import Index
from tensorstore_fmt.reading.tensor import Tensor
from tensorstore_fmt.rules.block import Block, Column, load, of_modes
from tensorstore_fmt.rules.rule import Needs, Series

__all__ = ["View", "views"]

_FIELDS = (
    "count", "nan", "posinf", "neginf", "zero", "min", "max", "sum", "sumsq", "sumabs",
    "mean", "std", "l2", "absmean",
)  # fmt: skip


class View:
    """A run as of one step.

    Attributes
    ----------
    step, mode
        The step that is looked at, and its mode (``"NONE"`` if it has none).
    """

    __slots__ = ("_block", "_columns", "_needs", "_saved", "mode", "step")

    def __init__(
        self,
        block: Block,
        step: int,
        mode: str,
        *,
        columns: Mapping[Series, Column],
        saved: Mapping[Series, NDArray[np.int64]],
        needs: Sequence[Needs],
    ) -> None:
        self._block = block
        self._columns = columns
        self._saved = saved
        self._needs = needs
        self.step = step
        self.mode = mode

    def series(self, pattern: str | None = None) -> list[Series]:
        """Give the series that the rule needs and that were saved at this step.

        Parameters
        ----------
        pattern
            Only those whose names this regular expression matches.
        """
        names = None if pattern is None else set(self._block.names(pattern))
        return [
            series
            for series, steps in self._saved.items()
            if (names is None or series.name in names) and _row(steps, self.step) is not None
        ]

    def stats(self, series: Series | str) -> Mapping[str, float]:
        """Give the statistics at this step; no chunk is fetched.

        ``count``, ``nan``, ``posinf``, ``neginf``, ``zero``, ``min``, ``max``, ``sum``,
        ``sumsq``, ``sumabs``, ``mean``, ``std``, ``l2`` and ``absmean`` (mean of |x|).

        Raises
        ------
        NotThereError
            It was not saved at this step, or has no statistics.
        """
        column = self._columns.get(self._series(series))
        row = None if column is None else _row(column.step, self.step)
        if column is None or row is None:
            raise NotThereError(
                f"{_name(series)!r} has no statistics at step {self.step}",
                name=_name(series),
                step=self.step,
            )
        return {field: float(column[field][row]) for field in _FIELDS}

    def history(self, series: Series | str, *, since: int = 0) -> Column:
        """Give the statistics of all steps from one up to this; they are fetched anew."""
        of = self._series(series)
        (column,) = load(self._block.run, [of], since, self.step)
        return column

    def read(
        self, series: Series | str, *, step: int | None = None, index: Index | None = None
    ) -> Any:  # noqa: ANN401 - an array or a text
        """Read a value at this step or an earlier one.

        Parameters
        ----------
        index
            A slice; by default that of the rule's `Needs`.

        Raises
        ------
        ArgumentError
            Code ``later_step``: the step comes after this one.
        NotThereError
            It was not saved then.
        """
        of = self._series(series)
        at = self.step if step is None else int(step)
        if at > self.step:
            raise ArgumentError(
                f"step {at} comes after {self.step}, which is looked at",
                code="later_step",
                step=at,
            )
        if index is None:
            index = self._index(of)
        (value,) = self._block.read([(of, at, index)])
        return value

    def steps(self, series: Series | str) -> NDArray[np.int64]:
        """Give the steps at which it was saved, up to this one."""
        of = self._series(series)
        session = self._block.run._session
        query = Query(name=of.name, mode=mode_number(of.mode), worker=of.worker)
        steps = Tensor(session, query).steps
        return steps[steps <= self.step]

    def others(self, series: Series | str) -> list[Any]:
        """Read the same in each of the other runs; None where it was not saved at this step."""
        of = self._series(series)
        index = self._index(of)
        return [
            next(self._block.read([(of, self.step, index)], other=number))
            for number in range(len(self._block.others))
        ]

    def _series(self, series: Series | str) -> Series:
        if isinstance(series, Series):
            return series
        for each in self._saved:
            if each.name == series:
                return each
        raise NotThereError(
            f"{series!r} is not among what the rule needs at step {self.step}; name it in needs()",
            name=series,
            step=self.step,
        )

    def _index(self, series: Series) -> Index:
        for each in self._needs:
            if each.values and series.name in self._block.names(each.names):
                return each.index
        return ()

    def __repr__(self) -> str:
        return f"<View of step {self.step}, mode {self.mode}>"


def _name(series: Series | str) -> str:
    return series if isinstance(series, str) else series.name


def _row(steps: NDArray[np.int64], step: int) -> int | None:
    at = int(steps.searchsorted(step))
    return at if at < len(steps) and steps[at] == step else None


def views(block: Block, needs: Sequence[Needs]) -> Iterator[View]:
    """Give a view of each step of each mode of a block, ascending by step, then by mode."""
    columns: dict[int, dict[Series, Column]] = {}
    saved: dict[int, dict[Series, NDArray[np.int64]]] = {}
    order: list[tuple[int, int]] = []
    for mode in map(mode_number, block.modes):
        assert mode is not None
        name = MODE_NAMES[mode]
        of_mode = of_modes(needs, mode)
        columns[mode], saved[mode] = {}, {}
        for each in of_mode:
            for column in block.columns(each.names, name):
                columns[mode][column.series] = column
                saved[mode][column.series] = column.step
            if each.values:
                saved[mode].update(block.saved(each.names, name))
        if of_mode or not needs:
            order += [(step, mode) for step in block.steps(name).tolist()]
    order.sort()
    for step, mode in order:
        yield View(
            block,
            step,
            MODE_NAMES[mode],
            columns=columns[mode],
            saved=saved[mode],
            needs=needs,
        )
