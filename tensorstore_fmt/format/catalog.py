"""The catalog: one row for each series of a segment (spec, "Pages", catalog page)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa

from tensorstore_fmt.dtypes import STRING
from tensorstore_fmt.errors import FormatError, LimitError
from tensorstore_fmt.format import layout
from tensorstore_fmt.format.columns import fixed, numbers, texts
from tensorstore_fmt.format.page import StoredPage, cut_rows, load_page, store_page
from tensorstore_fmt.format.ragged import Ragged

__all__ = [
    "SUMS",
    "CatalogColumns",
    "CatalogTable",
    "Series",
    "decode_catalog",
    "encode_catalog",
]

_INTS: Final = pa.list_(pa.int64())

CATALOG_SCHEMA: Final = pa.schema(
    [
        ("name", pa.utf8()),
        ("kind", pa.uint8()),
        ("mode", pa.uint8()),
        ("dtype", pa.utf8()),
        ("shape", _INTS),
        ("grid", _INTS),
        ("global_shape", _INTS),
        ("origin", _INTS),
        ("first_step", pa.int64()),
        ("last_step", pa.int64()),
        ("steps", pa.int64()),
        ("raw_nbytes", pa.int64()),
        ("stored_nbytes", pa.int64()),
    ]
)


class Series(NamedTuple):
    """One row of a catalog; its fields are in the order of the columns."""

    name: str
    kind: int
    mode: int
    dtype: str
    shape: tuple[int, ...]
    grid: tuple[int, ...]
    global_shape: tuple[int, ...] = ()
    origin: tuple[int, ...] = ()
    first_step: int = 0
    last_step: int = 0
    steps: int = 0
    raw_nbytes: int = 0
    stored_nbytes: int = 0

    @property
    def identity(self) -> tuple[object, ...]:
        """What makes a series; in the order of a catalog's rows."""
        return (
            self.name,
            self.kind,
            self.mode,
            self.dtype,
            self.grid,
            self.global_shape,
            self.origin,
        )

    @property
    def group(self) -> tuple[object, ...]:
        """What series have in common whose steps replace each other."""
        return (self.name, self.kind, self.mode, self.global_shape, self.origin)

    def full_shape(self, dims: Sequence[int]) -> tuple[int, ...]:
        """Give the shape at an entry whose varying lengths are `dims`."""
        left = iter(dims)
        return tuple(next(left) if n < 0 else n for n in self.shape)


SUMS: Final = ("first_step", "last_step", "steps", "raw_nbytes", "stored_nbytes")
"""The columns of a catalog that sum up the entries of a series."""


@dataclass(slots=True)
class CatalogTable:
    """Rows of a catalog, in columns; in order of `identities` when they are encoded."""

    names: list[str]
    kind: list[int]
    mode: list[int]
    dtypes: list[str]
    shape: list[tuple[int, ...]]
    grid: list[tuple[int, ...]]
    global_shape: list[tuple[int, ...]]
    origin: list[tuple[int, ...]]
    sums: dict[str, np.ndarray]

    @classmethod
    def of(cls, series: Sequence[Series]) -> CatalogTable:
        """Build from `Series`."""
        return cls(
            [s.name for s in series],
            [s.kind for s in series],
            [s.mode for s in series],
            [s.dtype for s in series],
            [s.shape for s in series],
            [s.grid for s in series],
            [s.global_shape for s in series],
            [s.origin for s in series],
            {
                key: np.fromiter((getattr(s, key) for s in series), np.int64, len(series))
                for key in SUMS
            },
        )

    def __len__(self) -> int:
        return len(self.names)

    def identities(self) -> list[tuple[object, ...]]:
        """Give what makes each series, as `Series.identity` does."""
        return list(
            zip(
                self.names, self.kind, self.mode, self.dtypes, self.grid, self.global_shape,
                self.origin, strict=True,
            )
        )  # fmt: skip

    def groups(self) -> list[tuple[object, ...]]:
        """Give what series have in common whose steps replace each other, as `Series.group`."""
        return list(
            zip(self.names, self.kind, self.mode, self.global_shape, self.origin, strict=True)
        )

    def full_shape(self, row: int, dims: Sequence[int]) -> tuple[int, ...]:
        """Give the shape at an entry whose varying lengths are `dims`."""
        left = iter(dims)
        return tuple(next(left) if n < 0 else n for n in self.shape[row])


def encode_catalog(catalog: CatalogTable | Sequence[Series]) -> list[StoredPage]:
    """Encode catalog rows, which must be in order of their identities."""
    table = catalog if isinstance(catalog, CatalogTable) else CatalogTable.of(catalog)
    if not len(table):
        return []
    sizes = np.fromiter(
        (
            4 * len(name) + 80 + 32 * len(shape) + 16 * len(origin)
            for name, shape, origin in zip(table.names, table.shape, table.origin, strict=True)
        ),
        np.int64,
        len(table),
    )
    pages = []
    for begin, end in itertools.pairwise(cut_rows(sizes)):
        part = slice(begin, end)
        columns = [
            texts(table.names[part]),
            fixed(table.kind[part], pa.uint8()),
            fixed(table.mode[part], pa.uint8()),
            texts(table.dtypes[part]),
            Ragged.of_ints(table.shape[part]).to_arrow_list(),
            Ragged.of_ints(table.grid[part]).to_arrow_list(),
            Ragged.of_ints(table.global_shape[part]).to_arrow_list(),
            Ragged.of_ints(table.origin[part]).to_arrow_list(),
            *(fixed(table.sums[key][part], pa.int64()) for key in SUMS),
        ]
        batch = pa.RecordBatch.from_arrays(columns, schema=CATALOG_SCHEMA)
        pages.append(
            store_page(batch, layout.PAGE_CATALOG, first_series=begin, last_series=end - 1)
        )
    return pages


@dataclass(frozen=True, slots=True)
class CatalogColumns:
    """One decoded catalog page, in columns."""

    names: list[str]
    kind: np.ndarray
    mode: np.ndarray
    dtypes: list[str]
    lists: dict[str, Ragged]
    sums: dict[str, np.ndarray]

    def series(self, begin: int, end: int) -> list[Series]:
        """Give rows begin … end − 1."""
        rows = slice(begin, end)
        columns = [
            self.names[rows],
            self.kind[rows].tolist(),
            self.mode[rows].tolist(),
            self.dtypes[rows],
            *(column.slice(begin, end).tuples() for column in self.lists.values()),
            *(column[rows].tolist() for column in self.sums.values()),
        ]
        return list(map(Series._make, zip(*columns, strict=True)))


def decode_catalog(stored: bytes | memoryview, row: np.void, where: str) -> CatalogColumns:
    """Check and decode one catalog page."""
    batch = load_page(stored, row, CATALOG_SCHEMA, where)
    kind, mode = numbers(batch.column("kind")), numbers(batch.column("mode"))
    names = batch.column("name")
    lists = {
        key: Ragged.of_arrow(batch.column(key))
        for key in ("shape", "grid", "global_shape", "origin")
    }
    rank = lists["shape"].lengths
    part = lists["global_shape"].lengths
    name_nbytes = np.diff(np.frombuffer(names.buffers()[1], np.int32, batch.num_rows + 1))
    is_bad = (
        (kind > layout.KIND_STEPS)
        | (mode >= len(layout.MODES))
        | (lists["grid"].lengths != rank)
        | (lists["origin"].lengths != part)
        | ((part != rank) & (part != 0) & (kind != layout.KIND_STATS))
        | ((name_nbytes == 0) != (kind == layout.KIND_STEPS))
    )
    if is_bad.any():
        raise FormatError(
            f"{where}: row {int(is_bad.argmax())} of a catalog page contradicts itself"
        )
    if (
        (name_nbytes > layout.MAX_NAME_NBYTES).any()
        or (rank > layout.MAX_RANK).any()
        or (part > layout.MAX_RANK).any()
    ):
        raise LimitError(f"{where}: a name or a rank in the catalog is above the limits")
    for key, least in (("shape", -1), ("grid", 0), ("global_shape", 0), ("origin", 0)):
        values = lists[key].values
        if len(values) and values.max() > layout.MAX_AXIS:
            raise LimitError(f"{where}: a {key} in the catalog is above the limits")
        if len(values) and values.min() < least:
            raise FormatError(f"{where}: a {key} in the catalog is negative")
    sums = {key: numbers(batch.column(key)) for key in SUMS}
    if max(int(sums["last_step"].max()), int(sums["first_step"].max())) > layout.MAX_STEP:
        raise LimitError(f"{where}: a step in the catalog is above the limits")
    if sums["first_step"].min() < 0 or (sums["first_step"] > sums["last_step"]).any():
        raise FormatError(f"{where}: the steps of a series in the catalog are out of range")
    dtypes = batch.column("dtype").to_pylist()
    if STRING in dtypes and any(
        d == STRING and r > 1 for d, r in zip(dtypes, rank.tolist(), strict=True)
    ):
        raise FormatError(f"{where}: strings in the catalog have more than one axis")
    return CatalogColumns(names.to_pylist(), kind, mode, dtypes, lists, sums)
