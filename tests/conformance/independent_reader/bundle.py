"""The bundle ("9. Bundle"): header and table; the copies in it are checked when they are used."""

from __future__ import annotations

import struct
from typing import NamedTuple

from .checksums import crc32c
from .errors import need
from .head import check_length, check_plain_header
from .limits import BUNDLE_MAGIC, MAX_BUNDLE_ROWS, MAX_NUMBER, MAX_WORKER
from .records import SegmentName

HEADER_NBYTES = ROW_NBYTES = 64


class BundleRow(NamedTuple):
    """One segment in a bundle: its name, its length and its first bytes."""

    name: SegmentName
    file_nbytes: int
    data: bytes


def read_bundle(data: bytes, *, run_id: bytes | str | None = None) -> list[BundleRow]:
    """Check header and table of a whole bundle, in the order of "6.1 Header"."""
    check_plain_header(data, BUNDLE_MAGIC, HEADER_NBYTES)
    values = struct.unpack("<8sHHI16sQQI8sI", data[:HEADER_NBYTES])
    _, major, _, count, found, file_nbytes, required, table_crc, reserved, _ = values
    need(major == 1, f"major {major}", "unsupported_version")
    need(required == 0, f"required {required:#x}", "unknown_feature")
    run = bytes.fromhex(run_id) if isinstance(run_id, str) else run_id
    need(run is None or found == run, "run_id", "wrong_run")
    check_length(file_nbytes, len(data))
    need(count <= MAX_BUNDLE_ROWS, "rows", "limit")
    need(not any(reserved), "reserved")
    end = HEADER_NBYTES + ROW_NBYTES * count
    need(len(data) >= end, "table", "truncated")
    need(crc32c(data[HEADER_NBYTES:end]) == table_crc, "table", "checksum")
    rows: list[BundleRow] = []
    for row in struct.iter_unpack("<IIQQQQQQ8s", data[HEADER_NBYTES:end]):
        name, nbytes = SegmentName(*row[:5]), row[7]
        need(max(name.worker, name.attempt) <= MAX_WORKER, "worker", "limit")
        need(name.last <= MAX_NUMBER, "last", "limit")
        need(1 <= name.flushes <= name.last + 1, "count of a row")
        need(row[6] == end and end + nbytes <= len(data), "place of a segment")
        need(nbytes <= row[5] and not any(row[8]), "row of the table")
        rows.append(BundleRow(name, row[5], data[end : end + nbytes]))
        end += nbytes
    need(end == len(data) and len({row.name for row in rows}) == count, "rows of the bundle")
    return rows
