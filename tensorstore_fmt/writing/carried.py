"""Entries that could not be published yet, kept within bounds."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from tensorstore_fmt.format import layout
from tensorstore_fmt.format.catalog import Series
from tensorstore_fmt.format.progressions import runs_of_steps
from tensorstore_fmt.writing.pending import PendingEntry, Placed

__all__ = ["Carried", "bound", "tensors"]

Carried = list[tuple[int, list[PendingEntry]]]
"""Flush numbers, ascending, with their entries."""


def bound(carried: Carried, most_nbytes: int) -> int:
    """Give up entries if there are too many, in place: tensors before numbers, the oldest first.

    What is given up is recorded as dropped, so that no reader takes it for never saved, or an
    older value for it. The step tables stay: they are small.

    Returns
    -------
    int
        Number of tensors that were given up.
    """
    given_up = 0
    for with_scalars in (False, True):
        size = 0
        for i in range(len(carried) - 1, -1, -1):
            size += sum(256 + len(e.placed.inline or b"") for e in carried[i][1])
            if size > most_nbytes:
                given_up += _give_up(carried, i, with_scalars=with_scalars)
                break
    return given_up


def tensors(entries: Iterable[PendingEntry]) -> int:
    """Count the tensors of which entries have data."""
    return sum(
        e.count
        for e in entries
        if e.series.kind == layout.KIND_DATA
        and e.chunk == 0
        and e.placed.codec != layout.CODEC_DROPPED
    )


def _give_up(carried: Carried, last: int, *, with_scalars: bool) -> int:
    """Give up all up to a position, at which the record of it stands."""
    gone: list[PendingEntry] = []
    for i in range(last + 1):
        number, entries = carried[i]
        doomed = [_may_go(e, with_scalars=with_scalars) for e in entries]
        gone += [e for e, is_doomed in zip(entries, doomed, strict=True) if is_doomed]
        carried[i] = (
            number,
            [e for e, is_doomed in zip(entries, doomed, strict=True) if not is_doomed],
        )
    carried[last][1].extend(_dropped(gone))
    return tensors(gone)


def _may_go(entry: PendingEntry, *, with_scalars: bool) -> bool:
    is_scalar = entry.series.kind == layout.KIND_DATA and not entry.series.shape
    return entry.series.kind != layout.KIND_STEPS and (with_scalars or not is_scalar)


def _dropped(entries: Iterable[PendingEntry]) -> list[PendingEntry]:
    """Say of all steps of these entries that they are dropped; as few entries as can be."""
    found: dict[tuple[object, ...], tuple[Series, list[np.ndarray]]] = {}
    for e in entries:
        steps = e.step + e.stride * np.arange(e.count, dtype=np.int64)
        found.setdefault(e.series.identity, (e.series, []))[1].append(steps)
    made = []
    for series, parts in found.values():
        steps = np.unique(np.concatenate(parts))
        for begin, end in runs_of_steps(steps):
            for at in range(begin, end, layout.MAX_ENTRY_STEPS):
                run = steps[at : min(at + layout.MAX_ENTRY_STEPS, end)]
                made.append(
                    PendingEntry(
                        series=series,
                        step=int(run[0]),
                        stride=int(run[1] - run[0]) if len(run) > 1 else 1,
                        count=len(run),
                        chunk=0,
                        placed=Placed(
                            codec=layout.CODEC_DROPPED, raw_nbytes=0, nbytes=0, crc32c=0, inline=b""
                        ),
                    )
                )
    return made
