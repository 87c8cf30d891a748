"""Plans: from a selection to chunks, and from payloads to requests. Pure data, no I/O."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt.errors import FormatError
from tensorstore_fmt.format.grid import n_chunks
from tensorstore_fmt.reading.selection import Axis, Selection

__all__ = ["Merged", "Touched", "merge_ranges", "n_touched", "touched_chunks"]

_MOST_CHUNKS: Final = 2**32  # an entry's number of a chunk has 32 bits
_MOST_WASTE: Final = 0.2  # bytes in gaps, per byte that is needed

_I64 = NDArray[np.int64]
_Slices = tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class Touched:
    """The chunks of a grid that a selection touches, in C order.

    Attributes
    ----------
    numbers
        Shape (m,), int64, ascending: their numbers in the grid.
    sizes
        Shape (m,), int64: elements of each chunk's box.
    boxes
        Shape of each chunk's box.
    local, places
        What is picked of each chunk, in the chunk; and where that lies in a result that keeps
        all axes and has ascending order.
    is_whole
        Whether all of a chunk is picked.
    """

    numbers: _I64
    sizes: _I64
    boxes: Sequence[tuple[int, ...]]
    local: Sequence[_Slices]
    places: Sequence[_Slices]
    is_whole: Sequence[bool]

    def __len__(self) -> int:
        return len(self.numbers)


def n_touched(selection: Selection, shape: tuple[int, ...], grid: tuple[int, ...]) -> int:
    """Give how many chunks `touched_chunks` would find, without listing them."""
    if 0 in selection.counts:
        return 0
    number = 1
    for axis, n, g in zip(selection.axes, shape, grid, strict=True):
        length = g or n
        span = (axis.start + (axis.count - 1) * axis.step) // length - axis.start // length + 1
        number *= min(span, axis.count)
    return number


def touched_chunks(selection: Selection, shape: tuple[int, ...], grid: tuple[int, ...]) -> Touched:
    """Find the chunks that a selection touches (spec, "Grid").

    Parameters
    ----------
    selection
        Of a tensor of this shape.
    grid
        Chunk lengths; 0 is the whole axis.
    """
    if 0 in selection.counts:
        none = np.empty(0, np.int64)
        return Touched(none, none, (), (), (), ())
    if n_chunks(shape, grid) > _MOST_CHUNKS:  # before their numbers wrap
        raise FormatError(
            f"a tensor of shape {shape} in chunks of {grid} has more chunks than can be numbered"
        )
    axes = [_along(axis, n, g or n) for axis, n, g in zip(selection.axes, shape, grid, strict=True)]
    numbers = np.zeros(1, np.int64)
    sizes = np.ones(1, np.int64)
    for axis, n, g in zip(axes, shape, grid, strict=True):
        numbers = np.add.outer(numbers * -(-n // (g or n)), axis.chunks).reshape(-1)
        sizes = np.multiply.outer(sizes, axis.lengths).reshape(-1)
    whole = [axis.is_whole for axis in axes]
    return Touched(
        numbers,
        sizes,
        list(itertools.product(*(axis.lengths.tolist() for axis in axes))),
        list(itertools.product(*(axis.local for axis in axes))),
        list(itertools.product(*(axis.places for axis in axes))),
        [all(each) for each in itertools.product(*whole)],
    )


@dataclass(frozen=True, slots=True)
class _Along:
    """Touched chunks along one axis."""

    chunks: _I64
    lengths: _I64
    local: list[slice]
    places: list[slice]
    is_whole: list[bool]


def _along(axis: Axis, n: int, g: int) -> _Along:
    start, count, step = axis.start, axis.count, axis.step
    first, last = start // g, (start + (count - 1) * step) // g
    if first == last:
        local = start - first * g
        length = min(g, n - first * g)
        return _Along(
            np.array([first], np.int64),
            np.array([length], np.int64),
            [slice(local, local + (count - 1) * step + 1, step)],
            [slice(0, count)],
            [count == length],
        )
    if step < g:
        chunks = np.arange(first, last + 1, dtype=np.int64)
    else:  # no two elements in one chunk, and some chunks without any
        chunks = (start + np.arange(count, dtype=np.int64) * step) // g
    begins = np.maximum(0, -((start - chunks * g) // step))
    ends = np.minimum(count, -((start - (chunks + 1) * g) // step))
    firsts = start + begins * step - chunks * g
    stops = firsts + (ends - begins - 1) * step + 1
    lengths = np.minimum(g, n - chunks * g)
    return _Along(
        chunks,
        lengths,
        [slice(a, b, step) for a, b in zip(firsts.tolist(), stops.tolist(), strict=True)],
        [slice(a, b) for a, b in zip(begins.tolist(), ends.tolist(), strict=True)],
        ((ends - begins) == lengths).tolist(),
    )


@dataclass(frozen=True, slots=True)
class Merged:
    """Byte ranges put together into requests.

    Attributes
    ----------
    file, start, stop
        Shape (r,), int64: of each request, ascending by file, then start.
    request
        Shape (n,), int64: the request that holds each range.
    """

    file: _I64
    start: _I64
    stop: _I64
    request: _I64

    def __len__(self) -> int:
        return len(self.file)

    @property
    def nbytes(self) -> int:
        """Bytes of all requests."""
        return int((self.stop - self.start).sum())


def merge_ranges(
    file: _I64,
    offset: _I64,
    nbytes: _I64,
    *,
    max_gap_bytes: int,
    max_request_nbytes: int,
    max_waste: float = _MOST_WASTE,
) -> Merged:
    """Put neighbouring byte ranges together.

    A gap is fetched along if it has at most `max_gap_bytes` and, the smallest first, as long
    as all gaps together are at most `max_waste` times the bytes needed. A range that occurs
    twice is fetched once. No request that holds more than one range is longer than about
    `max_request_nbytes`.

    Parameters
    ----------
    file, offset, nbytes
        Shape (n,), int64: number of the file, and place in it.
    """
    n = len(file)
    if n == 0:
        none = np.empty(0, np.int64)
        return Merged(none, none, none, none)
    if n == 1:
        return Merged(file, offset, offset + nbytes, np.zeros(1, np.int64))
    order = np.lexsort((nbytes, offset, file))
    files, starts = file[order], offset[order]
    stops = starts + nbytes[order]
    same_file = files[1:] == files[:-1]
    gaps = np.maximum(starts[1:] - stops[:-1], 0)
    is_repeated = same_file & (starts[1:] == starts[:-1]) & (stops[1:] == stops[:-1])
    joins = same_file & (gaps <= max_gap_bytes)
    wide = np.flatnonzero(joins & (gaps > 0))
    if len(wide):
        needed = int((stops - starts)[1:][~is_repeated].sum()) + int(stops[0] - starts[0])
        wide = wide[np.argsort(gaps[wide], kind="stable")]
        joins[wide[np.cumsum(gaps[wide]) > max_waste * needed]] = False
    joins = _cut_long(joins, starts, stops, max_request_nbytes) | is_repeated
    begins = np.flatnonzero(np.concatenate([[True], ~joins]))
    request = np.empty(n, np.int64)
    request[order] = np.cumsum(np.concatenate([[0], ~joins]))
    return Merged(files[begins], starts[begins], np.maximum.reduceat(stops, begins), request)


def _cut_long(joins: NDArray[np.bool_], starts: _I64, stops: _I64, most: int) -> NDArray[np.bool_]:
    """Undo joins so that no request is much longer than `most`."""
    begins = np.flatnonzero(np.concatenate([[True], ~joins]))
    group = np.cumsum(np.concatenate([[0], ~joins]))
    if int((np.maximum.reduceat(stops, begins) - starts[begins]).max()) <= most:
        return joins
    piece = (stops - starts[begins][group] - 1) // most
    is_same: NDArray[np.bool_] = piece[1:] <= piece[:-1]
    return joins & is_same
