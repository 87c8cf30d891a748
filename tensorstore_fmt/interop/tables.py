"""Scalars as tables: collected from a run, long or wide, written as CSV or Parquet."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, BinaryIO, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tensorstore_fmt import dtypes
from tensorstore_fmt.reading.steps import StepSet

if TYPE_CHECKING:
    from tensorstore_fmt.interop.picking import Where
    from tensorstore_fmt.reading.run import Run
    from tensorstore_fmt.reading.tensor import Tensor

__all__ = ["Scalars", "collect", "scalar_dtypes", "write_csv", "write_parquet"]

_KEYS: Final = ("step", "mode", "worker")
_ROWS_AT_ONCE: Final = 65_536
_EXACT: Final = 2**53  # float64 holds every integer up to this
_WALL_TIME: Final = pa.timestamp("us", "UTC")


def scalar_dtypes(run: Run) -> dict[str, tuple[set[str], bool]]:
    """Give the names that have scalars: the dtypes, and whether all their values are scalars."""
    table = run.table()
    found: dict[str, tuple[set[str], bool]] = {}
    others = set()
    columns = (table[c].to_pylist() for c in ("name", "kind", "dtype", "shape"))
    for name, kind, dtype, shape in zip(*columns, strict=True):
        if kind != "data":
            continue
        if dtypes.is_complex(dtype) or None in shape or math.prod(shape) != 1:
            others.add(name)
        else:
            found.setdefault(name, (set(), True))[0].add(dtype)
    return {name: (kinds, name not in others) for name, (kinds, _) in found.items()}


class Scalars:
    """Scalars of a run, ascending by step, mode, worker and name.

    Parameters
    ----------
    table
        Columns step, mode, worker, wall_time, name, value and text. The value of a string is
        null; the text is of strings, and the digits of integers that float64 cannot hold.
    kinds
        By name, the dtypes it was saved with.
    """

    def __init__(self, table: pa.Table, kinds: Mapping[str, set[str]]) -> None:
        order = [(c, "ascending") for c in (*_KEYS, "name")]
        self.table = table.sort_by(order).combine_chunks()
        self.kinds = kinds

    @property
    def steps(self) -> list[int]:
        """All steps, ascending."""
        steps: list[int] = np.unique(self.table["step"].to_numpy()).tolist()
        return steps

    def column(self, name: str, value: pa.ChunkedArray, text: pa.ChunkedArray) -> pa.ChunkedArray:
        """Give values of one name in the type that holds all that it was saved with."""
        if text.null_count == len(text):
            kinds = self.kinds[name]
            if kinds == {"bool"}:
                return value.cast(pa.bool_())
            if all(dtypes.is_integer(kind) for kind in kinds):
                return value.cast(pa.int64())
            return value
        numbers = self.column_of_numbers(name, value)
        return pc.coalesce(text, numbers)

    def column_of_numbers(self, name: str, value: pa.ChunkedArray) -> pa.ChunkedArray:
        """Give numbers as text."""
        if all(dtypes.is_integer(k) for k in self.kinds[name] if k != dtypes.STRING):
            is_exact = pc.less(pc.abs(value), float(_EXACT))  # the others have their text
            value = pc.if_else(is_exact, value, pa.scalar(None, pa.float64())).cast(pa.int64())
        return value.cast(pa.utf8())

    def values(self) -> pa.ChunkedArray:
        """Give the values of the only name in it, as `column` does."""
        (name,) = self.kinds
        return self.column(name, self.table["value"], self.table["text"])


def collect(
    run: Run,
    tensors: Sequence[Tensor],
    where: Where,
    wanted: StepSet,
    kinds: Mapping[str, set[str]],
) -> Scalars:
    """Read the scalars of some names.

    Parameters
    ----------
    tensors
        Of `run`, narrowed as `where` says.
    wanted
        Which steps.
    kinds
        By name, the dtypes it was saved with; see `scalar_dtypes`.
    """
    names = [tensor.name for tensor in tensors]
    table = run.scalars(names) if where.get("attempt") is None else _of_attempt(tensors)
    keep = wanted.of_saved(table["step"].to_numpy())
    if where.get("mode") is not None:
        keep &= pc.equal(table["mode"], str(where["mode"]).upper()).to_numpy()
    if where.get("worker") is not None:
        keep &= table["worker"].to_numpy() == where["worker"]
    table = table.filter(pa.array(keep))
    table = _with_digits(run, table, kinds, where)
    wall = table["wall_time_us"].cast(_WALL_TIME)
    columns = {c: table[c] for c in _KEYS}
    columns |= {"wall_time": wall} | {c: table[c] for c in ("name", "value", "text")}
    return Scalars(pa.table(columns), {name: kinds[name] for name in names})


def _of_attempt(tensors: Sequence[Tensor]) -> pa.Table:
    """Read what later attempts may hide; when it was logged is not known then."""
    parts = []
    for tensor in tensors:
        for mode in tensor.modes:
            for worker in tensor.select(mode=mode).workers:
                part = tensor.select(mode=mode, worker=worker)
                steps = part.steps
                values = part.read(steps=steps).reshape(len(steps))
                is_text = values.dtype == object
                nothing = pa.nulls(len(steps))
                parts.append(
                    pa.table(
                        {
                            "step": pa.array(steps, pa.int64()),
                            "mode": pa.array([mode] * len(steps), pa.utf8()),
                            "worker": pa.array(np.full(len(steps), worker), pa.int64()),
                            "wall_time_us": nothing.cast(pa.int64()),
                            "name": pa.array([tensor.name] * len(steps), pa.utf8()),
                            "value": nothing.cast(pa.float64())
                            if is_text
                            else pa.array(values.astype(np.float64)),
                            "text": pa.array(values, pa.utf8())
                            if is_text
                            else nothing.cast(pa.utf8()),
                        }
                    )
                )
    return pa.concat_tables(parts)


def _with_digits(
    run: Run, table: pa.Table, kinds: Mapping[str, set[str]], where: Where
) -> pa.Table:
    """Put the digits of integers that float64 cannot hold into the column text."""
    wide = {name for name, found in kinds.items() if found & {"int64", "uint64"}}
    value = table["value"].to_numpy()
    rows = np.flatnonzero(np.abs(value) >= _EXACT)
    if not wide or not len(rows):
        return table
    name, mode, worker = (table[c].take(rows).to_pylist() for c in ("name", "mode", "worker"))
    step = table["step"].to_numpy()
    text = table["text"].to_pylist()
    groups: dict[tuple[str, str, int], list[int]] = {}
    for row, *key in zip(rows.tolist(), name, mode, worker, strict=True):
        if key[0] in wide:
            groups.setdefault((key[0], key[1], key[2]), []).append(row)
    for (of, in_mode, by), some in groups.items():
        tensor = run[of].select(mode=in_mode, worker=by, attempt=where.get("attempt"))
        for row in some:
            exact = tensor.read(step=int(step[row])).reshape(())
            if exact.dtype.kind in "iu":
                text[row] = str(int(exact))
    number = table.schema.get_field_index("text")
    return table.set_column(number, "text", pa.array(text, pa.utf8()))


# --- files ---------------------------------------------------------------------------
def write_parquet(file: BinaryIO, scalars: Scalars) -> None:
    """Write the long table."""
    from pyarrow import parquet  # only here

    parquet.write_table(scalars.table, file, compression="zstd")


def write_csv(file: BinaryIO, scalars: Scalars, names: Sequence[str] | None) -> None:
    """Write one column per name, or one row per name and step if `names` is None.

    Strings are quoted, so that an empty one differs from none; NaN is ``nan``, times are UTC.
    """
    from pyarrow import csv  # only here

    if names is None:
        csv.write_csv(scalars.table, file)
        return
    for number, some in enumerate(_wide(scalars, names)):
        csv.write_csv(some, file, csv.WriteOptions(include_header=number == 0))


def _wide(scalars: Scalars, names: Sequence[str]) -> Iterator[pa.Table]:
    """Turn names into columns, some rows at a time."""
    table = scalars.table
    keys = [table["step"].to_numpy(), _codes(table["mode"]), table["worker"].to_numpy()]
    is_new = np.zeros(len(table), np.bool_)
    is_new[:1] = True
    for key in keys:
        is_new[1:] |= key[1:] != key[:-1]
    types = {
        name: scalars.column(name, *_values(table, rows)).type
        for name, rows in _rows_by_name(table, names)
    }
    begins = np.flatnonzero(is_new)
    stops = [*begins[_ROWS_AT_ONCE::_ROWS_AT_ONCE].tolist(), len(table)]
    for start, stop in zip([0, *stops[:-1]], stops, strict=True):
        part = table.slice(start, stop - start)
        yield _wide_part(scalars, part, is_new[start:stop], types)


def _wide_part(
    scalars: Scalars, table: pa.Table, is_new: NDArray[np.bool_], types: Mapping[str, pa.DataType]
) -> pa.Table:
    number = np.cumsum(is_new) - 1
    first = pa.array(np.flatnonzero(is_new))
    columns = {c: table[c].take(first) for c in (*_KEYS, "wall_time")}
    for name, rows in _rows_by_name(table, list(types)):
        at = np.full(len(first), -1, np.int64)
        at[number[rows]] = rows
        column = scalars.column(name, *_values(table, pa.array(at, mask=at < 0)))
        label = name if name not in columns else f"{name} (value)"
        columns[label] = column.cast(types[name])
    return pa.table(columns)


def _rows_by_name(table: pa.Table, names: Sequence[str]) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Give the rows of each name, found with one sort for all of them."""
    codes = pc.index_in(table["name"], pa.array(names, pa.utf8())).to_numpy()
    order = np.argsort(codes, kind="stable")
    begins = codes[order].searchsorted(np.arange(len(names) + 1))
    for number, name in enumerate(names):
        yield name, order[begins[number] : begins[number + 1]]


def _values(
    table: pa.Table, rows: pa.Array | NDArray[np.int64]
) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    return table["value"].take(rows), table["text"].take(rows)


def _codes(column: pa.ChunkedArray) -> NDArray[np.int64]:
    encoded = column.combine_chunks().dictionary_encode()
    codes: NDArray[np.int64] = encoded.indices.to_numpy(zero_copy_only=False)
    return codes
