"""The bundle: first bytes of a run's segments in one file (spec, "Bundle")."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import crc32c

from tensorstore_fmt.errors import (
    ChecksumError,
    FormatError,
    LimitError,
    TruncatedError,
    UnsupportedError,
)
from tensorstore_fmt.format import layout

__all__ = ["BundleRow", "decode", "encode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleRow:
    """One segment in a bundle."""

    name: layout.SegmentName
    file_nbytes: int
    offset: int
    nbytes: int


def encode(
    run_id: bytes, segments: Sequence[tuple[layout.SegmentName, int, bytes | memoryview]]
) -> list[bytes | memoryview]:
    """Give the bytes of a bundle in parts; of each segment: name, length, its first bytes."""
    table_nbytes = layout.BUNDLE_ROW.size * len(segments)
    offset = layout.BUNDLE_HEADER.size + table_nbytes
    rows = []
    for name, file_nbytes, data in segments:
        key = name.key
        rows.append(
            layout.BUNDLE_ROW.pack(
                key.worker, key.attempt, key.writer, name.last, name.count, file_nbytes, offset,
                len(data),
            )
        )  # fmt: skip
        offset += len(data)
    table = b"".join(rows)
    head = layout.BUNDLE_HEADER.pack(
        layout.BUNDLE_MAGIC, layout.MAJOR, layout.MINOR, len(segments), run_id, offset, 0,
        crc32c.crc32c(table), 0,
    )[:-4]  # fmt: skip
    head += struct.pack("<I", crc32c.crc32c(head))
    return [head, table, *(data for _, _, data in segments)]


def decode(
    data: bytes | memoryview, *, run_id: bytes, nbytes: int | None = None
) -> list[BundleRow]:
    """Check and read header and table from the first bytes of a bundle.

    Raises
    ------
    FormatError
        Also if the table is not all in `data`: a cache too large to be one.
    """
    where = layout.BUNDLE
    if len(data) < layout.BUNDLE_HEADER.size:
        raise TruncatedError(f"{where}: {len(data)} bytes", file=where)
    head = bytes(data[: layout.BUNDLE_HEADER.size])
    magic, major, _, count, found_id, file_nbytes, required, table_crc, crc = (
        layout.BUNDLE_HEADER.unpack(head)
    )
    if magic != layout.BUNDLE_MAGIC:
        raise FormatError(f"{where}: not a bundle", code="bad_magic", file=where)
    if crc32c.crc32c(head[:-4]) != crc:
        raise ChecksumError(f"{where}: the header is damaged", file=where)
    if major != layout.MAJOR:
        raise UnsupportedError(f"{where}: format version {major}", file=where)
    if required & ~layout.KNOWN_FEATURES:
        raise UnsupportedError(f"{where}: unknown feature", code="unknown_feature", file=where)
    if found_id != run_id:
        raise FormatError(f"{where}: belongs to another run", code="wrong_run", file=where)
    if nbytes is not None and nbytes < file_nbytes:
        raise TruncatedError(f"{where}: {nbytes} bytes, should have {file_nbytes}", file=where)
    if count > layout.MAX_BUNDLE_ROWS:
        raise LimitError(f"{where}: {count} segments", file=where)
    if any(head[52:60]) or (nbytes is not None and nbytes > file_nbytes):
        raise FormatError(f"{where}: the header contradicts the file", file=where)
    begin = layout.BUNDLE_HEADER.size
    table = bytes(data[begin : begin + count * layout.BUNDLE_ROW.size])
    if len(table) < count * layout.BUNDLE_ROW.size:
        raise TruncatedError(f"{where}: the table is not all there", file=where)
    if crc32c.crc32c(table) != table_crc:
        raise ChecksumError(f"{where}: the table is damaged", file=where)
    return _rows(table, begin + len(table), file_nbytes)


def _rows(table: bytes, begin: int, file_nbytes: int) -> list[BundleRow]:
    rows = []
    for i, fields in enumerate(layout.BUNDLE_ROW.iter_unpack(table)):
        worker, attempt, writer, last, count, segment_nbytes, offset, nbytes = fields
        end = (i + 1) * layout.BUNDLE_ROW.size
        if max(worker, attempt) > layout.MAX_WORKER or last > layout.MAX_NUMBER:
            raise LimitError(f"{layout.BUNDLE}: row {i} of the table is above the limits")
        if (
            offset != begin
            or nbytes > segment_nbytes
            or not 1 <= count <= last + 1
            or any(table[end - 8 : end])
        ):
            raise FormatError(f"{layout.BUNDLE}: row {i} of the table contradicts itself")
        begin = offset + nbytes
        key = layout.WriterKey(worker=worker, attempt=attempt, writer=writer)
        name = layout.SegmentName(key=key, last=last, count=count)
        rows.append(BundleRow(name=name, file_nbytes=segment_nbytes, offset=offset, nbytes=nbytes))
    if len({row.name for row in rows}) < len(rows):
        raise FormatError(f"{layout.BUNDLE}: a segment stands twice in the table")
    if begin != file_nbytes:
        raise FormatError(f"{layout.BUNDLE}: the table does not cover the file")
    return rows
