"""Vortex, a file a tensor, one flat column."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from peers.layout import FlatReader, Steps, batched, file_name, flat, steps_in_shard
from suite.contestant import Item, Reader, Series, Store

_COLUMN = "values"
_TAKEN = 1 << 16


class Vortex(Store):
    """Its default: chooses an encoding for each stretch."""

    name = "vortex"
    settings = "file a tensor, one flat column; VortexWriteOptions.default(); mapped"
    needs = ("vortex",)
    distributions = ("vortex-data", "pyarrow", "numpy")
    compresses = True
    reads_parts = True
    options: ClassVar[str] = "default"

    def write(self, place: str | Path, series: Sequence[Series], items: Iterable[Item]) -> None:
        """Write each tensor, or a shard of small ones: a writer takes all of a file at once."""
        import pyarrow as pa
        import vortex as vx

        folder = Path(place)
        for s in series:
            (folder / file_name(s.name)).mkdir(parents=True, exist_ok=True)
        options = getattr(vx.io.VortexWriteOptions, self.options)()
        together, steps = {s.name: steps_in_shard(s) for s in series}, Steps()
        for numbers, name, values in batched(items, together, aligned=False):
            row = pa.array(flat(values))
            schema = pa.schema([pa.field(_COLUMN, row.type, nullable=False)])
            path = _path(folder, name, steps.count(name) // together[name])
            options.write(pa.table([row], schema=schema), path)
            steps.add(name, numbers)
        steps.save(folder)

    def reader(self, place: str | Path, series: Sequence[Series]) -> Reader:
        """Open each file when it is first read."""
        return _VortexReader(Path(place), series)


class VortexCompact(Vortex):
    """With pcodec and zstd among the encodings."""

    name = "vortex-compact"
    settings = "file a tensor, one flat column; VortexWriteOptions.compact(); mapped"
    options = "compact"


class _VortexReader(FlatReader):
    def __init__(self, folder: Path, series: Sequence[Series]) -> None:
        super().__init__(folder, series)
        self._files: dict[tuple[str, int], Any] = {}

    def _file(self, name: str, number: int) -> Any:
        import vortex as vx

        if (name, number) not in self._files:
            path = _path(Path(self._place), name, number)
            self._files[name, number] = vx.open(path, memory_map=True)
        return self._files[name, number]

    def _numbers(self, table: Any, name: str) -> np.ndarray:
        column = table.column(0).combine_chunks()
        return column.to_numpy(zero_copy_only=False).view(self._series[name].numpy_dtype)

    def whole(self, name: str, step: int) -> np.ndarray:
        shape = self._series[name].shape
        if steps_in_shard(self._series[name]) > 1:
            start = np.array([self._places[name][step] * math.prod(shape)])
            return self.gather(name, start, math.prod(shape)).reshape(shape)
        table = self._file(name, self._places[name][step]).to_arrow().read_all()
        return self._numbers(table, name).reshape(shape)

    def gather(self, name: str, starts: np.ndarray, length: int) -> np.ndarray:
        series = self._series[name]
        size = steps_in_shard(series) * math.prod(series.shape)
        found = np.empty((len(starts), length), series.numpy_dtype)
        for number in np.unique(starts // size).tolist():
            chosen = starts // size == number
            places = starts[chosen, None] % size + np.arange(length)
            found[chosen] = self._taken(name, number, places)
        return found

    def _taken(self, name: str, number: int, places: np.ndarray) -> np.ndarray:
        import pyarrow as pa
        import vortex as vx

        file, order = self._file(name, number), np.unique(places)
        if len(order) > _TAKEN:
            return self._numbers(file.to_arrow().read_all(), name)[places]
        wanted = vx.array(pa.array(order.astype(np.uint64)))
        table = file.scan(indices=wanted).to_arrow().read_all()
        return self._numbers(table, name)[np.searchsorted(order, places)]


def _path(folder: Path, name: str, number: int) -> str:
    return str(folder / file_name(name) / f"{number}.vortex")
