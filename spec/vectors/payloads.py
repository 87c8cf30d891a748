"""Payloads: the codecs of the format, encoded as plainly as can be (`format.md`, "Codecs")."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import zstandard

RAW, CONSTANT, ZSTD, PLANES, DELTA, DROPPED = 0, 1, 2, 3, 4, 255


def zstd(content: bytes, *, level: int = 3, with_size: bool = True) -> bytes:
    """Give one zstd frame."""
    compressor = zstandard.ZstdCompressor(level=level, write_content_size=with_size)
    return compressor.compress(content)


def planes(raw: bytes, width: int, *, rotated: bool) -> bytes:
    """Give the planes payload of words of `width` bytes; each plane stored as is shortest."""
    stored = []
    for plane in split(raw, width, rotated=rotated):
        frame = zstd(plane)
        if len(set(plane)) == 1:
            stored.append(plane[:1])
        else:
            stored.append(frame if 1 < len(frame) < len(plane) else plane)
    return planes_of(stored, rotated=rotated)


def planes_of(stored: Sequence[bytes], *, rotated: bool) -> bytes:
    """Give a planes payload of planes that are stored already."""
    head = struct.pack(f"<BBH{len(stored)}I", int(rotated), len(stored), 0, *map(len, stored))
    return head + b"".join(stored)


def split(raw: bytes, width: int, *, rotated: bool) -> list[bytes]:
    """Cut words into planes, the sign moved to the lowest place first if `rotated`."""
    words = [int.from_bytes(raw[i : i + width], "little") for i in range(0, len(raw), width)]
    bits = 8 * width
    if rotated:
        words = [(x << 1 | x >> (bits - 1)) & ((1 << bits) - 1) for x in words]
    return [bytes(x >> (8 * i) & 0xFF for x in words) for i in range(width)]


def delta(raw: bytes, rows: int) -> bytes:
    """Give the delta payload of rows of int64."""
    words = np.frombuffer(raw, "<u8").reshape(rows, -1)
    deltas = words.copy()
    deltas[1:] -= words[:-1]
    return np.ascontiguousarray(deltas.reshape(-1).view(np.uint8).reshape(-1, 8).T).tobytes()


def strings(texts: Sequence[str]) -> bytes:
    """Give the raw chunk of strings; none of them have no bytes."""
    if not texts:
        return b""
    encoded = [text.encode() for text in texts]
    offsets = np.cumsum([0, *map(len, encoded)])
    return struct.pack(f"<{len(offsets)}I", *offsets.tolist()) + b"".join(encoded)


def encode(codec: int, raw: bytes, *, itemsize: int, word: int, rows: int, rotated: bool) -> bytes:
    """Encode a raw chunk with the codec asked for."""
    if codec == RAW:
        return raw
    if codec == CONSTANT:
        if raw != raw[:itemsize] * (len(raw) // itemsize):
            raise ValueError("these elements are not all the same")
        return raw[:itemsize]
    if codec == ZSTD:
        return zstd(raw)
    if codec == PLANES:
        return planes(raw, word, rotated=rotated)
    return delta(raw, rows)
