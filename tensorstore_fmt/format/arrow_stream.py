"""A look at an Arrow stream before Arrow sees it: its messages, and that none is compressed.

A compressed body says its own length, and pyarrow allocates what it says. So the headers of
the messages are read here, as far as that takes: FlatBuffers tables of Arrow's Message.fbs.
"""

from __future__ import annotations

import struct
from typing import Final

from tensorstore_fmt.errors import FormatError

__all__ = ["check_stream"]

_PREFIX: Final = struct.Struct("<Ii")
_U16: Final = struct.Struct("<H")
_I32: Final = struct.Struct("<i")
_U32: Final = struct.Struct("<I")
_I64: Final = struct.Struct("<q")
_CONTINUATION: Final = 0xFFFFFFFF
_SCHEMA: Final = 1
_RECORD_BATCH: Final = 3
_V5: Final = 4

_EXTENSION: Final = b"ARROW:extension"
_MOST_COLUMNS: Final = 64

# Numbers of the fields in Message, RecordBatch, Schema and Field.
_VERSION, _HEADER_TYPE, _HEADER, _BODY_NBYTES = 0, 1, 2, 3
_COMPRESSION: Final = 3
_FIELDS: Final = 1
_CHILDREN, _FIELD_METADATA = 5, 6


def check_stream(raw: bytes) -> bytes:
    """Refuse what is not one schema, one uncompressed record batch, and the end mark.

    Returns
    -------
    bytes
        The stream, without custom metadata of its columns if any of them names an extension
        type: those that somebody registered with pyarrow would run code of theirs on it.

    Raises
    ------
    FormatError
        Code ``malformed``.
    """
    at = 0
    try:
        for wanted in (_SCHEMA, _RECORD_BATCH):
            at = _check_message(raw, at, wanted)
        mark, nbytes = _PREFIX.unpack_from(raw, at)
    except struct.error:
        raise FormatError("an Arrow stream ends within a message") from None
    if mark != _CONTINUATION or nbytes != 0 or at + _PREFIX.size != len(raw):
        raise FormatError("an Arrow stream does not end behind one record batch")
    return _without_metadata(raw) if _EXTENSION in raw else raw


def _without_metadata(raw: bytes) -> bytes:
    """Mark the custom metadata of all columns as absent."""
    nbytes = _PREFIX.unpack_from(raw)[1]
    message = bytearray(raw[_PREFIX.size : _PREFIX.size + nbytes])
    view = memoryview(message)
    try:
        header = _field(view, _U32.unpack_from(view)[0], _HEADER)
        schema = _target(view, header)
        for column in _tables(view, schema, _FIELDS):
            for child in _tables(view, column, _CHILDREN):
                _clear(message, child, _FIELD_METADATA)
            _clear(message, column, _FIELD_METADATA)
    except (struct.error, IndexError):
        raise FormatError("an Arrow schema points out of its message") from None
    return raw[: _PREFIX.size] + bytes(message) + raw[_PREFIX.size + nbytes :]


def _target(message: memoryview, field: int | None) -> int:
    """Give what a field of a table points to."""
    if field is None:
        raise FormatError("an Arrow schema lacks a part")
    return field + int(_U32.unpack_from(message, field)[0])


def _tables(message: memoryview, table: int, number: int) -> list[int]:
    """Give the tables in a vector that is a field of a table."""
    field = _field(message, table, number)
    if field is None:
        return []
    vector = _target(message, field)
    n = _U32.unpack_from(message, vector)[0]
    if n > _MOST_COLUMNS:
        raise FormatError("an Arrow schema has more columns than any page")
    return [_target(message, vector + 4 + 4 * i) for i in range(n)]


def _clear(message: bytearray, table: int, number: int) -> None:
    """Mark a field of a table as absent; tables that share its description lack it, too."""
    vtable = table - _I32.unpack_from(message, table)[0]
    slot = 4 + 2 * number
    if vtable >= 0 and slot < _U16.unpack_from(message, vtable)[0]:
        _U16.pack_into(message, vtable + slot, 0)


def _check_message(raw: bytes, at: int, wanted: int) -> int:
    """Check the message at an offset; give the offset behind it."""
    mark, nbytes = _PREFIX.unpack_from(raw, at)
    begin = at + _PREFIX.size
    if mark != _CONTINUATION or not 0 < nbytes <= len(raw) - begin:
        raise FormatError("an Arrow stream has no message where one should be")
    message = memoryview(raw)[begin : begin + nbytes]
    table = _U32.unpack_from(message, 0)[0]
    version = _field(message, table, _VERSION)
    kind = _field(message, table, _HEADER_TYPE)
    if version is None or _U16.unpack_from(message, version)[0] != _V5:
        raise FormatError("an Arrow message has another version than V5")
    if kind is None or message[kind] != wanted:
        raise FormatError("an Arrow stream has other messages than a schema and a record batch")
    body = _field(message, table, _BODY_NBYTES)
    body_nbytes = 0 if body is None else _I64.unpack_from(message, body)[0]
    end: int = begin + nbytes + body_nbytes
    if body_nbytes < 0 or end > len(raw):
        raise FormatError("an Arrow message is longer than its stream")
    header = _field(message, table, _HEADER)
    if wanted == _RECORD_BATCH and header is not None:
        batch = header + _U32.unpack_from(message, header)[0]
        if _field(message, batch, _COMPRESSION) is not None:
            raise FormatError("the body of an Arrow message is compressed")
    return end


def _field(message: memoryview, table: int, number: int) -> int | None:
    """Give the offset of a field of a FlatBuffers table; None if it is absent."""
    vtable = table - _I32.unpack_from(message, table)[0]
    if vtable < 0:
        raise FormatError("an Arrow message points out of itself")
    slot = 4 + 2 * number
    if slot >= _U16.unpack_from(message, vtable)[0]:
        return None
    offset = _U16.unpack_from(message, vtable + slot)[0]
    if not offset:
        return None
    if table + offset >= len(message):
        raise FormatError("an Arrow message points out of itself")
    return int(table + offset)
