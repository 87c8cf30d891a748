"""Plain Arrow: IPC files and Parquet, a file a name, tensors as one flat column."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from peers.layout import (
    FlatReader,
    Steps,
    batched,
    chunk_elements,
    file_name,
    flat,
    is_remote,
    joined,
    ready,
    steps_together,
)
from suite.contestant import Item, Reader, Series, Store

_COLUMN = "values"


def _bucket() -> Any:
    from pyarrow import fs

    return fs.S3FileSystem(endpoint_override=os.environ.get("AWS_ENDPOINT_URL"))


def _sink(path: str) -> Any:
    import pyarrow as pa

    if is_remote(path):
        return _bucket().open_output_stream(path.removeprefix("s3://"))
    return pa.OSFile(path, "wb")


def _source(path: str) -> Any:
    import pyarrow as pa

    if is_remote(path):
        return _bucket().open_input_file(path.removeprefix("s3://"))
    return pa.memory_map(path)


class _Tables(Store):
    """One column, written piece by piece; a piece is a batch or a row group."""

    needs = ("pyarrow",)
    distributions = ("pyarrow", "numpy")
    reads_parts = True
    takes_s3 = True

    def _writer(self, sink: Any, schema: Any) -> Any:
        raise NotImplementedError

    def write(self, place: str | Path, series: Sequence[Series], items: Iterable[Item]) -> None:
        """Append each tensor to its table."""
        import pyarrow as pa

        ready(place)
        writers, sinks, steps = {}, [], Steps()
        for s in series:
            schema = pa.schema([pa.field(_COLUMN, self._type(s), nullable=False)])
            sinks.append(_sink(joined(place, file_name(s.name))))
            writers[s.name] = self._writer(sinks[-1], schema)
        together = {s.name: steps_together(s) for s in series}
        for numbers, name, values in batched(items, together, aligned=False):
            row, writer = flat(values), writers[name]
            size = self._piece(row.size, row.itemsize)
            for start in range(0, row.size, size):
                piece = row[start : start + size]
                column = pa.Array.from_buffers(
                    writer.schema.types[0], piece.size, [None, pa.py_buffer(piece)]
                )
                writer.write_batch(pa.record_batch([column], schema=writer.schema))
            steps.add(name, numbers)
        for writer, sink in zip(writers.values(), sinks, strict=True):
            writer.close()
            sink.close()
        steps.save(place)

    def _type(self, series: Series) -> Any:
        import pyarrow as pa

        return pa.from_numpy_dtype(flat(np.empty(0, series.numpy_dtype)).dtype)

    def _piece(self, size: int, itemsize: int) -> int:
        """Say how many numbers of a tensor of `size` go into one piece."""
        return chunk_elements(itemsize)


class _TableReader(FlatReader):
    """Decodes the pieces that a selection touches."""

    def __init__(self, store: _Tables, place: str | Path, series: Sequence[Series]) -> None:
        super().__init__(place, series)
        self._store = store
        self._files: dict[str, Any] = {}

    def _open(self, source: Any) -> Any:
        raise NotImplementedError

    def _decoded(self, file: Any, numbers: list[int]) -> list:
        """Give the columns of some pieces."""
        raise NotImplementedError

    def _pieces(self, name: str, numbers: np.ndarray) -> list[np.ndarray]:
        if name not in self._files:
            self._files[name] = self._open(_source(joined(self._place, file_name(name))))
        dtype = self._series[name].numpy_dtype
        return [
            np.frombuffer(column.buffers()[1], dtype)[column.offset : column.offset + len(column)]
            for column in self._decoded(self._files[name], numbers.tolist())
        ]

    def _layout(self, name: str) -> tuple[int, int, int]:
        """Give the numbers of a group of steps, of a piece, and the pieces of a group."""
        series = self._series[name]
        group = steps_together(series) * math.prod(series.shape)
        piece = min(group, self._store._piece(group, series.numpy_dtype.itemsize))
        return group, piece, -(-group // piece)

    def whole(self, name: str, step: int) -> np.ndarray:
        shape = self._series[name].shape
        found = self.gather(name, np.array([self._places[name][step] * math.prod(shape)]), -1)
        return found.reshape(shape)

    def gather(self, name: str, starts: np.ndarray, length: int) -> np.ndarray:
        group, piece, pieces = self._layout(name)
        length = math.prod(self._series[name].shape) if length < 0 else length
        groups, within = starts // group, starts % group
        first = groups * pieces + within // piece
        last = groups * pieces + (within + length - 1) // piece
        numbers = np.unique(np.concatenate([np.arange(a, b + 1) for a, b in _spans(first, last)]))
        rows = self._pieces(name, numbers)
        joined = rows[0] if len(rows) == 1 else np.concatenate(rows)
        # All pieces of a group are full but the last; Parquet joins what it reads.
        sizes = np.where(numbers % pieces == pieces - 1, group - (pieces - 1) * piece, piece)
        bases = np.cumsum(sizes) - sizes
        at = bases[np.searchsorted(numbers, first)] + within % piece
        if len(at) == 1:
            return joined[at[0] : at[0] + length][None]
        # A run goes on in the next piece, which is the next one here too.
        return np.lib.stride_tricks.sliding_window_view(joined, length)[at]


def _spans(first: np.ndarray, last: np.ndarray) -> list[tuple[int, int]]:
    """Give each span of pieces once."""
    return [tuple(pair) for pair in np.unique(np.stack([first, last], axis=1), axis=0).tolist()]


class ArrowIpc(_Tables):
    """Not compressed; a batch a tensor, parts from the mapped file."""

    name = "arrow-ipc"
    settings = "IPC file a name, a batch a tensor, no compression; memory-mapped"
    compresses = False
    codec: ClassVar[str | None] = None

    def _writer(self, sink: Any, schema: Any) -> Any:
        import pyarrow as pa

        options = pa.ipc.IpcWriteOptions(compression=self.codec and pa.Codec(self.codec, 1))
        writer = pa.ipc.new_file(sink, schema, options=options)
        return _Named(writer, schema)

    def _piece(self, size: int, itemsize: int) -> int:
        return size

    def reader(self, place: str | Path, series: Sequence[Series]) -> Reader:
        """Map each file when it is first read."""
        return _MappedReader(self, place, series)


class _Named:
    """An IPC writer that knows its schema, as Parquet's does."""

    def __init__(self, writer: Any, schema: Any) -> None:
        self.schema = schema
        self.write_batch = writer.write_batch
        self.close = writer.close


class _ArrowReader(_TableReader):
    def _open(self, source: Any) -> Any:
        import pyarrow as pa

        return pa.ipc.open_file(source)

    def _decoded(self, file: Any, numbers: list[int]) -> list:
        return [file.get_batch(number).column(0) for number in numbers]


class _MappedReader(_ArrowReader):
    """Whole tensors lie in the map as they are: a part is a slice of a view."""

    def _tensors(self, name: str, number: int) -> np.ndarray:
        """Give the tensors of one batch, stacked."""
        shape = self._series[name].shape
        row = self._pieces(name, np.array([number]))[0]
        return row.reshape(-1, *shape)

    def whole(self, name: str, step: int) -> np.ndarray:
        return self.parts(name, range(step, step + 1), ())[0]

    def parts(self, name: str, steps: range, index: tuple) -> np.ndarray:
        places, count = self._places[name], steps_together(self._series[name])
        found, held, tensors = [], -1, np.empty(0)
        for step in steps:
            number, place = divmod(places[step], count)
            if number != held:
                held, tensors = number, self._tensors(name, number)
            found.append(tensors[(place, *index)])
        return np.stack(found)


class ArrowZstd(ArrowIpc):
    """Compressed; a batch a chunk, so that a part need not decode all."""

    name = "arrow-zstd"
    settings = "IPC file a name, a batch for each 256 KiB, zstd 1; memory-mapped"
    compresses = True
    codec = "zstd"

    def _piece(self, size: int, itemsize: int) -> int:
        return chunk_elements(itemsize)

    def reader(self, place: str | Path, series: Sequence[Series]) -> Reader:
        """Map each file when it is first read."""
        return _ArrowReader(self, place, series)


class Parquet(_Tables):
    """Byte planes, then zstd."""

    name = "parquet"
    settings = (
        "file a name, a row group for each 256 KiB, BYTE_STREAM_SPLIT (of 2, 4, 8 bytes), zstd 1, "
        "no dictionary, no statistics; memory-mapped"
    )
    compresses = True

    def _type(self, series: Series) -> Any:
        import pyarrow as pa

        # Integers of 16 bits would be widened to 32; as fixed-size bytes they can be split.
        found = super()._type(series)
        return pa.binary(2) if pa.types.is_integer(found) and found.bit_width == 16 else found

    def _writer(self, sink: Any, schema: Any) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        kind = schema.types[0]
        splits = not pa.types.is_integer(kind) or kind.bit_width > 16
        return pq.ParquetWriter(
            sink,
            schema,
            compression="zstd",
            compression_level=1,
            use_dictionary=False,
            write_statistics=False,
            use_byte_stream_split=splits,
        )

    def reader(self, place: str | Path, series: Sequence[Series]) -> Reader:
        """Map each file when it is first read."""
        return _ParquetReader(self, place, series)


class _ParquetReader(_TableReader):
    def _open(self, source: Any) -> Any:
        import pyarrow.parquet as pq

        return pq.ParquetFile(source, pre_buffer=is_remote(self._place))

    def _decoded(self, file: Any, numbers: list[int]) -> list:
        return file.read_row_groups(numbers).column(0).chunks
