"""Inline payloads: values that lie in the index itself, gathered without a loop over steps."""

from __future__ import annotations

from typing import Final

import crc32c
import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt import dtypes
from tensorstore_fmt.errors import ChecksumError, FormatError
from tensorstore_fmt.format import codec, layout
from tensorstore_fmt.format.catalog import Series
from tensorstore_fmt.format.page import Entries

__all__ = ["check_inline", "gather_rows"]

_I64 = NDArray[np.int64]

_FEW: Final = 64
_SHORT_NBYTES: Final = 64


def _crc_table() -> NDArray[np.uint32]:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1)
    return table.astype(np.uint32)


_TABLE: Final = _crc_table()


def _crc_of_rows(rows: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Give the CRC32C of each row of a (n, length) matrix, all rows at once."""
    crc = np.full(len(rows), 0xFFFFFFFF, np.uint32)
    for column in rows.T:
        crc = _TABLE[(crc ^ column) & 0xFF] ^ (crc >> 8)
    return crc ^ np.uint32(0xFFFFFFFF)


def check_inline(entries: Entries, which: _I64, name: str) -> None:
    """Check the checksums of these entries' inline payloads.

    Raises
    ------
    ChecksumError
        One is wrong (though its page was right: the writer was not).
    """
    inline = entries.inline
    offsets, expected = inline.offsets, entries.rows["crc32c"]
    lengths = entries.rows["nbytes"][which]
    is_long = lengths > _SHORT_NBYTES
    one_by_one = which if len(which) < _FEW else which[is_long]
    values = np.ascontiguousarray(inline.values).data
    for i, begin, end, crc in zip(
        one_by_one.tolist(),
        offsets[one_by_one].tolist(),
        offsets[one_by_one + 1].tolist(),
        expected[one_by_one].tolist(),
        strict=True,
    ):
        if crc32c.crc32c(values[begin:end]) != crc:
            raise _damaged(entries, i, name)
    if len(one_by_one) == len(which):
        return
    short = which[~is_long]
    for length in np.unique(lengths[~is_long]).tolist():
        some = short[entries.rows["nbytes"][short] == length]
        found = _crc_of_rows(inline.values[offsets[some][:, None] + np.arange(length)])
        is_bad = found != expected[some]
        if is_bad.any():
            raise _damaged(entries, int(some[int(is_bad.argmax())]), name)


def _damaged(entries: Entries, row: int, name: str) -> ChecksumError:
    step = int(entries.rows["step"][row])
    return ChecksumError(
        f"{name!r}, step {step}: checksum of an inline value is wrong", name=name, step=step
    )


def gather_rows(
    entries: Entries, entry: _I64, inner: _I64, nbytes: int, series: Series
) -> NDArray[np.uint8]:
    """Gather values of one size from inline payloads.

    Parameters
    ----------
    entry, inner
        Shape (n,): the entry of each value, and which of its steps it is.
    nbytes
        Of each value.
    series
        Whose dtype is no string.

    Returns
    -------
    ndarray
        Shape (n, nbytes), uint8; may share memory with the page and be read-only.

    Raises
    ------
    ChecksumError, FormatError
        A payload is damaged.
    """
    if not len(entry):
        return np.empty((0, nbytes), np.uint8)
    is_new = np.concatenate([[True], entry[1:] != entry[:-1]])
    used = entry[is_new]  # an entry may come back later: it is then checked again
    name = series.name
    check_inline(entries, used, name)
    rows = entries.rows[used]
    coding = rows["codec"]
    is_single = (rows["flags"] & layout.ENTRY_REPEAT) != 0
    is_element = (coding == layout.CODEC_CONSTANT) & (rows["nbytes"] == nbytes)
    is_element &= nbytes == dtypes.itemsize(series.dtype)  # else that says nothing
    is_plain = (coding == layout.CODEC_RAW) | is_element
    values, starts = entries.inline.values, entries.inline.offsets[:-1][used]
    if (rows["nbytes"] != rows["raw_nbytes"])[coding == layout.CODEC_RAW].any():
        raise FormatError(f"{name!r}: a raw inline payload has another length than its chunk")
    if not is_plain.all():
        at = np.flatnonzero(~is_plain)
        room, begins = _decode_others(entries, used[at], series.dtype)
        starts = starts.copy()
        starts[at] = begins + len(values)
        values = np.concatenate([values, room])
    step_nbytes = np.where(is_single | is_element, 0, nbytes)
    place = np.zeros(len(entries), np.int64)
    place[used] = np.arange(len(used))
    group = place.take(entry)
    start = starts.take(group) + inner * step_nbytes.take(group)
    first = int(start[0])
    if (np.diff(start) == nbytes).all():
        rows_: NDArray[np.uint8] = values[first : first + len(start) * nbytes]
        return rows_.reshape(len(start), nbytes)
    gathered: NDArray[np.uint8] = values[start[:, None] + np.arange(nbytes)]
    return gathered


def _decode_others(entries: Entries, used: _I64, dtype: str) -> tuple[NDArray[np.uint8], _I64]:
    """Decode payloads that are not raw; give the raw chunks in one piece, and where each begins."""
    rows = entries.rows[used]
    raw_nbytes = rows["raw_nbytes"].astype(np.int64)
    ends = np.cumsum(raw_nbytes)
    begins = ends - raw_nbytes
    room = np.empty(int(ends[-1]), np.uint8)
    inline = entries.inline
    is_repeat = (rows["flags"] & layout.ENTRY_REPEAT) != 0
    kept = np.where(is_repeat, 1, rows["count"].astype(np.int64))
    for i, begin, end, coding, n in zip(
        used.tolist(),
        begins.tolist(),
        ends.tolist(),
        rows["codec"].tolist(),
        kept.tolist(),
        strict=True,
    ):
        codec.decode(inline[i], room[begin:end], codec=coding, dtype=dtype, rows=n)
    return room, begins
