"""CRC32C ("3. Conventions"): CRC-32/ISCSI, with NumPy, many lanes side by side."""

from __future__ import annotations

import functools

import numpy as np

from .limits import Array


def _advance(table: Array, state: Array) -> Array:
    """Apply a linear operator, given as 4 tables of 256 words, to CRC states."""
    out: Array = table[0][state & 0xFF] ^ table[1][(state >> 8) & 0xFF]
    out ^= table[2][(state >> 16) & 0xFF] ^ table[3][state >> 24]
    return out


@functools.cache
def _zeros_operator(power: int) -> Array:
    """Return the operator that feeds 2**power zero bytes."""
    if power:
        half = _zeros_operator(power - 1)
        return np.stack([_advance(half, half[j]) for j in range(4)])
    table: Array = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> 1) ^ np.where(table & 1, np.uint32(0x82F63B78), np.uint32(0))
    words = [np.arange(256, dtype=np.uint32) << np.uint32(8 * j) for j in range(4)]
    return np.stack([(word >> 8) ^ table[word & 0xFF] for word in words])


def crc32c(data: bytes) -> int:
    """CRC-32/ISCSI: many lanes, then folded in pairs."""
    if len(data) < 64:
        return _crc32c_short(data)
    power = 6 if len(data) < 1 << 14 else 8 if len(data) < 1 << 20 else 11
    padded = np.zeros(-(-len(data) >> power) << power, np.uint8)
    start = len(padded) - len(data)  # zeros in front do not change a zero state
    padded[start:] = np.frombuffer(data, np.uint8)
    padded[start : start + 4] ^= 0xFF  # the initial value
    lanes = np.ascontiguousarray(padded.view("<u4").reshape(-1, (1 << power) // 4).T)
    state: Array = np.zeros(lanes.shape[1], np.uint32)
    for words in lanes:
        state = _advance(_zeros_operator(2), state ^ words)
    while len(state) > 1:
        if len(state) % 2:
            state = np.concatenate([np.zeros(1, np.uint32), state])
        state = _advance(_zeros_operator(power), state[0::2]) ^ state[1::2]
        power += 1
    return int(state[0]) ^ 0xFFFFFFFF


def _crc32c_short(data: bytes) -> int:
    table, state = _zeros_operator(0)[0], 0xFFFFFFFF
    for byte in data:
        state = (state >> 8) ^ int(table[(state ^ byte) & 0xFF])
    return state ^ 0xFFFFFFFF
