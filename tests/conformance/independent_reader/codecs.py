"""Payloads and raw chunks ("7.2 Raw chunks", "7.4 Codecs" to "7.6 delta")."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence

import numpy as np
import zstandard

from .errors import SpecError, need
from .limits import DTYPES, MAX_CHUNK_NBYTES, MAX_CHUNK_RAW_NBYTES, Array

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


def unzstd(frame: bytes, nbytes: int) -> bytes:
    """Decode one zstd frame that states exactly nbytes of content ("3. Conventions")."""
    need(frame[:4] == ZSTD_MAGIC, "not a zstd frame")
    try:
        header = zstandard.get_frame_parameters(frame)
        need(header.content_size == nbytes and header.dict_id == 0, "content size or dictionary")
        content: bytes = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise SpecError("malformed", f"zstd: {error}") from None
    need(len(content) == nbytes, "length of zstd content")
    return content


def decode_payload(codec: int, payload: bytes, dtype: str, raw_nbytes: int, rows: int) -> bytes:
    """Give the raw chunk of a payload that holds `rows` steps ("7.4 Codecs")."""
    need(dtype in DTYPES, dtype, "unknown_dtype")
    need(codec in (0, 1, 2, 3, 4, 5), f"codec {codec}", "unknown_codec")
    need(raw_nbytes <= MAX_CHUNK_RAW_NBYTES, "raw_nbytes", "limit")
    need(len(payload) <= MAX_CHUNK_NBYTES, "nbytes", "limit")
    need(raw_nbytes or (codec == 0 and not payload), "an empty chunk has codec 0, no payload")
    if codec == 0:
        raw = payload
    elif codec == 1:
        raw = _decode_constant(payload, dtype, raw_nbytes)
    elif codec == 2:
        raw = unzstd(payload, raw_nbytes)
    elif codec == 3:
        raw = _decode_planes(payload, dtype, raw_nbytes)
    elif codec == 5:
        raw = _decode_sparse(payload, dtype, raw_nbytes)
    else:
        raw = _decode_delta(payload, dtype, raw_nbytes, rows)
    need(len(raw) == raw_nbytes, "decoded length is not raw_nbytes")
    return raw


def _decode_constant(payload: bytes, dtype: str, raw_nbytes: int) -> bytes:
    size = DTYPES[dtype].itemsize
    need(dtype != "string" and len(payload) == size and raw_nbytes % size == 0, "constant")
    return payload * (raw_nbytes // size)


def _decode_planes(payload: bytes, dtype: str, raw_nbytes: int) -> bytes:
    width = _word_nbytes(payload, dtype)
    unit = 2 if width >= 4 and payload[0] & 2 else 1
    rotated, sizes = _planes_header(payload, width, width // unit, raw_nbytes, unit)
    q = raw_nbytes // width * unit
    need(all(1 <= size <= q for size in sizes), "planes: length of a plane")
    return _words(payload[4 + 4 * len(sizes) :], sizes, q, width, rotated=rotated)


def _decode_sparse(payload: bytes, dtype: str, raw_nbytes: int) -> bytes:
    width = _word_nbytes(payload, dtype)
    rotated, (*sizes, size) = _planes_header(payload, width, width + 1, raw_nbytes, 1)
    n = raw_nbytes // width
    need(1 <= size <= -(-n // 8), "sparse: length of the map")
    packed = _plane(payload[len(payload) - size :], -(-n // 8))
    bits = [packed[i // 8] >> i % 8 & 1 for i in range(n)]
    m = sum(bits)
    need(all((m > 0) <= each <= max(m, 1) for each in sizes), "sparse: length of a plane")
    planes = payload[8 + 4 * width :]
    words = _words(planes, sizes, m, width, rotated=rotated) if m else b""
    left = iter([words[i : i + width] for i in range(0, len(words), width)])
    return b"".join(next(left) if bit else bytes(width) for bit in bits)


def _word_nbytes(payload: bytes, dtype: str) -> int:
    need(dtype != "string" and len(payload) >= 4, "planes of strings, or too short")
    return DTYPES[dtype].itemsize // (2 if dtype.startswith("complex") else 1)


def _planes_header(
    payload: bytes, width: int, count: int, raw_nbytes: int, unit: int
) -> tuple[bool, tuple[int, ...]]:
    start, (flags, w) = 4 + 4 * count, payload[:2]
    known = unit | 1  # wide, if that is what it is
    need(not flags & ~known and w == width and payload[2:4] == b"\0\0", "planes header")
    need(raw_nbytes % width == 0 and len(payload) >= start, "planes: lengths")
    sizes = struct.unpack_from(f"<{count}I", payload, 4)
    need(len(payload) == start + sum(sizes), "planes: length of the payload")
    return bool(flags & 1), sizes


def _words(stored: bytes, sizes: Sequence[int], q: int, width: int, *, rotated: bool) -> bytes:
    unit, start = width // len(sizes), 0
    words = np.empty((q // unit, len(sizes), unit), np.uint8)
    for i, size in enumerate(sizes):
        plane = np.frombuffer(_plane(stored[start : start + size], q), np.uint8)
        words[:, i] = plane.reshape(-1, unit)
        start += size
    if rotated:
        x = words.reshape(-1, width).view(f"<u{width}")
        return ((x >> 1) | (x << (8 * width - 1))).astype(f"<u{width}").tobytes()
    return words.tobytes()


def _plane(stored: bytes, n: int) -> bytes:
    if len(stored) == n:
        return stored
    return stored * n if len(stored) == 1 else unzstd(stored, n)


def _decode_delta(payload: bytes, dtype: str, raw_nbytes: int, rows: int) -> bytes:
    need(dtype == "int64" and rows > 0 and raw_nbytes % (8 * rows) == 0, "delta: shape")
    need(len(payload) == raw_nbytes, "delta: length of the payload")
    by_plane = np.frombuffer(payload, np.uint8).reshape(8, -1)
    words = np.ascontiguousarray(by_plane.T).view("<u8").reshape(rows, -1)
    return np.cumsum(words, axis=0, dtype="<u8").tobytes()


def cut_strings(raw: bytes, rows: int, row: int, each: int) -> Array:
    """Cut strings; `each` elements per step, of which those of step `row` are given ("7.2")."""
    total = rows * each
    result = np.empty(each, object)
    if not total:
        need(not raw, "strings without elements have no bytes")
        return result
    need(len(raw) >= 4 * (total + 1), "offsets of strings")
    offsets = struct.unpack_from(f"<{total + 1}I", raw)
    data = raw[4 * (total + 1) :]
    need(offsets[0] == 0 and offsets[-1] == len(data), "offsets of strings")
    need(all(a <= b for a, b in itertools.pairwise(offsets)), "offsets of strings descend")
    try:
        texts = [data[a:b].decode() for a, b in itertools.pairwise(offsets)]
    except UnicodeDecodeError as error:
        raise SpecError("malformed", f"strings: {error}") from None
    result[:] = texts[row * each : (row + 1) * each]
    return result
