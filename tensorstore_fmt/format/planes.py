"""Byte planes: cut words into planes and put them together again (spec, "planes").

Functions that read and write buffers of the caller and keep nothing. The compiled kernel does
the work if there is one, else NumPy, in blocks that stay in
cache: in large blocks a word is halved by a truncating cast and a shift until bytes are left,
because strided copies of single bytes run at half that speed; in small ones those win, being
fewer calls.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt.format import kernel

__all__ = ["BLOCK_NBYTES", "WORDS", "Bytes", "join", "join_wide", "split", "split_wide"]

Bytes = NDArray[np.uint8]
"""One-dimensional bytes."""

BLOCK_NBYTES: Final = 256 * 1024
"""Bytes of words per block: with as many of scratch they fit a second-level cache."""

_STRIDED_NBYTES: Final = {1: 0, 2: 8192, 4: 32768, 8: 131072}
"""Blocks up to this are copied byte by byte, by the width of their words (measured)."""

WORDS: Final = {w: np.dtype(f"<u{w}") for w in (1, 2, 4, 8)}
"""Words by their bytes; little-endian as in the spec, whatever the machine."""


class _Scratch(threading.local):
    """Buffers of one thread, for words of each width; allocated when first used."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, int], Bytes] = {}

    def words(self, w: int, slot: int, n: int) -> NDArray[Any]:
        """Give n words of w bytes; other slots and widths are other memory."""
        buffer = self._buffers.get((w, slot))
        if buffer is None:
            # Wider words are cut first, so narrower buffers hold as many, smaller words.
            buffer = self._buffers[w, slot] = np.empty(BLOCK_NBYTES, np.uint8)
        return buffer[: n * w].view(WORDS[w])


_scratch: Final = _Scratch()


def split_wide(raw: Bytes, planes: Sequence[Bytes]) -> None:
    """Write bytes 2·i and 2·i + 1 of every word to plane i.

    Parameters
    ----------
    raw
        n words of w bytes, contiguous; not changed.
    planes
        w ∕ 2 buffers of 2·n bytes each, overwritten; they may not overlap `raw` or each other.
    """
    halves = raw.view(WORDS[2])
    for i, plane in enumerate(planes):
        np.copyto(plane.view(WORDS[2]), halves[i :: len(planes)])


def join_wide(planes: Sequence[Bytes | memoryview], out: Bytes, *, rotated: bool) -> None:
    """Undo `split_wide`; as `join`."""
    halves = out.view(WORDS[2])
    for i, plane in enumerate(planes):
        stored = np.frombuffer(plane, np.uint8)
        if len(stored) == 1:
            stored = stored.repeat(2)
        halves[i :: len(planes)] = stored.view(WORDS[2])
    if rotated:
        words = out.view(WORDS[2 * len(planes)])
        np.bitwise_or(words >> 1, words << (16 * len(planes) - 1), out=words)


def split(raw: Bytes, planes: Sequence[Bytes], *, rotated: bool) -> None:
    """Write byte i of every word to plane i.

    Parameters
    ----------
    raw
        n words of w bytes, contiguous; not changed.
    planes
        w buffers (w is 1, 2, 4 or 8) of n bytes each, overwritten; they may not overlap
        `raw` or each other.
    rotated
        Move the highest bit of each word to the lowest place first.
    """
    if kernel.active is not None:
        kernel.active.split(raw, planes, rotated)
        return
    w = len(planes)
    if w == 1 and not rotated:
        np.copyto(planes[0], raw)
        return
    words = raw.view(WORDS[w])
    per_block = BLOCK_NBYTES // w
    for start in range(0, len(words), per_block):
        block = words[start : start + per_block]
        targets = [plane[start : start + per_block] for plane in planes]
        if rotated:
            turned = _scratch.words(w, 0, len(block))
            sign = _scratch.words(w, 1, len(block))
            np.add(block, block, out=turned)
            np.right_shift(block, 8 * w - 1, out=sign)
            np.bitwise_or(turned, sign, out=turned)
            block = turned
        if block.nbytes <= _STRIDED_NBYTES[w]:
            cut = block.view(np.uint8)
            for i, target in enumerate(targets):
                np.copyto(target, cut[i::w])
        else:
            _split_block(block, targets)


def join(planes: Sequence[Bytes | memoryview], out: Bytes, *, rotated: bool) -> None:
    """Write words whose byte i comes from plane i: undo `split`.

    Parameters
    ----------
    planes
        w buffers (w is 1, 2, 4 or 8) of n bytes each, contiguous, or of one byte that stands
        for n. Not changed.
    out
        Room for n words of w bytes, contiguous, overwritten; no plane may overlap it.
    rotated
        Move the lowest bit of each word back to the highest place.
    """
    if kernel.active is not None:
        kernel.active.join(planes, out, rotated)
        return
    arrays = [np.asarray(plane, np.uint8) for plane in planes]
    w = len(arrays)
    if w == 1 and not rotated:
        np.copyto(out, arrays[0])
        return
    words = out.view(WORDS[w])
    arrays = [np.broadcast_to(p, len(words)) if len(p) == 1 else p for p in arrays]
    per_block = BLOCK_NBYTES // w
    for start in range(0, len(words), per_block):
        block = words[start : start + per_block]
        sources = [plane[start : start + per_block] for plane in arrays]
        if block.nbytes <= _STRIDED_NBYTES[w]:
            joined = block.view(np.uint8)
            for i, source in enumerate(sources):
                np.copyto(joined[i::w], source)
        else:
            _join_block(sources, block)
        if rotated:
            sign = _scratch.words(w, 1, len(block))
            np.left_shift(block, 8 * w - 1, out=sign)
            np.right_shift(block, 1, out=block)
            np.bitwise_or(block, sign, out=block)


def _split_block(words: NDArray[Any], targets: Sequence[Bytes]) -> None:
    w = len(targets)
    if w == 1:
        np.copyto(targets[0], words)
        return
    half = w // 2
    if half == 1:
        low: NDArray[Any] = targets[0]
        high: NDArray[Any] = targets[1]
    else:
        low = _scratch.words(half, 0, len(words))
        high = low
    np.copyto(low, words, casting="unsafe")
    if half > 1:
        _split_block(low, targets[:half])
    # Rotated and halved words lie in slot 0 already and may be overwritten: slot 1 keeps
    # the caller's words as they are, and costs nothing more.
    shifted = _scratch.words(w, 1, len(words))
    np.right_shift(words, 8 * half, out=shifted)
    np.copyto(high, shifted, casting="unsafe")
    if half > 1:
        _split_block(high, targets[half:])


def _join_block(planes: Sequence[Bytes], words: NDArray[Any]) -> None:
    w = len(planes)
    if w == 1:
        np.copyto(words, planes[0])
        return
    half = w // 2
    wide = _scratch.words(w, 0, len(words))
    low: NDArray[Any] = planes[0]
    high: NDArray[Any] = planes[1]
    if half > 1:
        low = high = _scratch.words(half, 2, len(words))
        _join_block(planes[half:], high)
    np.copyto(words, high)
    np.left_shift(words, 8 * half, out=words)
    if half > 1:
        _join_block(planes[:half], low)
    np.copyto(wide, low)
    np.bitwise_or(words, wide, out=words)
