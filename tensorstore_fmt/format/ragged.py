"""Rows of different length in two arrays, as Arrow lists and binaries lie in memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import pyarrow as pa

from tensorstore_fmt.format import columns

__all__ = ["Ragged"]

_MOST_INDEXED: Final = 64 * 1024  # values gathered through an index, which takes 16 B for each


@dataclass(frozen=True, slots=True)
class Ragged:
    """Row i is ``values[offsets[i]:offsets[i + 1]]``.

    ``offsets`` is int64 with one element more than there are rows and begins at 0;
    ``values`` is int64 (lists) or uint8 (binaries).
    """

    offsets: np.ndarray
    values: np.ndarray

    @classmethod
    def of_ints(cls, rows: Sequence[Sequence[int]]) -> Self:
        """Build from tuples of integers."""
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        values = np.fromiter((v for row in rows for v in row), np.int64, int(offsets[-1]))
        return cls(offsets, values)

    @classmethod
    def of_bytes(cls, rows: Sequence[bytes | memoryview]) -> Self:
        """Build from byte strings."""
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return cls(offsets, np.frombuffer(b"".join(rows), np.uint8))

    @classmethod
    def empty(cls, rows: int, dtype: type[np.generic]) -> Self:
        """Build `rows` rows without values."""
        return cls(np.zeros(rows + 1, np.int64), np.empty(0, dtype))

    @classmethod
    def of_arrow(cls, column: pa.ListArray | pa.BinaryArray) -> Self:
        """Take an Arrow list<int64> or binary column; the values are not copied."""
        if isinstance(column, pa.ListArray):
            offsets = columns.numbers(column.offsets).astype(np.int64)
            values = columns.numbers(column.values)
        else:
            _, offsets_buffer, data = column.buffers()
            end = column.offset + len(column) + 1
            offsets = np.frombuffer(offsets_buffer, np.int32, end)[column.offset :].astype(np.int64)
            values = np.frombuffer(data if data is not None else b"", np.uint8)
        first = int(offsets[0]) if len(offsets) else 0
        values = values[first : int(offsets[-1])]
        return cls(offsets - first if first else offsets, values)

    def to_arrow_list(self) -> pa.ListArray:
        """Give an Arrow list<int64> column."""
        return pa.ListArray.from_arrays(
            columns.fixed(self.offsets, pa.int32()), columns.fixed(self.values, pa.int64())
        )

    def to_arrow_binary(self) -> pa.BinaryArray:
        """Give an Arrow binary column."""
        return pa.BinaryArray.from_buffers(
            pa.binary(),
            len(self),
            [None, pa.py_buffer(self.offsets.astype(np.int32)), pa.py_buffer(self.values)],
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Length of each row."""
        return np.diff(self.offsets)

    def row(self, number: int) -> tuple[int, ...]:
        """Give one row of integers."""
        return tuple(self[number].tolist())

    def tuples(self) -> list[tuple[int, ...]]:
        """Give all rows of integers."""
        lengths = self.lengths
        if not len(lengths):
            return []
        width = int(lengths[0])
        if (lengths == width).all():  # nearly always: no Python per element then
            return list(map(tuple, self.values.reshape(len(self), width).tolist()))
        values, offsets = self.values.tolist(), self.offsets.tolist()
        return [tuple(values[a:b]) for a, b in itertools.pairwise(offsets)]

    def take(self, rows: np.ndarray) -> Ragged:
        """Give the rows with these numbers, in this order."""
        lengths = self.lengths[rows]
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        if offsets[-1] == 0:
            return Ragged(offsets, self.values[:0])
        begins = self.offsets[:-1][rows]
        return Ragged(offsets, _gather(self.values, begins, lengths, int(offsets[-1])))

    def ranges(self, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Give the values of ranges of `values` behind each other."""
        lengths = ends - begins
        return _gather(self.values, begins, lengths, int(lengths.sum()))

    def slice(self, start: int, stop: int) -> Ragged:
        """Give rows start … stop − 1; the values are not copied."""
        offsets = self.offsets[start : stop + 1]
        return Ragged(offsets - offsets[0], self.values[offsets[0] : offsets[-1]])

    @staticmethod
    def concat(parts: Sequence[Ragged]) -> Ragged:
        """Put rows of several behind each other."""
        if len(parts) == 1:
            return parts[0]
        shifts = np.cumsum([0, *(int(p.offsets[-1]) for p in parts)])
        offsets = np.concatenate(
            [np.zeros(1, np.int64)]
            + [p.offsets[1:] + shift for p, shift in zip(parts, shifts, strict=False)]
        )
        return Ragged(offsets, np.concatenate([p.values for p in parts]))


def _gather(values: np.ndarray, begins: np.ndarray, lengths: np.ndarray, total: int) -> np.ndarray:
    """Give ranges of `values` behind each other."""
    if total > _MOST_INDEXED and total > 64 * len(begins):
        # Long rows: a slice for each costs less than an index of each value.
        ranges = zip(begins.tolist(), (begins + lengths).tolist(), strict=True)
        return np.concatenate([values[begin:end] for begin, end in ranges])
    index = np.repeat(begins - (np.cumsum(lengths) - lengths), lengths)
    index += np.arange(total)
    result: np.ndarray = values[index]
    return result
