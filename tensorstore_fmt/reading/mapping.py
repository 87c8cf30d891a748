"""Mapping: a local, raw tensor used where it lies."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import crc32c
import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt import dtypes
from tensorstore_fmt.errors import ArgumentError, ChecksumError
from tensorstore_fmt.format import layout
from tensorstore_fmt.reading.assembly import assemble, choose
from tensorstore_fmt.reading.locate import Located, at_steps, locate
from tensorstore_fmt.reading.reader import Ask, check_name
from tensorstore_fmt.reading.session import Session
from tensorstore_fmt.reading.timeline import timelines
from tensorstore_fmt.reading.view import View

__all__ = ["map_view"]


def map_view(session: Session, ask: Ask) -> NDArray[Any]:
    """Map one whole tensor at one step, read-only.

    Raises
    ------
    ArgumentError
        Code ``no_view``: it does not lie there in one raw piece.
    """
    name = ask.query.name

    def refuse(why: str) -> ArgumentError:
        return ArgumentError(
            f"{name!r} cannot be mapped: {why}; use read()", code="no_view", name=name
        )

    def work(view: View) -> NDArray[Any]:
        (where,) = at_steps(view, session.pages, [ask.query])
        located = None if where is None else locate(where)
        if located is None:
            check_name(view, name)
        if not session.storage.is_local or sys.byteorder == "big":
            raise refuse("the run is not local, or this machine is big-endian")
        if located is None:
            located = _planned(view, session, ask, refuse)
        if located.codec != layout.CODEC_RAW:
            coding = layout.CODEC_NAMES.get(located.codec, str(located.codec))
            raise refuse(f"its codec is {coding}, not raw (write it with compression='none')")
        if located.is_inline:
            raise refuse("it is small and lies in the index")
        shard, shard_nbytes = located.source.segment.head.shards[located.shard]
        begin, nbytes = located.offset, located.nbytes
        if begin + nbytes > shard_nbytes or nbytes != located.raw_nbytes:
            raise refuse("the index contradicts itself")
        path = shard.path
        payload = session.storage.map(path, begin + nbytes)[begin : begin + nbytes]
        key = (path, begin, located.crc32c)
        if key not in session.checked:
            _check(key, payload, name)
            session.checked.add(key)
        array: NDArray[Any] = np.frombuffer(payload, located.dtype)
        array = array.reshape(-1, *located.shape)[located.inner]
        array.flags.writeable = False
        return array

    return session.do(work)


def _planned(
    view: View, session: Session, ask: Ask, refuse: Callable[[str], ArgumentError]
) -> Located:
    """Find the only chunk of what is not simple, or say why it is not there or cannot be mapped."""
    (line,) = timelines(view, session.pages, [ask.query])
    assembly = assemble(choose(view, line, ask.wanted), ())
    if assembly.dtype == dtypes.STRING:
        raise refuse("strings have no NumPy form on disk")
    if len(assembly.groups) != 1 or len(assembly.groups[0].touched) != 1:
        raise refuse("it is not stored as exactly one chunk")
    (group,) = assembly.groups
    found, entry = assembly.found, int(group.entry[0, 0])
    return Located.of(
        found.source_of(entry),
        found.entries,
        entry,
        found.entries.rows[entry].item(),
        inner=int(group.inner[0, 0]),
        shape=group.touched.boxes[0],
    )


def _check(key: tuple[str, int, int], payload: memoryview, name: str) -> None:
    path, offset, crc = key
    found = crc32c.crc32c(payload)
    if found != crc:
        raise ChecksumError(
            f"{name!r}: {path}, bytes {offset} to {offset + len(payload)}: checksum {found:08x}, "
            f"expected {crc:08x}; the file is damaged, or was changed",
            name=name,
            file=path,
            offset=offset,
        )
