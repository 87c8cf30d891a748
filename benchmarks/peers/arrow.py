"""Plain Arrow: IPC files and Parquet, a file a name, tensors as one flat column."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from peers.layout import Steps, chunk_elements, file_name, flat, runs
from suite.contestant import Item, Reader, Series, Store

_COLUMN = "values"


class _Tables(Store):
    """One column, written piece by piece; a piece is a batch or a row group."""

    needs = ("pyarrow",)
    distributions = ("pyarrow", "numpy")
    reads_parts = True

    def _writer(self, path: Path, schema: Any) -> Any:
        raise NotImplementedError

    def write(self, place: str | Path, series: Sequence[Series], items: Iterable[Item]) -> None:
        """Append each tensor to its table."""
        folder = Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        import pyarrow as pa

        writers, steps = {}, Steps()
        for s in series:
            schema = pa.schema([pa.field(_COLUMN, self._type(s), nullable=False)])
            writers[s.name] = self._writer(folder / file_name(s.name), schema)
        for step, name, values in items:
            row, writer = flat(values), writers[name]
            size = self._piece(row)
            for start in range(0, max(1, row.size), size):
                piece = row[start : start + size]
                column = pa.Array.from_buffers(
                    writer.schema.types[0], piece.size, [None, pa.py_buffer(piece)]
                )
                writer.write_batch(pa.record_batch([column], schema=writer.schema))
            steps.add(name, step)
        for writer in writers.values():
            writer.close()
        steps.save(folder)

    def _type(self, series: Series) -> Any:
        import pyarrow as pa

        return pa.from_numpy_dtype(flat(np.empty(0, series.numpy_dtype)).dtype)

    def _piece(self, row: np.ndarray) -> int:
        return chunk_elements(row.itemsize)


class _TableReader(Reader):
    """Decodes the pieces that a selection touches."""

    def __init__(self, folder: Path, series: Sequence[Series]) -> None:
        self._folder = folder
        self._series = {s.name: s for s in series}
        self._places = Steps.load(folder)
        self._files: dict[str, Any] = {}

    def _open(self, path: Path) -> Any:
        raise NotImplementedError

    def _decoded(self, file: Any, numbers: list[int]) -> list:
        """Give the columns of some pieces."""
        raise NotImplementedError

    def _piece(self, size: int, itemsize: int) -> int:
        return chunk_elements(itemsize)

    def _flat(self, name: str, step: int, first: int, stop: int) -> tuple[np.ndarray, int]:
        """Give a stretch of the flat tensor that covers `first` to `stop`, and where it begins."""
        series = self._series[name]
        size = int(np.prod(series.shape))
        itemsize = series.numpy_dtype.itemsize
        piece = self._piece(size, itemsize)
        pieces = -(-size // piece)
        numbers = list(range(first // piece, -(-stop // piece)))
        before = self._places[name][step] * pieces
        if name not in self._files:
            self._files[name] = self._open(self._folder / file_name(name))
        columns = self._decoded(self._files[name], [before + number for number in numbers])
        rows = [
            np.frombuffer(column.buffers()[1], series.numpy_dtype)[
                column.offset : column.offset + len(column)
            ]
            for column in columns
        ]
        return rows[0] if len(rows) == 1 else np.concatenate(rows), numbers[0] * piece

    def whole(self, name: str, step: int) -> np.ndarray:
        shape = self._series[name].shape
        found, _ = self._flat(name, step, 0, int(np.prod(shape)))
        return (found if found.flags.owndata else found.copy()).reshape(shape)

    def part(self, name: str, step: int, index: tuple) -> np.ndarray:
        starts, length, shape = runs(self._series[name].shape, index)
        found, begin = self._flat(name, step, int(starts.min()), int(starts.max()) + length)
        windows = np.lib.stride_tricks.sliding_window_view(found, length)
        return windows[starts - begin].reshape(shape)


class ArrowIpc(_Tables):
    """Not compressed; a batch a tensor, parts from the mapped file."""

    name = "arrow-ipc"
    settings = "IPC file a name, a batch a tensor, no compression; memory-mapped"
    compresses = False
    codec: ClassVar[str | None] = None

    def _writer(self, path: Path, schema: Any) -> Any:
        import pyarrow as pa

        options = pa.ipc.IpcWriteOptions(compression=self.codec and pa.Codec(self.codec, 1))
        writer = pa.ipc.new_file(str(path), schema, options=options)
        return _Named(writer, schema)

    def _piece(self, row: np.ndarray) -> int:
        return max(1, row.size)

    def reader(self, place: str | Path, series: Sequence[Series]) -> Reader:
        """Map each file when it is first read."""
        return _ArrowReader(Path(place), series)


class _Named:
    """An IPC writer that knows its schema, as Parquet's does."""

    def __init__(self, writer: Any, schema: Any) -> None:
        self.schema = schema
        self.write_batch = writer.write_batch
        self.close = writer.close


class _ArrowReader(_TableReader):
    def _open(self, path: Path) -> Any:
        import pyarrow as pa

        return pa.ipc.open_file(pa.memory_map(str(path)))

    def _decoded(self, file: Any, numbers: list[int]) -> list:
        return [file.get_batch(number).column(0) for number in numbers]

    def _piece(self, size: int, itemsize: int) -> int:
        return max(1, size)


class ArrowZstd(ArrowIpc):
    """Compressed; a batch a chunk, so that a part need not decode all."""

    name = "arrow-zstd"
    settings = "IPC file a name, a batch for each 256 KiB, zstd 1; memory-mapped"
    compresses = True
    codec = "zstd"

    def _piece(self, row: np.ndarray) -> int:
        return chunk_elements(row.itemsize)

    def reader(self, place: str | Path, series: Sequence[Series]) -> Reader:
        """Map each file when it is first read."""
        return _ArrowZstdReader(Path(place), series)


class _ArrowZstdReader(_ArrowReader):
    def _piece(self, size: int, itemsize: int) -> int:
        return chunk_elements(itemsize)


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

    def _writer(self, path: Path, schema: Any) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        kind = schema.types[0]
        splits = not pa.types.is_integer(kind) or kind.bit_width > 16
        return pq.ParquetWriter(
            str(path),
            schema,
            compression="zstd",
            compression_level=1,
            use_dictionary=False,
            write_statistics=False,
            use_byte_stream_split=splits,
        )

    def reader(self, place: str | Path, series: Sequence[Series]) -> Reader:
        """Map each file when it is first read."""
        return _ParquetReader(Path(place), series)


class _ParquetReader(_TableReader):
    def _open(self, path: Path) -> Any:
        import pyarrow.parquet as pq

        return pq.ParquetFile(str(path), memory_map=True)

    def _decoded(self, file: Any, numbers: list[int]) -> list:
        return file.read_row_groups(numbers).column(0).chunks
