"""Pages: blocks of rows of a segment (spec, "Pages"): catalog, shards, entries."""

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
from tensorstore_fmt.format.ragged import Ragged

__all__ = [
    "ENTRY_ROW",
    "Entries",
    "Series",
    "StoredPage",
    "decode_catalog",
    "decode_entries",
    "decode_shards",
    "encode_catalog",
    "encode_entries",
    "encode_shards",
]

_INTS: Final = pa.list_(pa.int64())

CATALOG_SCHEMA: Final = pa.schema(
    [
        ("name", pa.utf8()),
        ("kind", pa.uint8()),
        ("mode", pa.uint8()),
        ("dtype", pa.utf8()),
        ("shape", _INTS),
        ("grid", _INTS),
        ("global_shape", _INTS),
        ("origin", _INTS),
        ("first_step", pa.int64()),
        ("last_step", pa.int64()),
        ("steps", pa.int64()),
        ("raw_nbytes", pa.int64()),
        ("stored_nbytes", pa.int64()),
    ]
)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One row of a catalog."""

    name: str
    kind: int
    mode: int
    dtype: str
    shape: tuple[int, ...]
    grid: tuple[int, ...]
    global_shape: tuple[int, ...] = ()
    origin: tuple[int, ...] = ()
    first_step: int = 0
    last_step: int = 0
    steps: int = 0
    raw_nbytes: int = 0
    stored_nbytes: int = 0

    @property
    def identity(self) -> tuple[object, ...]:
        """What makes a series; in the order of a catalog's rows."""
        return (
            self.name,
            self.kind,
            self.mode,
            self.dtype,
            self.grid,
            self.global_shape,
            self.origin,
        )

    @property
    def group(self) -> tuple[object, ...]:
        """What series have in common whose steps replace each other."""
        return (self.name, self.kind, self.mode, self.global_shape, self.origin)

    def full_shape(self, dims: Sequence[int]) -> tuple[int, ...]:
        """Give the shape at an entry whose varying lengths are `dims`."""
        left = iter(dims)
        return tuple(next(left) if n < 0 else n for n in self.shape)


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
        return Entries(
            np.concatenate([p.rows for p in parts]),
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


def _store(batch: pa.RecordBatch, kind: int, **root: int) -> StoredPage:
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


def _cut(nbytes: np.ndarray) -> list[int]:
    """Give row numbers at which pages begin and end, for rows of these sizes."""
    total = np.cumsum(nbytes)
    borders = [0]
    while borders[-1] < len(nbytes):
        begin = borders[-1]
        base = int(total[begin - 1]) if begin else 0
        end = int(np.searchsorted(total, base + layout.TARGET_PAGE_RAW_NBYTES, side="right"))
        borders.append(min(max(end, begin + 1), begin + layout.TARGET_PAGE_ROWS))
    return borders


def encode_catalog(series: Sequence[Series]) -> list[StoredPage]:
    """Encode catalog rows, which must be in order of `Series.identity`."""
    if not series:
        return []
    sizes = np.fromiter(
        (4 * len(s.name) + 80 + 32 * len(s.shape) + 16 * len(s.origin) for s in series),
        np.int64,
        len(series),
    )
    borders = _cut(sizes)
    pages = []
    for begin, end in itertools.pairwise(borders):
        part = series[begin:end]
        columns = [
            pa.array([s.name for s in part], pa.utf8()),
            pa.array([s.kind for s in part], pa.uint8()),
            pa.array([s.mode for s in part], pa.uint8()),
            pa.array([s.dtype for s in part], pa.utf8()),
            Ragged.of_ints([s.shape for s in part]).to_arrow_list(),
            Ragged.of_ints([s.grid for s in part]).to_arrow_list(),
            Ragged.of_ints([s.global_shape for s in part]).to_arrow_list(),
            Ragged.of_ints([s.origin for s in part]).to_arrow_list(),
            pa.array([s.first_step for s in part], pa.int64()),
            pa.array([s.last_step for s in part], pa.int64()),
            pa.array([s.steps for s in part], pa.int64()),
            pa.array([s.raw_nbytes for s in part], pa.int64()),
            pa.array([s.stored_nbytes for s in part], pa.int64()),
        ]
        batch = pa.RecordBatch.from_arrays(columns, schema=CATALOG_SCHEMA)
        pages.append(
            _store(batch, layout.PAGE_CATALOG, first_series=begin, last_series=end - 1)
        )
    return pages


def encode_shards(shards: Sequence[tuple[layout.ShardName, int]]) -> list[StoredPage]:
    """Encode the shard page: names and lengths; no page for none."""
    if not shards:
        return []
    columns = [
        pa.array([name.key.worker for name, _ in shards], pa.uint32()),
        pa.array([name.key.attempt for name, _ in shards], pa.uint32()),
        pa.array([name.key.writer for name, _ in shards], pa.uint64()),
        pa.array([name.number for name, _ in shards], pa.int64()),
        pa.array([nbytes for _, nbytes in shards], pa.int64()),
    ]
    return [_store(pa.RecordBatch.from_arrays(columns, schema=SHARDS_SCHEMA), layout.PAGE_SHARDS)]


def encode_entries(entries: Entries) -> list[StoredPage]:
    """Encode entries, which must be in the order of the spec, into pages."""
    if not len(entries):
        return []
    borders = _cut(_ENTRY_NBYTES + 8 * entries.dims.lengths + entries.inline.lengths)
    last = entries.last_step
    pages = []
    for begin, end in itertools.pairwise(borders):
        part = entries.slice(begin, end)
        columns = [
            part.dims.to_arrow_list()
            if field.name == "dims"
            else part.inline.to_arrow_binary()
            if field.name == "inline"
            else pa.array(np.ascontiguousarray(part.rows[field.name]))
            for field in ENTRIES_SCHEMA
        ]
        batch = pa.RecordBatch.from_arrays(columns, schema=ENTRIES_SCHEMA)
        pages.append(
            _store(
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


def _load(stored: bytes | memoryview, row: np.void, schema: pa.Schema, where: str) -> pa.RecordBatch:
    """Check a page against its row of the root and give its record batch."""
    nbytes, raw_nbytes, rows = int(row["nbytes"]), int(row["raw_nbytes"]), int(row["rows"])
    if len(stored) != nbytes:
        raise TruncatedError(
            f"{where}: page of {nbytes} bytes at {int(row['offset'])}, only {len(stored)} are there",
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
    try:
        with pa.ipc.open_stream(raw) as reader:
            found_schema = reader.schema
            if found_schema.names != schema.names or found_schema.types != schema.types:
                raise FormatError(f"{where}: a page has other columns than the spec's")
            batch = reader.read_next_batch()
            batch.validate(full=True)
            if next(iter(reader), None) is not None:
                raise FormatError(f"{where}: a page has two record batches")
    except (pa.ArrowException, StopIteration) as error:
        raise FormatError(f"{where}: a page is no Arrow stream: {error}") from None
    if batch.num_rows != rows:
        raise FormatError(f"{where}: a page has {batch.num_rows} rows, not {rows}")
    if any(column.null_count for column in batch.columns):
        raise FormatError(f"{where}: a page has nulls")
    return batch


def _numpy(batch: pa.RecordBatch, name: str) -> np.ndarray:
    return batch.column(name).to_numpy()


@dataclass(frozen=True, slots=True)
class CatalogColumns:
    """One decoded catalog page, in columns."""

    names: list[str]
    kind: np.ndarray
    mode: np.ndarray
    dtypes: list[str]
    lists: dict[str, Ragged]
    sums: dict[str, np.ndarray]

    def series(self, row: int) -> Series:
        """Give one row."""
        return Series(
            name=self.names[row],
            kind=int(self.kind[row]),
            mode=int(self.mode[row]),
            dtype=self.dtypes[row],
            shape=self.lists["shape"].tuple(row),
            grid=self.lists["grid"].tuple(row),
            global_shape=self.lists["global_shape"].tuple(row),
            origin=self.lists["origin"].tuple(row),
            **{key: int(column[row]) for key, column in self.sums.items()},
        )


def decode_catalog(stored: bytes | memoryview, row: np.void, where: str) -> CatalogColumns:
    """Check and decode one catalog page."""
    batch = _load(stored, row, CATALOG_SCHEMA, where)
    kind, mode = _numpy(batch, "kind"), _numpy(batch, "mode")
    names = batch.column("name")
    lists = {
        key: Ragged.of_arrow(batch.column(key))
        for key in ("shape", "grid", "global_shape", "origin")
    }
    rank = lists["shape"].lengths
    part = lists["global_shape"].lengths
    name_nbytes = np.diff(np.frombuffer(names.buffers()[1], np.int32)[: batch.num_rows + 1])
    is_bad = (
        (kind > layout.KIND_STEPS)
        | (mode >= len(layout.MODES))
        | (lists["grid"].lengths != rank)
        | (lists["origin"].lengths != part)
        | ((part != rank) & (part != 0) & (kind != layout.KIND_STATS))
        | ((name_nbytes == 0) != (kind == layout.KIND_STEPS))
    )
    if is_bad.any():
        raise FormatError(f"{where}: row {int(is_bad.argmax())} of a catalog page contradicts itself")
    if (name_nbytes > layout.MAX_NAME_NBYTES).any() or (rank > layout.MAX_RANK).any() or (
        part > layout.MAX_RANK
    ).any():
        raise LimitError(f"{where}: a name or a rank in the catalog is above the limits")
    for key, least in (("shape", -1), ("grid", 0), ("global_shape", 0), ("origin", 0)):
        values = lists[key].values
        if len(values) and (values.min() < least or values.max() > layout.MAX_AXIS):
            raise LimitError(f"{where}: a {key} in the catalog is out of range")
    sums = {
        key: _numpy(batch, key)
        for key in ("first_step", "last_step", "steps", "raw_nbytes", "stored_nbytes")
    }
    if (
        sums["first_step"].min() < 0
        or sums["last_step"].max() > layout.MAX_STEP
        or (sums["first_step"] > sums["last_step"]).any()
    ):
        raise FormatError(f"{where}: the steps of a series in the catalog are out of range")
    return CatalogColumns(
        names.to_pylist(), kind, mode, batch.column("dtype").to_pylist(), lists, sums
    )


def decode_shards(
    stored: bytes | memoryview, row: np.void, where: str
) -> list[tuple[layout.ShardName, int]]:
    """Check and decode the shard page."""
    batch = _load(stored, row, SHARDS_SCHEMA, where)
    columns = [batch.column(name).to_pylist() for name in SHARDS_SCHEMA.names]
    shards = []
    for worker, attempt, writer, number, nbytes in zip(*columns, strict=True):
        if nbytes < 0 or not 0 <= number < 10**12 or worker >= 10**6 or attempt >= 10**6:
            raise FormatError(f"{where}: a shard's number or length is out of range")
        key = layout.WriterKey(worker=worker, attempt=attempt, writer=writer)
        shards.append((layout.ShardName(key=key, number=number), nbytes))
    return shards


def decode_entries(
    stored: bytes | memoryview, row: np.void, where: str, *, varying: np.ndarray, n_shards: int
) -> Entries:
    """Check and decode one entry page.

    Parameters
    ----------
    varying
        For each series of the catalog, the number of axes that are −1.
    n_shards
        Rows of the shard page.
    """
    batch = _load(stored, row, ENTRIES_SCHEMA, where)
    rows = np.empty(batch.num_rows, ENTRY_ROW)
    for name in ENTRY_ROW.names or ():
        rows[name] = _numpy(batch, name)
    entries = Entries(
        rows, Ragged.of_arrow(batch.column("dims")), Ragged.of_arrow(batch.column("inline"))
    )
    _check_entries(entries, row, where, varying=varying, n_shards=n_shards)
    return entries


def _check_entries(
    entries: Entries, root: np.void, where: str, *, varying: np.ndarray, n_shards: int
) -> None:
    rows = entries.rows
    series, step, stride = rows["series"], rows["step"], rows["stride"]
    count, shard, codec = rows["count"].astype(np.int64), rows["shard"], rows["codec"]
    if int(series.max()) >= len(varying):
        raise FormatError(f"{where}: an entry names a series that the catalog does not have")
    if (
        int(count.max()) > layout.MAX_ENTRY_STEPS
        or int(rows["nbytes"].max()) > layout.MAX_CHUNK_NBYTES
        or int(rows["raw_nbytes"].max()) > layout.MAX_CHUNK_RAW_NBYTES
        or int(entries.inline.lengths.max()) > layout.MAX_INLINE_NBYTES
        or (len(entries.dims.values) and int(entries.dims.values.max()) > layout.MAX_AXIS)
    ):
        raise LimitError(f"{where}: an entry is above the limits")
    is_inline = shard == layout.INLINE_SHARD
    is_dropped = codec == layout.CODEC_DROPPED
    is_bad = (
        (count < 1)
        | (step < 0)
        | (step > layout.MAX_STEP)
        | (stride < 1)
        | (stride > (layout.MAX_STEP - step) // np.maximum(count - 1, 1))
        | ((count == 1) & (stride != 1))
        | (~is_inline & (shard >= n_shards))
        | (entries.inline.lengths != np.where(is_inline, rows["nbytes"], 0))
        | (rows["offset"] < 0)
        | (is_inline & (rows["offset"] != 0))
        | ((rows["flags"] & ~np.uint8(3)) != 0)
        | (((rows["flags"] & layout.ENTRY_HAS_DIGEST) == 0) & (rows["digest"] != 0))
        | (rows["first_flush"] < 0)
        | (rows["first_flush"] > rows["last_flush"])
        | (is_dropped & ((rows["nbytes"] != 0) | (rows["raw_nbytes"] != 0) | (rows["chunk"] != 0)))
        | (entries.dims.lengths != varying[series])
    )
    if is_bad.any():
        raise FormatError(f"{where}: row {int(is_bad.argmax())} of an entry page contradicts itself")
    if len(entries.dims.values) and int(entries.dims.values.min()) < 0:
        raise FormatError(f"{where}: an entry has a negative length")
    if len(rows) > 1:
        order = np.lexsort((rows["first_flush"], rows["chunk"], step, series))
        if (np.diff(order) != 1).any():
            raise FormatError(f"{where}: entries are not in order")
    if (
        int(series[0]) != root["first_series"]
        or int(series[-1]) != root["last_series"]
        or int(step.min()) != root["min_step"]
        or int(entries.last_step.max()) != root["max_step"]
    ):
        raise FormatError(f"{where}: the root says other series or steps than a page holds")
