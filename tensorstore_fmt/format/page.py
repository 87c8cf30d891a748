"""Pages: blocks of rows of a segment (spec, "Pages"); those of shards and of entries."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import crc32c
import numpy as np
import pyarrow as pa
import pyarrow.ipc
import zstandard

from tensorstore_fmt.errors import ChecksumError, FormatError, LimitError, TruncatedError
from tensorstore_fmt.format import layout
from tensorstore_fmt.format.arrow_stream import check_stream
from tensorstore_fmt.format.columns import fixed, has_columns, has_nulls, numbers
from tensorstore_fmt.format.ragged import Ragged

__all__ = [
    "ENTRY_ROW",
    "Entries",
    "EntryContext",
    "StoredPage",
    "cut_rows",
    "decode_entries",
    "decode_shards",
    "encode_entries",
    "encode_shards",
    "load_page",
    "store_page",
]

_INTS: Final = pa.list_(pa.int64())

SHARDS_SCHEMA: Final = pa.schema(
    [
        ("worker", pa.uint32()),
        ("attempt", pa.uint32()),
        ("writer", pa.uint64()),
        ("number", pa.int64()),
        ("nbytes", pa.int64()),
    ]
)
ENTRIES_SCHEMA: Final = pa.schema(
    [
        ("series", pa.uint32()),
        ("step", pa.int64()),
        ("stride", pa.int64()),
        ("count", pa.uint32()),
        ("chunk", pa.uint32()),
        ("dims", _INTS),
        ("first_flush", pa.int64()),
        ("last_flush", pa.int64()),
        ("codec", pa.uint8()),
        ("flags", pa.uint8()),
        ("shard", pa.uint32()),
        ("offset", pa.int64()),
        ("nbytes", pa.uint32()),
        ("raw_nbytes", pa.uint32()),
        ("crc32c", pa.uint32()),
        ("digest", pa.uint64()),
        ("inline", pa.binary()),
    ]
)

ENTRY_ROW: Final = np.dtype(
    [
        (field.name, field.type.to_pandas_dtype())
        for field in ENTRIES_SCHEMA
        if field.name not in ("dims", "inline")
    ]
)
"""The columns of an entry that have a fixed width, as a NumPy record."""

_ENTRY_NBYTES: Final = ENTRY_ROW.itemsize + 8  # with the offsets of dims and inline


@dataclass(frozen=True, slots=True)
class Entries:
    """Rows of entry pages, in columns."""

    rows: np.ndarray  # of ENTRY_ROW
    dims: Ragged
    inline: Ragged

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def last_step(self) -> np.ndarray:
        """Greatest step covered by each."""
        rows = self.rows
        return rows["step"] + rows["stride"] * (rows["count"].astype(np.int64) - 1)

    def take(self, index: np.ndarray) -> Entries:
        """Give the rows with these numbers (or of this mask), in this order."""
        if index.dtype == np.bool_:
            index = np.flatnonzero(index)
        return Entries(self.rows[index], self.dims.take(index), self.inline.take(index))

    def slice(self, start: int, stop: int) -> Entries:
        """Give rows start … stop − 1 without copying."""
        return Entries(
            self.rows[start:stop], self.dims.slice(start, stop), self.inline.slice(start, stop)
        )

    @classmethod
    def empty(cls) -> Entries:
        """Give no entries."""
        return cls(np.empty(0, ENTRY_ROW), Ragged.empty(0, np.int64), Ragged.empty(0, np.uint8))

    @staticmethod
    def concat(parts: Sequence[Entries]) -> Entries:
        """Put several behind each other."""
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return Entries.empty()
        rows = np.empty(sum(map(len, parts)), ENTRY_ROW)  # np.concatenate is slow on records
        at = 0
        for part in parts:
            rows[at : at + len(part)] = part.rows
            at += len(part)
        return Entries(
            rows,
            Ragged.concat([p.dims for p in parts]),
            Ragged.concat([p.inline for p in parts]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPage:
    """An encoded page with its row of the root (but for its offset)."""

    data: bytes
    raw_nbytes: int
    crc32c: int
    rows: int
    kind: int
    first_series: int = 0
    last_series: int = 0
    min_step: int = 0
    max_step: int = 0


class _PerThread(threading.local):
    """zstd contexts are not for two threads at once."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=1, write_content_size=True)
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 25)


_per_thread = _PerThread()


# --- encode -------------------------------------------------------------------


def store_page(batch: pa.RecordBatch, kind: int, **root: int) -> StoredPage:
    """Encode a record batch as a page; `root` goes into its row of the root."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    raw = sink.getvalue()
    if raw.size > layout.MAX_PAGE_RAW_NBYTES:  # a writer's mistake, never a user's
        raise LimitError(f"a page would have {raw.size:,} bytes", nbytes=raw.size)
    data = _per_thread.compressor.compress(raw)
    return StoredPage(
        data=data,
        raw_nbytes=raw.size,
        crc32c=crc32c.crc32c(data),
        rows=batch.num_rows,
        kind=kind,
        **root,
    )


def cut_rows(nbytes: np.ndarray) -> list[int]:
    """Give row numbers at which pages begin and end, for rows of these sizes."""
    total = np.cumsum(nbytes)
    borders = [0]
    while borders[-1] < len(nbytes):
        begin = borders[-1]
        base = int(total[begin - 1]) if begin else 0
        end = int(np.searchsorted(total, base + layout.TARGET_PAGE_RAW_NBYTES, side="right"))
        borders.append(min(max(end, begin + 1), begin + layout.TARGET_PAGE_ROWS))
    return borders


def encode_shards(shards: Sequence[tuple[layout.ShardName, int]]) -> list[StoredPage]:
    """Encode the shard page: names and lengths; no page for none."""
    if not shards:
        return []
    columns = [
        fixed([name.key.worker for name, _ in shards], pa.uint32()),
        fixed([name.key.attempt for name, _ in shards], pa.uint32()),
        fixed([name.key.writer for name, _ in shards], pa.uint64()),
        fixed([name.number for name, _ in shards], pa.int64()),
        fixed([nbytes for _, nbytes in shards], pa.int64()),
    ]
    return [
        store_page(pa.RecordBatch.from_arrays(columns, schema=SHARDS_SCHEMA), layout.PAGE_SHARDS)
    ]


def encode_entries(entries: Entries) -> list[StoredPage]:
    """Encode entries, which must be in the order of the spec, into pages."""
    if not len(entries):
        return []
    borders = cut_rows(_ENTRY_NBYTES + 8 * entries.dims.lengths + entries.inline.lengths)
    last = entries.last_step
    pages = []
    for begin, end in itertools.pairwise(borders):
        part = entries.slice(begin, end)
        columns = [
            part.dims.to_arrow_list()
            if field.name == "dims"
            else part.inline.to_arrow_binary()
            if field.name == "inline"
            else fixed(part.rows[field.name], field.type)
            for field in ENTRIES_SCHEMA
        ]
        batch = pa.RecordBatch.from_arrays(columns, schema=ENTRIES_SCHEMA)
        pages.append(
            store_page(
                batch,
                layout.PAGE_ENTRIES,
                first_series=int(part.rows["series"][0]),
                last_series=int(part.rows["series"][-1]),
                min_step=int(part.rows["step"].min()),
                max_step=int(last[begin:end].max()),
            )
        )
    return pages


# --- decode -------------------------------------------------------------------


def load_page(
    stored: bytes | memoryview, row: np.void, schema: pa.Schema, where: str
) -> pa.RecordBatch:
    """Check a page against its row of the root and give its record batch."""
    nbytes, raw_nbytes, rows = int(row["nbytes"]), int(row["raw_nbytes"]), int(row["rows"])
    if len(stored) != nbytes:
        raise TruncatedError(
            f"{where}: page of {nbytes} bytes at {int(row['offset'])}, only {len(stored)} of them",
            offset=int(row["offset"]),
        )
    found = crc32c.crc32c(stored)
    if found != row["crc32c"]:
        raise ChecksumError(
            f"{where}: checksum of the page at {int(row['offset'])} is {found:08x}, expected "
            f"{int(row['crc32c']):08x}; the file is damaged",
            offset=int(row["offset"]),
        )
    try:
        frame = zstandard.get_frame_parameters(stored)
        if frame.content_size != raw_nbytes or frame.dict_id:
            raise FormatError(f"{where}: a page says another length than its frame")
        raw = _per_thread.decompressor.decompress(
            stored, max_output_size=raw_nbytes, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise FormatError(f"{where}: a page is no zstd frame: {error}") from None
    if len(raw) != raw_nbytes:
        raise FormatError(f"{where}: a page has {len(raw)} bytes, not {raw_nbytes}")
    raw = check_stream(raw)
    try:
        with pa.ipc.open_stream(raw) as reader:
            if not has_columns(reader.schema, schema):
                raise FormatError(f"{where}: a page has other columns than the spec's")
            batch = reader.read_next_batch()
            batch.validate(full=True)
    except (pa.ArrowException, OSError, UnicodeError, StopIteration) as error:
        # OSError is what pyarrow says of broken metadata; no storage is asked here.
        raise FormatError(f"{where}: a page is no Arrow stream: {error}") from None
    if batch.num_rows != rows:
        raise FormatError(f"{where}: a page has {batch.num_rows} rows, not {rows}")
    if has_nulls(batch):
        raise FormatError(f"{where}: a page has nulls")
    return batch


def _numpy(batch: pa.RecordBatch, name: str) -> np.ndarray:
    return numbers(batch.column(name))


def decode_shards(
    stored: bytes | memoryview, row: np.void, where: str
) -> list[tuple[layout.ShardName, int]]:
    """Check and decode the shard page."""
    batch = load_page(stored, row, SHARDS_SCHEMA, where)
    columns = [batch.column(name).to_pylist() for name in SHARDS_SCHEMA.names]
    shards = []
    for worker, attempt, writer, number, nbytes in zip(*columns, strict=True):
        if max(worker, attempt) > layout.MAX_WORKER or number > layout.MAX_NUMBER:
            raise LimitError(f"{where}: the name of a shard is above the limits")
        if nbytes < 0 or number < 0 or not writer:
            raise FormatError(f"{where}: a shard's number or length is out of range")
        key = layout.WriterKey(worker=worker, attempt=attempt, writer=writer)
        shards.append((layout.ShardName(key=key, number=number), nbytes))
    if any(a[0] >= b[0] for a, b in itertools.pairwise(shards)):
        raise FormatError(f"{where}: shards are not in order")
    return shards


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryContext:
    """What of its segment an entry page has to agree with.

    Attributes
    ----------
    varying
        For each series of the catalog, the number of axes that are −1.
    shard_nbytes
        For each row of the shard page, the length it says.
    first_flush, last_flush
        Covered by the segment.
    """

    varying: np.ndarray
    shard_nbytes: np.ndarray
    first_flush: int
    last_flush: int


def decode_entries(
    stored: bytes | memoryview, row: np.void, where: str, context: EntryContext
) -> Entries:
    """Check and decode one entry page."""
    batch = load_page(stored, row, ENTRIES_SCHEMA, where)
    rows = np.empty(batch.num_rows, ENTRY_ROW)
    for name in ENTRY_ROW.names or ():
        rows[name] = _numpy(batch, name)
    entries = Entries(
        rows, Ragged.of_arrow(batch.column("dims")), Ragged.of_arrow(batch.column("inline"))
    )
    _check_limits(entries, where)
    _check_rows(entries, where, context)
    _check_order(entries, row, where)
    return entries


def _check_limits(entries: Entries, where: str) -> None:
    rows = entries.rows
    count = np.maximum(rows["count"].astype(np.int64), 1)
    reach = (layout.MAX_STEP - rows["step"]) // np.maximum(count - 1, 1)
    if (
        int(count.max()) > layout.MAX_ENTRY_STEPS
        or int(rows["nbytes"].max()) > layout.MAX_CHUNK_NBYTES
        or int(rows["raw_nbytes"].max()) > layout.MAX_CHUNK_RAW_NBYTES
        or int(entries.inline.lengths.max()) > layout.MAX_INLINE_NBYTES
        or (len(entries.dims.values) and int(entries.dims.values.max()) > layout.MAX_AXIS)
        or int(rows["step"].max()) > layout.MAX_STEP
        or ((rows["stride"] > reach) & (count > 1)).any()
    ):
        raise LimitError(f"{where}: an entry is above the limits")


def _check_rows(entries: Entries, where: str, context: EntryContext) -> None:
    """Check each entry for itself."""
    rows = entries.rows
    series, shard, offset = rows["series"], rows["shard"], rows["offset"]
    if int(series.max()) >= len(context.varying):
        raise FormatError(f"{where}: an entry names a series that the catalog does not have")
    is_inline = shard == layout.INLINE_SHARD
    is_dropped = rows["codec"] == layout.CODEC_DROPPED
    is_unused = is_dropped | is_inline
    has_digest = (rows["flags"] & layout.ENTRY_HAS_DIGEST) != 0
    is_bad = (
        (rows["count"] < 1)
        | (rows["step"] < 0)
        | (rows["stride"] < 1)
        | ((rows["count"] == 1) & (rows["stride"] != 1))
        | (~is_inline & (shard >= len(context.shard_nbytes)))
        | (entries.inline.lengths != np.where(is_inline, rows["nbytes"], 0))
        | (offset < 0)
        | (is_unused & (offset != 0))
        | (offset % 8 != 0)
        | ((rows["flags"] & ~np.uint8(layout.ENTRY_REPEAT | layout.ENTRY_HAS_DIGEST)) != 0)
        | (~has_digest & (rows["digest"] != 0))
        | (rows["first_flush"] < context.first_flush)
        | (rows["first_flush"] > rows["last_flush"])
        | (rows["last_flush"] > context.last_flush)
        | (entries.dims.lengths != context.varying[series])
    )
    for column in ("chunk", "flags", "nbytes", "raw_nbytes", "crc32c", "digest"):
        is_bad |= is_dropped & (rows[column] != 0)
    is_bad |= is_dropped & ~is_inline
    if len(context.shard_nbytes) and not is_inline.all():
        ends = context.shard_nbytes[np.where(is_inline | is_bad, 0, shard)]
        is_bad |= ~is_inline & (offset > ends - rows["nbytes"])
    total = np.concatenate([[0], np.cumsum(entries.dims.values)])
    is_bad |= is_dropped & (np.diff(total[entries.dims.offsets]) != 0)
    if is_bad.any():
        raise FormatError(
            f"{where}: row {int(is_bad.argmax())} of an entry page contradicts itself"
        )
    if len(entries.dims.values) and int(entries.dims.values.min()) < 0:
        raise FormatError(f"{where}: an entry has a negative length")


def _check_order(entries: Entries, root: np.void, where: str) -> None:
    rows = entries.rows
    if len(rows) > 1:
        is_same = np.ones(len(rows) - 1, np.bool_)
        for column in ("series", "step", "chunk", "first_flush"):
            before, after = rows[column][:-1], rows[column][1:]
            if (is_same & (before > after)).any():
                raise FormatError(f"{where}: entries are not in order")
            is_same &= before == after
        if is_same.any():
            raise FormatError(f"{where}: two entries for the same")
    if (
        int(rows["series"][0]) != root["first_series"]
        or int(rows["series"][-1]) != root["last_series"]
        or int(rows["step"].min()) != root["min_step"]
        or int(entries.last_step.max()) != root["max_step"]
    ):
        raise FormatError(f"{where}: the root says other series or steps than a page holds")
