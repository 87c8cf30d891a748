"""Files of an index taken apart, changed, and put together with right lengths and checksums."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

import crc32c
import numpy as np
import pyarrow as pa
import zstandard

from tensorstore_fmt.format import layout

HEADER: Final = np.dtype(
    [
        ("magic", "V8"), ("major", "<u2"), ("minor", "<u2"), ("flags", "<u4"), ("run_id", "V16"),
        ("writer", "<u8"), ("worker", "<u4"), ("attempt", "<u4"), ("num_workers", "<u4"),
        ("root_crc32c", "<u4"), ("resume_step", "<i8"), ("first_flush", "<u8"),
        ("last_flush", "<u8"), ("required", "<u8"), ("file_nbytes", "<u8"),
        ("head_nbytes", "<u8"), ("root_nbytes", "<u4"), ("series", "<u4"), ("opened_us", "<i8"),
        ("published_us", "<i8"), ("complete_through", "<i8", (4,)), ("recovers", "<u8"),
        ("reserved", "V84"), ("crc32c", "<u4"),
    ]
)  # fmt: skip
NUMBERS_OF_HEADER: Final = tuple(
    name
    for name in HEADER.names or ()
    if HEADER[name].kind in "ui" and name not in ("crc32c", "root_crc32c")
)
NUMBERS_OF_ROOT: Final = tuple(
    name for name in layout.ROOT_ROW.names or () if layout.ROOT_ROW[name].kind in "ui"
)

_compressor = zstandard.ZstdCompressor(level=1)
_decompressor = zstandard.ZstdDecompressor()


def wrapped(value: int, dtype: np.dtype[Any]) -> np.ndarray:
    """Give an integer as the bits that a field of the type has for it."""
    bits = (value % (1 << (8 * dtype.itemsize))).to_bytes(dtype.itemsize, "little")
    return cast("np.ndarray", np.frombuffer(bits, dtype)[0])


class SegmentEditor:
    """A segment whose parts can be changed; `encode` mends lengths and checksums.

    What stands in `header` and `root` overrides what would be right.
    """

    def __init__(self, data: bytes) -> None:
        self.first = np.frombuffer(data, HEADER, 1)
        nbytes = int(self.first["root_nbytes"][0])
        self.rows = np.frombuffer(data, layout.ROOT_ROW, nbytes // 64, 256).copy()
        self.stored = [
            data[int(r["offset"]) : int(r["offset"]) + int(r["nbytes"])] for r in self.rows
        ]
        self.raw = [_decompressor.decompress(each) for each in self.stored]
        self.header: dict[str, Any] = {}
        self.root: dict[tuple[int, str], int] = {}

    def copy(self) -> SegmentEditor:
        """Give one that can be changed by itself."""
        other = copy.copy(self)
        other.rows = self.rows.copy()
        other.stored, other.raw = list(self.stored), list(self.raw)
        other.header, other.root = dict(self.header), dict(self.root)
        return other

    def pages(self, kind: int) -> list[int]:
        """Give the numbers of the pages of a kind."""
        return np.flatnonzero(self.rows["kind"] == kind).tolist()

    def batch(self, number: int) -> pa.RecordBatch:
        """Give the rows of a page."""
        with pa.ipc.open_stream(self.raw[number]) as reader:
            return reader.read_next_batch()

    def set_stored(self, number: int, stored: bytes, *, raw_nbytes: int | None = None) -> None:
        """Put other bytes in the place of a page."""
        self.stored[number] = stored
        if raw_nbytes is not None:
            self.rows[number]["raw_nbytes"] = raw_nbytes

    def set_raw(self, number: int, raw: bytes) -> None:
        """Put another Arrow stream in a page."""
        self.raw[number] = raw
        self.set_stored(number, _compressor.compress(raw), raw_nbytes=len(raw))

    def set_columns(self, number: int, columns: Mapping[str, Sequence[Any]]) -> None:
        """Change columns of a page; what the root says of entries follows."""
        batch = self.batch(number)
        arrays = [
            pa.array(columns[f.name], f.type) if f.name in columns else batch.column(f.name)
            for f in batch.schema
        ]
        self.set_batch(number, pa.RecordBatch.from_arrays(arrays, schema=batch.schema))

    def set_batch(self, number: int, batch: pa.RecordBatch) -> None:
        """Put other rows in a page; what the root says of entries follows."""
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        self.set_raw(number, sink.getvalue())
        row = self.rows[number]
        row["rows"] = batch.num_rows
        if row["kind"] != layout.PAGE_ENTRIES or not batch.num_rows:
            return
        with np.errstate(all="ignore"):
            series, step, stride, counts = (
                batch.column(c).to_numpy() for c in ("series", "step", "stride", "count")
            )
            row["first_series"], row["last_series"] = series[0], series[-1]
            last = step + stride * (counts.astype(np.int64) - 1)
            row["min_step"], row["max_step"] = step.min(), last.max()

    def encode(self) -> bytes:
        """Give the bytes of the file."""
        rows = self.rows.copy()
        lengths = [len(each) for each in self.stored]
        begin = 256 + 64 * len(rows)
        rows["nbytes"] = lengths
        rows["offset"] = [begin + at for at in itertools.accumulate([0, *lengths])][:-1]
        rows["crc32c"] = [crc32c.crc32c(each) for each in self.stored]
        head = begin + sum(
            n for n, kind in zip(lengths, rows["kind"], strict=True) if kind != layout.PAGE_ENTRIES
        )
        for (number, name), value in self.root.items():
            rows[name][number] = wrapped(value, layout.ROOT_ROW[name])
        catalog = rows["kind"] == layout.PAGE_CATALOG
        header = self.first.copy()
        header["root_nbytes"], header["head_nbytes"] = rows.nbytes, head
        header["file_nbytes"] = 2 * begin + sum(lengths)
        header["series"] = int(rows["rows"][catalog].sum()) & 0xFFFFFFFF
        header["root_crc32c"] = crc32c.crc32c(rows.tobytes())
        for name, value in self.header.items():
            set_field(header, name, value)
        header["crc32c"] = crc32c.crc32c(header.tobytes()[:252])
        first = header.tobytes()
        return b"".join([first, rows.tobytes(), *self.stored, rows.tobytes(), first])


def set_field(record: np.ndarray, name: str, value: Any) -> None:
    """Set a field of a record to an integer, wrapped to its width, or to bytes."""
    kind = record.dtype[name]
    if isinstance(value, bytes):
        record[name] = np.frombuffer(value, kind)
    elif kind.subdtype is not None:
        record[name] = wrapped(value, kind.subdtype[0])
    else:
        record[name] = wrapped(value, kind)


def run_json(body: bytes) -> bytes:
    """Give a `run.json` with a right checksum; `body` has no closing brace."""
    return body + layout.RUN_JSON_TAIL + b"%08x" % crc32c.crc32c(body) + b'"}\n'


def mended_bundle(data: bytes, *, header: Mapping[int, bytes], table: Mapping[int, bytes]) -> bytes:
    """Change bytes of a bundle's header and table (by offset), and mend the checksums."""
    changed = bytearray(data)
    rows = int.from_bytes(data[12:16], "little")
    for at, new in table.items():
        changed[64 + at : 64 + at + len(new)] = new
    changed[48:52] = crc32c.crc32c(bytes(changed[64 : 64 + 64 * rows])).to_bytes(4, "little")
    for at, new in header.items():
        changed[at : at + len(new)] = new
    changed[60:64] = crc32c.crc32c(bytes(changed[:60])).to_bytes(4, "little")
    return bytes(changed)
