"""Lance's files: rows of vectors, and numbers one by one, compressed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from peers.layout import FlatReader, Steps, file_name, flat, is_remote, joined, ready
from suite.contestant import Item, Reader, Series, Store

_COLUMN = "values"
_TAKEN = 1 << 16  # so many rows are asked for one by one, more as a stretch


class _Lance(Store):
    """A file a name; datasets would make a version a tensor, whose cost grows with each."""

    needs = ("lance",)
    distributions = ("pylance", "pyarrow", "numpy")
    reads_parts = True
    takes_s3 = True
    metadata: ClassVar[dict[str, str]] = {}
    is_flat: ClassVar[bool]

    def write(self, place: str | Path, series: Sequence[Series], items: Iterable[Item]) -> None:
        """Append each tensor to its file."""
        import pyarrow as pa
        from lance.file import LanceFileWriter

        ready(place)
        schemas, writers, steps = {}, {}, Steps()
        for s in series:
            kind = pa.from_numpy_dtype(flat(np.empty(0, s.numpy_dtype)).dtype)
            width = _width(s, is_flat=self.is_flat)
            if width > 1:
                kind = pa.list_(pa.field("item", kind, nullable=False), width)
            field = pa.field(_COLUMN, kind, nullable=False, metadata=self.metadata)
            schemas[s.name] = pa.schema([field])
            path = joined(place, file_name(s.name, ".lance"))
            options = {"allow_http": "true"} if is_remote(place) else None
            writers[s.name] = LanceFileWriter(path, schemas[s.name], storage_options=options)
        for step, name, values in items:
            schema = schemas[name]
            column = pa.array(flat(values))
            if pa.types.is_fixed_size_list(schema.types[0]):
                column = pa.FixedSizeListArray.from_arrays(column, type=schema.types[0])
            writers[name].write_batch(pa.record_batch([column], schema=schema))
            steps.add(name, [step])
        for name, writer in writers.items():
            # A file without rows cannot be closed.
            if name in steps.names:
                writer.close()
        steps.save(place)

    def reader(self, place: str | Path, series: Sequence[Series]) -> Reader:
        """Open each file when it is first read."""
        return _LanceReader(place, series, is_flat=self.is_flat)


class _LanceReader(FlatReader):
    def __init__(self, place: str | Path, series: Sequence[Series], *, is_flat: bool) -> None:
        super().__init__(place, series)
        self._is_flat = is_flat
        self._files: dict[str, Any] = {}

    def _file(self, name: str) -> Any:
        from lance.file import LanceFileReader

        if name not in self._files:
            path = joined(self._place, file_name(name, ".lance"))
            options = {"allow_http": "true"} if is_remote(path) else None
            self._files[name] = LanceFileReader(path, storage_options=options)
        return self._files[name]

    def _numbers(self, results: Any, name: str) -> np.ndarray:
        import pyarrow as pa

        column = results.to_table().column(0).combine_chunks()
        if pa.types.is_fixed_size_list(column.type):
            column = column.flatten()
        return column.to_numpy(zero_copy_only=False).view(self._series[name].numpy_dtype)

    def _stretch(self, name: str, first: int, count: int) -> np.ndarray:
        return self._numbers(self._file(name).read_range(first, count, batch_size=count), name)

    def whole(self, name: str, step: int) -> np.ndarray:
        series = self._series[name]
        rows = math.prod(series.shape) // _width(series, is_flat=self._is_flat)
        return self._stretch(name, self._places[name][step] * rows, rows).reshape(series.shape)

    def gather(self, name: str, starts: np.ndarray, length: int) -> np.ndarray:
        width = _width(self._series[name], is_flat=self._is_flat)
        places = starts[:, None] + np.arange(length)
        rows = np.unique(places // width)
        if len(rows) <= _TAKEN:
            found = self._numbers(self._file(name).take_rows(rows.tolist()), name)
        else:
            rows = np.arange(rows[0], rows[-1] + 1)
            found = self._stretch(name, int(rows[0]), len(rows))
        where = np.searchsorted(rows, places // width)
        return found.reshape(-1, width)[where, places % width]


def _width(series: Series, *, is_flat: bool) -> int:
    """Say how many numbers a row has."""
    return 1 if is_flat or len(series.shape) < 2 else series.shape[-1]


class Lance(_Lance):
    """As embeddings are stored: its documentation has them as lists of fixed size."""

    name = "lance"
    settings = "LanceFileWriter, file a name, a row for each last axis (FixedSizeList)"
    compresses = False
    is_flat = False


class LanceZstd(_Lance):
    """Lists of fixed size are not compressed; single numbers are."""

    name = "lance-zstd"
    settings = "LanceFileWriter, file a name, a row a number; compression zstd 1, bss auto"
    compresses = True
    is_flat = True
    metadata: ClassVar = {
        "lance-encoding:compression": "zstd",
        "lance-encoding:compression-level": "1",
        "lance-encoding:bss": "auto",
    }
