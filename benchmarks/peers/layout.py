"""How tensors lie in stores that know arrays, or tables, but no steps of a training."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np

from suite.contestant import CHUNK_NBYTES, Item, Reader


class SteppedReader(Reader):
    """Reads arrays whose first axis is the step, and that take NumPy's basic indexing."""

    def array(self, name: str):  # noqa: ANN201 (each peer has a type of its own)
        """Give a peer's array."""
        raise NotImplementedError

    def whole(self, name: str, step: int) -> np.ndarray:
        return np.asarray(self.array(name)[step])

    def part(self, name: str, step: int, index: tuple) -> np.ndarray:
        return np.asarray(self.array(name)[(step, *index)])

    def parts(self, name: str, steps: range, index: tuple) -> np.ndarray:
        return np.asarray(self.array(name)[(slice(steps.start, steps.stop, steps.step), *index)])


class Steps:
    """Which steps of each name were written, in their order: tables know no steps."""

    def __init__(self) -> None:
        self._steps: dict[str, list[int]] = {}

    def add(self, name: str, step: int) -> None:
        """Note one tensor."""
        self._steps.setdefault(name, []).append(step)

    @property
    def names(self) -> set[str]:
        """What was written at all."""
        return set(self._steps)

    def save(self, folder: Path) -> None:
        """Keep it beside the tables."""
        (folder / "steps.json").write_text(json.dumps(self._steps))

    @staticmethod
    def load(folder: Path) -> dict[str, dict[int, int]]:
        """Give each step's place in its table, by name."""
        steps = json.loads((folder / "steps.json").read_text())
        return {name: {step: i for i, step in enumerate(each)} for name, each in steps.items()}


def file_name(name: str, ending: str = "") -> str:
    """Make a series' name one component of a path."""
    return quote(name, safe="") + ending


def chunk_elements(itemsize: int) -> int:
    """Say how many numbers a chunk of a table has."""
    return CHUNK_NBYTES // itemsize


def flat(values: np.ndarray) -> np.ndarray:
    """Give the values as one row; booleans as bytes, which tables would pack into bits."""
    row = np.ascontiguousarray(values).reshape(-1)
    return row.view(np.uint8) if row.dtype == bool else row


def runs(shape: Sequence[int], index: tuple) -> tuple[np.ndarray, int, tuple[int, ...]]:
    """Cut a selection into runs of the flat array.

    Returns
    -------
    starts, length, result
        Each run begins at one of the starts, all have one length; the shape of the result.
    """
    index = (*index, *[slice(None)] * (len(shape) - len(index)))
    ranges = [
        range(*axis.indices(n)) if isinstance(axis, slice) else range(axis % n, axis % n + 1)
        for axis, n in zip(index, shape, strict=True)
    ]
    result = tuple(len(r) for r, axis in zip(ranges, index, strict=True) if isinstance(axis, slice))
    length, stride, inner = 1, 1, len(shape)
    while inner > 0 and ranges[inner - 1] == range(shape[inner - 1]):
        inner -= 1
        length *= shape[inner]
    offset = 0
    if inner > 0 and ranges[inner - 1].step == 1:
        inner -= 1
        offset = ranges[inner].start * length
        stride = length * shape[inner]
        length *= len(ranges[inner])
    else:
        stride = length
    starts = np.array([offset])
    for axis in reversed(range(inner)):
        steps = np.arange(ranges[axis].start, ranges[axis].stop, ranges[axis].step) * stride
        starts = (steps[:, None] + starts[None, :]).reshape(-1)
        stride *= shape[axis]
    return starts, length, result


def by_step(items: Iterable[Item]) -> Iterable[tuple[int, dict[str, np.ndarray]]]:
    """Gather what has one step, for stores that write a file a step."""
    group: dict[str, np.ndarray] = {}
    current: int | None = None
    for step, name, values in items:
        if current is not None and step != current:
            yield current, group
            group = {}
        current = step
        group[name] = values
    if current is not None:
        yield current, group
