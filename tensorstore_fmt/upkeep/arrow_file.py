"""The frame of an Arrow IPC file, read without Arrow: where its messages and its footer lie.

Arrow trusts what it is given: a footer with wrong offsets aborts the process. So the few
fields that say where things lie are read here first, each checked against the file, and
only then a child process opens anything (`shard_check`). Reads a few KB per record batch.

The layouts are those of Arrow's ``Message.fbs`` and ``File.fbs`` (metadata version V5).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from tensorstore_fmt.errors import FormatError

__all__ = ["ArrowFrame", "Block", "parse_footer", "patch_footer", "walk"]

MAGIC: Final = b"ARROW1\0\0"
END_MAGIC: Final = b"ARROW1"
_CONTINUATION: Final = 0xFFFFFFFF
_PREFIX: Final = struct.Struct("<II")
_BLOCK: Final = struct.Struct("<qi4xq")
_BUFFER: Final = struct.Struct("<qq")
_TAIL_NBYTES: Final = 4 + len(END_MAGIC)
_V5: Final = 4
_SCHEMA, _RECORD_BATCH = 1, 3
_FIRST_READ_NBYTES: Final = 4096
_MAX_METADATA_NBYTES: Final = 16 * 1024 * 1024
_MAX_FOOTER_NBYTES: Final = 64 * 1024 * 1024

Read: TypeAlias = Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True)
class Block:
    """A message: its prefix and metadata, then its body.

    ``payload_at`` and ``payload_nbytes`` are those of the last buffer of a record batch, in the
    file; -1 where they are not known (a block read from a footer).
    """

    offset: int
    metadata_nbytes: int
    body_nbytes: int
    rows: int = -1
    payload_at: int = -1
    payload_nbytes: int = -1

    @property
    def end(self) -> int:
        """Where the next message begins."""
        return self.offset + self.metadata_nbytes + self.body_nbytes

    @property
    def place(self) -> tuple[int, int, int]:
        """What a footer says of it."""
        return self.offset, self.metadata_nbytes, self.body_nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrowFrame:
    """What stands where in an Arrow file.

    Attributes
    ----------
    schema
        The first message, None if it cannot be read.
    batches
        Record batches that are all there, in order.
    end
        Behind the last of them: where a writer would go on.
    is_ended
        Whether the end-of-stream mark follows at `end`.
    footer
        Record batches as the footer says; None if there is no footer.
    footer_at
        Where the footer begins.
    problem
        Why reading stopped at `end` although the file goes on; None if it did not.
    """

    nbytes: int
    schema: Block | None = None
    batches: tuple[Block, ...] = ()
    end: int = 0
    is_ended: bool = False
    footer: tuple[Block, ...] | None = None
    footer_at: int = -1
    problem: str | None = None

    @property
    def is_sealed(self) -> bool:
        """Whether the file has its footer."""
        return self.footer is not None

    @property
    def torn_nbytes(self) -> int:
        """Bytes behind the last whole batch of a file without a footer."""
        return 0 if self.is_sealed else self.nbytes - self.end


# --- flatbuffers --------------------------------------------------------------------


class _Table:
    """A table of a flatbuffer; whatever lies outside of it is `FormatError` or struct.error."""

    __slots__ = ("at", "data")

    def __init__(self, data: bytes, at: int) -> None:
        if not 0 <= at <= len(data) - 4:
            raise FormatError("a flatbuffer points outside of itself")
        self.data, self.at = data, at

    @classmethod
    def root(cls, data: bytes) -> _Table:
        return cls(data, _u32(data, 0))

    def field(self, number: int) -> int:
        """Give the place of a field; 0 if it has its default."""
        vtable = self.at - int(struct.unpack_from("<i", self.data, self.at)[0])
        if not 0 <= vtable <= len(self.data) - 4:
            raise FormatError("a flatbuffer points outside of itself")
        size = int(struct.unpack_from("<H", self.data, vtable)[0])
        if 4 + 2 * number + 2 > size:
            return 0
        relative = int(struct.unpack_from("<H", self.data, vtable + 4 + 2 * number)[0])
        return self.at + relative if relative else 0

    def number(self, field: int, form: str) -> int:
        at = self.field(field)
        return int(struct.unpack_from(form, self.data, at)[0]) if at else 0

    def table(self, field: int) -> _Table | None:
        at = self.field(field)
        return _Table(self.data, at + _u32(self.data, at)) if at else None

    def vector(self, field: int, item_nbytes: int) -> tuple[int, int]:
        """Give the place of the first item and the number of items."""
        at = self.field(field)
        if not at:
            return 0, 0
        at += _u32(self.data, at)
        count = _u32(self.data, at)
        if at + 4 + count * item_nbytes > len(self.data):
            raise FormatError("a flatbuffer points outside of itself")
        return at + 4, count


def _u32(data: bytes, at: int) -> int:
    return int(struct.unpack_from("<I", data, at)[0])


# --- messages -------------------------------------------------------------------------


def _parse_message(metadata: bytes, offset: int, nbytes: int) -> tuple[int, Block]:
    """Read the metadata of a message; give its type and where it lies."""
    message = _Table.root(metadata)
    if message.number(0, "<h") != _V5:
        raise FormatError("a message is not of metadata version V5")
    kind, body_nbytes = message.number(1, "<B"), message.number(3, "<q")
    block = Block(offset, _PREFIX.size + len(metadata), body_nbytes)
    if body_nbytes < 0 or body_nbytes % 8 or block.end > nbytes:
        raise FormatError(f"a message ends at {block.end:,}, the file at {nbytes:,}")
    if kind != _RECORD_BATCH:
        return kind, block
    batch = message.table(2)
    if batch is None:
        raise FormatError("a record batch has no header")
    if batch.field(3):
        raise FormatError("a record batch is compressed")
    rows = batch.number(0, "<q")
    first, count = batch.vector(2, _BUFFER.size)
    payload = (0, 0)
    for i in range(count):
        payload = _BUFFER.unpack_from(metadata, first + i * _BUFFER.size)
        if not 0 <= payload[0] <= body_nbytes - payload[1] or payload[1] < 0:
            raise FormatError("a buffer lies outside of its record batch")
    begin = offset + block.metadata_nbytes
    return kind, replace(block, rows=rows, payload_at=begin + payload[0], payload_nbytes=payload[1])


def _read_message(read: Read, offset: int, nbytes: int) -> tuple[int, Block] | None:
    """Read the message at a place; None if the end-of-stream mark stands there."""
    head = read(offset, min(offset + _FIRST_READ_NBYTES, nbytes))
    if len(head) < _PREFIX.size:
        raise FormatError("the file ends in the prefix of a message")
    mark, size = _PREFIX.unpack_from(head)
    if mark != _CONTINUATION:
        raise FormatError(f"no message begins at {offset:,}")
    if size == 0:
        return None
    end = offset + _PREFIX.size + size
    if size > _MAX_METADATA_NBYTES or size % 8 or end > nbytes:
        raise FormatError(f"the metadata of a message end at {end:,}, the file at {nbytes:,}")
    if len(head) < _PREFIX.size + size:
        head += read(offset + len(head), end)
    metadata = head[_PREFIX.size : _PREFIX.size + size]
    try:
        return _parse_message(metadata, offset, nbytes)
    except struct.error as error:
        raise FormatError(f"the metadata of a message are damaged: {error}") from None


def walk(read: Read, nbytes: int) -> ArrowFrame:
    """Find the messages of an Arrow file, and its footer.

    Parameters
    ----------
    read
        Gives the bytes from a start to a stop, which lie inside the file.
    nbytes
        Length of the file.
    """
    footer, footer_at, problem = _read_footer(read, nbytes)
    frame = ArrowFrame(nbytes=nbytes, footer=footer, footer_at=footer_at)
    limit = footer_at if footer is not None else nbytes
    if nbytes < len(MAGIC) or read(0, len(MAGIC)) != MAGIC:
        return replace(frame, problem="it does not begin as an Arrow file")
    at, schema, batches = len(MAGIC), None, []
    frame = replace(frame, end=at)
    while at < limit:
        try:
            found = _read_message(read, at, limit)
            if found is None:
                return replace(frame, is_ended=True, problem=problem)
            kind, block = found
            if kind != (_SCHEMA if schema is None else _RECORD_BATCH) or (
                kind == _SCHEMA and block.body_nbytes
            ):
                raise FormatError(f"a message has the type {kind}")
        except FormatError as error:
            batches += _listed_batches(read, footer or (), at)
            return replace(frame, batches=tuple(batches), problem=error.message)
        at = block.end
        if schema is None:
            schema = block
        else:
            batches.append(block)
        frame = replace(frame, schema=schema, batches=tuple(batches), end=at)
    if footer is not None:
        problem = "the end-of-stream mark is missing"
    return replace(frame, problem=problem)


def _listed_batches(read: Read, listed: tuple[Block, ...], behind: int) -> list[Block]:
    """Give the record batches behind a damaged message that a footer still knows."""
    batches = []
    for block in listed:
        if block.offset <= behind:
            continue
        try:
            found = _read_message(read, block.offset, block.end)
        except FormatError:
            continue
        if found is not None and found[0] == _RECORD_BATCH and found[1].place == block.place:
            batches.append(found[1])
    return batches


# --- the footer -------------------------------------------------------------------------


def parse_footer(footer: bytes, nbytes: int) -> tuple[Block, ...]:
    """Read the record batches that a footer lists; each lies in the first `nbytes` bytes."""
    try:
        table = _Table.root(footer)
        if table.number(0, "<h") != _V5:
            raise FormatError("the footer is not of metadata version V5")
        if table.vector(2, _BLOCK.size)[1]:
            raise FormatError("the footer lists dictionaries")
        first, count = table.vector(3, _BLOCK.size)
        blocks = [Block(*_BLOCK.unpack_from(footer, first + i * _BLOCK.size)) for i in range(count)]
    except struct.error as error:
        raise FormatError(f"the footer is damaged: {error}") from None
    for block in blocks:
        if (
            block.offset < len(MAGIC)
            or block.offset % 8
            or block.metadata_nbytes < _PREFIX.size
            or block.metadata_nbytes % 8
            or not 0 <= block.body_nbytes <= nbytes
            or block.end > nbytes
        ):
            raise FormatError(f"the footer lists a record batch at {block.place}")
    return tuple(blocks)


def _read_footer(read: Read, nbytes: int) -> tuple[tuple[Block, ...] | None, int, str | None]:
    if nbytes < len(MAGIC) + _TAIL_NBYTES:
        return None, -1, None
    tail = read(nbytes - _TAIL_NBYTES, nbytes)
    if tail[4:] != END_MAGIC:
        return None, -1, None
    size = _u32(tail, 0)
    begin = nbytes - _TAIL_NBYTES - size
    if size > _MAX_FOOTER_NBYTES or begin < len(MAGIC):
        return None, -1, f"the footer says that it has {size:,} bytes"
    try:
        return parse_footer(read(begin, nbytes - _TAIL_NBYTES), begin), begin, None
    except FormatError as error:
        return None, -1, error.message


def patch_footer(tail: bytes, blocks: tuple[tuple[int, int, int], ...]) -> bytes:
    """Put the places of record batches into a footer that lists as many.

    Parameters
    ----------
    tail
        The end of an Arrow file, from its end-of-stream mark on.
    blocks
        (offset, metadata length, body length) of each batch.
    """
    size = _u32(tail, len(tail) - _TAIL_NBYTES)
    begin = len(tail) - _TAIL_NBYTES - size
    footer = bytearray(tail[begin : begin + size])
    first, count = _Table.root(bytes(footer)).vector(3, _BLOCK.size)
    if count != len(blocks):
        raise FormatError(f"the footer lists {count} record batches, not {len(blocks)}")
    for i, block in enumerate(blocks):
        _BLOCK.pack_into(footer, first + i * _BLOCK.size, *block)
    return tail[:begin] + bytes(footer) + tail[begin + size :]
