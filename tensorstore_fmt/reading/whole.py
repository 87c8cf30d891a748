"""Whole tensors: all of one step of a local run, read and decoded straight into its place.

A shortcut past `assembly` and `fetch` for what is read most, which plans in half of their time.
What is not as simple as that, or not right, is left to them: they know all cases, and say what is
wrong.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt import dtypes
from tensorstore_fmt.errors import FormatError
from tensorstore_fmt.format import codec, layout
from tensorstore_fmt.format.grid import n_chunks, steps_lengths
from tensorstore_fmt.reading import pool
from tensorstore_fmt.reading.locate import AtStep
from tensorstore_fmt.reading.placing import check, scratch
from tensorstore_fmt.storage import Range, Storage

__all__ = ["read_whole"]

_MOST_CHUNKS: Final = 4096
_AT_ONCE_NBYTES: Final = 512 * 1024  # what was read is decoded while it is in the cache
_RAW_AT_ONCE_NBYTES: Final = 2 * 1024 * 1024
_MOST_GAP_NBYTES: Final = 4096
_THREADED_NBYTES: Final = 1024 * 1024
_THREADED_RAW_NBYTES: Final = 2 * 1024 * 1024

_COLUMNS: Final = ("chunk", "step", "stride", "count", "flags", "shard",
                   "offset", "nbytes", "raw_nbytes", "codec", "crc32c")  # fmt: skip


class _Payload(NamedTuple):
    """One chunk: where it lies in a shard, and where it belongs in the result."""

    offset: int
    nbytes: int
    place: int
    raw_nbytes: int
    codec: int
    crc32c: int


@dataclass(slots=True)
class _Run:
    """Payloads that are read together.

    Attributes
    ----------
    path, start, stop
        The shard, and the bytes of it.
    place
        First byte in the result, if all are raw and lie there as in the shard; else −1.
    """

    path: str
    start: int
    stop: int
    place: int
    payloads: list[_Payload] = field(default_factory=list)


def read_whole(storage: Storage, where: AtStep) -> NDArray[Any] | None:
    """Read all of a tensor at one step; None if it has to be planned, or is damaged.

    Returns
    -------
    ndarray
        Of its shape, in native byte order; the caller owns it.
    """
    if not storage.is_local or sys.byteorder == "big":
        return None
    series = where.source.series
    sizes = _sizes(series.shape, series.grid)
    which = where.page.rows_of(where.source.row, where.step, where.step)
    if sizes is None or not isinstance(which, slice) or which.stop - which.start != len(sizes):
        return None
    nbytes = sum(sizes) * dtypes.itemsize(series.dtype)
    threads, most = _division(where.page.entries.rows[which], nbytes)
    plan = _plan(where, which, sizes, most)
    if plan is None:
        return None
    inline, runs = plan
    result: NDArray[Any] = np.empty(series.shape, dtypes.numpy_dtype(series.dtype))
    reader = _Reader(storage, series.dtype, result.reshape(-1).view(np.uint8), deque(runs))
    try:
        for at, payload in inline:
            reader.put(payload, where.page.entries.inline[at].data)
        pool.run_all(reader.work, range(min(threads, len(runs))))
    except (FormatError, OSError):
        return None
    return result


@lru_cache(maxsize=256)
def _sizes(shape: tuple[int, ...], grid: tuple[int, ...]) -> tuple[int, ...] | None:
    """Give the elements of each chunk if one lies behind the other in a tensor in C order."""
    box = steps_lengths(shape, grid)
    axis = next((i for i, n in enumerate(box) if n != 1), len(box) - 1)
    if n_chunks(shape, grid) > _MOST_CHUNKS or box[axis + 1 :] != shape[axis + 1 :]:
        return None
    if not shape:
        return (1,)
    inner = math.prod(shape[axis + 1 :])
    lengths = [min(box[axis], shape[axis] - i) * inner for i in range(0, shape[axis], box[axis])]
    return tuple(lengths * math.prod(shape[:axis]))


def _division(rows: NDArray[Any], nbytes: int) -> tuple[int, int]:
    """Give the number of threads, and the most bytes to read at once, so that each has a share."""
    least, most = _THREADED_NBYTES, _AT_ONCE_NBYTES
    if rows["codec"][0] == layout.CODEC_RAW:
        least, most = _THREADED_RAW_NBYTES, _RAW_AT_ONCE_NBYTES
    if nbytes <= least:
        return 1, most
    share = -(-int(rows["nbytes"].sum(dtype=np.int64)) // pool.THREADS)
    return pool.THREADS, min(most, share + _MOST_GAP_NBYTES)


def _plan(
    where: AtStep, which: slice, sizes: tuple[int, ...], most: int
) -> tuple[list[tuple[int, _Payload]], list[_Run]] | None:
    """Give what lies in the index, by row, and what is read from shards.

    None if it is not all there, once, and as it should be.
    """
    itemsize = dtypes.itemsize(where.source.series.dtype)
    rows, shards = where.page.entries.rows[which], where.source.segment.head.shards
    inline = []
    runs = _Runs(shards, most)
    place = 0
    columns = [rows[name].tolist() for name in _COLUMNS]
    for i, (chunk, step, stride, count, flags, shard, *rest) in enumerate(
        zip(*columns, strict=True)
    ):
        offset, nbytes, raw_nbytes, number, crc = rest
        if (
            chunk != i
            or (where.step - step) % stride
            or (count != 1 and not flags & layout.ENTRY_REPEAT)
            or number == layout.CODEC_DROPPED
            or raw_nbytes != sizes[i] * itemsize
            or raw_nbytes > layout.MAX_CHUNK_RAW_NBYTES
        ):
            return None
        payload = _Payload(offset, nbytes, place, raw_nbytes, number, crc)
        if shard == layout.INLINE_SHARD:
            inline.append((which.start + i, payload))
        elif not runs.add(shard, payload):
            return None
        place += raw_nbytes
    return inline, runs.found


class _Runs:
    """Puts payloads together that are neighbours in a shard, whatever lies between them in others.

    Parameters
    ----------
    shards
        Of the segment.
    most
        Bytes that are read at once, but for a payload that is longer.
    """

    def __init__(self, shards: Sequence[tuple[layout.ShardName, int]], most: int) -> None:
        self._shards = shards
        self._most = most
        self._last: dict[tuple[int, bool], _Run] = {}
        self.found: list[_Run] = []

    def add(self, shard: int, payload: _Payload) -> bool:
        """Add a payload; False if it is not in its shard."""
        offset, nbytes, place = payload.offset, payload.nbytes, payload.place
        name, length = self._shards[shard]
        is_raw = payload.codec == layout.CODEC_RAW
        if offset + nbytes > length or not nbytes or (is_raw and nbytes != payload.raw_nbytes):
            return False
        run = self._last.get((shard, is_raw))
        if run is None or not self._continues(run, payload):
            run = _Run(name.path, offset, offset, place if is_raw else -1)
            self._last[shard, is_raw] = run
            self.found.append(run)
        run.stop = offset + nbytes
        run.payloads.append(payload)
        return True

    def _continues(self, run: _Run, payload: _Payload) -> bool:
        gap = payload.offset - run.stop
        if payload.offset + payload.nbytes - run.start > self._most:
            return False
        if run.place < 0:
            return 0 <= gap <= _MOST_GAP_NBYTES
        return gap == 0 and payload.place - run.place == payload.offset - run.start


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads runs, as many threads as like to, until none is left."""

    storage: Storage
    dtype: str
    result: NDArray[np.uint8]
    runs: deque[_Run]

    def work(self, _: int) -> None:
        while self.runs:
            try:
                run = self.runs.popleft()
            except IndexError:  # another thread was faster
                return
            if run.place >= 0:
                self._read_raw(run)
            else:
                self._decode(run)

    def put(self, payload: _Payload, data: memoryview) -> None:
        """Check a payload, and decode it in its place."""
        check(data, payload.crc32c)
        room = self.result[payload.place : payload.place + payload.raw_nbytes]
        codec.decode(data, room, codec=payload.codec, dtype=self.dtype)

    def _read_raw(self, run: _Run) -> None:
        room = self.result[run.place : run.place + run.stop - run.start].data
        self.storage.fetch_into([Range(run.path, run.start, run.stop)], [room])
        for payload in run.payloads:
            at = payload.offset - run.start
            check(room[at : at + payload.nbytes], payload.crc32c)

    def _decode(self, run: _Run) -> None:
        data = scratch.take(run.stop - run.start).data
        self.storage.fetch_into([Range(run.path, run.start, run.stop)], [data])
        for payload in run.payloads:
            at = payload.offset - run.start
            self.put(payload, data[at : at + payload.nbytes])
