"""The head of a segment: header and root ("6.1 Header", "6.2 Root")."""

from __future__ import annotations

import struct

from .checksums import crc32c
from .errors import SpecError, need
from .limits import (
    CATALOG,
    ENTRIES,
    MAX_HEAD_NBYTES,
    MAX_NUMBER,
    MAX_PAGE_NBYTES,
    MAX_PAGE_RAW_NBYTES,
    MAX_PAGE_ROWS,
    MAX_ROOT_NBYTES,
    MAX_SERIES,
    MAX_STEP,
    MAX_WORKER,
    SEGMENT_MAGIC,
    SHARDS,
)
from .records import Header, RootRow, SegmentName

HEADER_NBYTES = 256


def check_plain_header(data: bytes, magic: bytes, size: int) -> None:
    """Check what stands first in the order of "6.1 Header": length, magic, crc32c."""
    need(len(data) >= size, "shorter than its header", "truncated")
    need(data[:8] == magic, "magic", "bad_magic")
    stored = struct.unpack_from("<I", data, size - 4)[0]
    need(crc32c(data[: size - 4]) == stored, "header", "checksum")


def check_length(stated: int, real: int) -> None:
    need(real >= stated, f"{real} bytes of {stated}", "truncated")
    need(real == stated, f"{real} bytes, not {stated}")


def _header_bytes(data: bytes) -> bytes:
    """Give the first header, or the copy at the end in its place."""
    try:
        check_plain_header(data, SEGMENT_MAGIC, HEADER_NBYTES)
    except SpecError as error:
        if error.code not in ("bad_magic", "checksum"):
            raise
        try:
            check_plain_header(data[-HEADER_NBYTES:], SEGMENT_MAGIC, HEADER_NBYTES)
        except SpecError:
            raise error from None
        return data[-HEADER_NBYTES:]
    return data[:HEADER_NBYTES]


def read_header(
    data: bytes, name: SegmentName | None, run_id: bytes | None, file_nbytes: int
) -> Header:
    """Check in the order that "6.1 Header" demands."""
    raw = _header_bytes(data)
    values = struct.unpack("<8sHHI16sQIIIIqQQQQQIIqq4qQ", raw[:168])
    header = Header._make((*values[:20], values[20:24], values[24]))
    need(header.major == 1, f"major {header.major}", "unsupported_version")
    need(header.required == 0, f"required {header.required:#x}", "unknown_feature")
    need(run_id is None or header.run_id == run_id, "run_id", "wrong_run")
    if name is not None:
        count = header.last_flush - header.first_flush + 1
        found = SegmentName(header.worker, header.attempt, header.writer, header.last_flush, count)
        need(found == name, f"{name} holds {tuple(found)}", "wrong_run")
    check_length(header.file_nbytes, file_nbytes)
    _check_limits(header)
    _check_agreement(header, raw[168:252])
    return header


def _check_limits(header: Header) -> None:
    need(header.root_nbytes <= MAX_ROOT_NBYTES, "root_nbytes", "limit")
    need(header.head_nbytes <= MAX_HEAD_NBYTES, "head_nbytes", "limit")
    need(header.series <= MAX_SERIES, "series", "limit")
    need(header.num_workers <= MAX_WORKER + 1, "num_workers", "limit")
    need(max(header.resume_step, *header.complete_through) <= MAX_STEP, "steps", "limit")
    need(max(header.worker, header.attempt) <= MAX_WORKER, "worker, attempt", "limit")
    need(header.last_flush <= MAX_NUMBER, "last_flush", "limit")


def _check_agreement(header: Header, reserved: bytes) -> None:
    need(header.flags < 2 and not any(reserved), "reserved")
    need(header.worker < header.num_workers and header.writer, "num_workers, writer")
    need(header.first_flush <= header.last_flush, "flushes")
    need(header.resume_step >= 0 and min(header.complete_through) >= -1, "steps")
    need(header.root_nbytes % 64 == 0, "root_nbytes")
    end = header.file_nbytes - HEADER_NBYTES - header.root_nbytes
    need(HEADER_NBYTES + header.root_nbytes <= header.head_nbytes <= end, "head_nbytes")


def read_root(data: bytes, header: Header) -> list[RootRow]:
    """Read the root or its copy, and check that the pages lie as they must ("6.2 Root")."""
    raw = data[HEADER_NBYTES : HEADER_NBYTES + header.root_nbytes]
    if crc32c(raw) != header.root_crc32c:
        end = header.file_nbytes - HEADER_NBYTES
        raw = data[end - header.root_nbytes : end]
        need(crc32c(raw) == header.root_crc32c, "root", "checksum")
    root = [RootRow(*row) for row in struct.iter_unpack("<QIIIIIIqqB15s", raw)]
    raw_nbytes = sum(row.raw_nbytes for row in root if row.kind != ENTRIES)
    need(raw_nbytes <= MAX_HEAD_NBYTES, "raw_nbytes of the head", "limit")
    place = HEADER_NBYTES + header.root_nbytes
    for row in root:
        _check_root_row(row)
        need(row.offset == place, "pages do not follow each other")
        place += row.nbytes
    need(place == header.file_nbytes - HEADER_NBYTES - header.root_nbytes, "end of the pages")
    _check_page_order(root, header)
    return root


def _check_root_row(row: RootRow) -> None:
    need(row.nbytes <= MAX_PAGE_NBYTES, "page nbytes", "limit")
    need(row.raw_nbytes <= MAX_PAGE_RAW_NBYTES, "page raw_nbytes", "limit")
    need(row.rows <= MAX_PAGE_ROWS, "page rows", "limit")
    need(row.rows > 0 and row.nbytes > 0, "empty page")
    need(row.kind in (CATALOG, SHARDS, ENTRIES) and not any(row.reserved), "kind or reserved")
    need(row.first_series <= row.last_series, "series range of a page")
    if row.kind == ENTRIES:
        need(row.max_step <= MAX_STEP, "page steps", "limit")
        need(0 <= row.min_step <= row.max_step, "step range of a page")
    else:
        need(row.min_step == row.max_step == 0, "steps of a page without entries")


def _check_page_order(root: list[RootRow], header: Header) -> None:
    """Catalog, at most one shard page, entries; the catalog counted through ("6.2 Root")."""
    kinds = [row.kind for row in root]
    need(kinds == sorted(kinds) and kinds.count(SHARDS) <= 1, "order of pages")
    series = reached = 0
    for row in root:
        if row.kind == CATALOG:
            need(row.first_series == series, "first_series of a catalog page")
            series += row.rows
            need(row.last_series == series - 1, "last_series of a catalog page")
        elif row.kind == SHARDS:
            need(row.last_series == 0, "series of the shard page")
        else:
            need(row.last_series < header.series, "last_series of an entry page")
            need(row.first_series >= reached, "order of the entry pages")
            reached = row.last_series
    need(series == header.series, "number of series")
    head = HEADER_NBYTES + header.root_nbytes
    head += sum(row.nbytes for row in root if row.kind != ENTRIES)
    need(header.head_nbytes == head, "head_nbytes")
