"""Placing: payloads checked, decoded, and put where they belong in a result."""

from __future__ import annotations

import math
import threading
from typing import Any, Final, NamedTuple

import crc32c
import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt import dtypes
from tensorstore_fmt.errors import ChecksumError, FormatError
from tensorstore_fmt.format import codec, layout
from tensorstore_fmt.format.strings import unpack_strings
from tensorstore_fmt.reading.plan import Touched

__all__ = ["Decoder", "Payload", "check", "scratch", "straight_places"]

_I64 = NDArray[np.int64]
_Array = NDArray[Any]

_KEPT_SCRATCH_NBYTES: Final = 1024 * 1024


class _Scratch(threading.local):
    """Room for one raw chunk, kept by each thread if it is small."""

    def __init__(self) -> None:
        self.room = np.empty(0, np.uint8)

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        if nbytes > _KEPT_SCRATCH_NBYTES:
            return np.empty(nbytes, np.uint8)
        if len(self.room) < nbytes:
            self.room = np.empty(max(nbytes, 64 * 1024), np.uint8)
        return self.room[:nbytes]


scratch = _Scratch()


def check(payload: memoryview, expected: int) -> None:
    """Refuse a payload with another checksum.

    Raises
    ------
    ChecksumError
    """
    found = crc32c.crc32c(payload)
    if found != expected:
        raise ChecksumError(
            f"checksum {found:08x}, expected {expected:08x}; the file is damaged, or was changed"
        )


def straight_places(touched: Touched, target: _Array) -> _I64 | None:
    """Give where the values of each chunk begin in one step of a result, in bytes.

    None if not all chunks lie there whole and in one piece, as they do in a payload.
    """
    if not target.flags.c_contiguous or not all(touched.is_whole):
        return None
    # Whole chunks in C order, none of which is interrupted by others, follow each other. The
    # first one is as large as any.
    box, lengths = touched.boxes[0], target.shape[1:]
    first = next((i for i, n in enumerate(box) if n != 1), len(box))
    if box[first + 1 :] != lengths[first + 1 :]:
        return None
    ends: _I64 = np.cumsum(touched.sizes)
    return (ends - touched.sizes) * target.itemsize


class Payload(NamedTuple):
    """What the index says of a payload, and which rows of the units' columns are its steps."""

    chunk: int
    begin: int
    end: int
    raw_nbytes: int
    codec: int
    crc32c: int
    kept: int
    place: int  # first byte of its values in the target; −1 if they do not lie there so


class Decoder:
    """Puts the payloads of one group in their places; for one thread.

    Parameters
    ----------
    touched, target
        The group's chunks, and the part of a result that they fill: steps × all axes.
    number, inner
        Of each step in the payloads: its row in the target, and its place in its payload.
    dtype
        As stored.
    is_straight
        Whether payloads have a `place`.
    """

    def __init__(
        self,
        touched: Touched,
        target: _Array,
        number: _I64,
        inner: _I64,
        *,
        dtype: str,
        is_straight: bool,
    ) -> None:
        self._touched = touched
        self._target = target
        self._number = number
        self._inner = inner
        self._dtype_name = dtype
        self._dtype = dtypes.numpy_dtype(dtype)
        self._is_string = dtype == dtypes.STRING
        self._last: _Array | None = None
        self._raw: NDArray[np.uint8] | None = None  # the last one that was put straight
        self._bytes = np.empty(0, np.uint8)
        if is_straight:
            self._bytes = target.reshape(-1).view(np.uint8)
        self._spans: dict[int, tuple[int, int]] = {}

    def put(self, payload: memoryview, what: Payload, *, is_same: bool) -> None:
        """Check and decode one payload; `is_same`: it is the one before (say, a frozen layer)."""
        if what.place >= 0:
            self._put_straight(payload, what, is_same=is_same)
            return
        touched, target = self._touched, self._target
        place, box = touched.places[what.chunk], touched.boxes[what.chunk]
        if what.end - what.begin == 1:
            first, inner = int(self._number[what.begin]), int(self._inner[what.begin])
            rows: slice | _I64 = slice(first, first + 1)
            taken: slice | _I64 = slice(inner, inner + 1)
            is_all = what.kept == 1
        else:
            rows = _as_slice(self._number[what.begin : what.end])
            taken = _as_slice(self._inner[what.begin : what.end])
            is_all = (
                isinstance(rows, slice)
                and isinstance(taken, slice)
                and taken == slice(0, what.kept, 1)
            )
        if is_same and self._last is not None:
            values = self._last.reshape(what.kept, *box)
        else:
            check(payload, what.crc32c)
            room = None
            if is_all and touched.is_whole[what.chunk] and not self._is_string:
                room = target[(rows, *place)]
                room = room if room.flags.c_contiguous else None
            values = self._last = self._values(payload, what, box, room)
            if room is not None:
                return
        target[(rows, *place)] = values[(taken, *touched.local[what.chunk])]

    def _put_straight(self, payload: memoryview, what: Payload, *, is_same: bool) -> None:
        """Do as `put`, for a chunk with one step that lies in the target as in its payload."""
        raw = self._bytes[what.place : what.place + what.raw_nbytes]
        if is_same and self._raw is not None:
            raw[:] = self._raw
            return
        check(payload, what.crc32c)
        codec.decode(payload, raw, codec=what.codec, dtype=self._dtype_name)
        self._raw = raw

    def _span(self, what: Payload, box: tuple[int, ...]) -> tuple[int, int] | None:
        """Give the bytes of a chunk with one step that the selection lies in."""
        if what.kept != 1 or self._is_string:
            return None
        span = self._spans.get(what.chunk)
        if span is None:
            span = self._spans[what.chunk] = _span(
                box, self._touched.local[what.chunk], self._dtype.itemsize
            )
        return span

    def _values(
        self, payload: memoryview, what: Payload, box: tuple[int, ...], room: _Array | None
    ) -> _Array:
        """Give the values of a payload, its steps × the box; written to `room`, if there is one."""
        if room is None and what.codec == layout.CODEC_RAW and not self._is_string:
            if len(payload) != what.raw_nbytes:
                raise FormatError(
                    f"raw payload of {len(payload)} bytes, expected {what.raw_nbytes}"
                )
            return np.frombuffer(payload, self._dtype).reshape(what.kept, *box)
        raw = scratch.take(what.raw_nbytes) if room is None else room.reshape(-1).view(np.uint8)
        codec.decode(
            payload,
            raw,
            codec=what.codec,
            dtype=self._dtype_name,
            rows=what.kept,
            span=self._span(what, box) if room is None else None,
        )
        if self._is_string:
            cut = unpack_strings(raw, what.kept * math.prod(box))
            texts = np.empty(len(cut), object)
            texts[:] = cut
            return texts.reshape(what.kept, *box)
        return raw.view(self._dtype).reshape(what.kept, *box)


def _as_slice(numbers: _I64) -> slice | _I64:
    """Give ascending numbers as a slice where they have even distances."""
    distance = int(numbers[1] - numbers[0])
    if distance > 0 and (np.diff(numbers) == distance).all():
        return slice(int(numbers[0]), int(numbers[-1]) + 1, distance)
    return numbers


def _span(box: tuple[int, ...], local: tuple[slice, ...], itemsize: int) -> tuple[int, int]:
    """Give the first and the last + 1 byte of a box in C order that a selection touches."""
    begin, nbytes = 0, math.prod(box) * itemsize
    for length, axis in zip(box, local, strict=True):
        if not length:
            return 0, 0
        indices = range(*axis.indices(length))
        if not indices:
            return 0, 0
        inner = nbytes // length
        low, high = min(indices[0], indices[-1]), max(indices[0], indices[-1])
        begin += low * inner
        nbytes = (high - low + 1) * inner
        if high > low:
            break
    return begin, begin + nbytes
