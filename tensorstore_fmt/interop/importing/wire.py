"""Protobuf's wire format: fields of a message, without the package of that name.

Enough to read event files: varints, fixed 32 and 64 bits, bytes. Groups are refused.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt.errors import FormatError

__all__ = ["DOUBLE", "FLOAT", "Field", "Value", "fields", "packed_varints", "signed", "text"]

Value: TypeAlias = int | memoryview
"""A varint as an unsigned number; anything else as its bytes."""

Field: TypeAlias = tuple[int, Value]

DOUBLE: Final = struct.Struct("<d")
FLOAT: Final = struct.Struct("<f")

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_NBYTES: Final = 10


def fields(message: memoryview) -> Iterator[Field]:
    """Iterate over the fields of a message, as (number, value), in their order.

    Raises
    ------
    FormatError
        It is no message: a field ends behind it, or has a type that event files do not use.
    """
    at, end = 0, len(message)
    while at < end:
        key, at = _varint(message, at)
        kind = key & 7
        if kind == _VARINT:
            number, at = _varint(message, at)
            yield key >> 3, number
            continue
        if kind == _BYTES:
            nbytes, at = _varint(message, at)
        elif kind == _FIXED32:
            nbytes = 4
        elif kind == _FIXED64:
            nbytes = 8
        else:
            raise FormatError(f"a field of wire type {kind} at byte {at} of a message", offset=at)
        if at + nbytes > end:
            raise FormatError(
                f"a field of {nbytes} bytes at byte {at} of a message of {end}", offset=at
            )
        yield key >> 3, message[at : at + nbytes]
        at += nbytes


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    for place in range(at, min(at + _MAX_VARINT_NBYTES, len(message))):
        byte = message[place]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, place + 1
        shift += 7
    raise FormatError(f"a number that does not end, at byte {at} of a message", offset=at)


def signed(value: int) -> int:
    """Take a varint for an int64 in two's complement."""
    return value - 2**64 if value >= 2**63 else value


def text(value: Value) -> str:
    """Take bytes for text.

    Raises
    ------
    FormatError
        They are no UTF-8, or no bytes.
    """
    if isinstance(value, int):
        raise FormatError("a number where text is expected")
    try:
        return str(value, "utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"text that is no UTF-8: {error}") from None


def packed_varints(data: memoryview) -> NDArray[np.uint64]:
    """Decode many varints that stand behind one another, without a loop over them."""
    raw = np.frombuffer(data, np.uint8)
    if not len(raw):
        return np.empty(0, np.uint64)
    ends = np.flatnonzero(raw < 0x80)
    if not len(ends) or ends[-1] != len(raw) - 1:
        raise FormatError("packed numbers whose last one does not end")
    begins = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - begins + 1
    if int(lengths.max()) > _MAX_VARINT_NBYTES:
        raise FormatError("a packed number of more than 64 bits")
    shifts = 7 * (np.arange(len(raw)) - np.repeat(begins, lengths))
    parts = (raw & 0x7F).astype(np.uint64) << shifts.astype(np.uint64)
    sums: NDArray[np.uint64] = np.add.reduceat(parts, begins)
    return sums
