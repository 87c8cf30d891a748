"""What the spec says of entries beyond one page: flushes, shapes, chunks, payloads, order."""

from __future__ import annotations

import math
from typing import Final

import crc32c
import numpy as np
import xxhash

from tensorstore_fmt import dtypes
from tensorstore_fmt.errors import FormatError, UnsupportedError
from tensorstore_fmt.format import codec, grid, layout, strings
from tensorstore_fmt.format.catalog import Series
from tensorstore_fmt.format.page import Entries
from tensorstore_fmt.format.segment import Catalog
from tensorstore_fmt.upkeep.boxes import Boxes, Run
from tensorstore_fmt.upkeep.claims import Claims, names_of
from tensorstore_fmt.upkeep.report import Names, Problem
from tensorstore_fmt.upkeep.segment_file import SegmentFile

__all__ = ["EntryChecker", "check_payload", "check_segment"]

_TOO_MANY: Final = 1 << 30  # elements of a chunk: no limit lets this be, nothing overflows


def check_payload(payload: memoryview, row: np.void, dtype: str, elements: int) -> None:
    """Decode a payload, whose checksum is right, and check what comes out.

    Parameters
    ----------
    row
        The entry, or the claim.
    elements
        Number of strings, if it holds such.
    """
    raw = np.empty(int(row["raw_nbytes"]), np.uint8)
    steps = 1 if row["flags"] & layout.ENTRY_REPEAT else int(row["count"])
    codec.decode(payload, raw, codec=int(row["codec"]), dtype=dtype, rows=steps)
    has_digest = bool(row["flags"] & layout.ENTRY_HAS_DIGEST)
    if has_digest and xxhash.xxh3_64_intdigest(raw.data) != int(row["digest"]):
        raise FormatError("the raw chunk does not have the digest that its entry says")
    if dtype == dtypes.STRING:
        strings.unpack_strings(raw, elements)


class EntryChecker:
    """Goes over the entry pages of one segment, in order.

    Parameters
    ----------
    file
        Its problems get what is found.
    claims
        Gets the chunks that lie in shards.

    Attributes
    ----------
    entries, inline_chunks
        How many were checked.
    logged
        Per mode, what the step table says: (step, stride, count).
    halves
        Series with steps of which a chunk is missing; after `finish`.
    """

    def __init__(self, file: SegmentFile, claims: Claims) -> None:
        assert file.head is not None
        self._file, self._head, self._claims = file, file.head, claims
        n = len(self._head.catalog)
        self._first = np.full(n, np.iinfo(np.int64).max, np.int64)
        self._last = np.full(n, -1, np.int64)
        self._shards = np.zeros(len(self._head.shards), np.bool_)
        self._last_key: tuple[int, ...] = (-1, -1, -1, -1)
        self._shapes: dict[tuple[int, int, tuple[int, ...]], tuple[int, int] | None] = {}
        self._boxes = Boxes()
        self.entries = 0
        self.inline_chunks = 0
        self.logged: dict[int, list[Run]] = {}
        self.halves: list[tuple[int, list[int]]] = []
        claims.need(self._head.shards)

    @property
    def catalog(self) -> Catalog:
        """The series of the segment."""
        return self._head.catalog

    def report(
        self,
        number: int,
        entries: Entries,
        mask: np.ndarray,
        what: str,
        *,
        code: str = "malformed",
    ) -> None:
        """Add a problem with some entries of a page."""
        names = names_of(
            (self.catalog.names[r["series"]], int(r["step"]), int(r["stride"]), int(r["count"]))
            for r in entries.rows[mask]
        )
        self.problem(what, code, names, int(self._head.root[number]["offset"]))

    def problem(
        self,
        what: str,
        code: str = "malformed",
        names: Names = (),
        offset: int | None = None,
    ) -> None:
        """Add a problem."""
        severity = "note" if code.startswith("unknown") else "damage"
        self._file.problems.append(
            Problem(
                code=code,
                severity=severity,  # type: ignore[arg-type] # one of the two
                file=self._file.path,
                offset=offset,
                what=what,
                names=names,
            )
        )

    # --- one page -----------------------------------------------------------------------

    def page(self, number: int, entries: Entries) -> None:
        """Check one page."""
        rows = entries.rows
        self.entries += len(rows)
        self._order(number, rows)
        self._columns(number, entries)
        series = rows["series"].astype(np.int64)
        np.minimum.at(self._first, series, rows["step"])
        np.maximum.at(self._last, series, entries.last_step)
        is_stored = rows["shard"] != layout.INLINE_SHARD
        self._shards[rows["shard"][is_stored]] = True
        is_table = self._head.catalog.kind[series] == layout.KIND_STEPS
        for row in rows[is_table & (rows["codec"] != layout.CODEC_DROPPED)]:
            mode = int(self._head.catalog.mode[row["series"]])
            run = (int(row["step"]), int(row["stride"]), int(row["count"]))
            self.logged.setdefault(mode, []).append(run)
        elements, is_good = self._sizes(number, entries)
        self._inline(number, entries, elements, is_good)
        self._claims.add(
            self._head.catalog, self._head.shards, entries.take(is_good), elements[is_good]
        )

    def _order(self, number: int, rows: np.ndarray) -> None:
        """Check the order from page to page; decoding has checked it within each."""
        keys = ("series", "step", "chunk", "first_flush")
        first, last = (tuple(int(rows[i][k]) for k in keys) for i in (0, -1))
        if first <= self._last_key:
            offset = int(self._head.root[number]["offset"])
            self.problem("entries are not in strict order", offset=offset)
        self._last_key = last

    def _columns(self, number: int, entries: Entries) -> None:
        """Check what decoding leaves out."""
        rows = entries.rows
        mask = (rows["count"] == 1) & (rows["first_flush"] != rows["last_flush"])
        if mask.any():
            self.report(number, entries, mask, "entries of one step in two flushes")

    # --- shapes ---------------------------------------------------------------------------

    def _shape(self, series: int, chunk: int, dims: tuple[int, ...]) -> tuple[int, int] | None:
        """Give the elements of a chunk's box and the number of chunks; None if there is none."""
        key = (series, chunk, dims)
        if key not in self._shapes:
            if len(self._shapes) > 100_000:
                self._shapes.clear()
            row = self._head.catalog[series]
            shape = row.full_shape(dims)
            count = grid.n_chunks(shape, row.grid)
            found = None
            if chunk < count and _fits(row, shape):
                box = grid.chunk_box(shape, row.grid, chunk)
                found = math.prod(b - a for a, b in box), count
            self._shapes[key] = found
        return self._shapes[key]

    def _sizes(self, number: int, entries: Entries) -> tuple[np.ndarray, np.ndarray]:
        """Check chunk numbers and raw lengths.

        Returns
        -------
        tuple
            The elements of each payload, and which entries have a payload that can be decoded.
        """
        rows = entries.rows
        has_dims = entries.dims.lengths > 0
        per_step = np.zeros(len(rows), np.int64)
        is_good = rows["codec"] != layout.CODEC_DROPPED
        outside = np.zeros(len(rows), np.bool_)
        itemsizes = self._itemsizes(np.unique(rows["series"]))
        plain = zip(rows["series"].tolist(), rows["chunk"].tolist(), strict=True)
        for i, (series, chunk) in enumerate(plain):
            if not is_good[i]:
                continue
            dims = tuple(entries.dims[i].tolist()) if has_dims[i] else ()
            found = self._shape(series, chunk, dims)
            if found is None:
                outside[i] = True
                continue
            per_step[i] = min(found[0], _TOO_MANY)
            if found[1] > 1:
                self._boxes.add(series, dims, found[1], rows[i])
        steps = np.where(rows["flags"] & layout.ENTRY_REPEAT, 1, rows["count"]).astype(np.int64)
        size = np.array([itemsizes[s] for s in rows["series"].tolist()], np.int64)
        elements = per_step * steps
        wrong = is_good & (size > 0) & (rows["raw_nbytes"] != elements * size)
        wrong |= is_good & (size == 0) & (rows["raw_nbytes"] < 4 * (elements + (elements > 0)))
        for mask, what in (
            (outside, "chunks that the grid does not have"),
            (wrong & ~outside, "raw lengths that the shape does not give"),
        ):
            if mask.any():
                self.report(number, entries, mask, what)
        is_known = size >= 0
        return elements, is_good & ~outside & ~wrong & is_known

    def _itemsizes(self, numbers: np.ndarray) -> dict[int, int]:
        """Give the bytes of an element; 0 for strings, -1 for dtypes of newer versions."""
        sizes = {}
        for n in numbers.tolist():
            try:
                sizes[n] = dtypes.itemsize(self._head.catalog[n].dtype)
            except UnsupportedError:
                sizes[n] = -1
        return sizes

    # --- payloads in the page ---------------------------------------------------------------

    def _inline(
        self, number: int, entries: Entries, elements: np.ndarray, is_good: np.ndarray
    ) -> None:
        rows = entries.rows
        where = np.flatnonzero((rows["shard"] == layout.INLINE_SHARD) & is_good)
        offsets = entries.inline.offsets.tolist()
        data = entries.inline.values.data
        bad: dict[tuple[str, str], list[int]] = {}
        for i in where.tolist():
            row = rows[i]
            payload = data[offsets[i] : offsets[i + 1]]
            if crc32c.crc32c(payload) != row["crc32c"]:
                bad.setdefault(("checksum", "inline payloads with a wrong checksum"), []).append(i)
                continue
            is_plain = row["codec"] == layout.CODEC_RAW and not row["flags"]
            dtype = self._head.catalog[int(row["series"])].dtype
            if is_plain and dtype != dtypes.STRING and row["nbytes"] == row["raw_nbytes"]:
                continue
            try:
                check_payload(payload, row, dtype, int(elements[i]))
            except FormatError as error:
                bad.setdefault((error.code, f"inline payload: {error.message}"), []).append(i)
        self.inline_chunks += len(where)
        for (code, what), found in bad.items():
            self.report(number, entries, np.array(found), what, code=code)

    # --- the end --------------------------------------------------------------------------

    def finish(self) -> None:
        """Check what only all pages together can tell."""
        catalog, head = self._head.catalog, self._head
        lost: set[int] = set()
        for number in self._file.bad_pages:
            row = head.root[number]
            lost |= set(range(int(row["first_series"]), int(row["last_series"]) + 1))
        for n, what, steps in self._boxes.finish():
            if n not in lost:
                self.halves.append((n, steps))
                names = names_of((catalog.names[n], step, 1, 1) for step in steps)
                self.problem(what, names=names or ((catalog.names[n], ()),))
        for n in range(len(catalog)):
            wrong = _wrong_series(catalog[n])
            if wrong is not None:
                code = "unknown_dtype" if wrong.startswith("dtype") else "malformed"
                self.problem(f"series {n}: {wrong}", code, ((catalog.names[n], ()),))
        if lost:
            return
        is_wrong = (self._first != catalog.column("first_step")) | (
            self._last != catalog.column("last_step")
        )
        for n in np.flatnonzero(is_wrong).tolist() if len(catalog) else ():
            what = "the catalog says other steps than the entries cover"
            self.problem(what, names=((catalog.names[n], ()),))
        if not self._shards.all():
            self.problem("the shard page has a shard that no entry names")


def _fits(row: Series, shape: tuple[int, ...]) -> bool:
    """Say whether a part lies in its global tensor."""
    if row.kind != layout.KIND_DATA or not row.global_shape:
        return True
    return all(o + n <= g for o, n, g in zip(row.origin, shape, row.global_shape, strict=True))


def _wrong_series(row: Series) -> str | None:
    """Say what is wrong with a catalog row beyond what decoding it checks."""
    if row.dtype not in dtypes.NAMES:
        return f"dtype {row.dtype!r} is not known to this version"
    if row.kind == layout.KIND_STATS and (row.dtype, row.shape, row.grid) != (
        "float64", (layout.STATS_LEN,), (0,),
    ):  # fmt: skip
        return "statistics of another shape"
    if row.kind == layout.KIND_STEPS and (
        (row.dtype, row.shape, row.grid) != ("int64", (2,), (0,)) or row.global_shape
    ):
        return "a step table of another shape"
    return None


def check_segment(file: SegmentFile, claims: Claims) -> EntryChecker | None:
    """Go over all entry pages of a segment; None if its head is damaged."""
    if file.head is None:
        return None
    checker = EntryChecker(file, claims)
    for number, entries in file.pages():
        checker.page(number, entries)
    checker.finish()
    return checker
