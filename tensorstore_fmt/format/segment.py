"""Segments: immutable index files (spec, "Segment"): header, root, pages, root, header."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import crc32c
import numpy as np

from tensorstore_fmt.errors import (
    ChecksumError,
    FormatError,
    LimitError,
    TruncatedError,
    UnsupportedError,
)
from tensorstore_fmt.format import layout, page
from tensorstore_fmt.format.catalog import (
    SUMS,
    CatalogColumns,
    CatalogTable,
    Series,
    decode_catalog,
    encode_catalog,
)
from tensorstore_fmt.format.page import Entries, StoredPage
from tensorstore_fmt.lazy import lazy

__all__ = [
    "Catalog",
    "Head",
    "Header",
    "decode_head",
    "decode_header",
    "encode",
    "recover_head_parts",
]

_HEADER = layout.SEGMENT_HEADER
_CRC = slice(_HEADER.size - 4, _HEADER.size)
_MOST_DECODED: Final = 255  # rows of a catalog at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What the header of a segment says (spec, "Header")."""

    run_id: bytes
    key: layout.WriterKey
    num_workers: int
    resume_step: int
    first_flush: int
    last_flush: int
    opened_us: int
    published_us: int
    complete_through: tuple[int, int, int, int] = (-1, -1, -1, -1)
    is_closed: bool = False
    recovers: int = 0
    required: int = 0
    file_nbytes: int = 0
    head_nbytes: int = 0
    root_crc32c: int = 0
    root_nbytes: int = 0
    series: int = 0

    @property
    def name(self) -> layout.SegmentName:
        """The file name that belongs to this header."""
        return layout.SegmentName(
            key=self.key, last=self.last_flush, count=self.last_flush - self.first_flush + 1
        )


def _pack(header: Header, **sizes: int) -> bytes:
    def size(field: str) -> int:
        return int(sizes.get(field, getattr(header, field)))

    data = _HEADER.pack(
        layout.SEGMENT_MAGIC,
        layout.MAJOR,
        layout.MINOR,
        layout.FLAG_CLOSED if header.is_closed else 0,
        header.run_id,
        header.key.writer,
        header.key.worker,
        header.key.attempt,
        header.num_workers,
        size("root_crc32c"),
        header.resume_step,
        header.first_flush,
        header.last_flush,
        header.required,
        size("file_nbytes"),
        size("head_nbytes"),
        size("root_nbytes"),
        size("series"),
        header.opened_us,
        header.published_us,
        *header.complete_through,
        header.recovers,
        0,
    )
    return data[:-4] + crc32c.crc32c(data[:-4]).to_bytes(4, "little")


def encode(
    header: Header,
    series: CatalogTable | Sequence[Series],
    shards: Sequence[tuple[layout.ShardName, int]],
    entry_pages: Sequence[StoredPage],
) -> list[bytes]:
    """Give the bytes of a segment, in parts.

    `series` are in order of their identities; sizes and checksums in `header` are filled in.
    """
    head_pages = encode_catalog(series) + page.encode_shards(shards)
    pages = [*head_pages, *entry_pages]
    root = np.zeros(len(pages), layout.ROOT_ROW)
    for field in ("raw_nbytes", "crc32c", "rows", "first_series", "last_series"):
        root[field] = [getattr(p, field) for p in pages]
    for field in ("min_step", "max_step", "kind"):
        root[field] = [getattr(p, field) for p in pages]
    lengths = np.fromiter((len(p.data) for p in pages), np.int64, len(pages))
    root["nbytes"] = lengths
    begin = _HEADER.size + root.nbytes
    root["offset"] = begin + np.cumsum(lengths) - lengths
    root_bytes = root.tobytes()
    head = _pack(
        header,
        root_crc32c=crc32c.crc32c(root_bytes),
        file_nbytes=2 * begin + int(lengths.sum()),
        head_nbytes=begin + sum(len(p.data) for p in head_pages),
        root_nbytes=len(root_bytes),
        series=len(series),
    )
    return [head, root_bytes, *(p.data for p in pages), root_bytes, head]


def decode_header(
    data: bytes | memoryview,
    *,
    where: str,
    run_id: bytes | None = None,
    name: layout.SegmentName | None = None,
    nbytes: int | None = None,
) -> Header:
    """Check and read the 256 bytes of a header, in the order of the spec.

    Parameters
    ----------
    where
        The file, for messages.
    run_id, name, nbytes
        What is known of the run and of the file; None: not known, not checked.
    """
    if len(data) < _HEADER.size:
        raise TruncatedError(
            f"{where}: {len(data)} bytes, a segment has at least {2 * _HEADER.size}", file=where
        )
    data = bytes(data[: _HEADER.size])
    if data[:8] != layout.SEGMENT_MAGIC:
        raise FormatError(f"{where}: not a segment", code="bad_magic", file=where)
    found = crc32c.crc32c(data[:-4])
    if found != int.from_bytes(data[_CRC], "little"):
        raise ChecksumError(
            f"{where}: checksum of the header is {found:08x}, expected "
            f"{int.from_bytes(data[_CRC], 'little'):08x}; the file is damaged",
            file=where,
            offset=0,
        )
    header, major, flags = _unpack(data)
    if major != layout.MAJOR:
        raise UnsupportedError(
            f"{where}: format version {major}, this version of tensorstore_fmt reads "
            f"{layout.MAJOR}.x: use a newer one",
            file=where,
            version=major,
        )
    if header.required & ~layout.KNOWN_FEATURES:
        raise UnsupportedError(
            f"{where}: needs features (bits {header.required:#x}) this version does not know; "
            "use a newer tensorstore_fmt",
            code="unknown_feature",
            file=where,
            required=header.required,
        )
    if (run_id is not None and header.run_id != run_id) or (
        name is not None and header.name != name
    ):
        raise FormatError(
            f"{where}: belongs to another run or has another file's name "
            f"(run {header.run_id.hex()}, {header.name.path})",
            code="wrong_run",
            file=where,
        )
    _check_header(header, data, flags, where, nbytes)
    return header


def _unpack(data: bytes) -> tuple[Header, int, int]:
    (
        _, major, _, flags, run_id, writer, worker, attempt, num_workers, root_crc32c,
        resume_step, first_flush, last_flush, required, file_nbytes, head_nbytes,
        root_nbytes, series, opened_us, published_us, *complete, recovers, _,
    ) = _HEADER.unpack(data)  # fmt: skip
    header = Header(
        run_id=run_id,
        key=layout.WriterKey(worker=worker, attempt=attempt, writer=writer),
        num_workers=num_workers,
        resume_step=resume_step,
        first_flush=first_flush,
        last_flush=last_flush,
        opened_us=opened_us,
        published_us=published_us,
        complete_through=tuple(complete),
        is_closed=bool(flags & layout.FLAG_CLOSED),
        recovers=recovers,
        required=required,
        file_nbytes=file_nbytes,
        head_nbytes=head_nbytes,
        root_crc32c=root_crc32c,
        root_nbytes=root_nbytes,
        series=series,
    )
    return header, major, flags


def _check_header(header: Header, data: bytes, flags: int, where: str, nbytes: int | None) -> None:
    if nbytes is not None and nbytes < header.file_nbytes:
        raise TruncatedError(
            f"{where}: {nbytes:,} bytes, should have {header.file_nbytes:,}; it was cut short",
            file=where,
            nbytes=nbytes,
        )
    if (
        header.root_nbytes > layout.MAX_ROOT_NBYTES
        or header.head_nbytes > layout.MAX_HEAD_NBYTES
        or header.series > layout.MAX_SERIES
        or header.num_workers > layout.MAX_WORKER + 1
        or header.resume_step > layout.MAX_STEP
        or max(header.complete_through) > layout.MAX_STEP
    ):
        raise LimitError(f"{where}: a size in the header is above the limits", file=where)
    begin = _HEADER.size + header.root_nbytes
    if (
        (nbytes is not None and nbytes > header.file_nbytes)
        or flags & ~layout.FLAG_CLOSED
        or any(data[168:252])
        or header.root_nbytes % layout.ROOT_ROW.itemsize
        or not begin <= header.head_nbytes <= header.file_nbytes - begin
        or header.first_flush > header.last_flush
        or header.key.worker >= header.num_workers
        or not header.key.writer
        or header.resume_step < 0
        or min(header.complete_through) < -1
    ):
        raise FormatError(f"{where}: the header contradicts itself or the file", file=where)


class Catalog:
    """All catalog rows of one segment; `Series` objects are made when asked for."""

    def __init__(self, pages: Sequence[CatalogColumns]) -> None:
        self._pages = pages
        self.names: list[str] = [name for p in pages for name in p.names]
        self._begins = [0, *itertools.accumulate(len(p.names) for p in pages)]
        self._series: dict[int, Series] = {}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> Series:
        found = self._series.get(number)
        return self._decoded(number) if found is None else found

    def _decoded(self, number: int) -> Series:
        # A block takes little longer than a row: the more were asked for, the larger it is.
        size = 1 << min(len(self._series), _MOST_DECODED).bit_length()
        which = bisect.bisect_right(self._begins, number) - 1
        page, first = self._pages[which], self._begins[which]
        begin = (number - first) // size * size
        end = min(begin + size, len(page.names))
        self._series.update(enumerate(page.series(begin, end), first + begin))
        return self._series[number]

    def table(self) -> CatalogTable:
        """Give all rows, in columns of Python values."""
        lists = {
            key: [row for p in self._pages for row in p.lists[key].tuples()]
            for key in ("shape", "grid", "global_shape", "origin")
        }
        return CatalogTable(
            names=self.names,
            kind=self.kind.tolist(),
            mode=self.mode.tolist(),
            dtypes=[dtype for p in self._pages for dtype in p.dtypes],
            sums={key: self.column(key) for key in SUMS},
            **lists,
        )

    @lazy
    def kind(self) -> np.ndarray:
        """Kind of each series."""
        return np.concatenate([p.kind for p in self._pages] or [np.empty(0, np.uint8)])

    @lazy
    def mode(self) -> np.ndarray:
        """Mode of each series."""
        return np.concatenate([p.mode for p in self._pages] or [np.empty(0, np.uint8)])

    def column(self, name: str) -> np.ndarray:
        """Give one of first_step, last_step, steps, raw_nbytes, stored_nbytes."""
        return np.concatenate([p.sums[name] for p in self._pages] or [np.empty(0, np.int64)])

    @lazy
    def varying(self) -> np.ndarray:
        """Number of axes of each series whose length stands in the entries."""
        parts = []
        for p in self._pages:
            shape = p.lists["shape"]
            total = np.concatenate([[0], np.cumsum(shape.values < 0)])
            parts.append(total[shape.offsets[1:]] - total[shape.offsets[:-1]])
        return np.concatenate(parts or [np.empty(0, np.int64)])

    def has(self, name: str) -> bool:
        """Say whether a series has this name."""
        at = bisect.bisect_left(self.names, name)
        return at < len(self.names) and self.names[at] == name

    def rows_of(self, name: str) -> range:
        """Give the numbers of the series with this name (the rows are sorted by name)."""
        begin = bisect.bisect_left(self.names, name)
        end = begin
        while end < len(self.names) and self.names[end] == name:  # few, as a rule one
            end += 1
        return range(begin, end)


@dataclass(frozen=True)
class Head:
    """The checked head of a segment: everything but its entries."""

    header: Header
    root: np.ndarray
    catalog: Catalog
    shards: Sequence[tuple[layout.ShardName, int]]

    def entry_pages(self, series: int | None = None) -> np.ndarray:
        """Give the root rows of the entry pages; only those that can hold this series."""
        root = self.root
        keep = root["kind"] == layout.PAGE_ENTRIES
        if series is not None:
            keep &= (root["first_series"] <= series) & (series <= root["last_series"])
        return np.flatnonzero(keep)

    def decode_entries(self, number: int, stored: bytes | memoryview) -> Entries:
        """Check and decode the entry page with this root row."""
        return page.decode_entries(
            stored,
            self.root[number],
            self.header.name.path,
            self._context,
        )

    @lazy
    def _context(self) -> page.EntryContext:
        return page.EntryContext(
            varying=self.catalog.varying,
            shard_nbytes=np.fromiter((n for _, n in self.shards), np.int64, len(self.shards)),
            first_flush=self.header.first_flush,
            last_flush=self.header.last_flush,
        )


def recover_head_parts(tail: bytes | memoryview, header: Header) -> bytes:
    """Give header and root from the last bytes of a segment, where they stand again."""
    begin = len(tail) - _HEADER.size - header.root_nbytes
    if begin < 0:
        raise TruncatedError("the end of the segment is not all there")
    return bytes(tail[-_HEADER.size :]) + bytes(tail[begin : begin + header.root_nbytes])


def decode_head(header: Header, data: bytes | memoryview) -> Head:
    """Check and decode the head; `data` holds at least ``header.head_nbytes`` first bytes."""
    return _decode_head(header, data, page.decode_shards)


def decode_head_without_shards(header: Header, data: bytes | memoryview) -> Head:
    """Do the same but for the shard page, which is damaged: its names are made up.

    Entries with inline payloads are all that can be used of such a segment as they are.
    """
    unknown = layout.ShardName(key=header.key, number=layout.MAX_NUMBER)
    return _decode_head(header, data, lambda _, row, __: [(unknown, 2**62)] * int(row["rows"]))


def _decode_head(
    header: Header,
    data: bytes | memoryview,
    decode_shards: Callable[[memoryview, np.void, str], list[tuple[layout.ShardName, int]]],
) -> Head:
    where = header.name.path
    if len(data) < header.head_nbytes:
        raise TruncatedError(
            f"{where}: {len(data):,} bytes, its head has {header.head_nbytes:,}", file=where
        )
    data = memoryview(data)
    root_bytes = data[_HEADER.size : _HEADER.size + header.root_nbytes]
    found = crc32c.crc32c(root_bytes)
    if found != header.root_crc32c:
        raise ChecksumError(
            f"{where}: checksum of the root is {found:08x}, expected {header.root_crc32c:08x}; "
            "the file is damaged",
            file=where,
            offset=_HEADER.size,
        )
    root = np.frombuffer(root_bytes, layout.ROOT_ROW)
    _check_root(root, header, where)
    catalogs: list[CatalogColumns] = []
    shards: list[tuple[layout.ShardName, int]] = []
    for row in root:
        if row["kind"] == layout.PAGE_ENTRIES:
            break
        stored = data[int(row["offset"]) : int(row["offset"]) + int(row["nbytes"])]
        if row["kind"] == layout.PAGE_CATALOG:
            catalogs.append(decode_catalog(stored, row, where))
        else:
            shards = decode_shards(stored, row, where)
    catalog = Catalog(catalogs)  # as many rows as pages and root say, so as the header does
    names = catalog.names
    for i in np.flatnonzero(np.fromiter(map(_not_ascending, names, names[1:]), np.bool_)):
        if catalog[int(i)].identity >= catalog[int(i) + 1].identity:
            raise FormatError(f"{where}: rows {i} and {i + 1} of the catalog are not in order")
    return Head(header, root, catalog, shards)


def _not_ascending(a: str, b: str) -> bool:
    return a >= b


def _check_root(root: np.ndarray, header: Header, where: str) -> None:
    begin = _HEADER.size + header.root_nbytes
    if not len(root):  # of a flush without steps
        if (header.head_nbytes, header.file_nbytes, header.series) != (begin, 2 * begin, 0):
            raise FormatError(f"{where}: there is no root, but the header says more", file=where)
        return
    ends = root["offset"] + root["nbytes"]
    kind = root["kind"]
    if (
        int(root["nbytes"].max()) > layout.MAX_PAGE_NBYTES
        or int(root["raw_nbytes"].max()) > layout.MAX_PAGE_RAW_NBYTES
        or int(root["raw_nbytes"][kind != layout.PAGE_ENTRIES].sum(dtype=np.int64))
        > layout.MAX_HEAD_NBYTES
        or int(root["rows"].max()) > layout.MAX_PAGE_ROWS
        or int(root["max_step"].max()) > layout.MAX_STEP
        or int(root["min_step"].max()) > layout.MAX_STEP
    ):
        raise LimitError(f"{where}: a page is above the limits", file=where)
    n_head = int(np.count_nonzero(kind != layout.PAGE_ENTRIES))
    head_end = int(ends[n_head - 1]) if n_head else begin
    is_bad = (
        int(root["offset"][0]) != begin
        or (root["offset"][1:] != ends[:-1]).any()
        or int(ends[-1]) != header.file_nbytes - begin
        or head_end != header.head_nbytes
        or (kind[1:] < kind[:-1]).any()
        or int(kind[0]) < layout.PAGE_CATALOG
        or int(kind[-1]) > layout.PAGE_ENTRIES
        or np.count_nonzero(kind == layout.PAGE_SHARDS) > 1
        or (root["rows"] < 1).any()
        or (root["first_series"] > root["last_series"]).any()
        or root["reserved"].tobytes().strip(b"\0")
    )
    if is_bad:
        raise FormatError(f"{where}: the root contradicts itself or the header", file=where)
    first = root["first_series"][kind == layout.PAGE_CATALOG].astype(np.int64)
    rows = root["rows"][kind == layout.PAGE_CATALOG].astype(np.int64)
    last = root["last_series"][kind == layout.PAGE_CATALOG].astype(np.int64)
    is_head = kind != layout.PAGE_ENTRIES
    entries = root[~is_head]
    is_shards = kind == layout.PAGE_SHARDS
    if (
        (first != np.cumsum(rows) - rows).any()
        or (last != first + rows - 1).any()
        or int(rows.sum()) != header.series
        or root["min_step"][is_head].any()
        or root["max_step"][is_head].any()
        or root["last_series"][is_shards].any()
    ):
        raise FormatError(f"{where}: the root says other catalog rows than the header", file=where)
    if len(entries) and (
        int(entries["last_series"].max()) >= header.series
        or (entries["first_series"][1:] < entries["last_series"][:-1]).any()
        or int(entries["min_step"].min()) < 0
        or (entries["min_step"] > entries["max_step"]).any()
    ):
        raise FormatError(f"{where}: the root says entry pages that cannot be", file=where)
