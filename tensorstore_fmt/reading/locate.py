"""Locating: the entries with a tensor at one step, where one writer saved it and one page has them.

A shortcut past `timeline` and `assembly`, for single steps, of which many are read one by one.
Whatever is not as simple as that, or not right, is left to these: they know all cases, and say
what is wrong.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import crc32c
import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt import dtypes
from tensorstore_fmt.errors import FormatError
from tensorstore_fmt.format import codec, layout
from tensorstore_fmt.format.page import ENTRY_ROW, Entries
from tensorstore_fmt.reading.entries import Page, Pages, Query
from tensorstore_fmt.reading.view import Segment, Source, View
from tensorstore_fmt.storage import Range, Storage

__all__ = ["AtStep", "Located", "at_steps", "locate", "read_located"]

_FIELDS: Final = {name: i for i, name in enumerate(ENTRY_ROW.names or ())}
_CHUNK: Final = _FIELDS["chunk"]
_STEP: Final = _FIELDS["step"]
_STRIDE: Final = _FIELDS["stride"]
_COUNT: Final = _FIELDS["count"]
_FLAGS: Final = _FIELDS["flags"]
_CODEC: Final = _FIELDS["codec"]
_SHARD: Final = _FIELDS["shard"]
_OFFSET: Final = _FIELDS["offset"]
_NBYTES: Final = _FIELDS["nbytes"]
_RAW_NBYTES: Final = _FIELDS["raw_nbytes"]
_CRC32C: Final = _FIELDS["crc32c"]

_MOST_NBYTES: Final = 1024 * 1024  # of a payload, raw; beyond, the plan costs little


@dataclass(frozen=True, slots=True)
class Located:
    """One chunk that is all of a tensor at one step.

    Attributes
    ----------
    source
        Where the entry comes from.
    entries, at
        The page's entries, and which of them it is.
    codec, shard, offset, nbytes, raw_nbytes, crc32c
        As in the entry.
    inner, kept
        Which of the payload's steps it is, and how many it holds.
    shape
        Of the tensor.
    """

    source: Source
    entries: Entries
    at: int
    codec: int
    shard: int
    offset: int
    nbytes: int
    raw_nbytes: int
    crc32c: int
    inner: int
    kept: int
    shape: tuple[int, ...]

    @classmethod
    def of(
        cls, source: Source, entries: Entries, at: int, *, inner: int, shape: tuple[int, ...]
    ) -> Located:
        """Wrap an entry that has a chunk with the whole tensor."""
        row: tuple[Any, ...] = entries.rows[at].item()
        kept = 1 if row[_FLAGS] & layout.ENTRY_REPEAT else row[_COUNT]
        return cls(
            source, entries, at, row[_CODEC], row[_SHARD], row[_OFFSET], row[_NBYTES],
            row[_RAW_NBYTES], row[_CRC32C], inner, kept, shape,
        )  # fmt: skip

    @property
    def is_inline(self) -> bool:
        """Whether it lies in the index."""
        return self.shard == layout.INLINE_SHARD

    @property
    def dtype(self) -> np.dtype[Any]:
        """As stored."""
        return dtypes.numpy_dtype(self.source.series.dtype)


@dataclass(frozen=True, slots=True)
class AtStep:
    """The only source that can have a tensor at a step, and the only page."""

    source: Source
    page: Page
    step: int


def at_steps(view: View, pages: Pages, queries: Sequence[Query]) -> list[AtStep | None]:
    """Find where tensors at single steps are, fetching all pages that takes in one round.

    Parameters
    ----------
    queries
        Of one step each.

    Returns
    -------
    list
        For each what was found, or None: it has to be planned, or is not there.

    Raises
    ------
    LostSegmentsError
        A segment is not there any more.
    FormatError
        A page is damaged.
    """
    places: list[tuple[Source, int]] = []
    for query in queries:
        place = _place(view, query)
        if place is None:
            return [None] * len(queries)  # and one round for the pages of all
        places.append(place)
    needed: dict[tuple[layout.SegmentName, int], tuple[Segment, int]] = {
        (source.segment.name, number): (source.segment, number) for source, number in places
    }
    have = pages.get(list(needed.values()))
    return [
        AtStep(source, have[source.segment.name, number], query.low)
        for query, (source, number) in zip(queries, places, strict=True)
    ]


def _place(view: View, query: Query) -> tuple[Source, int] | None:
    """Give the only series and the only page that can hold a step, if both are."""
    if query.low != query.high or not isinstance(query.name, str):
        return None
    found = None
    for source in view.sources(query.name, query.kind):
        if not query.accepts(source, view):
            continue
        if found is not None:
            return None
        found = source
    if (
        found is None
        or found.segment.cut is not None
        or (query.worker is not None and found.worker != query.worker)
        or (query.attempt is None and query.low >= view.visible_below(found.attempt))
        or not _is_simple(found)
    ):
        return None
    numbers = found.segment.pages_of(found.row, query.low, query.low)
    return (found, numbers[0]) if len(numbers) == 1 else None


def _is_simple(source: Source) -> bool:
    series = source.series
    if series.global_shape or series.dtype == dtypes.STRING:
        return False
    return all(n > 0 for n in series.shape)  # none without elements, or with a length that varies


def locate(where: AtStep) -> Located | None:
    """Give the one chunk that is all of the tensor; None if there is no such chunk."""
    source, page, step = where.source, where.page, where.step
    series = source.series
    if any(0 < g < n for n, g in zip(series.shape, series.grid, strict=True)):
        return None
    which = page.rows_of(source.row, step, step)
    if isinstance(which, slice):
        at, n = which.start, which.stop - which.start
    else:
        at, n = int(which[0]), len(which)
    if n != 1:
        return None
    row: tuple[Any, ...] = page.entries.rows[at].item()
    inner, rest = divmod(step - row[_STEP], row[_STRIDE])
    if row[_CHUNK] or rest or not 0 <= inner < row[_COUNT] or row[_CODEC] == layout.CODEC_DROPPED:
        return None
    if row[_FLAGS] & layout.ENTRY_REPEAT:
        inner = 0
    found = Located.of(source, page.entries, at, inner=inner, shape=series.shape)
    nbytes = math.prod(series.shape) * dtypes.itemsize(series.dtype)
    return found if found.raw_nbytes == found.kept * nbytes else None


def read_located(storage: Storage, located: Located) -> NDArray[Any] | None:
    """Read all of a tensor that was located; None if it has to be planned, or is damaged.

    Returns
    -------
    ndarray
        Of its shape, in native byte order; the caller owns it.
    """
    if sys.byteorder == "big" or max(located.raw_nbytes, located.nbytes) > _MOST_NBYTES:
        return None
    payload = _payload(storage, located)
    if payload is None or crc32c.crc32c(payload) != located.crc32c:
        return None
    dtype, shape = located.dtype, located.shape
    if located.codec == layout.CODEC_RAW and len(payload) == located.raw_nbytes:
        count = math.prod(shape)
        offset = located.inner * count * dtype.itemsize
        values: NDArray[Any] = np.frombuffer(payload, dtype, count, offset).reshape(shape)
        return values.copy()
    raw = np.empty(located.raw_nbytes, np.uint8)
    try:
        codec.decode(
            payload,
            raw,
            codec=located.codec,
            dtype=located.source.series.dtype,
            rows=located.kept,
        )
    except FormatError:
        return None
    steps: NDArray[Any] = raw.view(dtype).reshape(located.kept, -1)
    one: NDArray[Any] = steps[located.inner].reshape(shape)
    return one if located.kept == 1 else one.copy()


def _payload(storage: Storage, located: Located) -> memoryview | None:
    if located.is_inline:
        return located.entries.inline[located.at].data
    if not storage.is_local:
        return None  # in one round with others
    name, nbytes = located.source.segment.head.shards[located.shard]
    stop = located.offset + located.nbytes
    if stop > nbytes:
        return None
    (result,) = storage.fetch_settled([Range(name.path, located.offset, stop)])
    return None if isinstance(result, Exception) else memoryview(result)
