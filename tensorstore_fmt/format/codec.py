"""Codecs: raw chunks to payloads and back (spec, "Codecs"); bytes in, bytes out, no I/O.

`Encoder` picks a codec for each chunk from a sample, `decode` undoes any of them and
trusts nothing it is given.
"""

from __future__ import annotations

import struct
import threading
from dataclasses import dataclass
from typing import Final, Literal

import crc32c
import numpy as np
import zstandard
from numpy.typing import NDArray

from tensorstore_fmt import dtypes
from tensorstore_fmt.errors import ArgumentError, FormatError, LimitError, UnsupportedError
from tensorstore_fmt.format import layout, planes

__all__ = [
    "Buffer",
    "Compression",
    "Encoded",
    "Encoder",
    "Hint",
    "decode",
    "encode_delta",
]

Buffer = bytes | bytearray | memoryview | NDArray[np.uint8]
"""One-dimensional contiguous bytes, read only."""

Compression = Literal["auto", "none", "zstd"]

_Bytes = NDArray[np.uint8]

_PLANES_HEAD: Final = struct.Struct("<BBH")
_U32: Final = np.dtype("<u4")
_U64: Final = np.dtype("<u8")
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_MAX_WINDOW_NBYTES: Final = layout.MAX_CHUNK_RAW_NBYTES

# --- how a run of bytes is stored ---------------------------------------------
_RAW: Final = 0
_ENTROPY: Final = 1  # zstd for exponents: nothing to match, only entropy
_LEVEL_1: Final = 2
_LEVEL_3: Final = 3

_ENTROPY_PARAMETERS: Final = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST,
    min_match=7,
    hash_log=6,
    chain_log=6,
    window_log=17,
    search_log=1,
    target_length=0,
)

# --- sampling -------------------------------------------------------------------
_WHOLE_SAMPLE_NBYTES: Final = 64 * 1024
_PLANE_SAMPLE_WORDS: Final = 8192
_STRETCHES: Final = 4

# A slower setting has to save this fraction of its bytes more than the next faster one.
_PAYS: Final = {_ENTROPY: 1 / 64, _LEVEL_1: 1 / 64, _LEVEL_3: 1 / 64}
_WHOLE_PAYS: Final = 0.97
_ROTATION_PAYS: Final = 0.995  # it costs a tenth of the time to encode, more to decode

_SMALLEST_NBYTES: Final = 64  # below, headers eat what could be saved
_FIRST_INTERVAL_NBYTES: Final = 32 * 1024 * 1024
_LAST_INTERVAL_NBYTES: Final = 256 * 1024 * 1024
_DRIFT: Final = 0.05
_DRIFT_CHUNKS: Final = 16
_GROWTH: Final = 4

# Scratch larger than this is not kept: a rare huge chunk must not cost memory for ever.
_KEPT_SCRATCH_NBYTES: Final = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A payload, in parts.

    Attributes
    ----------
    codec
        Number of the codec (spec, "Codecs").
    parts
        Put together they are the payload. They own their memory or alias the raw chunk
        that was encoded: valid as long as the caller leaves that alone.
    nbytes
        Length of the payload.
    crc32c
        Checksum of the payload.
    """

    codec: int
    parts: tuple[Buffer, ...]
    nbytes: int
    crc32c: int

    def to_bytes(self) -> bytes:
        """Give the payload in one piece."""
        return b"".join(map(_view, self.parts))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What a sample said: codec, and a setting for the whole chunk or for each plane."""

    codec: int
    settings: tuple[int, ...]
    rotated: bool
    expected: float
    sampled_nbytes: int

    def agrees(self, other: _Plan) -> bool:
        return (self.codec, self.settings, self.rotated) == (
            other.codec,
            other.settings,
            other.rotated,
        )


class Hint:
    """What was learned from earlier chunks of a series, so that sampling is rare.

    The caller keeps one per series and passes it to each `Encoder.encode`. A sample is taken
    at the first chunk, then every 32 MiB, at most twice as rarely each time it says the
    same again (up to 256 MiB), when chunks become much larger, and when what was
    achieved drifts from what the sample promised. Several threads may use one: a race
    costs or saves a sample, never correctness.
    """

    __slots__ = ("_chunks", "_interval", "_nbytes", "_plan")

    def __init__(self) -> None:
        self._plan: _Plan | None = None
        self._interval = _FIRST_INTERVAL_NBYTES
        self._nbytes = 0
        self._chunks = 0

    def _usable(self, nbytes: int, nsettings: int) -> _Plan | None:
        plan = self._plan
        if (
            plan is None
            or self._nbytes >= self._interval
            or nbytes >= _GROWTH * plan.sampled_nbytes
            or (plan.codec == layout.CODEC_PLANES and len(plan.settings) != nsettings)
        ):
            return None
        return plan

    def _learn(self, plan: _Plan) -> None:
        same = self._plan is not None and self._plan.agrees(plan)
        self._interval = (
            min(2 * self._interval, _LAST_INTERVAL_NBYTES) if same else _FIRST_INTERVAL_NBYTES
        )
        self._plan = plan
        self._nbytes = self._chunks = 0

    def _note(self, nbytes: int, stored: int) -> None:
        self._nbytes += nbytes
        self._chunks += 1
        plan = self._plan
        if (
            plan is not None
            and self._chunks >= _DRIFT_CHUNKS
            and abs(stored / nbytes - plan.expected) > _DRIFT
        ):
            self._nbytes = self._interval


class Encoder:
    """Encodes chunks; each thread needs its own.

    Parameters
    ----------
    compression
        ``auto`` looks for constant chunks and else stores what a sample says pays: raw,
        one zstd frame, or planes. ``zstd`` always tries zstd level 3, ``none`` stores raw.
    """

    def __init__(self, compression: Compression = "auto") -> None:
        if compression not in ("auto", "none", "zstd"):
            raise ArgumentError(
                f"compression {compression!r} is none of 'auto', 'none', 'zstd'",
                compression=compression,
            )
        self._compression = compression
        self._zstd = {
            _ENTROPY: zstandard.ZstdCompressor(compression_params=_ENTROPY_PARAMETERS),
            _LEVEL_1: zstandard.ZstdCompressor(level=1),
            _LEVEL_3: zstandard.ZstdCompressor(level=3),
        }
        self._scratch: _Bytes = np.empty(0, np.uint8)

    def encode(self, raw: _Bytes, *, dtype: str, hint: Hint | None = None) -> Encoded:
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
            Never longer than `raw`. Its parts own their memory or alias `raw`.
        """
        if self._compression == "none" or raw.nbytes == 0:
            return _encoded(layout.CODEC_RAW, (raw,) if raw.nbytes else ())
        size = dtypes.itemsize(dtype)
        if size and raw.nbytes > size:
            if raw.nbytes % size:
                raise ArgumentError(
                    f"{raw.nbytes} bytes are no whole number of {dtype} elements",
                    nbytes=raw.nbytes,
                    dtype=dtype,
                )
            if _is_constant(raw, size):
                return _encoded(layout.CODEC_CONSTANT, (raw[:size].tobytes(),))
        if self._compression == "zstd":
            return self._encode_whole(raw, _LEVEL_3)
        if raw.nbytes < _SMALLEST_NBYTES:
            return _encoded(layout.CODEC_RAW, (raw,))
        w = dtypes.word_nbytes(dtype)
        plan = None if hint is None else hint._usable(raw.nbytes, w)
        if plan is None:
            plan = self._plan(raw, dtype)
            if hint is not None:
                hint._learn(plan)
        encoded = self._follow(raw, plan)
        if hint is not None:
            hint._note(raw.nbytes, encoded.nbytes)
        return encoded

    def _follow(self, raw: _Bytes, plan: _Plan) -> Encoded:
        if plan.codec == layout.CODEC_PLANES:
            return self._encode_planes(raw, plan.settings, rotated=plan.rotated)
        if plan.codec == layout.CODEC_ZSTD:
            return self._encode_whole(raw, plan.settings[0])
        return _encoded(layout.CODEC_RAW, (raw,))

    def _encode_whole(self, raw: _Bytes, setting: int) -> Encoded:
        frame = self._zstd[setting].compress(raw.data)
        if len(frame) >= raw.nbytes:
            return _encoded(layout.CODEC_RAW, (raw,))
        return _encoded(layout.CODEC_ZSTD, (frame,))

    def _encode_planes(self, raw: _Bytes, settings: tuple[int, ...], *, rotated: bool) -> Encoded:
        w = len(settings)
        n = raw.nbytes // w
        # Planes stored raw are cut straight into memory of the result, neighbours into one part.
        owned = np.empty(n * settings.count(_RAW), np.uint8)
        scratch = self._room(n * (w - settings.count(_RAW)))
        cut: list[_Bytes] = []
        owned_used = scratch_used = 0
        for setting in settings:
            if setting == _RAW:
                cut.append(owned[owned_used : owned_used + n])
                owned_used += n
            else:
                cut.append(scratch[scratch_used : scratch_used + n])
                scratch_used += n
        planes.split(raw, cut, rotated=rotated)

        stored = [
            plane if setting == _RAW else self._encode_plane(plane, setting)
            for plane, setting in zip(cut, settings, strict=True)
        ]
        lengths = np.array([len(plane) for plane in stored], _U32)
        flags = layout.PLANES_ROTATED if rotated else 0
        parts: list[Buffer] = [_PLANES_HEAD.pack(flags, w, 0) + lengths.tobytes()]
        owned_used = i = 0
        while i < w:
            run = i
            while run < w and settings[run] == _RAW:
                run += 1
            if run > i:
                parts.append(owned[owned_used : owned_used + (run - i) * n])
                owned_used += (run - i) * n
                i = run
            else:
                parts.append(stored[i])
                i += 1
        if len(parts[0]) + int(lengths.sum(dtype=np.int64)) >= raw.nbytes:
            return _encoded(layout.CODEC_RAW, (raw,))
        return _encoded(layout.CODEC_PLANES, tuple(parts))

    def _encode_plane(self, plane: _Bytes, setting: int) -> Buffer:
        if _is_constant(plane, 1):
            return plane[:1].tobytes()
        frame = self._zstd[setting].compress(plane.data)
        # A frame of just this length would be read as the plane itself.
        return frame if len(frame) < len(plane) else plane.copy()

    def _room(self, nbytes: int) -> _Bytes:
        if nbytes <= len(self._scratch):
            return self._scratch
        room = np.empty(nbytes, np.uint8)
        if nbytes <= _KEPT_SCRATCH_NBYTES:
            self._scratch = room
        return room

    # --- choosing ---------------------------------------------------------------

    def _plan(self, raw: _Bytes, dtype: str) -> _Plan:
        """Choose codec and settings from samples of a chunk."""
        size, w = dtypes.itemsize(dtype), dtypes.word_nbytes(dtype)
        best = _Plan(
            codec=layout.CODEC_RAW,
            settings=(),
            rotated=False,
            expected=1 - _PAYS[_ENTROPY],  # what anything else has to beat
            sampled_nbytes=raw.nbytes,
        )
        if w > 1:
            sample = _sample(raw, size)
            is_float = not dtypes.is_integer(dtype)
            for rotated in (False, True) if is_float else (False,):
                settings, expected = self._plan_planes(sample, w, rotated=rotated)
                expected += (layout.PLANES_HEADER_NBYTES + 4 * w) / raw.nbytes
                if expected < best.expected * (_ROTATION_PAYS if rotated else 1):
                    best = _Plan(
                        codec=layout.CODEC_PLANES,
                        settings=settings,
                        rotated=rotated,
                        expected=expected,
                        sampled_nbytes=raw.nbytes,
                    )
        # The middle: chunks often begin and end with padding.
        middle = max(0, (raw.nbytes - _WHOLE_SAMPLE_NBYTES) // 2)
        whole = raw[middle : middle + _WHOLE_SAMPLE_NBYTES]
        setting, expected = self._plan_run(
            whole, (_ENTROPY, _LEVEL_1, _LEVEL_3) if w == 1 else (_LEVEL_1, _LEVEL_3)
        )
        if expected < best.expected * _WHOLE_PAYS:
            best = _Plan(
                codec=layout.CODEC_ZSTD,
                settings=(setting,),
                rotated=False,
                expected=expected,
                sampled_nbytes=raw.nbytes,
            )
        return best

    def _plan_planes(
        self, sample: _Bytes, w: int, *, rotated: bool
    ) -> tuple[tuple[int, ...], float]:
        n = len(sample) // w
        cut = list(np.empty((w, n), np.uint8))
        planes.split(sample, cut, rotated=rotated)
        chosen = [self._plan_run(plane, (_ENTROPY, _LEVEL_1, _LEVEL_3)) for plane in cut]
        settings = tuple(setting for setting, _ in chosen)
        if not any(settings):
            return settings, 1.0
        return settings, sum(expected for _, expected in chosen) / w

    def _plan_run(self, run: _Bytes, settings: tuple[int, ...]) -> tuple[int, float]:
        """Choose how to store a run of bytes; give the fraction of it that remains."""
        best, remains = _RAW, 1.0
        for setting in settings:
            fraction = len(self._zstd[setting].compress(run.data)) / len(run)
            if fraction < remains - _PAYS[setting]:
                best, remains = setting, fraction
        return best, remains


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
    return _encoded(layout.CODEC_DELTA, (payload,))


def _view(buffer: Buffer) -> memoryview:
    return buffer.data if isinstance(buffer, np.ndarray) else memoryview(buffer)


def _encoded(codec: int, parts: tuple[Buffer, ...]) -> Encoded:
    crc = 0
    for part in parts:
        crc = crc32c.crc32c(_view(part), crc)
    return Encoded(codec=codec, parts=parts, nbytes=sum(map(len, parts)), crc32c=crc)


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


def _sample(raw: _Bytes, size: int) -> _Bytes:
    """Take whole elements from a few places of a chunk."""
    count = len(raw) // size
    if count <= _PLANE_SAMPLE_WORDS:
        return raw
    stretch = _PLANE_SAMPLE_WORDS // _STRETCHES
    starts = [(count - stretch) * i // (_STRETCHES - 1) for i in range(_STRETCHES)]
    return np.concatenate([raw[s * size : (s + stretch) * size] for s in starts])


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
    data = np.frombuffer(payload, np.uint8) if len(payload) else np.empty(0, np.uint8)
    if len(data) > layout.MAX_CHUNK_NBYTES:
        raise _limit("payload", len(data), layout.MAX_CHUNK_NBYTES)
    if len(out) > layout.MAX_CHUNK_RAW_NBYTES:
        raise _limit("raw chunk", len(out), layout.MAX_CHUNK_RAW_NBYTES)
    size = dtypes.itemsize(dtype)
    if size and len(out) % size:
        raise _malformed(f"raw chunk of {len(out)} bytes is no whole number of {dtype} elements")
    if codec not in layout.CODEC_NAMES:
        raise UnsupportedError(
            f"codec {codec} is not known to this version; a newer tensorstore_fmt may read it",
            code="unknown_codec",
            codec=codec,
        )
    if codec == layout.CODEC_RAW:
        if len(data) != len(out):
            raise _malformed(f"raw payload has {len(data)} bytes, expected {len(out)}")
        np.copyto(out, data)
    elif len(out) == 0 or codec == layout.CODEC_DROPPED:
        name = layout.CODEC_NAMES[codec]
        raise _malformed(f"a chunk of {len(out)} bytes cannot have a payload with codec {name}")
    elif codec == layout.CODEC_CONSTANT:
        _decode_constant(data, out, size)
    elif codec == layout.CODEC_ZSTD:
        _check_frame(data, len(out))
        np.copyto(out, _decompress(data, len(out)))
    elif codec == layout.CODEC_PLANES:
        _decode_planes(data, out, dtypes.word_nbytes(dtype), span or (0, len(out)))
    else:
        _decode_delta(data, out, dtype, rows)


def _decode_constant(data: _Bytes, out: _Bytes, size: int) -> None:
    if size == 0:
        raise _malformed("strings cannot have the codec constant")
    if len(data) != size:
        raise _malformed(f"constant payload has {len(data)} bytes, expected one element of {size}")
    # Words of at most 8 bytes: rows of single bytes would be filled slowly.
    word = np.dtype(f"<u{min(size, 8)}")
    out.view(word).reshape(-1, size // word.itemsize)[:] = np.frombuffer(data.tobytes(), word)


def _decode_planes(data: _Bytes, out: _Bytes, w: int, span: tuple[int, int]) -> None:
    head = layout.PLANES_HEADER_NBYTES + 4 * w
    if w == 0:
        raise _malformed("strings cannot have the codec planes")
    if len(data) < head:
        raise _malformed(f"planes payload has {len(data)} bytes, its header needs {head}")
    flags, stored_w, reserved = _PLANES_HEAD.unpack_from(data.data)
    if flags & ~layout.PLANES_ROTATED or reserved:
        raise _malformed("planes payload has a reserved bit that is not zero")
    if stored_w != w:
        raise _malformed(f"planes payload has words of {stored_w} bytes, the dtype of {w}")
    lengths = [int(s) for s in np.frombuffer(data.data, _U32, w, layout.PLANES_HEADER_NBYTES)]
    if head + sum(lengths) != len(data):
        raise _malformed(
            f"planes payload has {len(data)} bytes, its header says {head + sum(lengths)}"
        )
    n = len(out) // w
    runs: list[_Bytes] = []
    at = head
    # All frames are checked before the first is decompressed.
    for length in lengths:
        run = data[at : at + length]
        at += length
        if length not in (1, n):
            _check_frame(run, n)
        runs.append(run)
    cut = [run if len(run) in (1, n) else _decompress(run, n) for run in runs]
    first, last = span[0] // w, -(-span[1] // w)
    planes.join(
        cut if last - first == n else [p if len(p) == 1 else p[first:last] for p in cut],
        out[first * w : last * w],
        rotated=bool(flags & layout.PLANES_ROTATED),
    )


def _decode_delta(data: _Bytes, out: _Bytes, dtype: str, rows: int) -> None:
    if dtype != "int64":
        raise _malformed(f"{dtype} cannot have the codec delta")
    if len(data) != len(out):
        raise _malformed(f"delta payload has {len(data)} bytes, expected {len(out)}")
    if rows < 1 or len(out) % (8 * rows):
        raise _malformed(f"{len(out)} bytes are not {rows} rows of int64")
    planes.join(list(data.reshape(8, -1)), out, rotated=False)
    words = out.view(_U64).reshape(rows, -1)
    np.add.accumulate(words, axis=0, out=words)


def _check_frame(frame: _Bytes, nbytes: int) -> None:
    """Refuse what is not a zstd frame that says its content has `nbytes`; allocates nothing."""
    if frame[:4].tobytes() != _ZSTD_MAGIC:
        raise _malformed("zstd frame does not begin with its magic")
    try:
        head = zstandard.get_frame_parameters(frame.data)
    except zstandard.ZstdError as error:
        raise _malformed(f"zstd frame has a damaged header: {error}") from error
    # An absent size reads as 2^64 - 1 and fails this too.
    if head.content_size != nbytes:
        raise _malformed(f"zstd frame says {head.content_size} bytes, expected {nbytes}")
    if head.dict_id:
        raise _malformed(f"zstd frame needs dictionary {head.dict_id}")
    if head.window_size > _MAX_WINDOW_NBYTES:
        raise _limit("zstd window", head.window_size, _MAX_WINDOW_NBYTES)


def _decompress(frame: _Bytes, nbytes: int) -> _Bytes:
    """Give the content of a checked frame: exactly `nbytes` bytes, read-only."""
    try:
        content = _decompressor.zstd.decompress(frame.data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise _malformed(f"zstd frame is damaged: {error}") from error
    if len(content) != nbytes:
        raise _malformed(f"zstd frame gave {len(content)} bytes, expected {nbytes}")
    return np.frombuffer(content, np.uint8)


def _malformed(message: str) -> FormatError:
    return FormatError(message)


def _limit(what: str, found: int, limit: int) -> LimitError:
    return LimitError(f"{what} of {found} bytes, at most {limit} are allowed", nbytes=found)
