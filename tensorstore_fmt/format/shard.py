"""Shards: Arrow IPC files with the payloads of large chunks (spec, "Shard").

`ShardEncoder` turns rows into scatter lists of bytes; it writes nothing itself. pyarrow
makes everything but the payloads: it is given a placeholder of the right length, and the
payloads are put in its place without being copied together first.
"""

from __future__ import annotations

import json
import mmap
import operator
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import crc32c
import numpy as np
import pyarrow as pa
import pyarrow.ipc

from tensorstore_fmt.format import layout
from tensorstore_fmt.format.catalog import Series
from tensorstore_fmt.format.codec import Buffer
from tensorstore_fmt.format.columns import fixed, texts
from tensorstore_fmt.format.ragged import Ragged

__all__ = ["SHARD_SCHEMA", "ShardEncoder", "ShardRow", "row_crc"]


Stored = bytes | bytearray | memoryview
"""What can be handed to a file."""

_INTS: Final = pa.list_(pa.int64())
SHARD_SCHEMA: Final = pa.schema(
    [
        ("name", pa.utf8()),
        ("kind", pa.uint8()),
        ("mode", pa.uint8()),
        ("dtype", pa.utf8()),
        ("shape", _INTS),
        ("grid", _INTS),
        ("global_shape", _INTS),
        ("origin", _INTS),
        ("step", pa.int64()),
        ("stride", pa.int64()),
        ("count", pa.uint32()),
        ("chunk", pa.uint32()),
        ("flush", pa.int64()),
        ("codec", pa.uint8()),
        ("flags", pa.uint8()),
        ("nbytes", pa.uint32()),
        ("raw_nbytes", pa.uint32()),
        ("crc32c", pa.uint32()),
        ("digest", pa.uint64()),
        ("row_crc", pa.uint32()),
        ("payload", pa.large_binary()),
    ]
)
MAX_BATCH_NBYTES: Final = 2 * layout.MAX_CHUNK_NBYTES
"""More payload than this is never put into one record batch."""

_TAIL: Final = struct.Struct("<qqIIqBBIIQI")


_OF_SERIES: Final = (
    "name", "kind", "mode", "dtype", "shape", "grid", "global_shape", "origin",
)  # fmt: skip
_OF_ROW: Final = tuple(
    f.name for f in SHARD_SCHEMA if f.name not in (*_OF_SERIES, "row_crc", "payload")
)
_series_values: Final = operator.attrgetter(*_OF_SERIES)
_row_values: Final = operator.attrgetter(*_OF_ROW)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRow:
    """One chunk on its way into a shard; ``series.shape`` holds all lengths (never −1)."""

    series: Series
    step: int
    stride: int
    count: int
    chunk: int
    flush: int
    codec: int
    flags: int
    nbytes: int
    raw_nbytes: int
    crc32c: int
    digest: int
    parts: Sequence[Buffer]


def _ints(values: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


def row_crc(run_id: bytes, key: layout.WriterKey, row: ShardRow) -> int:
    """Give the checksum by which a row proves what it is (spec, "Shard", row_crc)."""
    return _with_row(_series_crc(run_id, key, row.series), row)


def _series_crc(run_id: bytes, key: layout.WriterKey, series: Series) -> int:
    """Give the checksum of what all rows of a series begin with."""
    name, dtype = series.name.encode(), series.dtype.encode()
    return crc32c.crc32c(
        b"".join(
            (
                run_id,
                struct.pack("<QIII", key.writer, key.worker, key.attempt, len(name)),
                name,
                struct.pack("<BBI", series.kind, series.mode, len(dtype)),
                dtype,
                struct.pack("<I", len(series.shape)),
                _ints(series.shape),
                _ints(series.grid),
                struct.pack("<I", len(series.global_shape)),
                _ints(series.global_shape),
                _ints(series.origin),
            )
        )
    )


def _with_row(crc: int, row: ShardRow) -> int:
    tail = _TAIL.pack(
        row.step, row.stride, row.count, row.chunk, row.flush, row.codec, row.flags,
        row.nbytes, row.raw_nbytes, row.digest, row.crc32c,
    )  # fmt: skip
    return crc32c.crc32c(tail, crc)


class _Scatter:
    """A sink for pyarrow that keeps what it is given and puts payloads for the placeholder."""

    closed = False

    def __init__(self, placeholder: int) -> None:
        self._placeholder = placeholder
        self.position = 0
        self.parts: list[Stored] = []
        self.payload: Sequence[Stored] = ()
        self.payload_at = -1

    def write(self, data: bytes | pa.Buffer) -> int:
        if isinstance(data, pa.Buffer):
            size: int = data.size
            if data.address == self._placeholder:
                self.payload_at = self.position
                self.parts.extend(self.payload)
            else:
                self.parts.append(data.to_pybytes())  # offsets and the like: small
        else:
            size = len(data)
            self.parts.append(data)
        self.position += size
        return size

    def take(self) -> list[Stored]:
        parts, self.parts = self.parts, []
        return parts

    def tell(self) -> int:
        return self.position

    def flush(self) -> None: ...

    def close(self) -> None: ...

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False


class ShardEncoder:
    """Gives the bytes of one shard, batch by batch.

    Parameters
    ----------
    run_id, name
        Of the shard; they stand in its metadata and in every row's checksum.
    """

    def __init__(self, run_id: bytes, name: layout.ShardName) -> None:
        self._run_id = run_id
        self.name = name
        key = name.key
        about = {
            "format_version": [layout.MAJOR, layout.MINOR],
            "run_id": run_id.hex(),
            "worker": key.worker,
            "attempt": key.attempt,
            "writer": f"{key.writer:016x}",
            "number": name.number,
        }
        self._schema = SHARD_SCHEMA.with_metadata({layout.FORMAT_NAME: json.dumps(about)})
        # Address space, not memory: no page of it is ever touched.
        self._placeholder = pa.py_buffer(mmap.mmap(-1, MAX_BATCH_NBYTES))
        self._sink = _Scatter(self._placeholder.address)
        self._writer = pa.ipc.new_file(self._sink, self._schema)

    @property
    def position(self) -> int:
        """Bytes given so far."""
        return self._sink.position

    def batch(self, rows: Sequence[ShardRow]) -> tuple[list[Stored], list[int]]:
        """Give the bytes to append for one record batch, and each payload's offset in the file."""
        lengths = np.fromiter((row.nbytes for row in rows), np.int64, len(rows))
        padded = -(-lengths // layout.PAYLOAD_ALIGNMENT) * layout.PAYLOAD_ALIGNMENT
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(padded, out=offsets[1:])
        payload: list[Stored] = []
        for row, gap in zip(rows, (padded - lengths).tolist(), strict=True):
            payload += [p.data if isinstance(p, np.ndarray) else p for p in row.parts]
            if gap:
                payload.append(bytes(gap))
        total = int(offsets[-1])
        sink = self._sink
        sink.payload, sink.payload_at = payload, -1
        self._writer.write_batch(self._record_batch(rows, offsets, total))
        sink.payload = ()
        # Arrow pads every buffer; decoding rests on it. -1 is a payload that was copied.
        if total and sink.payload_at % 8:
            raise AssertionError("pyarrow did not hand the payload over as one aligned buffer")
        return sink.take(), (offsets[:-1] + sink.payload_at).tolist()

    def _record_batch(
        self, rows: Sequence[ShardRow], offsets: np.ndarray, total: int
    ) -> pa.RecordBatch:
        series = [row.series for row in rows]
        # Neighbours are chunks of one tensor, as a rule.
        crcs, before, begun = [], None, 0
        for row in rows:
            if row.series is not before:
                before = row.series
                begun = _series_crc(self._run_id, self.name.key, before)
            crcs.append(_with_row(begun, row))
        # One call a row for all that it holds.
        values = dict(zip(_OF_ROW, zip(*map(_row_values, rows), strict=True), strict=True))
        values |= zip(_OF_SERIES, zip(*map(_series_values, series), strict=True), strict=True)
        columns: list[pa.Array] = []
        for field in SHARD_SCHEMA:
            name = field.name
            if name == "payload":
                columns.append(
                    pa.LargeBinaryArray.from_buffers(
                        pa.large_binary(),
                        len(rows),
                        [None, pa.py_buffer(offsets), self._placeholder.slice(0, total)],
                    )
                )
            elif name == "row_crc":
                columns.append(fixed(crcs, pa.uint32()))
            elif name in ("shape", "grid", "global_shape", "origin"):
                columns.append(Ragged.of_ints(values[name]).to_arrow_list())
            elif name in ("name", "dtype"):
                columns.append(texts(values[name]))
            else:
                columns.append(fixed(values[name], field.type))
        return pa.RecordBatch.from_arrays(columns, schema=self._schema)

    def seal(self) -> list[Stored]:
        """Give the bytes that end the file (end-of-stream mark, footer)."""
        self._writer.close()
        return self._sink.take()
