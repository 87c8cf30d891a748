"""Codecs: raw chunks to payloads and back (spec, "Codecs"); bytes in, bytes out, no I/O.

`Encoder` picks a codec for each chunk from a sample, `decode` undoes any of them and
trusts nothing it is given.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import crc32c
import numpy as np
import zstandard
from numpy.typing import NDArray

from tensorstore_fmt import dtypes
from tensorstore_fmt.errors import ArgumentError, FormatError, LimitError, UnsupportedError
from tensorstore_fmt.format import layout, planes, sampling

__all__ = [
    "Buffer",
    "Compression",
    "Encoded",
    "Encoder",
    "decode",
    "encode_delta",
]

Buffer = bytes | bytearray | memoryview | NDArray[np.uint8]
"""One-dimensional contiguous bytes, read only."""

Compression = Literal["auto", "none", "zstd"]

_Bytes = NDArray[np.uint8]

_HEADS: Final = {n: struct.Struct(f"<BBH{n}I") for n in (1, 2, 3, 4, 5, 8, 9)}  # n lengths
_U64: Final = np.dtype("<u8")
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_MAX_WINDOW_NBYTES: Final = layout.MAX_CHUNK_RAW_NBYTES

_SMALLEST_NBYTES: Final = 64  # below, headers eat what could be saved
_BLOCK_NBYTES: Final = 4 * 1024 * 1024
# Scratch larger than this is not kept: a rare huge chunk must not cost memory for ever.
_KEPT_SCRATCH_NBYTES: Final = 4 * 1024 * 1024

Empty = Callable[[int], _Bytes]
"""Gives so many uninitialised bytes."""


@dataclass(slots=True)
class Encoded:
    """A payload, in parts.

    Attributes
    ----------
    codec
        Number of the codec (spec, "Codecs").
    parts
        Put together they are the payload. Memory of their own, or the raw chunk that was
        encoded: valid as long as the caller leaves that alone.
    nbytes
        Length of the payload.
    crc32c
        Checksum of the payload.
    """

    codec: int
    parts: tuple[bytes | memoryview, ...]
    nbytes: int
    crc32c: int

    def to_bytes(self) -> bytes:
        """Give the payload in one piece."""
        return b"".join(self.parts)


class _Cut(NamedTuple):
    """Words, cut into planes.

    Attributes
    ----------
    first
        Room for a header, and behind it the first planes, stored as they are.
    lengths, stored
        The stored length of each plane, and those that are not in `first`.
    """

    first: _Bytes
    lengths: list[int]
    stored: list[bytes]


def _new(nbytes: int) -> _Bytes:
    return np.empty(nbytes, np.uint8)


class Encoder:
    """Encodes chunks; each thread needs its own.

    Parameters
    ----------
    compression
        ``auto`` looks for constant chunks and else stores what a sample says pays: raw,
        one zstd frame, planes, or planes without zeros (sparse). ``zstd`` always tries zstd
        level 3, ``none`` stores raw.
    empty
        Where blocks of memory come from, for planes that are stored as they are. What gives
        memory that was used before saves much of the time: fresh pages cost more than filling them.
    """

    def __init__(self, compression: Compression = "auto", *, empty: Empty = _new) -> None:
        if compression not in ("auto", "none", "zstd"):
            raise ArgumentError(
                f"compression {compression!r} is none of 'auto', 'none', 'zstd'",
                compression=compression,
            )
        self._compression = compression
        self._zstd = sampling.compressors()
        self._empty = empty
        self._scratch: _Bytes = np.empty(0, np.uint8)
        self._block: _Bytes = np.empty(0, np.uint8)
        self._used = 0  # of the block

    def encode(self, raw: _Bytes, *, dtype: str, hint: sampling.Hint | None = None) -> Encoded:
        """Encode one raw chunk.

        Parameters
        ----------
        raw
            The raw chunk (spec, "Raw chunks"): one-dimensional, contiguous.
        dtype
            Name of the stored dtype.
        hint
            What earlier chunks of the series taught. Without one, ``auto`` samples each
            chunk, at several times the cost of encoding it.

        Returns
        -------
        Encoded
            Never longer than `raw`.
        """
        if self._compression == "none" or raw.nbytes == 0:
            return _encoded(layout.CODEC_RAW, raw.data)
        size = dtypes.itemsize(dtype)
        if size and raw.nbytes > size:
            if raw.nbytes % size:
                raise ArgumentError(
                    f"{raw.nbytes} bytes are no whole number of {dtype} elements",
                    nbytes=raw.nbytes,
                    dtype=dtype,
                )
            if _is_constant(raw, size):
                return _encoded(layout.CODEC_CONSTANT, raw[:size].tobytes())
        if self._compression == "zstd":
            return self._encode_whole(raw, sampling.LEVEL_3)
        if raw.nbytes < _SMALLEST_NBYTES:
            return _encoded(layout.CODEC_RAW, raw.data)
        w = dtypes.word_nbytes(dtype)
        choice = None if hint is None else hint.usable(raw.nbytes, w)
        if choice is None:
            choice = self._choose(raw, dtype, () if hint is None else hint.earlier)
            if hint is not None:
                hint.learn(choice)
        encoded = self._follow(raw, choice)
        if hint is not None:
            hint.note(raw.nbytes, encoded.nbytes)
        return encoded

    def _choose(
        self, raw: _Bytes, dtype: str, earlier: Sequence[sampling.Sample]
    ) -> sampling.Choice:
        return sampling.choose(raw, dtype, self._zstd, earlier)

    def _follow(self, raw: _Bytes, choice: sampling.Choice) -> Encoded:
        if choice.codec == layout.CODEC_PLANES:
            return self._encode_planes(raw, choice.settings, choice.flags)
        if choice.codec == layout.CODEC_SPARSE:
            return self._encode_sparse(raw, choice.settings, choice.flags)
        if choice.codec == layout.CODEC_ZSTD:
            return self._encode_whole(raw, choice.settings[0])
        return _encoded(layout.CODEC_RAW, raw.data)

    def _encode_whole(self, raw: _Bytes, setting: int) -> Encoded:
        frame = self._zstd[setting].compress(raw.data)
        if len(frame) >= raw.nbytes:
            return _encoded(layout.CODEC_RAW, raw.data)
        return _encoded(layout.CODEC_ZSTD, frame)

    def _encode_planes(self, raw: _Bytes, settings: Sequence[int], flags: int) -> Encoded:
        cut = self._cut(raw, settings, len(settings), flags)
        w = len(settings) * (2 if flags & layout.PLANES_WIDE else 1)
        return self._put_together(cut, raw, codec=layout.CODEC_PLANES, flags=flags, w=w)

    def _encode_sparse(self, raw: _Bytes, settings: Sequence[int], flags: int) -> Encoded:
        *of_planes, of_map = settings
        w = len(of_planes)
        words = raw.view(planes.WORDS[w])
        is_there = words != 0
        if w == 1 and not flags and np.array_equal(is_there.view(np.uint8), raw):  # only ones
            cut = _Cut(self._room(_HEADS[2].size), [1], [b"\1"])
        else:
            # By number: where zeros come at random, masks take five times as long.
            left = words.take(np.flatnonzero(is_there)).view(np.uint8)
            cut = self._cut(left, of_planes, w + 1, flags)
        cut.stored.append(self._encode_plane(np.packbits(is_there, bitorder="little"), of_map))
        cut.lengths.append(len(cut.stored[-1]))
        return self._put_together(cut, raw, codec=layout.CODEC_SPARSE, flags=flags, w=w)

    def _put_together(self, cut: _Cut, raw: _Bytes, *, codec: int, flags: int, w: int) -> Encoded:
        """Give the payload of planes, if it is shorter than the raw chunk."""
        head = _HEADS[len(cut.lengths)]
        if head.size + sum(cut.lengths) >= raw.nbytes:
            return _encoded(layout.CODEC_RAW, raw.data)
        head.pack_into(cut.first.data, 0, flags, w, 0, *cut.lengths)
        self._used += -(-len(cut.first) // 64) * 64
        return _encoded(codec, cut.first.data, *cut.stored)

    def _cut(self, raw: _Bytes, settings: Sequence[int], nlengths: int, flags: int) -> _Cut:
        """Cut words into planes, for a header with so many lengths."""
        count = len(settings)
        n = raw.nbytes // count
        # Planes that are stored as they are come first, as a rule: they are cut into their place.
        leading = 0
        while leading < count and settings[leading] == sampling.RAW:
            leading += 1
        at = _HEADS[nlengths].size
        first = self._room(at + leading * n)
        scratch = self._scratch_of((count - leading) * n)
        cut = [first[at + i * n : at + (i + 1) * n] for i in range(leading)]
        cut += [scratch[i * n : (i + 1) * n] for i in range(count - leading)]
        if flags & layout.PLANES_WIDE:
            planes.split_wide(raw, cut)
        else:
            planes.split(raw, cut, rotated=flags & layout.PLANES_ROTATED != 0)
        stored = [
            self._encode_plane(plane, setting)
            for plane, setting in zip(cut[leading:], settings[leading:], strict=True)
        ]
        return _Cut(first, [n] * leading + [len(each) for each in stored], stored)

    def _encode_plane(self, plane: _Bytes, setting: int) -> bytes:
        if setting == sampling.RAW:
            return plane.tobytes()
        if _is_constant(plane, 1):
            return plane[:1].tobytes()
        frame = self._zstd[setting].compress(plane.data)
        # A frame of just this length would be read as the plane itself.
        return frame if len(frame) < len(plane) else plane.tobytes()

    # --- memory -----------------------------------------------------------------

    def _room(self, nbytes: int) -> _Bytes:
        """Give memory that is free until `_used` moves on."""
        if self._used + nbytes > len(self._block):
            # The payloads in the old one keep it alive as long as they are needed.
            self._block, self._used = self._empty(max(nbytes, _BLOCK_NBYTES)), 0
        return self._block[self._used : self._used + nbytes]

    def _scratch_of(self, nbytes: int) -> _Bytes:
        if nbytes <= len(self._scratch):
            return self._scratch
        scratch = np.empty(nbytes, np.uint8)
        if nbytes <= _KEPT_SCRATCH_NBYTES:
            self._scratch = scratch
        return scratch


def encode_delta(raw: _Bytes, *, rows: int) -> Encoded:
    """Encode int64 rows of the step table with the delta codec (spec, "delta").

    Parameters
    ----------
    raw
        `rows` rows of equally many int64, contiguous.
    """
    words = raw.view(_U64).reshape(rows, -1)
    deltas = words.copy()
    np.subtract(words[1:], words[:-1], out=deltas[1:])
    payload = np.empty(raw.nbytes, np.uint8)
    planes.split(deltas.reshape(-1).view(np.uint8), list(payload.reshape(8, -1)), rotated=False)
    return _encoded(layout.CODEC_DELTA, payload.data)


def _encoded(codec: int, *parts: bytes | memoryview) -> Encoded:
    nbytes = crc = 0
    for part in parts:
        nbytes += len(part)
        crc = crc32c.crc32c(part, crc)
    return Encoded(codec, parts, nbytes, crc)


def _is_constant(raw: _Bytes, size: int) -> bool:
    """Say whether all elements of `size` bytes have the same bits; cheap if they do not."""
    # Almost everything that is not constant shows it here.
    head = raw[: 16 * size].tobytes()
    if head != head[:size] * (len(head) // size):
        return False
    # Equal to its neighbour everywhere is the same as constant, for any element size.
    step = planes.BLOCK_NBYTES
    equal = np.empty(min(step, raw.nbytes), np.bool_)
    for start in range(0, raw.nbytes - size, step):
        here = raw[start : min(start + step, raw.nbytes - size)]
        there = raw[start + size : start + size + len(here)]
        if not np.equal(here, there, out=equal[: len(here)]).all():
            return False
    return True


# --- decoding -------------------------------------------------------------------


class _Decompressor(threading.local):
    """One zstd decompressor a thread."""

    def __init__(self) -> None:
        self.zstd = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_NBYTES)


_decompressor: Final = _Decompressor()


def decode(
    payload: Buffer,
    out: _Bytes,
    *,
    codec: int,
    dtype: str,
    rows: int = 1,
    span: tuple[int, int] | None = None,
) -> None:
    """Write the raw chunk of a payload to `out`, or raise.

    The payload's checksum is the caller's to check. If this raises, what `out` holds is undefined.

    Parameters
    ----------
    payload
        The stored bytes, all of them.
    out
        Room for exactly the raw chunk: one-dimensional, contiguous, writable; may not overlap
        `payload`.
    codec, dtype
        As in the entry and the catalog.
    rows
        Number of steps in the payload; the delta codec needs it.
    span
        First and last + 1 byte of the raw chunk that the caller will look at, if it is not all:
        the others may be left as they are. Whole elements. The payload is checked all the same.

    Raises
    ------
    LimitError
        More bytes than the spec allows.
    UnsupportedError
        Codec or dtype are not known.
    FormatError
        The payload does not follow the spec, or gives another number of bytes.
    """
    # A slice of it costs half of what one of an array does.
    data = memoryview(payload)  # type: ignore[arg-type]  # arrays are buffers, too
    n, nbytes = len(data), len(out)
    if n > layout.MAX_CHUNK_NBYTES:
        raise _limit("payload", n, layout.MAX_CHUNK_NBYTES)
    if nbytes > layout.MAX_CHUNK_RAW_NBYTES:
        raise _limit("raw chunk", nbytes, layout.MAX_CHUNK_RAW_NBYTES)
    size = dtypes.itemsize(dtype)
    if size and nbytes % size:
        raise _malformed(f"raw chunk of {nbytes} bytes is no whole number of {dtype} elements")
    if codec not in layout.CODEC_NAMES:
        raise UnsupportedError(
            f"codec {codec} is not known to this version; a newer tensorstore_fmt may read it",
            code="unknown_codec",
            codec=codec,
        )
    if codec == layout.CODEC_RAW:
        if n != nbytes:
            raise _malformed(f"raw payload has {n} bytes, expected {nbytes}")
        out[:] = data
    elif nbytes == 0 or codec == layout.CODEC_DROPPED:
        name = layout.CODEC_NAMES[codec]
        raise _malformed(f"a chunk of {nbytes} bytes cannot have a payload with codec {name}")
    elif codec == layout.CODEC_CONSTANT:
        _decode_constant(data, out, size)
    elif codec == layout.CODEC_ZSTD:
        _check_frame(data, nbytes)
        out[:] = _decompress(data, nbytes)
    elif codec == layout.CODEC_PLANES:
        _decode_planes(data, out, dtypes.word_nbytes(dtype), span or (0, nbytes))
    elif codec == layout.CODEC_SPARSE:
        _decode_sparse(data, out, dtypes.word_nbytes(dtype), span or (0, nbytes))
    else:
        _decode_delta(data, out, dtype, rows)


def _decode_constant(data: memoryview, out: _Bytes, size: int) -> None:
    if size == 0:
        raise _malformed("strings cannot have the codec constant")
    if len(data) != size:
        raise _malformed(f"constant payload has {len(data)} bytes, expected one element of {size}")
    # Words of at most 8 bytes: rows of single bytes would be filled slowly.
    word = np.dtype(f"<u{min(size, 8)}")
    out.view(word).reshape(-1, size // word.itemsize)[:] = np.frombuffer(data, word)


def _decode_planes(data: memoryview, out: _Bytes, w: int, span: tuple[int, int]) -> None:
    known = layout.PLANES_ROTATED | layout.PLANES_WIDE if w >= 4 else layout.PLANES_ROTATED
    unit = 2 if data[:1] and data[0] & known & layout.PLANES_WIDE else 1  # bytes of a word
    rotated, cut_at, lengths = _head(data, w, "planes", w // unit, known)
    cut = _planes(data[cut_at:], lengths, len(out) // w * unit)
    if span != (0, len(out)):
        first, last = span[0] // w, -(-span[1] // w)
        cut = [plane if len(plane) == 1 else plane[first * unit : last * unit] for plane in cut]
        out = out[first * w : last * w]
    if unit == 2:
        planes.join_wide(cut, out, rotated=rotated)
    else:
        planes.join(cut, out, rotated=rotated)


def _decode_sparse(data: memoryview, out: _Bytes, w: int, span: tuple[int, int]) -> None:
    rotated, at, lengths = _head(data, w, "sparse", w + 1, layout.PLANES_ROTATED)
    n = len(out) // w
    bits = data[len(data) - lengths.pop() :]
    (bits,) = _planes(bits, [len(bits)], -(-n // 8))
    packed = np.frombuffer(bits, np.uint8)
    if len(packed) == 1:
        packed = packed.repeat(-(-n // 8))
    is_there = np.unpackbits(packed, count=n, bitorder="little").view(np.bool_)
    begin, end = 0, int(np.count_nonzero(is_there))
    cut = _planes(data[at:], lengths, end)
    if span != (0, len(out)):
        first, last = span[0] // w, -(-span[1] // w)
        begin = int(np.count_nonzero(is_there[:first]))
        is_there = is_there[first:last]
        end = begin + int(np.count_nonzero(is_there))
        cut = [plane if len(plane) == 1 else plane[begin:end] for plane in cut]
        out = out[first * w : last * w]
    words = out.view(planes.WORDS[w])
    if begin == end:
        words[:] = 0
        return
    if max(map(len, cut)) == 1:  # masks: all that is there is the same
        one = np.empty(w, np.uint8)
        planes.join(cut, one, rotated=rotated)
        np.multiply(is_there, one.view(words.dtype), out=words)
        return
    left = np.empty(w * (end - begin), np.uint8)
    planes.join(cut, left, rotated=rotated)
    words[:] = 0
    words[np.flatnonzero(is_there)] = left.view(words.dtype)


def _head(
    data: memoryview, w: int, codec: str, nlengths: int, known: int
) -> tuple[bool, int, list[int]]:
    """Check a header with so many lengths.

    Returns
    -------
    rotated
        Whether words are.
    end
        Of the header.
    lengths
        As stored.
    """
    if w == 0:
        raise _malformed(f"strings cannot have the codec {codec}")
    head = _HEADS[nlengths]
    if len(data) < head.size:
        raise _malformed(f"{codec} payload has {len(data)} bytes, its header needs {head.size}")
    flags, stored_w, reserved, *lengths = head.unpack_from(data)
    if flags & ~known or reserved:
        raise _malformed(f"{codec} payload has a reserved bit that is not zero")
    if stored_w != w:
        raise _malformed(f"{codec} payload has words of {stored_w} bytes, the dtype of {w}")
    if head.size + sum(lengths) != len(data):
        raise _malformed(
            f"{codec} payload has {len(data)} bytes, its header says {head.size + sum(lengths)}"
        )
    return bool(flags & layout.PLANES_ROTATED), head.size, lengths


def _planes(data: memoryview, lengths: Sequence[int], n: int) -> list[memoryview]:
    """Give planes of n bytes, or of one that stands for all, that lie behind each other."""
    cut: list[memoryview] = []
    frames: list[int] = []
    at = 0
    # All frames are checked before the first is decompressed.
    for i, length in enumerate(lengths):
        run = data[at : at + length]
        at += length
        if length not in (1, n):
            if not 0 < length < n:
                raise _malformed(f"a plane of {n} bytes cannot be stored in {length}")
            _check_frame(run, n)
            frames.append(i)
        cut += (run,)
    for i in frames:
        cut[i] = _decompress(cut[i], n)
    return cut


def _decode_delta(data: memoryview, out: _Bytes, dtype: str, rows: int) -> None:
    if dtype != "int64":
        raise _malformed(f"{dtype} cannot have the codec delta")
    if len(data) != len(out):
        raise _malformed(f"delta payload has {len(data)} bytes, expected {len(out)}")
    if rows < 1 or len(out) % (8 * rows):
        raise _malformed(f"{len(out)} bytes are not {rows} rows of int64")
    n = len(out) // 8
    planes.join([data[i * n : (i + 1) * n] for i in range(8)], out, rotated=False)
    words = out.view(_U64).reshape(rows, -1)
    np.add.accumulate(words, axis=0, out=words)


def _check_frame(frame: memoryview, nbytes: int) -> None:
    """Refuse what is not a zstd frame that says its content has `nbytes`; allocates nothing."""
    if bytes(frame[:4]) != _ZSTD_MAGIC:
        raise _malformed("zstd frame does not begin with its magic")
    try:
        head = zstandard.get_frame_parameters(frame)
    except zstandard.ZstdError as error:
        raise _malformed(f"zstd frame has a damaged header: {error}") from error
    # An absent size reads as 2^64 - 1 and fails this too.
    if head.content_size != nbytes:
        raise _malformed(f"zstd frame says {head.content_size} bytes, expected {nbytes}")
    if head.dict_id:
        raise _malformed(f"zstd frame needs dictionary {head.dict_id}")
    if head.window_size > _MAX_WINDOW_NBYTES:
        raise _limit("zstd window", head.window_size, _MAX_WINDOW_NBYTES)


def _decompress(frame: memoryview, nbytes: int) -> memoryview:
    """Give the content of a checked frame: exactly `nbytes` bytes, read-only."""
    try:
        content = _decompressor.zstd.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise _malformed(f"zstd frame is damaged: {error}") from error
    if len(content) != nbytes:
        raise _malformed(f"zstd frame gave {len(content)} bytes, expected {nbytes}")
    return memoryview(content)


def _malformed(message: str) -> FormatError:
    return FormatError(message)


def _limit(what: str, found: int, limit: int) -> LimitError:
    return LimitError(f"{what} of {found} bytes, at most {limit} are allowed", nbytes=found)
