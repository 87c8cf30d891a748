"""Payloads: the codecs of the format, encoded as plainly as can be (`format.md`, "Codecs")."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

import numpy as np
import zstandard

RAW, CONSTANT, ZSTD, PLANES, DELTA, SPARSE, DROPPED = 0, 1, 2, 3, 4, 5, 255


def zstd(content: bytes, *, level: int = 3, with_size: bool = True) -> bytes:
    """Give one zstd frame."""
    compressor = zstandard.ZstdCompressor(level=level, write_content_size=with_size)
    return compressor.compress(content)


def planes(raw: bytes, width: int, *, rotated: bool, wide: bool = False) -> bytes:
    """Give the planes payload of words of `width` bytes; each plane stored as is shortest."""
    cut = split(raw, width, rotated=rotated)
    if wide:
        pairs = zip(cut[::2], cut[1::2], strict=True)
        cut = [bytes(byte for both in zip(*pair, strict=True) for byte in both) for pair in pairs]
    return planes_of(map(shortest, cut), rotated=rotated, wide=wide)


def planes_of(stored: Iterable[bytes], *, rotated: bool, wide: bool = False) -> bytes:
    """Give a planes payload of planes that are stored already."""
    runs = list(stored)
    flags, width = rotated + 2 * wide, len(runs) * (2 if wide else 1)
    head = struct.pack(f"<BBH{len(runs)}I", flags, width, 0, *map(len, runs))
    return head + b"".join(runs)


def sparse(raw: bytes, width: int, *, rotated: bool) -> bytes:
    """Give the sparse payload of words of `width` bytes."""
    words = [raw[i : i + width] for i in range(0, len(raw), width)]
    left = b"".join(word for word in words if any(word))
    stored = map(shortest, split(left, width, rotated=rotated))
    return sparse_of(stored, shortest(map_of(words)), rotated=rotated)


def sparse_of(stored: Iterable[bytes], bits: bytes, *, rotated: bool) -> bytes:
    """Give a sparse payload of planes and a map that are stored already."""
    runs = [*stored, bits]
    head = struct.pack(f"<BBH{len(runs)}I", int(rotated), len(runs) - 1, 0, *map(len, runs))
    return head + b"".join(runs)


def map_of(words: Sequence[bytes]) -> bytes:
    """Give a bit for each word, set if the word is not 0."""
    bits = [any(word) for word in words] + [False] * (-len(words) % 8)
    return bytes(
        sum(bit << i for i, bit in enumerate(bits[at : at + 8])) for at in range(0, len(bits), 8)
    )


def shortest(plane: bytes) -> bytes:
    """Store a plane as is shortest."""
    if len(set(plane)) == 1:
        return plane[:1]
    frame = zstd(plane)
    return frame if 1 < len(frame) < len(plane) else plane


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


def encode(
    codec: int, raw: bytes, *, itemsize: int, word: int, rows: int, rotated: bool, wide: bool
) -> bytes:
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
        return planes(raw, word, rotated=rotated, wide=wide)
    if codec == SPARSE:
        return sparse(raw, word, rotated=rotated)
    return delta(raw, rows)
