"""Fetching: payloads from shards, checked, decoded and put where they belong in a result."""

from __future__ import annotations

import itertools
import math
import sys
import threading
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt import dtypes
from tensorstore_fmt.errors import (
    FormatError,
    LimitError,
    MissingFileError,
    TensorStoreError,
)
from tensorstore_fmt.format import layout
from tensorstore_fmt.reading import pool
from tensorstore_fmt.reading.assembly import Assembly, Group
from tensorstore_fmt.reading.entries import Found
from tensorstore_fmt.reading.inline import gather_rows
from tensorstore_fmt.reading.placing import Decoder, Payload, straight_places
from tensorstore_fmt.reading.plan import merge_ranges
from tensorstore_fmt.reading.raw import RawPayloads, read_raw
from tensorstore_fmt.storage import BytesLike, Range, Storage

__all__ = ["check_room", "read_all"]

_I64 = NDArray[np.int64]
_Array = NDArray[Any]

_THREADED_NBYTES: Final = 1024 * 1024
_REMOTE_NBYTES: Final = 64 * 1024 * 1024  # on their way at the same time
_STRAIGHT_NBYTES: Final = 256 * 1024  # less is better merged with what others ask for
_LOCAL_BATCH_NBYTES: Final = 2 * 1024 * 1024
_REMOTE_REQUEST_NBYTES: Final = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Units:
    """Payloads of a group, one row each, and where their steps go.

    Attributes
    ----------
    entry, chunk
        Entry, and which of the touched chunks it is.
    file, offset, nbytes
        Where it lies; the file is −1 for inline, and for one without bytes.
    begin
        Steps ``begin[i]`` to ``begin[i + 1]`` of `number` and `inner` are in payload i.
    number, inner
        Row of the result, and which of the payload's steps it is.
    """

    entry: _I64
    chunk: _I64
    file: _I64
    offset: _I64
    nbytes: _I64
    begin: _I64
    number: _I64
    inner: _I64


@dataclass(frozen=True, slots=True)
class _Fill:
    """A group, its units, and the part of a result that it fills."""

    assembly: Assembly
    group: Group
    units: _Units
    target: _Array  # steps of the result × all axes, ascending
    straight: _I64 | None  # first byte of each unit in the target; None: they do not lie there so

    @property
    def name(self) -> str:
        return self.group.series.name


def read_all(storage: Storage, assemblies: Sequence[Assembly]) -> list[_Array]:
    """Read results; all payloads are asked for at once, at most 64 MiB of them in a bucket.

    Returns
    -------
    list of ndarray
        For each the shape (n, *selection), stored dtype (object for strings), native byte
        order. The caller owns them.

    Raises
    ------
    ChecksumError, TruncatedError, MissingFileError, FormatError
        A payload is not what the index says; nothing of it is returned.
    OSError
        The storage failed.
    """
    files: dict[layout.ShardName, int] = {}
    results = []
    fills: list[_Fill] = []
    for assembly in assemblies:
        result, target = _room(assembly)
        results.append(result)
        for group in assembly.groups:
            if not len(group.number) or not len(group.touched):
                continue
            part = target[(slice(None), *(slice(a, b) for a, b in group.places))]
            rest = _fill_inline(assembly, group, part)
            if rest is not None:
                units = _units(assembly, rest, files)
                straight = _straight(assembly, rest, units, part)
                fills.append(_Fill(assembly, rest, units, part, straight))
    paths = [name.path for name in files]
    if storage.is_local:
        fills = [fill for fill in fills if not _is_read_raw(storage, paths, fill)]
    if fills:
        _Reader(storage, paths, fills).run()
    return [_finish(assembly, result) for assembly, result in zip(assemblies, results, strict=True)]


def check_room(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Refuse a shape that NumPy cannot have; it would take it for a wrong argument of ours.

    Raises
    ------
    LimitError
    """
    # NumPy leaves axes without elements out, too.
    if math.prod(n or 1 for n in shape) * dtype.itemsize > sys.maxsize:
        raise LimitError(
            f"{name!r}: no array can have the shape {shape} of {dtype}; read fewer steps, or less "
            "of each",
            name=name,
        )


def _room(assembly: Assembly) -> tuple[_Array, _Array]:
    """Give the array for a result with all axes, and a view of it in ascending order."""
    shape = (len(assembly.chosen.steps), *assembly.selection.counts)
    dtype = dtypes.numpy_dtype(assembly.dtype)
    check_room(assembly.found.query.name, shape, dtype)
    result = np.empty(shape, dtype)
    if not assembly.selection.is_flipped:
        return result, result
    flips = [slice(None, None, -1 if a.is_flipped else 1) for a in assembly.selection.axes]
    return result, result[(slice(None), *flips)]


def _finish(assembly: Assembly, result: _Array) -> _Array:
    result = result.reshape((len(result), *assembly.selection.shape))
    if sys.byteorder == "big" and result.dtype.itemsize > 1:
        result = result.astype(result.dtype.newbyteorder("="))
    return result


def _fill_inline(assembly: Assembly, group: Group, target: _Array) -> Group | None:
    """Fill what lies in the index as single chunks; give what is left to do."""
    touched = group.touched
    if len(touched) != 1 or assembly.dtype == dtypes.STRING:
        return group
    entries = assembly.found.entries
    entry, inner = group.entry.reshape(-1), group.inner.reshape(-1)
    is_inline = (entries.rows["shard"] == layout.INLINE_SHARD).take(entry)
    if not is_inline.any():
        return group
    rest = None
    number = group.number
    if not is_inline.all():
        rest = Group(
            group.series, touched, group.places, group.steps[~is_inline], number[~is_inline],
            group.entry[~is_inline], group.inner[~is_inline],
        )  # fmt: skip
        entry, inner, number = entry[is_inline], inner[is_inline], number[is_inline]
    dtype = dtypes.numpy_dtype(assembly.dtype)
    nbytes = int(touched.sizes[0]) * dtype.itemsize
    rows = gather_rows(entries, entry, inner, nbytes, group.series)
    values = np.ascontiguousarray(rows).view(dtype).reshape(len(rows), *touched.boxes[0])
    if not touched.is_whole[0]:
        values = values[(slice(None), *touched.local[0])]
    if len(number) == len(target):
        target[...] = values
    else:
        target[number] = values
    return rest


def _units(assembly: Assembly, group: Group, files: dict[layout.ShardName, int]) -> _Units:
    """List the payloads of a group, each once."""
    n, m = group.entry.shape
    if n == 1 or m == 1:
        flat = group.entry.reshape(-1)
        chunk = np.arange(m) if n == 1 else np.zeros(n, np.int64)
    else:
        flat = group.entry.T.reshape(-1)
        chunk = np.repeat(np.arange(m), n)
    # Chunk by chunk, steps ascending: steps that share a payload are neighbours, but for
    # entries whose strides interlace.
    if (flat[1:] > flat[:-1]).all():
        order = None
        begin = np.arange(len(flat) + 1)
    else:
        order = np.argsort(flat, kind="stable")
        flat = flat[order]
        is_new = np.concatenate([[True], flat[1:] != flat[:-1], [True]])
        begin = np.flatnonzero(is_new)
    number = np.tile(group.number, m) if m > 1 else group.number
    inner = group.inner.T.reshape(-1)
    if order is not None:
        number, inner, chunk = number[order], inner[order], chunk[order]
    entry = flat[begin[:-1]]
    rows = assembly.found.entries.rows[entry]
    return _Units(
        entry,
        chunk[begin[:-1]],
        _files_of(assembly.found, entry, rows, files),
        rows["offset"].astype(np.int64),
        rows["nbytes"].astype(np.int64),
        begin,
        number,
        inner,
    )


def _straight(assembly: Assembly, group: Group, units: _Units, target: _Array) -> _I64 | None:
    """Give the byte of the target at which each payload's values begin, if all can be put so."""
    if assembly.dtype == dtypes.STRING or len(units.number) != len(units.entry):
        return None
    rows = assembly.found.entries.rows[units.entry]
    if ((rows["count"] != 1) & (rows["flags"] & layout.ENTRY_REPEAT == 0)).any():
        return None
    places = straight_places(group.touched, target)
    if places is None:
        return None
    return units.number * (target.nbytes // len(target)) + places[units.chunk]


def _is_read_raw(storage: Storage, paths: list[str], fill: _Fill) -> bool:
    """Read a fill straight into its result, if all of it is raw; False: that has to be done yet.

    Also if something is wrong: what it is, is found out by who reads it then.
    """
    if fill.straight is None or fill.target.nbytes < _STRAIGHT_NBYTES:
        return False
    units = fill.units
    rows = fill.assembly.found.entries.rows[units.entry]
    is_raw = (rows["codec"] == layout.CODEC_RAW) & (rows["nbytes"] == rows["raw_nbytes"])
    if not is_raw.all() or (units.file < 0).any():
        return False
    raw = RawPayloads(units.file, units.offset, units.nbytes, fill.straight, rows["crc32c"])
    return read_raw(storage, paths, raw, fill.target.reshape(-1).view(np.uint8))


def _files_of(found: Found, entry: _I64, rows: _Array, files: dict[layout.ShardName, int]) -> _I64:
    """Number the shards of payloads, and make sure that these lie inside of them."""
    shard = rows["shard"].astype(np.int64)
    file = np.full(len(shard), -1, np.int64)
    is_there = (rows["nbytes"] > 0) & (shard != layout.INLINE_SHARD)
    source = np.searchsorted(found.begins, entry, side="right") - 1
    key = np.where(is_there, source << 32 | shard, -1)
    end = rows["offset"] + rows["nbytes"]
    for each in set(key.tolist()) - {-1}:
        segment = found.sources[each >> 32].segment
        name, nbytes = segment.head.shards[each & 0xFFFFFFFF]
        mine = key == each
        if int(end[mine].max()) > nbytes:
            path = segment.name.path
            raise FormatError(
                f"{path}: an entry of {found.query.name!r} names bytes to {int(end[mine].max()):,} "
                f"of {name.path}, whose length it says is {nbytes:,}",
                file=path,
            )
        file[mine] = files.setdefault(name, len(files))
    return file


@dataclass(frozen=True, slots=True)
class _Batch:
    """Requests (a slice of all of them) and the payloads in them."""

    first: int
    end: int
    payloads: _I64


class _Reader:
    """Fetches the payloads of fills and decodes them into their targets."""

    def __init__(self, storage: Storage, paths: list[str], fills: Sequence[_Fill]) -> None:
        self._storage = storage
        self._paths = paths
        self._fills = fills
        self._fill_of = np.repeat(np.arange(len(fills)), [len(fill.units.entry) for fill in fills])
        self._unit_of = np.concatenate([np.arange(len(f.units.entry)) for f in fills])
        file = np.concatenate([f.units.file for f in fills])
        offset = np.concatenate([f.units.offset for f in fills])
        nbytes = np.concatenate([f.units.nbytes for f in fills])
        self._is_here = file < 0
        self._merged = merge_ranges(
            file[~self._is_here],
            offset[~self._is_here],
            nbytes[~self._is_here],
            max_gap_bytes=storage.max_gap_bytes,
            max_request_nbytes=_LOCAL_BATCH_NBYTES if storage.is_local else _REMOTE_REQUEST_NBYTES,
        )
        self._stored_nbytes = int(nbytes.sum())
        self._request = np.full(len(file), -1, np.int64)
        self._request[~self._is_here] = self._merged.request
        self._offset = offset

    def run(self) -> None:
        """Do everything."""
        here = np.flatnonzero(self._is_here)
        if len(here):
            self._decode(here, {})
        batches = self._batches()
        total = sum(fill.target.nbytes for fill in self._fills)
        is_much = max(total, self._stored_nbytes) > _THREADED_NBYTES and pool.THREADS > 1
        if self._storage.is_local and is_much and len(batches) > 1:
            pool.run_all(self._do, _spread(batches, pool.THREADS))
            return
        if self._storage.is_local:
            self._do(batches)
        else:
            self._stream(batches, pool.THREADS if is_much else 1)

    def _stream(self, batches: Sequence[_Batch], threads: int) -> None:
        """Fetch each request by itself, many at the same time, and decode what has arrived."""
        if len(batches) == 1:
            (batch,) = batches
            data = self._fetch(batch)
            pieces = np.array_split(batch.payloads, min(threads, len(batch.payloads)))
            pool.run_all(partial(self._decode, data=data), pieces)
            return
        ranges = [self._ranges(batch)[0] for batch in batches]
        lock, has_failed = threading.Lock(), threading.Event()

        def work(_: int) -> None:
            while not has_failed.is_set():
                with lock:
                    number, result = next(arriving, (-1, b""))
                if number < 0:
                    return
                try:
                    data = self._checked(batches[number], ranges[number : number + 1], [result])
                    self._decode(batches[number].payloads, data)
                except BaseException:
                    has_failed.set()
                    raise
                del result, data  # before it is waited for more

        with closing(self._storage.fetch_each(ranges, most_nbytes=_REMOTE_NBYTES)) as arriving:
            pool.run_all(work, range(min(threads, len(batches))))

    def _do(self, batches: Sequence[_Batch]) -> None:
        for batch in batches:
            self._decode(batch.payloads, self._fetch(batch))

    def _batches(self) -> list[_Batch]:
        if not len(self._merged):
            return []
        most = _LOCAL_BATCH_NBYTES if self._storage.is_local else 0  # each by itself
        lengths = self._merged.stop - self._merged.start
        total = np.cumsum(lengths)
        there = np.flatnonzero(~self._is_here)
        order = there[np.lexsort((self._offset[there], self._request[there]))]
        ordered = self._request[order]
        batches = []
        first = 0
        while first < len(lengths):
            base = int(total[first - 1]) if first else 0
            end = max(int(total.searchsorted(base + most, side="right")), first + 1)
            begin, stop = ordered.searchsorted([first, end])
            batches.append(_Batch(first, end, order[begin:stop]))
            first = end
        return batches

    def _fetch(self, batch: _Batch) -> dict[int, memoryview]:
        ranges = self._ranges(batch)
        return self._checked(batch, ranges, self._storage.fetch_settled(ranges))

    def _ranges(self, batch: _Batch) -> list[Range]:
        merged, at = self._merged, slice(batch.first, batch.end)
        return [
            Range(self._paths[file], start, stop)
            for file, start, stop in zip(
                merged.file[at].tolist(),
                merged.start[at].tolist(),
                merged.stop[at].tolist(),
                strict=True,
            )
        ]

    def _checked(
        self, batch: _Batch, ranges: Sequence[Range], results: Sequence[BytesLike | Exception]
    ) -> dict[int, memoryview]:
        data = {}
        for number, asked, result in zip(
            range(batch.first, batch.end), ranges, results, strict=True
        ):
            if isinstance(result, Exception):
                raise self._explain(result, asked, batch, number) from result
            data[number] = memoryview(result)
        return data

    def _explain(self, error: Exception, request: Range, batch: _Batch, number: int) -> Exception:
        """Say what was being read when a request failed."""
        payload = int(batch.payloads[self._request[batch.payloads] == number][0])
        fill = self._fills[int(self._fill_of[payload])]
        step = int(
            fill.assembly.found.entries.rows["step"][fill.units.entry[self._unit_of[payload]]]
        )
        facts: dict[str, Any] = {
            "name": fill.name,
            "step": step,
            "file": request.path,
            "offset": request.start,
        }
        if isinstance(error, FileNotFoundError):
            return MissingFileError(
                f"{fill.name!r}, step {step}: {request.path} is not there, but the index names it",
                **facts,
            )
        if isinstance(error, FormatError):
            return type(error)(
                f"{fill.name!r}, step {step}: {error}", code=error.code, **{**error.facts, **facts}
            )
        return error

    def _decode(self, payloads: _I64, data: dict[int, memoryview]) -> None:
        """Decode payloads, given the requests that hold them."""
        fills = self._fill_of[payloads]
        if len(payloads) and (fills == fills[0]).all():
            self._decode_of(self._fills[int(fills[0])], payloads, data)
            return
        for number in np.unique(fills).tolist():
            self._decode_of(self._fills[number], payloads[fills == number], data)

    def _decode_of(self, fill: _Fill, payloads: _I64, data: dict[int, memoryview]) -> None:
        units, straight = fill.units, fill.straight
        decoder = Decoder(
            fill.group.touched,
            fill.target,
            units.number,
            units.inner,
            dtype=fill.assembly.dtype,
            is_straight=fill.straight is not None,
        )
        unit = self._unit_of[payloads]
        entry = units.entry[unit]
        rows = fill.assembly.found.entries.rows[entry]
        inline = fill.assembly.found.entries.inline
        request = self._request[payloads]
        start = np.where(
            request < 0, 0, self._offset[payloads] - self._merged.start[request] if data else 0
        )
        what = zip(
            units.chunk[unit].tolist(),
            units.begin[unit].tolist(),
            units.begin[unit + 1].tolist(),
            rows["raw_nbytes"].tolist(),
            rows["codec"].tolist(),
            rows["crc32c"].tolist(),
            np.where(rows["flags"] & layout.ENTRY_REPEAT, 1, rows["count"]).tolist(),
            itertools.repeat(-1, len(unit)) if straight is None else straight[unit].tolist(),
            strict=True,
        )
        where = zip(
            entry.tolist(), request.tolist(), start.tolist(), rows["nbytes"].tolist(), strict=True
        )
        before: object = None
        for (number, at, offset, nbytes), each in zip(where, map(Payload._make, what), strict=True):
            if at >= 0:
                payload = data[at][offset : offset + nbytes]
            else:
                payload = np.ascontiguousarray(inline[number]).data
            key = (at, offset, nbytes, each.raw_nbytes, each.codec, each.crc32c, each.kept)
            try:
                decoder.put(payload, each, is_same=at >= 0 and key == before)
            except TensorStoreError as error:
                raise self._located(error, fill, number) from error
            before = key

    def _located(self, error: TensorStoreError, fill: _Fill, entry: int) -> TensorStoreError:
        """Say of a bad payload what it was and where it lies."""
        row = fill.assembly.found.entries.rows[entry]
        segment = fill.assembly.found.source_of(entry).segment
        is_inline = row["shard"] == layout.INLINE_SHARD
        path = segment.name.path if is_inline else segment.head.shards[int(row["shard"])][0].path
        offset, step = int(row["offset"]), int(row["step"])
        return type(error)(
            f"{fill.name!r}, step {step}: {path}, bytes {offset} to {offset + int(row['nbytes'])}: "
            f"{error}",
            code=error.code,
            **{
                **error.facts,
                "name": fill.name,
                "step": step,
                "file": path,
                "offset": offset,
                "chunk": int(row["chunk"]),
            },
        )


def _spread(batches: Sequence[_Batch], n: int) -> list[list[_Batch]]:
    """Deal batches to threads, neighbours together."""
    n = min(n, len(batches))
    borders = [len(batches) * i // n for i in range(n + 1)]
    return [list(batches[a:b]) for a, b in itertools.pairwise(borders)]
