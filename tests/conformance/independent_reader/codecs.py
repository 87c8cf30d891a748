"""Payloads and raw chunks ("7.2 Raw chunks", "7.4 Codecs", "7.5 planes", "7.6 delta")."""

from __future__ import annotations

import itertools
import struct

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
    need(codec in (0, 1, 2, 3, 4), f"codec {codec}", "unknown_codec")
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
    else:
        raw = _decode_delta(payload, dtype, raw_nbytes, rows)
    need(len(raw) == raw_nbytes, "decoded length is not raw_nbytes")
    return raw


def _decode_constant(payload: bytes, dtype: str, raw_nbytes: int) -> bytes:
    size = DTYPES[dtype].itemsize
    need(dtype != "string" and len(payload) == size and raw_nbytes % size == 0, "constant")
    return payload * (raw_nbytes // size)


def _decode_planes(payload: bytes, dtype: str, raw_nbytes: int) -> bytes:
    need(dtype != "string" and len(payload) >= 4, "planes of strings, or too short")
    width = DTYPES[dtype].itemsize // (2 if dtype.startswith("complex") else 1)
    start, (flags, w) = 4 + 4 * width, payload[:2]
    need(flags < 2 and w == width and payload[2:4] == b"\0\0", "planes header")
    need(raw_nbytes % width == 0 and len(payload) >= start, "planes: lengths")
    n, sizes = raw_nbytes // width, struct.unpack_from(f"<{width}I", payload, 4)
    need(all(1 <= size <= n for size in sizes), "planes: length of a plane")
    need(len(payload) == start + sum(sizes), "planes: length of the payload")
    words = np.empty((n, width), np.uint8)
    for i, size in enumerate(sizes):
        words[:, i] = np.frombuffer(_plane(payload[start : start + size], n), np.uint8)
        start += size
    if flags & 1:
        x = words.view(f"<u{width}")
        words = ((x >> 1) | (x << (8 * width - 1))).astype(f"<u{width}")
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
