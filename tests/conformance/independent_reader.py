"""A second reader of tensorstore_fmt 1.0, written from spec/format.md alone.

It shares no code with the package: standard library, NumPy, pyarrow and zstandard only.  It reads
whole segments eagerly and checks everything the specification demands of a reader; of shards it
fetches only the byte ranges of the chunks a selection touches.  XXH3 digests are not verified.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pyarrow as pa
import zstandard

Array = np.ndarray[Any, np.dtype[Any]]
Part = tuple[tuple[int, ...], tuple[int, ...]]
Index = tuple[int | slice, ...]

# Section "13. Limits".
MAX_NAME_NBYTES, MAX_RANK, MAX_STEP, MAX_AXIS = 1024, 32, 2**62 - 1, 281474976710656
MAX_CHUNK_RAW_NBYTES, MAX_CHUNK_NBYTES, MAX_INLINE_NBYTES = 134217728, 134225920, 65536
MAX_PAGE_RAW_NBYTES, MAX_PAGE_NBYTES, MAX_PAGE_ROWS = 16777216, 16781312, 65536
MAX_ROOT_NBYTES, MAX_HEAD_NBYTES, MAX_SERIES = 16777216, 1073741824, 16777216
MAX_ENTRY_STEPS, MAX_RUN_JSON_NBYTES, MAX_BUNDLE_ROWS = 1048576, 16777216, 65536
MAX_FILE_WORKER, MAX_FILE_COUNTER = 999_999, 999_999_999_999

SEGMENT_MAGIC, BUNDLE_MAGIC = b"\x89TSFSEG\n", b"\x89TSFIDX\n"
NO_SHARD, DROPPED = 0xFFFFFFFF, 255
CATALOG, SHARDS, ENTRIES = 1, 2, 3
ZSTD_MAGIC, END_OF_STREAM = b"\x28\xb5\x2f\xfd", b"\xff\xff\xff\xff\x00\x00\x00\x00"
SEGMENT_NAME = re.compile(r"([0-9]{6})-([0-9]{6})-([0-9a-f]{16})-([0-9]{12})-([0-9]{12})\.seg")

# Section "7.1 dtypes": NumPy dtype in which the bits are returned, and the greatest valid byte.
DTYPES: dict[str, np.dtype[Any]] = {
    **{f"{s}int{b}": np.dtype(f"<{s or 'i'}{b // 8}") for s in ("", "u") for b in (8, 16, 32, 64)},
    **{f"float{b}": np.dtype(f"<f{b // 8}") for b in (16, 32, 64)},
    "bool": np.dtype("?"),
    "complex64": np.dtype("<c8"),
    "complex128": np.dtype("<c16"),
    "bfloat16": np.dtype("<u2"),
    "string": np.dtype(object),
}
for _name in ("e3m4", "e4m3", "e4m3b11fnuz", "e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu"):
    DTYPES[f"float8_{_name}"] = np.dtype("u1")
SMALL = {"bool": 1, "float6_e2m3fn": 63, "float6_e3m2fn": 63, "float4_e2m1fn": 15}
SMALL |= {"uint4": 15, "uint2": 3}
SIGNED_SMALL = {"int4": 8, "int2": 2}
for _name in (*SMALL, *SIGNED_SMALL):
    DTYPES.setdefault(_name, np.dtype("u1"))


class SpecError(Exception):
    """A failure of section "14. Failures".

    Answers that are no failures have the codes dropped, never_saved, not_yet_written, ambiguous.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message = code, message


def _fail(code: str, message: str) -> NoReturn:
    raise SpecError(code, message)


def _need(condition: object, message: str, code: str = "malformed") -> None:
    if not condition:
        raise SpecError(code, message)


# ---- CRC32C ("3. Conventions") ---------------------------------------------------------------


def _advance(table: Array, state: Array) -> Array:
    """Apply a linear operator, given as 4 tables of 256 words, to CRC states."""
    out: Array = table[0][state & 0xFF] ^ table[1][(state >> 8) & 0xFF]
    out ^= table[2][(state >> 16) & 0xFF] ^ table[3][state >> 24]
    return out


@functools.cache
def _zeros_operator(power: int) -> Array:
    """Return the operator that feeds 2**power zero bytes."""
    if power:
        half = _zeros_operator(power - 1)
        return np.stack([_advance(half, half[j]) for j in range(4)])
    table: Array = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> 1) ^ np.where(table & 1, np.uint32(0x82F63B78), np.uint32(0))
    words = [np.arange(256, dtype=np.uint32) << np.uint32(8 * j) for j in range(4)]
    return np.stack([(word >> 8) ^ table[word & 0xFF] for word in words])


def crc32c(data: bytes) -> int:
    """CRC-32/ISCSI: many lanes side by side, then folded in pairs ("3. Conventions")."""
    if len(data) < 64:
        return _crc32c_short(data)
    power = 6 if len(data) < 1 << 14 else 8 if len(data) < 1 << 20 else 11
    padded = np.zeros(-(-len(data) >> power) << power, np.uint8)
    start = len(padded) - len(data)  # zeros in front do not change a zero state
    padded[start:] = np.frombuffer(data, np.uint8)
    padded[start : start + 4] ^= 0xFF  # the initial value
    lanes = np.ascontiguousarray(padded.view("<u4").reshape(-1, (1 << power) // 4).T)
    state: Array = np.zeros(lanes.shape[1], np.uint32)
    for words in lanes:
        state = _advance(_zeros_operator(2), state ^ words)
    while len(state) > 1:
        if len(state) % 2:
            state = np.concatenate([np.zeros(1, np.uint32), state])
        state = _advance(_zeros_operator(power), state[0::2]) ^ state[1::2]
        power += 1
    return int(state[0]) ^ 0xFFFFFFFF


def _crc32c_short(data: bytes) -> int:
    table, state = _zeros_operator(0)[0], 0xFFFFFFFF
    for byte in data:
        state = (state >> 8) ^ int(table[(state ^ byte) & 0xFF])
    return state ^ 0xFFFFFFFF


# ---- Payloads ("7.4 Codecs") -----------------------------------------------------------------


def _unzstd(frame: bytes, nbytes: int) -> bytes:
    """Decode one zstd frame that states exactly nbytes of content ("3. Conventions")."""
    _need(frame[:4] == ZSTD_MAGIC, "not a zstd frame")
    try:
        header = zstandard.get_frame_parameters(frame)
        _need(header.content_size == nbytes and header.dict_id == 0, "content size or dictionary")
        content: bytes = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise SpecError("malformed", f"zstd: {error}") from None
    _need(len(content) == nbytes, "length of zstd content")
    return content


def decode_payload(codec: int, payload: bytes, dtype: str, raw_nbytes: int, rows: int) -> bytes:
    """Give the raw chunk of a payload that holds `rows` steps ("7.4 Codecs")."""
    _need(dtype in DTYPES, dtype, "unknown_dtype")
    _need(codec in (0, 1, 2, 3, 4), f"codec {codec}", "unknown_codec")
    _need(raw_nbytes <= MAX_CHUNK_RAW_NBYTES, "raw_nbytes", "limit")
    _need(len(payload) <= MAX_CHUNK_NBYTES, "nbytes", "limit")
    _need(raw_nbytes or (codec == 0 and not payload), "an empty chunk has codec 0, no payload")
    if codec == 0:
        raw = payload
    elif codec == 1:
        raw = _decode_constant(payload, dtype, raw_nbytes)
    elif codec == 2:
        raw = _unzstd(payload, raw_nbytes)
    else:
        decode = _decode_planes if codec == 3 else _decode_delta
        raw = decode(payload, dtype, raw_nbytes, rows)
    _need(len(raw) == raw_nbytes, "decoded length is not raw_nbytes")
    return raw


def _decode_constant(payload: bytes, dtype: str, raw_nbytes: int) -> bytes:
    size = DTYPES[dtype].itemsize
    _need(dtype != "string" and len(payload) == size and raw_nbytes % size == 0, "constant")
    return payload * (raw_nbytes // size)


def _decode_planes(payload: bytes, dtype: str, raw_nbytes: int, rows: int) -> bytes:
    """Section "7.5 planes"."""
    _need(dtype != "string" and len(payload) >= 4, "planes of strings, or too short")
    width = DTYPES[dtype].itemsize // (2 if dtype.startswith("complex") else 1)
    start, (flags, w) = 4 + 4 * width, payload[:2]
    _need(flags < 2 and w == width and payload[2:4] == b"\0\0", "planes header")
    _need(raw_nbytes % width == 0 and len(payload) >= start, "planes: lengths")
    n, sizes = raw_nbytes // width, struct.unpack_from(f"<{width}I", payload, 4)
    _need(len(payload) == start + sum(sizes), "planes: length of the payload")
    words = np.empty((n, width), np.uint8)
    for i, size in enumerate(sizes):
        words[:, i] = np.frombuffer(_plane(payload[start : start + size], n), np.uint8)
        start += size
    if flags & 1:
        x = words.view(f"<u{width}")
        words = ((x >> 1) | (x << (8 * width - 1))).astype(f"<u{width}")
    return words.tobytes()


def _plane(stored: bytes, n: int) -> bytes:
    if len(stored) == n:
        return stored
    return stored * n if len(stored) == 1 else _unzstd(stored, n)


def _decode_delta(payload: bytes, dtype: str, raw_nbytes: int, rows: int) -> bytes:
    """Section "7.6 delta"."""
    _need(dtype == "int64" and rows > 0 and raw_nbytes % (8 * rows) == 0, "delta: shape")
    _need(len(payload) == raw_nbytes, "delta: length of the payload")
    by_plane = np.frombuffer(payload, np.uint8).reshape(8, -1)
    words = np.ascontiguousarray(by_plane.T).view("<u8").reshape(rows, -1)
    return np.cumsum(words, axis=0, dtype="<u8").tobytes()


# ---- Arrow pages ("6.3 Pages") ---------------------------------------------------------------

_LIST = pa.list_(pa.int64())
SCHEMAS: dict[int, list[tuple[str, pa.DataType]]] = {
    CATALOG: [
        ("name", pa.utf8()),
        *[(name, pa.uint8()) for name in ("kind", "mode")],
        ("dtype", pa.utf8()),
        *[(name, _LIST) for name in ("shape", "grid", "global_shape", "origin")],
        *[(name, pa.int64()) for name in ("first_step", "last_step", "steps")],
        *[(name, pa.int64()) for name in ("raw_nbytes", "stored_nbytes")],
    ],
    SHARDS: [
        *[(name, pa.uint32()) for name in ("worker", "attempt")],
        ("writer", pa.uint64()),
        *[(name, pa.int64()) for name in ("number", "nbytes")],
    ],
    ENTRIES: [
        ("series", pa.uint32()),
        *[(name, pa.int64()) for name in ("step", "stride")],
        *[(name, pa.uint32()) for name in ("count", "chunk")],
        ("dims", _LIST),
        *[(name, pa.int64()) for name in ("first_flush", "last_flush")],
        *[(name, pa.uint8()) for name in ("codec", "flags")],
        ("shard", pa.uint32()),
        ("offset", pa.int64()),
        *[(name, pa.uint32()) for name in ("nbytes", "raw_nbytes", "crc32c")],
        ("digest", pa.uint64()),
        ("inline", pa.binary()),
    ],
}


def _table_field(buffer: bytes, table: int, number: int) -> int:
    """Give the place of a field of a flatbuffers table, 0 if it is absent."""
    vtable = table - int(struct.unpack_from("<i", buffer, table)[0])
    if 4 + 2 * number >= struct.unpack_from("<H", buffer, vtable)[0]:
        return 0
    offset = int(struct.unpack_from("<H", buffer, vtable + 4 + 2 * number)[0])
    return table + offset if offset else 0


def _is_compressed(metadata: bytes) -> bool:
    """Say whether a RecordBatch message has body compression: no Arrow API tells."""
    place = _table_field(metadata, struct.unpack_from("<I", metadata)[0], 2)
    batch = place + struct.unpack_from("<I", metadata, place)[0]
    return _table_field(metadata, batch, 3) != 0


def _check_messages(content: bytes) -> None:
    """One schema, one uncompressed record batch, the end mark, nothing behind."""
    source = pa.BufferReader(content)
    for kind in ("schema", "record batch"):
        message = pa.ipc.read_message(source)
        _need(message.type == kind and message.metadata_version == 4, f"message {message.type}")
        if kind == "record batch":
            _need(not _is_compressed(message.metadata.to_pybytes()), "compression inside Arrow")
    _need(content[source.tell() :] == END_OF_STREAM, "end-of-stream mark")


def _check_column(column: pa.Array, wanted: pa.DataType) -> None:
    children = [column.values] if pa.types.is_list(column.type) else []
    found = pa.list_(column.type.value_type) if children else column.type
    _need(found == wanted, f"column type {column.type} is not {wanted}")
    _need(not any(part.null_count for part in (column, *children)), "nulls")


def _page_rows(content: bytes, kind: int, rows: int) -> Iterator[tuple[Any, ...]]:
    """Decode the Arrow stream of a page and give its rows ("6.3 Pages")."""
    try:
        _check_messages(content)
        with pa.ipc.open_stream(content) as stream:
            batch = stream.read_next_batch()
        batch.validate(full=True)
        names = batch.schema.names
    except (pa.ArrowException, EOFError, OSError, struct.error, ValueError) as error:
        raise SpecError("malformed", f"Arrow: {error}") from None
    _need(names == [name for name, _ in SCHEMAS[kind]], "columns of the page")
    _need(batch.num_rows == rows, "rows of the page")
    for column, (_, wanted) in zip(batch.columns, SCHEMAS[kind], strict=True):
        _check_column(column, wanted)
    return zip(*[column.to_pylist() for column in batch.columns], strict=True)


# ---- Segments ("6. Segment") -----------------------------------------------------------------


class SegmentName(NamedTuple):
    """The five fields of a segment's file name ("4. Layout of a run")."""

    worker: int
    attempt: int
    writer: int
    last: int
    flushes: int

    @property
    def first(self) -> int:
        return self.last - self.flushes + 1

    def __str__(self) -> str:
        prefix = f"{self.worker:06}-{self.attempt:06}-{self.writer:016x}"
        return f"{prefix}-{self.last:012}-{self.flushes:012}.seg"


def parse_segment_name(text: str) -> SegmentName | None:
    """Parse a file name; None if it has not exactly the form of section 4."""
    match = SEGMENT_NAME.fullmatch(text)
    if match is None:
        return None
    return SegmentName(*[int(x, 16 if i == 2 else 10) for i, x in enumerate(match.groups())])


class Header(NamedTuple):
    """Section "6.1 Header"."""

    magic: bytes
    major: int
    minor: int
    flags: int
    run_id: bytes
    writer: int
    worker: int
    attempt: int
    num_workers: int
    root_crc32c: int
    resume_step: int
    first_flush: int
    last_flush: int
    required: int
    file_nbytes: int
    head_nbytes: int
    root_nbytes: int
    series: int
    opened_us: int
    published_us: int
    complete_through: tuple[int, int, int, int]
    recovers: int


class RootRow(NamedTuple):
    """Section "6.2 Root"."""

    offset: int
    nbytes: int
    raw_nbytes: int
    crc32c: int
    rows: int
    first_series: int
    last_series: int
    min_step: int
    max_step: int
    kind: int
    reserved: bytes


class Series(NamedTuple):
    """A row of the catalog page ("6.3 Pages")."""

    name: str
    kind: int
    mode: int
    dtype: str
    shape: list[int]
    grid: list[int]
    global_shape: list[int]
    origin: list[int]
    first_step: int
    last_step: int
    steps: int
    raw_nbytes: int
    stored_nbytes: int

    @property
    def part(self) -> Part | None:
        return (tuple(self.global_shape), tuple(self.origin)) if self.global_shape else None

    def sort_key(self) -> tuple[Any, ...]:
        return (self.name.encode(), self.kind, self.mode, self.dtype.encode(), *self[5:8])


class Shard(NamedTuple):
    """A row of the shard page ("6.3 Pages")."""

    worker: int
    attempt: int
    writer: int
    number: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.worker:06}-{self.attempt:06}-{self.writer:016x}-{self.number:012}.arrow"


class Entry(NamedTuple):
    """A row of an entry page ("6.3 Pages")."""

    series: int
    step: int
    stride: int
    num_steps: int
    chunk: int
    dims: list[int]
    first_flush: int
    last_flush: int
    codec: int
    flags: int
    shard: int
    offset: int
    nbytes: int
    raw_nbytes: int
    crc32c: int
    digest: int
    inline: bytes

    @property
    def last_step(self) -> int:
        return self.step + (self.num_steps - 1) * self.stride

    @property
    def rows(self) -> int:
        """Number of steps in the payload."""
        return 1 if self.flags & 1 else self.num_steps

    def covers(self, step: int) -> bool:
        return self.step <= step <= self.last_step and (step - self.step) % self.stride == 0


@dataclass
class Segment:
    """A segment, or the head of one (then without entries)."""

    header: Header
    root: list[RootRow]
    series: list[Series] = field(default_factory=list)
    shards: list[Shard] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)


def _plain_header(data: bytes, magic: bytes, size: int) -> None:
    """Check what stands first in the order of "6.1 Header": magic, then crc32c."""
    _need(data[:8] == magic[: len(data)], "magic", "bad_magic")
    _need(len(data) >= size, "shorter than its header", "truncated")
    stored = struct.unpack_from("<I", data, size - 4)[0]
    _need(crc32c(data[: size - 4]) == stored, "header", "checksum")


def _header_bytes(data: bytes) -> bytes:
    """Give the first header, or the copy at the end in its place ("6.1 Header")."""
    try:
        _plain_header(data, SEGMENT_MAGIC, 256)
    except SpecError as error:
        try:
            _plain_header(data[-256:] if len(data) > 256 else b"", SEGMENT_MAGIC, 256)
        except SpecError:
            raise error from None
        return data[-256:]
    return data[:256]


def _check_length(stated: int, real: int) -> None:
    _need(real >= stated, f"{real} bytes of {stated}", "truncated")
    _need(real == stated, f"{real} bytes, not {stated}")


def _read_header(
    data: bytes, name: SegmentName | None, run_id: bytes | None, file_nbytes: int
) -> Header:
    """Check in the order that "6.1 Header" demands."""
    raw = _header_bytes(data)
    values = struct.unpack("<8sHHI16sQIIIIqQQQQQIIqq4qQ", raw[:168])
    header = Header._make((*values[:20], values[20:24], values[24]))
    _need(header.major == 1, f"major {header.major}", "unsupported_version")
    _need(header.required == 0, f"required {header.required:#x}", "unknown_feature")
    _need(run_id is None or header.run_id == run_id, "run_id", "wrong_run")
    if name is not None:
        count = header.last_flush - header.first_flush + 1
        found = SegmentName(header.worker, header.attempt, header.writer, header.last_flush, count)
        _need(found == name, f"{name} holds {tuple(found)}", "wrong_run")
    _check_length(header.file_nbytes, file_nbytes)
    _check_header(header, raw[168:252])
    return header


def _check_header(header: Header, reserved: bytes) -> None:
    """Limits, then what else can be wrong ("6.1 Header")."""
    _need(header.root_nbytes <= MAX_ROOT_NBYTES, "root_nbytes", "limit")
    _need(header.head_nbytes <= MAX_HEAD_NBYTES, "head_nbytes", "limit")
    _need(header.series <= MAX_SERIES, "series", "limit")
    _need(header.resume_step <= MAX_STEP, "resume_step", "limit")
    _need(max(header.worker, header.attempt) <= MAX_FILE_WORKER, "worker, attempt", "limit")
    _need(header.last_flush <= MAX_FILE_COUNTER, "last_flush", "limit")
    _need(header.flags < 2 and not any(reserved), "reserved")
    _need(header.worker < header.num_workers and header.writer, "num_workers, writer")
    _need(header.first_flush <= header.last_flush, "flushes")
    _need(header.resume_step >= 0 and min(header.complete_through) >= -1, "steps")
    _need(header.root_nbytes % 64 == 0, "root_nbytes")
    end = header.file_nbytes - 256 - header.root_nbytes
    _need(256 + header.root_nbytes <= header.head_nbytes <= end, "head_nbytes")


def _read_root(data: bytes, header: Header) -> list[RootRow]:
    """Read the root or its copy, and check that the pages lie as they must ("6.2 Root")."""
    raw = data[256 : 256 + header.root_nbytes]
    if crc32c(raw) != header.root_crc32c:
        end = header.file_nbytes - 256
        raw = data[end - header.root_nbytes : end]
        _need(crc32c(raw) == header.root_crc32c, "root", "checksum")
    root = [RootRow(*row) for row in struct.iter_unpack("<QIIIIIIqqB15s", raw)]
    place = 256 + header.root_nbytes
    for row in root:
        _check_root_row(row)
        _need(row.offset == place, "pages do not follow each other")
        place += row.nbytes
    _need(place == header.file_nbytes - 256 - header.root_nbytes, "end of the pages")
    _check_page_order(root, header)
    return root


def _check_root_row(row: RootRow) -> None:
    _need(row.nbytes <= MAX_PAGE_NBYTES, "page nbytes", "limit")
    _need(row.raw_nbytes <= MAX_PAGE_RAW_NBYTES, "page raw_nbytes", "limit")
    _need(row.rows <= MAX_PAGE_ROWS, "page rows", "limit")
    _need(row.rows > 0 and row.nbytes > 0, "empty page")
    _need(row.kind in (1, 2, 3) and not any(row.reserved), "page kind or reserved")
    _need(row.first_series <= row.last_series, "series range of a page")
    if row.kind == ENTRIES:
        _need(row.max_step <= MAX_STEP, "page steps", "limit")
        _need(0 <= row.min_step <= row.max_step, "step range of a page")
    else:
        _need(row.min_step == row.max_step == 0, "steps of a page without entries")


def _check_page_order(root: list[RootRow], header: Header) -> None:
    """Catalog, at most one shard page, entries; the catalog counted through ("6.2 Root")."""
    kinds = [row.kind for row in root]
    _need(kinds == sorted(kinds) and kinds.count(SHARDS) <= 1, "order of pages")
    series = 0
    for row in root:
        if row.kind == CATALOG:
            _need(row.first_series == series, "first_series of a catalog page")
            series += row.rows
            _need(row.last_series == series - 1, "last_series of a catalog page")
        elif row.kind == SHARDS:
            _need(row.last_series == 0, "series of the shard page")
        else:
            _need(row.last_series < header.series, "last_series of an entry page")
    _need(series == header.series, "number of series")
    head = 256 + header.root_nbytes + sum(row.nbytes for row in root if row.kind != ENTRIES)
    _need(header.head_nbytes == head, "head_nbytes")


def _read_page(data: bytes, row: RootRow) -> Iterator[tuple[Any, ...]]:
    stored = data[row.offset : row.offset + row.nbytes]
    _need(crc32c(stored) == row.crc32c, f"page at {row.offset}", "checksum")
    return _page_rows(_unzstd(stored, row.raw_nbytes), row.kind, row.rows)


def read_head(
    data: bytes, name: SegmentName | None, run_id: bytes | None, file_nbytes: int
) -> Segment:
    """Read header, root, catalog and shard page from a segment or its head ("6. Segment")."""
    header = _read_header(data, name, run_id, file_nbytes)
    segment = Segment(header, _read_root(data, header))
    for row in segment.root:
        if row.kind == CATALOG:
            segment.series += [Series(*values) for values in _read_page(data, row)]
        elif row.kind == SHARDS:
            segment.shards += [Shard(*values) for values in _read_page(data, row)]
    for series in segment.series:
        _check_series(series)
    keys = [series.sort_key() for series in segment.series]
    _need(all(a < b for a, b in itertools.pairwise(keys)), "order of the catalog")
    for shard in segment.shards:
        _need(max(shard[:2]) <= MAX_FILE_WORKER, "worker of a shard", "limit")
        _need(shard.number <= MAX_FILE_COUNTER, "number of a shard", "limit")
        _need(min(shard) >= 0, "shard row")
    _need(len({shard[:4] for shard in segment.shards}) == len(segment.shards), "shard twice")
    return segment


def _check_series(row: Series) -> None:
    """Limits and rules of a catalog row ("6.3 Pages")."""
    lists = (row.shape, row.grid, row.global_shape, row.origin)
    _need(len(row.name.encode()) <= MAX_NAME_NBYTES, "name", "limit")
    _need(max(map(len, lists)) <= MAX_RANK, "rank", "limit")
    _need(all(x <= MAX_AXIS for part in lists for x in part), "axis", "limit")
    _need(max(row.first_step, row.last_step) <= MAX_STEP, "step", "limit")
    _need(row.kind <= 2 and row.mode <= 3 and (not row.name) == (row.kind == 2), "kind, name")
    _need(len(row.grid) == len(row.shape) and min(row.shape, default=0) >= -1, "shape, grid")
    _need(all(x >= 0 for part in lists[1:] for x in part), "negative length")
    _need(len(row.global_shape) == len(row.origin), "origin")
    _need(0 <= row.first_step <= row.last_step, "first_step, last_step")
    _need(row.dtype != "string" or len(row.shape) <= 1, "rank of strings")
    if row.kind == 0:
        _need(not row.part or len(row.origin) == len(row.shape), "rank of a part")
        if row.part:
            _check_box(row, row.shape)
    else:
        fixed = ("float64", [10]) if row.kind == 1 else ("int64", [2])
        _need((row.dtype, row.shape) == fixed and row.grid == [0], "statistics or step table")
        _need(row.kind == 1 or not row.part, "the step table has no parts")


def _check_box(row: Series, shape: Sequence[int]) -> None:
    """A part lies within its global tensor ("2. Terms")."""
    for at, length, whole in zip(row.origin, shape, row.global_shape, strict=True):
        _need(at + max(length, 0) <= whole, "part outside of its global tensor")


def full_shape(series: Series, entry: Entry) -> list[int]:
    """Give the shape with the lengths that the entry adds ("6.3 Pages", dims)."""
    dims = iter(entry.dims)
    return [next(dims) if length < 0 else length for length in series.shape]


def axis_chunks(length: int, grid: int) -> range:
    """Give the starts of the chunks along an axis ("7.3 Grid")."""
    return range(0, max(length, 1), grid or max(length, 1))


def count_chunks(shape: Sequence[int], grid: Sequence[int]) -> int:
    """Section "7.3 Grid"; a tensor without elements has one chunk."""
    if 0 in shape:
        return 1
    return math.prod(len(axis_chunks(n, g)) for n, g in zip(shape, grid, strict=True))


def chunk_box(shape: Sequence[int], grid: Sequence[int], chunk: int) -> list[tuple[int, int]]:
    """Give the box of a chunk, numbered in C order ("7.3 Grid")."""
    if 0 in shape:
        return [(0, n) for n in shape]
    box: list[tuple[int, int]] = []
    for n, g in zip(reversed(shape), reversed(grid), strict=True):
        starts = axis_chunks(n, g)
        chunk, j = divmod(chunk, len(starts))
        box.append((starts[j], min(starts[j] + (g or n), n)))
    return box[::-1]


def read_segment(
    data: bytes, *, name: str | None = None, run_id: bytes | str | None = None
) -> Segment:
    """Read and check a whole segment ("6. Segment")."""
    parsed = parse_segment_name(name) if name is not None else None
    _need(name is None or parsed is not None, f"name {name}", "wrong_run")
    segment = read_head(data, parsed, _run_id(run_id), len(data))
    for row in segment.root:
        if row.kind == ENTRIES:
            page = [Entry(*values) for values in _read_page(data, row)]
            for entry in page:
                _need(entry.series < len(segment.series), "series of an entry")
                _check_entry(segment, entry)
            _check_entry_page(row, page)
            segment.entries += page
    _check_all_entries(segment)
    return segment


def _run_id(run_id: bytes | str | None) -> bytes | None:
    return bytes.fromhex(run_id) if isinstance(run_id, str) else run_id


def _check_entry_page(row: RootRow, page: list[Entry]) -> None:
    """The ranges of the root row are those of the page ("6.2 Root")."""
    steps = (min(e.step for e in page), max(e.last_step for e in page))
    _need((row.min_step, row.max_step) == steps, "step range of an entry page")
    series = (page[0].series, page[-1].series)
    _need((row.first_series, row.last_series) == series, "series range of an entry page")


def _check_all_entries(segment: Segment) -> None:
    """Order over all pages, ranges of the catalog, shards that are named ("6.3 Pages")."""
    keys = [(e.series, e.step, e.chunk, e.first_flush) for e in segment.entries]
    _need(all(a < b for a, b in itertools.pairwise(keys)), "order of the entries")
    groups = {k: list(g) for k, g in itertools.groupby(segment.entries, lambda e: e.series)}
    _need(len(groups) == len(segment.series), "series without entries")
    for number, group in groups.items():
        row = segment.series[number]
        steps = (min(e.step for e in group), max(e.last_step for e in group))
        _need((row.first_step, row.last_step) == steps, "step range of a series")
    named = {e.shard for e in segment.entries} - {NO_SHARD}
    _need(len(named) == len(segment.shards), "shard row that no entry names")


def _check_entry(segment: Segment, e: Entry) -> None:
    """Limits and rules of one entry ("6.3 Pages")."""
    series, header = segment.series[e.series], segment.header
    _need(e.num_steps <= MAX_ENTRY_STEPS, "count", "limit")
    _need(e.last_step <= MAX_STEP, "step", "limit")
    _need(e.nbytes <= MAX_CHUNK_NBYTES and e.raw_nbytes <= MAX_CHUNK_RAW_NBYTES, "chunk", "limit")
    _need(len(e.inline) <= MAX_INLINE_NBYTES, "inline", "limit")
    _need(all(x <= MAX_AXIS for x in e.dims), "dims", "limit")
    _need(e.step >= 0 and e.stride >= 1 and e.num_steps >= 1, "steps of an entry")
    _need(e.num_steps > 1 or (e.stride == 1 and e.first_flush == e.last_flush), "entry of one step")
    flushes = (header.first_flush, e.first_flush, e.last_flush, header.last_flush)
    _need(list(flushes) == sorted(flushes), "flushes of an entry")
    _need(e.flags < 4 and (e.flags & 2 or e.digest == 0), "flags or digest")
    if e.shard == NO_SHARD:
        _need(e.offset == 0 and len(e.inline) == e.nbytes, "inline payload")
    else:
        _need(e.shard < len(segment.shards) and not e.inline, "shard of an entry")
        _need(e.offset >= 0 and e.offset % 8 == 0, "offset of a payload")
        _need(e.offset + e.nbytes <= segment.shards[e.shard].nbytes, "nbytes of a shard row")
    if e.codec == DROPPED:
        empty = (e.chunk, e.nbytes, e.raw_nbytes, e.shard) == (0, 0, 0, NO_SHARD)
        _need(empty, "a dropped entry has no payload")
    else:
        _check_entry_shape(series, e)


def _check_entry_shape(series: Series, e: Entry) -> None:
    """The chunk is in the grid and has the length that its box gives ("7.2", "7.3")."""
    _need(len(e.dims) == series.shape.count(-1) and min(e.dims, default=0) >= 0, "dims")
    shape = full_shape(series, e)
    _need(e.chunk < count_chunks(shape, series.grid), "chunk outside of the grid")
    if series.kind == 0 and series.part:
        _check_box(series, shape)
    box = chunk_box(shape, series.grid, e.chunk)
    elements = e.rows * math.prod(b - a for a, b in box)
    if series.dtype == "string":
        least = 4 * (elements + 1) if elements else 0
        _need(e.raw_nbytes >= least, "raw_nbytes of strings")
    elif series.dtype in DTYPES:
        _need(e.raw_nbytes == elements * DTYPES[series.dtype].itemsize, "raw_nbytes of a chunk")


# ---- Bundle ("9. Bundle") --------------------------------------------------------------------


class BundleRow(NamedTuple):
    """One segment in a bundle: its name, its length and its first bytes."""

    name: SegmentName
    file_nbytes: int
    data: bytes


def read_bundle(data: bytes, *, run_id: bytes | str | None = None) -> list[BundleRow]:
    """Read and check a whole bundle, with all heads in it ("9. Bundle")."""
    _plain_header(data, BUNDLE_MAGIC, 64)
    values = struct.unpack("<8sHHI16sQQI8sI", data[:64])
    _, major, _, count, found, file_nbytes, required, table_crc, reserved, _ = values
    _need(major == 1, f"major {major}", "unsupported_version")
    _need(required == 0, f"required {required:#x}", "unknown_feature")
    _need(run_id is None or found == _run_id(run_id), "run_id", "wrong_run")
    _check_length(file_nbytes, len(data))
    _need(count <= MAX_BUNDLE_ROWS, "rows", "limit")
    _need(not any(reserved), "reserved")
    end = 64 + 64 * count
    _need(len(data) >= end and crc32c(data[64:end]) == table_crc, "table", "checksum")
    rows: list[BundleRow] = []
    for values in struct.iter_unpack("<IIQQQQQQ8s", data[64:end]):
        name, nbytes = SegmentName(*values[:5]), values[7]
        _need(values[6] == end and end + nbytes <= len(data), "place of a segment")
        _need(nbytes <= values[5] and not any(values[8]), "row of the table")
        rows.append(BundleRow(name, values[5], data[end : end + nbytes]))
        _check_copy(rows[-1], found)
        end += nbytes
    _need(end == len(data) and len({row.name for row in rows}) == count, "rows of the bundle")
    return rows


def _check_copy(row: BundleRow, run_id: bytes) -> None:
    """Copied bytes are checked as bytes of the segment; they are its head, or all."""
    if len(row.data) == row.file_nbytes:
        read_segment(row.data, name=str(row.name), run_id=run_id)
    else:
        head = read_head(row.data, row.name, run_id, row.file_nbytes)
        _need(head.header.head_nbytes == len(row.data), "a copy is the head, or all")


# ---- run.json ("5. run.json") ----------------------------------------------------------------


def read_run_json(data: bytes) -> dict[str, Any]:
    """Check the checksum, then parse ("5. run.json")."""
    _need(len(data) <= MAX_RUN_JSON_NBYTES, "run.json", "limit")
    tail = re.fullmatch(rb',"crc32c":"([0-9a-f]{8})"\}\n', data[-22:])
    stated = int(tail[1], 16) if tail else -1
    _need(tail, "run.json does not end as it must", "not_a_run")
    _need(crc32c(data[:-22]) == stated, "run.json", "checksum")
    try:
        run: Any = json.loads(data.decode(), parse_constant=lambda text: _fail("malformed", text))
    except (ValueError, RecursionError) as error:
        raise SpecError("malformed", f"run.json: {error}") from None
    _need(isinstance(run, dict) and run.get("format") == "tensorstore_fmt", "format", "not_a_run")
    version = run.get("format_version")
    pair = isinstance(version, list) and len(version) == 2
    _need(pair and all(type(x) is int and x >= 0 for x in version or ()), "format_version")
    _need(version[0] == 1, f"version {version}", "unsupported_version")
    required = run.get("required")
    _need(isinstance(required, list) and all(type(x) is str for x in required), "required")
    _need(not required, f"required {required}", "unknown_feature")
    run_id = run.get("run_id")
    _need(isinstance(run_id, str) and re.fullmatch("[0-9a-f]{32}", run_id), "run_id")
    _need(type(run.get("created_us")) is int and isinstance(run.get("attrs"), dict), "members")
    return dict(run)


# ---- Selections ("10.5 Reading a slice") -----------------------------------------------------


def _selection(index: Index, shape: Sequence[int]) -> tuple[list[range], list[int]]:
    """Turn ints and slices into one range per axis; give also the shape of the result."""
    if len(index) > len(shape):
        raise IndexError("more indices than axes")
    padded = (*index, *[slice(None)] * (len(shape) - len(index)))
    ranges: list[range] = []
    for item, length in zip(padded, shape, strict=True):
        if isinstance(item, slice):
            ranges.append(range(*item.indices(length)))
        else:
            at = range(length)[item]
            ranges.append(range(at, at + 1))
    kept = [len(r) for r, item in zip(ranges, padded, strict=True) if isinstance(item, slice)]
    return ranges, kept


def _pick(wanted: range, low: int, high: int) -> range:
    """Give the positions in `wanted` of its elements in [low, high)."""
    if wanted.step > 0:
        first = -((wanted.start - low) // wanted.step)
        last = -((wanted.start - high) // wanted.step)
    else:
        first = (wanted.start - high) // -wanted.step + 1
        last = (wanted.start - low) // -wanted.step + 1
    return range(max(first, 0), max(min(last, len(wanted)), first, 0))


def _as_slice(wanted: range) -> slice:
    stop = wanted.stop if wanted.stop >= 0 else None
    return slice(wanted.start, stop, wanted.step)


# ---- The run ("10. Duties of a reader") ------------------------------------------------------


@dataclass
class Writer:
    """The good segments of one writer ("2. Terms")."""

    worker: int
    attempt: int
    id: int
    segments: list[Segment]

    @property
    def newest(self) -> Header:
        return max((s.header for s in self.segments), key=lambda h: h.last_flush)


class Saved(NamedTuple):
    """One save of one (name, kind, mode, part) and step by one writer: a chunk set."""

    writer: Writer
    segment: Segment
    series: Series
    step: int
    entries: list[Entry]

    @property
    def dropped(self) -> bool:
        return self.entries[0].codec == DROPPED

    @property
    def shape(self) -> list[int]:
        return full_shape(self.series, self.entries[0])


class SavedRow(NamedTuple):
    """What `Run.saved` lists."""

    name: str
    kind: int
    mode: int
    worker: int
    attempt: int
    dtype: str
    step: int
    part: Part | None


Candidate = tuple[Writer, Segment, Entry]


def _choose(candidates: list[Candidate], step: int) -> Saved:
    """Rules 3 and 4 of "10.3 What is visible"."""

    def rank(item: Candidate) -> tuple[int, int, int]:
        return item[0].newest.opened_us, item[0].id, item[2].last_flush

    writer, segment, top = max(candidates, key=rank)
    best = [e for w, _, e in candidates if w is writer and e.last_flush == top.last_flush]
    clash = {(e.series, tuple(e.dims), e.codec == DROPPED) for e in best}
    _need(len(clash) == 1, f"two saves of step {step} in flush {top.last_flush}")
    chunks: dict[int, Entry] = {}
    for w, s, e in candidates:
        same = w is writer and s is segment and (e.series, e.dims) == (top.series, top.dims)
        if same and (e.codec == DROPPED) == (top.codec == DROPPED):
            old = chunks.setdefault(e.chunk, e)
            _need(old is e or old.last_flush != e.last_flush, "two entries of one chunk")
            chunks[e.chunk] = max(old, e, key=lambda x: x.last_flush)
    series = segment.series[top.series]
    return Saved(writer, segment, series, step, [chunks[key] for key in sorted(chunks)])


class Run:
    """A run, as it was when it was opened.

    `damage` holds every failure met at opening, `missing` those that lost flushes, `fetched`
    the byte ranges (shard, offset, nbytes) that were read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            document = (folder / "run.json").read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            _fail("not_a_run", str(folder))
        self.json = read_run_json(document)
        self.attrs: dict[str, Any] = self.json["attrs"]
        self.run_id = bytes.fromhex(self.json["run_id"])
        self.damage: list[SpecError] = []
        self.missing: list[SpecError] = []
        self.fetched: list[tuple[str, int, int]] = []
        self.writers: list[Writer] = []
        self._decoded: dict[int, bytes] = {}
        self._open()

    # Sections "10.1 Opening" and "10.2 Damage and merges".

    def _open(self) -> None:
        try:
            rows = read_bundle((self.folder / "index.bundle").read_bytes(), run_id=self.run_id)
        except (OSError, SpecError):
            rows = []  # a damaged bundle is ignored
        self._bundle = {row.name: row for row in rows}
        for _ in range(3):
            self.writers, self.damage, self.missing = [], [], []
            names = self._listing()
            keys = sorted({name[:3] for name in names})
            vanished = [self._load_writer([n for n in names if n[:3] == key]) for key in keys]
            if not any(vanished) and not self.missing:
                break
        self._attempts = {name.attempt for name in names}

    def _listing(self) -> list[SegmentName]:
        folder = self.folder / "index"
        found = [parse_segment_name(p.name) for p in folder.iterdir()] if folder.is_dir() else []
        return sorted(name for name in found if name is not None)

    def _load_writer(self, names: list[SegmentName]) -> bool:
        """Load the maximal segments, or in place of bad ones those they cover."""
        good: dict[SegmentName, Segment] = {}
        vanished = False
        for name in sorted(names, key=lambda n: (-n.flushes, n.last)):
            try:
                _need(name.flushes >= 1 and name.first >= 0, f"flush range of {name}")
                if any(g.first <= name.first and name.last <= g.last for g in good):
                    continue
                good[name] = self._load(name)
                for g in good:
                    apart = g.last < name.first or name.last < g.first
                    _need(apart or g == name, f"{g} and {name} are not nested")
            except FileNotFoundError:
                vanished = True
            except SpecError as error:
                self.damage.append(error)
        self._check_gaps(names, good)
        if good:
            self.writers.append(Writer(*names[0][:3], list(good.values())))
        return vanished

    def _check_gaps(self, names: list[SegmentName], good: Iterable[SegmentName]) -> None:
        expected = 0
        for first, last in [*sorted((g.first, g.last) for g in good), (names[-1].last + 1, 0)]:
            if first > expected:
                text = f"{names[0]}: flushes {expected} to {first - 1}"
                self.missing.append(SpecError("missing_segment", text))
                self.damage.append(self.missing[-1])
            expected = max(expected, last + 1)

    def _load(self, name: SegmentName) -> Segment:
        """Take the first bytes from the bundle if it has them; it is only a cache."""
        path, row = self.folder / "index" / str(name), self._bundle.get(name)
        if row is not None and path.stat().st_size == row.file_nbytes:
            with path.open("rb") as file:
                file.seek(len(row.data))
                data = row.data + file.read()
            try:
                return read_segment(data, name=str(name), run_id=self.run_id)
            except SpecError:
                pass
        return read_segment(path.read_bytes(), name=str(name), run_id=self.run_id)

    # Section "10.3 What is visible".

    def _candidates(
        self, name: str | None, kind: int | None, mode: int | None, step: int | None
    ) -> Iterator[tuple[Candidate, Series, Iterable[int]]]:
        for writer in self.writers:
            for segment in writer.segments:
                for entry in segment.entries:
                    row = segment.series[entry.series]
                    wanted = (name in (None, row.name), kind in (None, row.kind))
                    if not all(wanted) or mode not in (None, row.mode):
                        continue
                    if step is None:
                        steps: Iterable[int] = range(entry.step, entry.last_step + 1, entry.stride)
                    else:
                        steps = (step,) if entry.covers(step) else ()
                    yield (writer, segment, entry), row, steps

    def _hidden_from(self, attempt: int) -> int:
        """Give the first step that later attempts hide of this one (rule 2)."""
        later = [w.newest.resume_step for w in self.writers if w.attempt > attempt]
        return min(later, default=MAX_STEP + 1)

    def _find(
        self,
        name: str | None = None,
        kind: int | None = None,
        mode: int | None = None,
        step: int | None = None,
        attempt: int | None = None,
    ) -> list[Saved]:
        """Give what is visible: the winners, dropped ones among them."""
        groups: dict[tuple[Any, ...], list[Candidate]] = {}
        hidden = {a: self._hidden_from(a) for a in self._attempts}
        for item, row, steps in self._candidates(name, kind, mode, step):
            at = item[0].attempt
            for s in steps:
                if at == attempt or (attempt is None and s < hidden[at]):
                    key = (row.name, row.kind, row.mode, s, at, item[0].worker, row.part or ())
                    groups.setdefault(key, []).append(item)
        newest: dict[tuple[Any, ...], int] = {}
        for key in groups:
            newest[key[:4]] = max(newest.get(key[:4], 0), key[4])
        shown = sorted(key for key in groups if key[4] == newest[key[:4]])
        return [_choose(groups[key], key[3]) for key in shown]

    def saved(self, attempt: int | None = None) -> list[SavedRow]:
        """List all that is visible and was not dropped."""
        return [
            SavedRow(*x.series[:3], x.writer.worker, x.writer.attempt, x.series.dtype, x.step, part)
            for x in self._find(attempt=attempt)
            if not x.dropped
            for part in [x.series.part]
        ]

    def names(self) -> list[str]:
        """Names that have data or statistics ("7.8 Statistics": a name may have no data)."""
        return sorted({row.name for row in self.saved() if row.kind < 2}, key=str.encode)

    def steps(self, mode: int | None = None) -> list[int]:
        """Steps that were logged or saved."""
        return sorted({row.step for row in self.saved() if mode in (None, row.mode)})

    def step_table(self) -> list[tuple[int, int, int, int, int]]:
        """Give (worker, mode, step, mode_step, wall_us) ("7.7 The step table")."""
        rows: list[tuple[int, int, int, int, int]] = []
        for found in self._find(kind=2):
            if not found.dropped:
                pair = self._box(found, [range(2)]).tolist()
                rows.append((found.writer.worker, found.series.mode, found.step, *pair))
        return sorted(rows)

    # Section "10.4 What is not there".

    def _spoken_for(self, writer: Writer) -> list[Header]:
        """Newest header of a writer and of those that recover it, in a chain (rule 1)."""
        found = [writer]
        for dead in found:
            same = [w for w in self.writers if w.newest.recovers == dead.id and w not in found]
            found += [w for w in same if (w.worker, w.attempt) == (dead.worker, dead.attempt)]
        return [w.newest for w in found]

    def _done(self, worker: int | None, mode: int | None, step: int | None) -> bool:
        """All writers of the newest attempt are closed, or (with a step) complete through it."""
        attempt = max(self._attempts, default=0)
        writers = [w for w in self.writers if w.attempt == attempt]
        wanted = range(max((w.newest.num_workers for w in writers), default=1))
        wanted = wanted if worker is None else range(worker, worker + 1)
        if not set(wanted) <= {w.worker for w in writers}:
            return False
        for writer in (w for w in writers if w.worker in wanted):
            headers = self._spoken_for(writer)
            modes = range(4) if mode is None else (mode,)
            through = min(max(h.complete_through[m] for h in headers) for m in modes)
            if not any(h.flags & 1 for h in headers) and (step is None or through < step):
                return False
        return True

    @property
    def is_closed(self) -> bool:
        return self._done(None, None, None)

    def state(
        self, name: str, step: int, mode: int | None = None, worker: int | None = None
    ) -> str:
        """Give here, dropped, never_saved or not_yet_written ("10.4")."""
        found = self._find(name, 0, mode, step)
        found = [x for x in found if worker in (None, x.writer.worker)]
        return self._state(found, step, mode, worker)

    def _state(self, found: list[Saved], step: int, mode: int | None, worker: int | None) -> str:
        if found:
            return "dropped" if all(x.dropped for x in found) else "here"
        if self.missing:
            raise self.missing[0]
        return "never_saved" if self._done(worker, mode, step) else "not_yet_written"

    # Section "10.5 Reading a slice".

    def _wanted(
        self,
        name: str,
        kind: int,
        step: int,
        mode: int | None,
        *,
        worker: int | None,
        attempt: int | None,
    ) -> list[Saved]:
        """Give the one tensor, or the parts of one, that a question means (rules 5 and 6)."""
        found = self._find(name, kind, mode, step, attempt)
        found = [x for x in found if worker in (None, x.writer.worker)]
        state = self._state(found, step, mode, worker)
        _need(state == "here", f"{name!r} at step {step}", state)
        found = [x for x in found if not x.dropped]
        one = len({x.series.mode for x in found}) == 1
        parts = all(x.series.part for x in found)
        _need(one and (parts or len(found) == 1), f"{name!r} at step {step}", "ambiguous")
        return found

    def read(
        self,
        name: str,
        step: int,
        mode: int | None = None,
        worker: int | None = None,
        attempt: int | None = None,
        *,
        index: Index = (),
    ) -> Array | str | list[str]:
        """Read a tensor or a slice of it; parts are put together ("10.3", rule 6).

        With `worker`, only parts of that worker are taken, still in global coordinates.
        """
        found = self._wanted(name, 0, step, mode, worker=worker, attempt=attempt)
        result = self._assemble(found, index)
        if found[0].series.dtype != "string":
            return result
        text: str | list[str] = result.tolist()
        return text

    def dtype(self, name: str, step: int, mode: int | None = None) -> str:
        """Name of the dtype, for the bits that `read` gives."""
        return self._wanted(name, 0, step, mode, worker=None, attempt=None)[0].series.dtype

    def _assemble(self, found: list[Saved], index: Index) -> Array:
        series = found[0].series
        _need(series.dtype in DTYPES, series.dtype, "unknown_dtype")
        if series.part is None:
            ranges, kept = _selection(index, found[0].shape)
            return self._box(found[0], ranges).reshape(kept)
        same = {(tuple(x.series.global_shape), x.series.dtype) for x in found}
        _need(len(same) == 1, "global shapes or dtypes differ", "parts")
        ranges, kept = _selection(index, series.global_shape)
        picks = [
            [_pick(r, o, o + n) for r, o, n in zip(ranges, x.series.origin, x.shape, strict=True)]
            for x in found
        ]
        _check_cover(picks, ranges)
        result = np.empty([len(r) for r in ranges], DTYPES[series.dtype])
        for x, pick in zip(found, picks, strict=True):
            if all(pick):
                own = [r[p.start : p.stop] for r, p in zip(ranges, pick, strict=True)]
                own = [_shift(r, -o) for r, o in zip(own, x.series.origin, strict=True)]
                result[tuple(map(_as_slice, pick))] = self._box(x, own)
        return result.reshape(kept)

    def _box(self, found: Saved, ranges: list[range]) -> Array:
        """Read a selection of one saved tensor, chunk by chunk."""
        shape, grid = found.shape, found.series.grid
        # Each number is below the count and stands once, so the length says all.
        _need(len(found.entries) == count_chunks(shape, grid), "chunks are missing")
        result = np.empty([len(r) for r in ranges], DTYPES[found.series.dtype])
        for entry in found.entries if result.size else ():
            box = chunk_box(shape, grid, entry.chunk)
            pick = [_pick(r, a, b) for r, (a, b) in zip(ranges, box, strict=True)]
            if all(pick):
                values = self._chunk(found, entry).reshape([b - a for a, b in box])
                own = [r[p.start : p.stop] for r, p in zip(ranges, pick, strict=True)]
                own = [_shift(r, -a) for r, (a, _) in zip(own, box, strict=True)]
                result[tuple(map(_as_slice, pick))] = values[tuple(map(_as_slice, own))]
        return result

    def _chunk(self, found: Saved, entry: Entry) -> Array:
        """Give the elements of one step of a chunk ("7.2 Raw chunks")."""
        raw = self._decoded.get(id(entry))
        if raw is None:
            payload = self._payload(found.segment, entry)
            _need(crc32c(payload) == entry.crc32c, f"payload at step {found.step}", "checksum")
            dtype = found.series.dtype
            raw = decode_payload(entry.codec, payload, dtype, entry.raw_nbytes, entry.rows)
            if len(raw) <= MAX_INLINE_NBYTES:
                self._decoded[id(entry)] = raw
        row = 0 if entry.flags & 1 else (found.step - entry.step) // entry.stride
        if found.series.dtype == "string":
            box = chunk_box(found.shape, found.series.grid, entry.chunk)
            return _strings(raw, entry.rows, row, math.prod(b - a for a, b in box))
        size = len(raw) // entry.rows
        return _elements(raw[row * size : (row + 1) * size], found.series.dtype)

    def _payload(self, segment: Segment, entry: Entry) -> bytes:
        """Fetch exactly [offset, offset + nbytes) of the shard."""
        if entry.shard == NO_SHARD:
            return entry.inline
        name = str(segment.shards[entry.shard])
        try:
            with (self.folder / "shards" / name).open("rb", buffering=0) as file:
                end = file.seek(0, 2)
                _need(end >= entry.offset + entry.nbytes, name, "truncated")
                file.seek(entry.offset)
                payload = file.read(entry.nbytes)
        except FileNotFoundError:
            _fail("missing_file", name)
        self.fetched.append((name, entry.offset, entry.nbytes))
        _need(len(payload) == entry.nbytes, name, "truncated")
        return payload

    def stats(
        self,
        name: str,
        step: int,
        mode: int | None = None,
        worker: int | None = None,
        attempt: int | None = None,
    ) -> Array:
        """Give the ten statistics, stored or computed from the values ("7.8 Statistics")."""
        try:
            found = self._wanted(name, 1, step, mode, worker=worker, attempt=attempt)
        except SpecError as error:
            if error.code not in ("never_saved", "not_yet_written"):
                raise
            data = self._wanted(name, 0, step, mode, worker=worker, attempt=attempt)
            return compute_stats(self._assemble(data, ()), data[0].series.dtype)
        return functools.reduce(_merge_stats, [self._box(x, [range(10)]) for x in found])


def _shift(wanted: range, by: int) -> range:
    return range(wanted.start + by, wanted.stop + by, wanted.step)


def _check_cover(picks: list[list[range]], ranges: list[range]) -> None:
    """No two parts overlap and no hole is left under the selection (rule 6)."""
    picks = [pick for pick in picks if all(pick)]
    for one, two in itertools.combinations(picks, 2):
        pairs = zip(one, two, strict=True)
        apart = any(a.stop <= b.start or b.stop <= a.start for a, b in pairs)
        _need(apart, "parts overlap", "parts")
    covered = sum(math.prod(map(len, pick)) for pick in picks)
    _need(covered == math.prod(map(len, ranges)), "parts leave a hole", "parts")


def _elements(raw: bytes, dtype: str) -> Array:
    """View bytes as elements; spare bits have to be as "7.1 dtypes" says."""
    if dtype in SMALL:
        _need(max(raw, default=0) <= SMALL[dtype], f"value of {dtype}")
    if dtype in SIGNED_SMALL:
        half = SIGNED_SMALL[dtype]
        values = np.frombuffer(raw, np.int8)
        _need(bool(((values >= -half) & (values < half)).all()), f"value of {dtype}")
    return np.frombuffer(raw, DTYPES[dtype])


def _strings(raw: bytes, rows: int, row: int, each: int) -> Array:
    """Cut strings; `each` elements per step, of which those of step `row` are given ("7.2")."""
    total = rows * each
    result = np.empty(each, object)
    if not total and raw in (b"", b"\0\0\0\0"):
        return result
    _need(len(raw) >= 4 * (total + 1), "offsets of strings")
    offsets = struct.unpack_from(f"<{total + 1}I", raw)
    data = raw[4 * (total + 1) :]
    _need(offsets[0] == 0 and offsets[-1] == len(data), "offsets of strings")
    _need(all(a <= b for a, b in itertools.pairwise(offsets)), "offsets of strings")
    try:
        texts = [data[a:b].decode() for a, b in itertools.pairwise(offsets)]
    except UnicodeDecodeError as error:
        raise SpecError("malformed", f"strings: {error}") from None
    result[:] = texts[row * each : (row + 1) * each]
    return result


def compute_stats(values: Array, dtype: str) -> Array:
    """Compute the statistics of values of real dtypes ("7.8 Statistics")."""
    if dtype == "bfloat16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    elif (DTYPES[dtype] == np.uint8 and dtype != "uint8") or values.dtype.kind not in "biuf":
        _fail("unknown_dtype", f"statistics of {dtype} are not computed here")
    x = values.astype(np.float64).ravel()
    finite, number = x[np.isfinite(x)], x[~np.isnan(x)]
    bounds = (number.min(), number.max()) if number.size else (np.nan, np.nan)
    counts = (x.size, x.size - number.size, (x == np.inf).sum(), (x == -np.inf).sum())
    sums = (finite.sum(), (finite * finite).sum(), np.abs(finite).sum())
    return np.array([*counts, (x == 0).sum(), *bounds, *sums], np.float64)


def _merge_stats(one: Array, two: Array) -> Array:
    merged = one + two
    merged[5], merged[6] = np.fmin(one[5], two[5]), np.fmax(one[6], two[6])
    return merged


def open_run(folder: str | Path) -> Run:
    """Open a run ("10.1 Opening")."""
    return Run(Path(folder))
