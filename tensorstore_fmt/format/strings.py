"""Strings as raw chunks: offsets, then UTF-8 (spec, "Raw chunks")."""

from __future__ import annotations

import itertools
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt.errors import ArgumentError, FormatError
from tensorstore_fmt.format import layout
from tensorstore_fmt.format.codec import Buffer

__all__ = ["pack_strings", "unpack_strings"]

_U32: Final = np.dtype("<u4")
_FIRST_NON_CONTINUATION: Final = -64
"""Bytes of UTF-8 below this, as int8, continue a character."""


def pack_strings(strings: list[str]) -> bytes:
    """Give the raw chunk of string elements (spec, "Raw chunks"); no elements are no bytes.

    Raises
    ------
    ArgumentError
        A string has a surrogate, so that it has no UTF-8, or all are longer than a chunk may be.
    """
    if not strings:
        return b""
    try:
        encoded = [string.encode() for string in strings]
    except UnicodeEncodeError as error:
        raise ArgumentError(f"a string cannot be stored as UTF-8: {error}") from error
    offsets = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)), out=offsets[1:])
    nbytes = 4 * len(offsets) + int(offsets[-1])
    if nbytes > layout.MAX_CHUNK_RAW_NBYTES:
        raise ArgumentError(
            f"strings of {nbytes} bytes do not fit a chunk of {layout.MAX_CHUNK_RAW_NBYTES}",
            nbytes=nbytes,
        )
    return b"".join([offsets.astype(_U32).tobytes(), *encoded])


def unpack_strings(raw: Buffer, n: int) -> list[str]:
    """Cut a raw chunk into its n strings, or raise `FormatError`."""
    head = 4 * (n + 1) if n else 0
    if len(raw) < head or (n == 0 and len(raw)):
        raise FormatError(f"raw chunk of {n} strings has {len(raw)} bytes")
    if n == 0:
        return []
    offsets: NDArray[Any] = np.frombuffer(raw, _U32, n + 1).astype(np.int64)
    data = bytes(raw[head:])
    if offsets[0] != 0 or offsets[-1] != len(data) or (offsets[1:] < offsets[:-1]).any():
        raise FormatError("offsets of strings do not ascend from 0 to the number of bytes")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"strings are not UTF-8: {error}") from error
    cuts = offsets.tolist()
    if len(text) == len(data):
        return [text[a:b] for a, b in itertools.pairwise(cuts)]
    # All bytes together are UTF-8: each string is, if no cut goes through a character.
    inner = offsets[offsets < len(data)]
    if (np.frombuffer(data, np.int8)[inner] < _FIRST_NON_CONTINUATION).any():
        raise FormatError("an offset of strings cuts through a character")
    return [data[a:b].decode() for a, b in itertools.pairwise(cuts)]
