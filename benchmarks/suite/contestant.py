"""What takes part: something that stores tensors and gives them back, or a codec."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

CHUNK_NBYTES = 256 * 1024


@dataclass(frozen=True)
class Series:
    """One name that is saved at steps 0, 1, … with one shape.

    ``dtype`` is NumPy's name, or ``bfloat16``: arrays of that are given and taken as uint16 bits.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    steps: int

    @property
    def numpy_dtype(self) -> np.dtype:
        """What the arrays of the series have as their dtype."""
        return np.dtype("uint16" if self.dtype == "bfloat16" else self.dtype)

    @property
    def chunk(self) -> tuple[int, ...]:
        """The chunk shape of all contestants that have chunks: leading axes split first."""
        return chunk_shape(self.shape, self.numpy_dtype.itemsize)


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Give the largest box of about 256 KiB that keeps trailing axes whole."""
    chunk: list[int] = []
    left = CHUNK_NBYTES // itemsize
    for length in reversed(shape):
        chunk.append(max(1, min(length, left)))
        left //= max(1, length)
    return tuple(reversed(chunk))


Item = tuple[int, str, np.ndarray]
"""A step, a name, and its values."""


class Reader:
    """Gives back what was written. Each method returns an array the caller owns."""

    def whole(self, name: str, step: int) -> np.ndarray:
        """Read one tensor."""
        raise NotImplementedError

    def part(self, name: str, step: int, index: tuple) -> np.ndarray:
        """Read a part of one tensor: NumPy's basic indexing."""
        return self.whole(name, step)[index].copy()

    def parts(self, name: str, steps: range, index: tuple) -> np.ndarray:
        """Read the same part of several steps, stacked."""
        return np.stack([self.part(name, step, index) for step in steps])

    def close(self) -> None:
        """Give up files."""


class Contestant:
    """Whatever is measured: its name in tables, where it runs, and how it was set up."""

    name: ClassVar[str]
    settings: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()  # import names
    distributions: ClassVar[tuple[str, ...]] = ()  # whose versions the report names
    environment: ClassVar[str] = "peers"
    variables: ClassVar[Mapping[str, str]] = {}  # of its process

    @classmethod
    def is_installed(cls) -> bool:
        """Say whether it can run in this Python."""
        return all(importlib.util.find_spec(module) is not None for module in cls.needs)


class Store(Contestant):
    """Stores tensors in a folder, or below an ``s3://`` URL if it says so."""

    compresses: ClassVar[bool]
    reads_parts: ClassVar[bool]  # a part of a tensor costs less than all of it
    takes_s3: ClassVar[bool] = False  # endpoint and credentials come from AWS_* variables
    in_files: float | None = None
    """When the last `write` had everything in files, if it went on to make that durable."""

    def write(self, place: str | Path, series: Sequence[Series], items: Iterable[Item]) -> None:
        """Store a stream in the order it comes, and close: all data are in files then."""
        raise NotImplementedError

    def reader(self, place: str | Path, series: Sequence[Series]) -> Reader:
        """Open what was written."""
        raise NotImplementedError


class Codec(Contestant):
    """Makes bytes of an array, and the array of the bytes, in memory, on one thread.

    Arrays are one-dimensional and contiguous; bfloat16 comes as uint16 bits.
    """

    chunk_nbytes: ClassVar[int] = CHUNK_NBYTES

    def takes(self, dtype: str) -> bool:
        """Say whether it has been made for this dtype."""
        return True

    def begin(self) -> None:
        """Say that chunks of another tensor follow."""

    def encode(self, values: np.ndarray, dtype: str) -> Encoded:
        """Compress one chunk, which may be destroyed."""
        raise NotImplementedError

    def decode(self, data: bytes, like: np.ndarray, dtype: str) -> np.ndarray:
        """Give the chunk back, with the shape and dtype of ``like`` (whose values are not seen).

        The array may be used again by the next call.
        """
        raise NotImplementedError


class Parts:
    """A compressed chunk in several pieces, as a store would write them."""

    def to_bytes(self) -> bytes:
        """Give it in one piece."""
        raise NotImplementedError


Encoded = bytes | bytearray | memoryview | Parts
