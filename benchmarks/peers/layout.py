"""How tensors lie in stores that know arrays, or tables, but no steps of a training."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from suite.contestant import CHUNK_NBYTES, Item, Reader, Series

SHARD_NBYTES = 16 << 20


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


def steps_together(series: Series, nbytes: int = CHUNK_NBYTES) -> int:
    """Say how many steps of small tensors go into one chunk (or what else has `nbytes`).

    One for large ones. A chunk a scalar would cost every store its speed.
    """
    each = max(1, math.prod(series.shape) * series.numpy_dtype.itemsize)
    return max(1, min(series.steps, nbytes // each))


def steps_in_shard(series: Series) -> int:
    """Say how many steps go into one shard: one of large tensors, whole chunks of small ones."""
    chunk = steps_together(series)
    if chunk == 1:
        return 1
    return min(-(-series.steps // chunk), SHARD_NBYTES // CHUNK_NBYTES) * chunk


def batched(
    items: Iterable[Item], together: Mapping[str, int], *, aligned: bool = True
) -> Iterator[tuple[list[int], str, np.ndarray]]:
    """Gather the tensors that go into one piece: their steps, the name, the tensors stacked.

    What is gathered waits in memory, which training could lose: this favours the stores that
    need it.

    Parameters
    ----------
    together
        How many tensors of each name.
    aligned
        The steps of a batch follow each other, and it ends where a piece of an array by steps
        does; else every batch but the last is full.
    """
    waiting: dict[str, list[tuple[int, np.ndarray]]] = {}
    for step, name, values in items:
        count = together[name]
        if count == 1:
            yield [step], name, np.asarray(values)[None]
            continue
        batch = waiting.setdefault(name, [])
        is_apart = bool(batch) and (step != batch[-1][0] + 1 or step % count == 0)
        if len(batch) == count or (aligned and is_apart):
            yield _stacked(name, batch)
            batch.clear()
        batch.append((step, values))
    for name, batch in waiting.items():
        if batch:
            yield _stacked(name, batch)


def _stacked(name: str, batch: list[tuple[int, Any]]) -> tuple[list[int], str, np.ndarray]:
    return [step for step, _ in batch], name, np.stack([values for _, values in batch])


class Steps:
    """Which steps of each name were written, in their order: tables know no steps."""

    def __init__(self) -> None:
        self._steps: dict[str, list[int]] = {}

    def add(self, name: str, steps: Iterable[int]) -> None:
        """Note the next tensors of a name."""
        self._steps.setdefault(name, []).extend(steps)

    def count(self, name: str) -> int:
        """Say how many tensors a name has by now."""
        return len(self._steps.get(name, ()))

    @property
    def names(self) -> set[str]:
        """What was written at all."""
        return set(self._steps)

    def save(self, place: str | Path) -> None:
        """Keep it beside the tables. In a bucket all steps must be there, so that none is read."""
        if not is_remote(place):
            (Path(place) / "steps.json").write_text(json.dumps(self._steps))
        elif any(each != list(range(len(each))) for each in self._steps.values()):
            message = f"{place}: steps are missing; tables in a bucket must have all from 0 on"
            raise ValueError(message)

    @staticmethod
    def load(place: str | Path, names: Iterable[str]) -> Mapping[str, Mapping[int, int] | range]:
        """Give each step's place in its table, by name."""
        if is_remote(place):
            return dict.fromkeys(names, range(sys.maxsize))
        steps = json.loads((Path(place) / "steps.json").read_text())
        return {name: {step: i for i, step in enumerate(each)} for name, each in steps.items()}


def is_remote(place: str | Path) -> bool:
    """Say whether a place is in a bucket."""
    return str(place).startswith("s3://")


def joined(place: str | Path, name: str) -> str:
    """Give the path, or the URL, of a file below a place."""
    return f"{place}/{name}"


def ready(place: str | Path) -> None:
    """Make a local folder; a bucket has none."""
    if not is_remote(place):
        Path(place).mkdir(parents=True, exist_ok=True)


def upload(folder: Path, place: str) -> None:
    """Copy files to a bucket, for stores that write local files alone."""
    import s3fs

    filesystem = s3fs.S3FileSystem(skip_instance_cache=True)
    for file in folder.iterdir():
        filesystem.put_file(str(file), joined(place, file.name))


class FlatReader(Reader):
    """Reads tables in which all numbers of a name lie in one row, step after step."""

    def __init__(self, place: str | Path, series: Sequence[Series]) -> None:
        self._place = place
        self._series = {s.name: s for s in series}
        self._places = Steps.load(place, self._series)

    def gather(self, name: str, starts: np.ndarray, length: int) -> np.ndarray:
        """Give the runs of `length` numbers that begin at `starts`, as rows."""
        raise NotImplementedError

    def part(self, name: str, step: int, index: tuple) -> np.ndarray:
        return self.parts(name, range(step, step + 1), index)[0]

    def parts(self, name: str, steps: range, index: tuple) -> np.ndarray:
        shape = self._series[name].shape
        starts, length, result = runs(shape, index)
        places = self._places[name]
        firsts = np.array([places[step] for step in steps]) * math.prod(shape)
        found = self.gather(name, (firsts[:, None] + starts).reshape(-1), length)
        return found.reshape(len(steps), *result)


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
