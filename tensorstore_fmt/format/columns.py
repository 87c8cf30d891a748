"""Arrow columns from Python and NumPy values, and back.

``pyarrow.array`` and ``to_numpy`` would do, but they import pandas where that is installed:
a third of a second, in the middle of somebody's training.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

__all__ = ["fixed", "has_columns", "has_nulls", "numbers", "texts"]


def fixed(values: Sequence[int] | np.ndarray, kind: pa.DataType) -> pa.Array:
    """Give a column of integers; an array of the right dtype is not copied."""
    array = np.ascontiguousarray(values, dtype=kind.to_pandas_dtype())
    return pa.Array.from_buffers(kind, len(array), [None, pa.py_buffer(array)])


def texts(values: Sequence[str]) -> pa.Array:
    """Give a utf8 column."""
    encoded = [value.encode() for value in values]
    offsets = np.zeros(len(encoded) + 1, np.int32)
    np.cumsum(np.fromiter(map(len, encoded), np.int32, len(encoded)), out=offsets[1:])
    data = pa.py_buffer(b"".join(encoded))
    return pa.Array.from_buffers(pa.utf8(), len(encoded), [None, pa.py_buffer(offsets), data])


def numbers(column: pa.Array) -> np.ndarray:
    """Give the values of a column of integers without nulls; they are not copied."""
    data = column.buffers()[1]
    dtype = column.type.to_pandas_dtype()
    if data is None or not len(column):
        return np.empty(0, dtype)
    # Counted: a buffer in a file may be longer, and by no whole number of elements.
    return np.frombuffer(data, dtype, column.offset + len(column))[column.offset :]


def has_columns(found: pa.Schema, wanted: pa.Schema) -> bool:
    """Say whether columns have these names and types, whatever may be null in them."""
    if found.equals(wanted):  # as a rule, and a tenth of the time
        return True
    return found.names == wanted.names and all(
        _bare(a) == _bare(b) for a, b in zip(found.types, wanted.types, strict=True)
    )


def _bare(kind: pa.DataType) -> pa.DataType:
    return pa.list_(_bare(kind.value_type)) if pa.types.is_list(kind) else kind


def has_nulls(batch: pa.RecordBatch) -> bool:
    """Say whether anything is null, also within lists."""
    return any(
        column.null_count or (pa.types.is_list(column.type) and column.values.null_count)
        for column in batch.columns
    )
