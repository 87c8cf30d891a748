"""TFRecord files: framed records with masked CRC32C, read in windows of bounded memory.

A record is a length (8 bytes), the masked CRC32C of the length, the payload, and the masked
CRC32C of the payload; all little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import crc32c

from tensorstore_fmt.errors import ChecksumError, FormatError, TruncatedError
from tensorstore_fmt.storage.foreign import ForeignFolder

__all__ = ["WINDOW_NBYTES", "Bad", "Record", "masked_crc", "records"]

WINDOW_NBYTES: Final = 8 * 1024 * 1024

_HEAD: Final = struct.Struct("<QI")
_FOOT: Final = struct.Struct("<I")
_MAX_NBYTES: Final = 2**31 + 64 * 1024  # a protobuf message has less than 2 GiB


def masked_crc(data: bytes | memoryview) -> int:
    """Give the checksum as it stands in these files."""
    crc = crc32c.crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFF_FFFF


UNCHECKED_CRC: Final = masked_crc(b"0x12345678")
"""What smdebug writes in place of a payload's checksum, unless it is told to compute one."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record.

    Attributes
    ----------
    offset
        Where it begins in its file.
    payload
        A view that is good until the next record is asked for.
    is_checked
        Whether it has a checksum, which then is right.
    """

    offset: int
    payload: memoryview
    is_checked: bool


@dataclass(frozen=True, slots=True)
class Bad:
    """A place where there is no record that could be read.

    Attributes
    ----------
    offset
        Where it begins.
    error
        What is wrong: `ChecksumError`, `TruncatedError` or `FormatError`.
    """

    offset: int
    error: FormatError


def records(
    folder: ForeignFolder, path: str, begin: bytes, *, known: Sequence[int] = ()
) -> Iterator[Record | Bad]:
    """Iterate over the records of a file; what is damaged comes as `Bad`, and it goes on behind.

    Holds one record, or one window of small ones, in memory.

    Parameters
    ----------
    begin
        The first bytes of the file, if they were read already.
    known
        Ascending offsets of records. Where the length of a record is damaged, reading goes on at
        the next of them; without any, the rest of the file is lost.

    Raises
    ------
    FileNotFoundError, OSError
        The file is not there, or the storage failed.
    """
    window = _Window(folder, path, begin)
    at = 0
    while True:
        head = window.get(at, _HEAD.size)
        if not head:
            return
        found = _record(window, at, head)
        yield found
        if isinstance(found, Record):
            at += _HEAD.size + len(found.payload) + _FOOT.size
            continue
        step = found.error.facts.get("record_nbytes")
        if isinstance(step, int):  # only the payload is damaged
            at += step
            continue
        following = [offset for offset in known if offset > at]
        if not following:
            return
        at = following[0]


def _record(window: _Window, at: int, head: memoryview) -> Record | Bad:
    if len(head) < _HEAD.size:
        return Bad(at, TruncatedError(f"the file ends {len(head)} bytes into a record", offset=at))
    nbytes, crc = _HEAD.unpack(head)
    if masked_crc(head[:8]) != crc:
        return Bad(at, ChecksumError("the length of a record has a wrong checksum", offset=at))
    if nbytes > _MAX_NBYTES:
        return Bad(at, FormatError(f"a record of {nbytes} bytes", code="limit", offset=at))
    total = _HEAD.size + nbytes + _FOOT.size
    data = window.get(at, total)
    if len(data) < total:
        found = f"a record of {total} bytes, of which the file has {len(data)}"
        return Bad(at, TruncatedError(found, offset=at))
    payload = data[_HEAD.size : -_FOOT.size]
    (crc,) = _FOOT.unpack(data[-_FOOT.size :])
    if crc == masked_crc(payload):
        return Record(at, payload, is_checked=True)
    if crc == UNCHECKED_CRC:
        return Record(at, payload, is_checked=False)
    error = ChecksumError("a record has a wrong checksum", offset=at, record_nbytes=total)
    return Bad(at, error)


class _Window:
    """The part of a file that is in memory."""

    def __init__(self, folder: ForeignFolder, path: str, begin: bytes) -> None:
        self._folder = folder
        self._path = path
        self._data = memoryview(begin)
        self._start = 0

    def get(self, start: int, nbytes: int) -> memoryview:
        """Give bytes of the file, fewer only where it ends."""
        skip = start - self._start
        if skip >= 0 and skip + nbytes <= len(self._data):
            return self._data[skip : skip + nbytes]
        self._data = memoryview(b"")  # two windows would be too many
        self._data = memoryview(self._folder.read(self._path, start, max(nbytes, WINDOW_NBYTES)))
        self._start = start
        return self._data[:nbytes]
