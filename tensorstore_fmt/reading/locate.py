"""Locating: the entries with a tensor at one step, where one writer saved it and one page has them.

A shortcut past `timeline` and `assembly`, for single steps, of which many are read one by one.
Whatever is not as simple as that, or not right, is left to these: they know all cases, and say
what is wrong.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import crc32c
import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt import dtypes
from tensorstore_fmt.errors import FormatError
from tensorstore_fmt.format import codec, layout
from tensorstore_fmt.format.page import ENTRY_ROW, Entries
from tensorstore_fmt.reading.entries import Page, Pages, Query
from tensorstore_fmt.reading.view import MANY, Segment, Source, View
from tensorstore_fmt.storage import Range, Storage

__all__ = ["AtStep", "Located", "at_steps", "locate", "locate_all", "read_located"]

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

Row: TypeAlias = tuple[Any, ...]
"""One entry, its columns in their order."""

_MOST_NBYTES: Final = 1024 * 1024  # of a payload, raw; beyond, the plan costs little


class Located(NamedTuple):
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
        cls,
        source: Source,
        entries: Entries,
        at: int,
        row: Row,
        *,
        inner: int,
        shape: tuple[int, ...],
    ) -> Located:
        """Wrap an entry that has a chunk with the whole tensor; `row` is it, as a tuple."""
        is_repeat = row[_FLAGS] & layout.ENTRY_REPEAT
        return cls(
            source, entries, at, row[_CODEC], row[_SHARD], row[_OFFSET], row[_NBYTES],
            row[_RAW_NBYTES], row[_CRC32C], 0 if is_repeat else inner,
            1 if is_repeat else row[_COUNT], shape,
        )  # fmt: skip

    @property
    def is_inline(self) -> bool:
        """Whether it lies in the index."""
        return self.shard == layout.INLINE_SHARD

    @property
    def dtype(self) -> np.dtype[Any]:
        """As stored."""
        return dtypes.numpy_dtype(self.source.series.dtype)


class AtStep(NamedTuple):
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
    sources: list[Source] = []
    for query in queries:
        source = _source(view, query)
        if source is None:
            return [None] * len(queries)  # and one round for the pages of all
        sources.append(source)
    steps = [query.low for query in queries]
    numbers = _page_numbers(sources, steps)
    if -1 in numbers:
        return [None] * len(queries)
    # By identity: names of segments are slow to hash, and there may be many questions.
    keys = [(id(source.segment), number) for source, number in zip(sources, numbers, strict=True)]
    needed: dict[tuple[int, int], tuple[Segment, int]] = {
        key: (source.segment, key[1]) for key, source in zip(keys, sources, strict=True)
    }
    have = pages.get(list(needed.values()))
    page = {key: have[segment.name, number] for key, (segment, number) in needed.items()}
    return [
        AtStep(source, page[key], step)
        for source, key, step in zip(sources, keys, steps, strict=True)
    ]


def _source(view: View, query: Query) -> Source | None:
    """Give the only series that can hold a step, if there is only one."""
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
    return found


def _is_simple(source: Source) -> bool:
    series = source.series
    if series.global_shape or series.dtype == dtypes.STRING:
        return False
    return min(series.shape, default=1) > 0  # neither without elements, nor of varying length


def _page_numbers(sources: Sequence[Source], steps: Sequence[int]) -> list[int]:
    """Give the root row of the only page that can hold each step, −1 if it is not the only one."""
    if len(sources) < MANY:
        pairs = zip(sources, steps, strict=True)
        return [source.segment.only_page(source.row, step) for source, step in pairs]
    numbers = [-1] * len(sources)
    for which in _grouped([source.segment for source in sources]):
        segment = sources[which[0]].segment
        rows = [sources[i].row for i in which]
        found = segment.only_pages(rows, [steps[i] for i in which])
        for i, number in zip(which, found, strict=True):
            numbers[i] = number
    return numbers


def _grouped(things: Sequence[object]) -> Iterable[list[int]]:
    """Give the positions of each thing."""
    groups: dict[int, list[int]] = {}
    for i, thing in enumerate(things):
        groups.setdefault(id(thing), []).append(i)
    return groups.values()


def locate(where: AtStep) -> Located | None:
    """Give the one chunk that is all of the tensor; None if there is no such chunk."""
    if _is_cut_up(where.source):
        return None
    at = where.page.only_row(where.source.row, where.step)
    return None if at < 0 else _located(where, at, where.page.entries.rows[at].item())


def locate_all(wheres: Sequence[AtStep]) -> list[Located | None]:
    """Do as `locate` for each, the searches together."""
    located: list[Located | None] = [None] * len(wheres)
    for which in _grouped([where.page for where in wheres]):
        asked = [i for i in which if not _is_cut_up(wheres[i].source)]
        page = wheres[which[0]].page
        found = page.only_rows(
            [wheres[i].source.row for i in asked], [wheres[i].step for i in asked]
        )
        rows = page.entries.rows[found].tolist()
        for i, at, row in zip(asked, found, rows, strict=True):
            if at >= 0:
                located[i] = _located(wheres[i], at, row)
    return located


def _is_cut_up(source: Source) -> bool:
    shape, grid = source.series.shape, source.series.grid
    return shape != grid and any(0 < g < n for n, g in zip(shape, grid, strict=True))


def _located(where: AtStep, at: int, row: Row) -> Located | None:
    inner, rest = divmod(where.step - row[_STEP], row[_STRIDE])
    if row[_CHUNK] or rest or not 0 <= inner < row[_COUNT] or row[_CODEC] == layout.CODEC_DROPPED:
        return None
    series = where.source.series
    found = Located.of(where.source, where.page.entries, at, row, inner=inner, shape=series.shape)
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
