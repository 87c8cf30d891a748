"""Raw payloads: read straight into a result, where they lie as in the file, and checked there."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt.errors import FormatError
from tensorstore_fmt.reading import pool
from tensorstore_fmt.reading.placing import check
from tensorstore_fmt.storage import Range, Storage

__all__ = ["RawPayloads", "read_raw"]

_I64 = NDArray[np.int64]

# What was read is checked while it is in the cache.
_AT_ONCE_NBYTES: Final = 1024 * 1024
_THREADED_NBYTES: Final = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class RawPayloads:
    """Raw payloads of a local run; columns of shape (n,).

    Attributes
    ----------
    file, offset, nbytes
        Number of the shard, and place in it.
    place
        First byte in the result.
    crc32c
        Of each.
    """

    file: _I64
    offset: _I64
    nbytes: _I64
    place: _I64
    crc32c: NDArray[np.uint32]


def read_raw(
    storage: Storage, paths: Sequence[str], payloads: RawPayloads, result: NDArray[np.uint8]
) -> bool:
    """Read payloads straight into a result of bytes.

    Returns
    -------
    bool
        Whether all are there and right. If not, what the result holds is undefined.
    """
    order = np.lexsort((payloads.offset, payloads.file))
    file, offset = payloads.file[order], payloads.offset[order]
    nbytes, place = payloads.nbytes[order], payloads.place[order]
    same_file = file[1:] == file[:-1]
    if (same_file & (offset[1:] == offset[:-1])).any():
        return False  # they are better read once
    follows = same_file & (offset[1:] == offset[:-1] + nbytes[:-1])
    follows &= place[1:] == place[:-1] + nbytes[:-1]
    ends = np.cumsum(nbytes)
    follows &= ends[1:] // _AT_ONCE_NBYTES == ends[:-1] // _AT_ONCE_NBYTES
    begins = [0, *(np.flatnonzero(~follows) + 1).tolist(), len(order)]
    files, offsets, places = file.tolist(), offset.tolist(), place.tolist()
    lengths, crcs = nbytes.tolist(), payloads.crc32c[order].tolist()
    room = result.data

    def work(runs: Sequence[tuple[int, int]]) -> None:
        for first, end in runs:
            start, at = offsets[first], places[first]
            stop = offsets[end - 1] + lengths[end - 1]
            storage.fetch_into(
                [Range(paths[files[first]], start, stop)], [room[at : at + stop - start]]
            )
            for i in range(first, end):
                check(room[places[i] : places[i] + lengths[i]], crcs[i])

    runs = list(itertools.pairwise(begins))
    n = min(pool.THREADS, len(runs)) if result.nbytes > _THREADED_NBYTES else 1
    borders = [len(runs) * i // n for i in range(n + 1)]
    try:
        pool.run_all(work, [runs[a:b] for a, b in itertools.pairwise(borders)])
    except (FormatError, OSError):
        return False
    return True
