"""Vortex, a file a tensor, one flat column."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from peers.layout import file_name, flat, runs
from suite.contestant import Item, Reader, Series, Store

_COLUMN = "values"
_TAKEN = 1 << 16


class Vortex(Store):
    """Its default: chooses an encoding for each stretch."""

    name = "vortex"
    settings = "file a tensor, one flat column; VortexWriteOptions.default()"
    needs = ("vortex",)
    distributions = ("vortex-data", "pyarrow", "numpy")
    compresses = True
    reads_parts = True
    options: ClassVar[str] = "default"

    def write(self, place: str | Path, series: Sequence[Series], items: Iterable[Item]) -> None:
        """Write each tensor as it comes: a writer takes all of a file at once."""
        import pyarrow as pa
        import vortex as vx

        folder = Path(place)
        for s in series:
            (folder / file_name(s.name)).mkdir(parents=True, exist_ok=True)
        options = getattr(vx.io.VortexWriteOptions, self.options)()
        for step, name, values in items:
            row = pa.array(flat(values))
            schema = pa.schema([pa.field(_COLUMN, row.type, nullable=False)])
            path = str(folder / file_name(name) / f"{step}.vortex")
            options.write(pa.table([row], schema=schema), path)

    def reader(self, place: str | Path, series: Sequence[Series]) -> Reader:
        """Open each file when it is first read."""
        return _VortexReader(Path(place), series)


class VortexCompact(Vortex):
    """With pcodec and zstd among the encodings."""

    name = "vortex-compact"
    settings = "file a tensor, one flat column; VortexWriteOptions.compact()"
    options = "compact"


class _VortexReader(Reader):
    def __init__(self, folder: Path, series: Sequence[Series]) -> None:
        self._folder = folder
        self._series = {s.name: s for s in series}
        self._files: dict[tuple[str, int], Any] = {}

    def _file(self, name: str, step: int) -> Any:
        import vortex as vx

        if (name, step) not in self._files:
            path = self._folder / file_name(name) / f"{step}.vortex"
            self._files[name, step] = vx.open(str(path))
        return self._files[name, step]

    def _numbers(self, column: Any, name: str) -> np.ndarray:
        import pyarrow as pa

        if isinstance(column, pa.ChunkedArray):
            column = column.combine_chunks()
        return column.to_numpy(zero_copy_only=False).view(self._series[name].numpy_dtype)

    def whole(self, name: str, step: int) -> np.ndarray:
        table = self._file(name, step).to_arrow().read_all()
        return np.array(self._numbers(table.column(0), name)).reshape(self._series[name].shape)

    def part(self, name: str, step: int, index: tuple) -> np.ndarray:
        import pyarrow as pa
        import vortex as vx

        starts, length, shape = runs(self._series[name].shape, index)
        places = (starts[:, None] + np.arange(length)).reshape(-1)
        if len(places) > _TAKEN:
            return self.whole(name, step)[index].copy()
        order = np.unique(places)
        wanted = vx.array(pa.array(order.astype(np.uint64)))
        table = self._file(name, step).scan(indices=wanted).to_arrow().read_all()
        return self._numbers(table.column(0), name)[np.searchsorted(order, places)].reshape(shape)
