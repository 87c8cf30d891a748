"""The index of a dead writer, put together again from everything that is left of it.

What is left: good pages of damaged segments, segments that they cover, copies in the bundle,
and rows of shards, which prove themselves. Pure in that it writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from tensorstore_fmt.format import layout, merge, segment
from tensorstore_fmt.format.catalog import Series
from tensorstore_fmt.format.page import Entries
from tensorstore_fmt.storage import Storage
from tensorstore_fmt.upkeep.claims import Claims, expand
from tensorstore_fmt.upkeep.entry_check import EntryChecker, check_segment
from tensorstore_fmt.upkeep.inventory import children, gaps
from tensorstore_fmt.upkeep.lost import Logged, lost_of_page
from tensorstore_fmt.upkeep.report import KIND_TEXTS, Lost, mode_text
from tensorstore_fmt.upkeep.rows import Part, dropped_part, part_of_rows
from tensorstore_fmt.upkeep.segment_file import SegmentFile, open_segment

__all__ = ["Piece", "Rebuilder"]

_ROUNDS: Final = 20

ReadRows = Callable[[Sequence[tuple[int, int]]], list[dict[str, Any]]]


@dataclass(slots=True)
class Piece:
    """The rebuilt content of a range of flushes.

    Attributes
    ----------
    is_complete
        Whether everything is there that was committed in these flushes.
    restored
        Number of entries that the damaged segment itself did not give.
    gone
        Series with steps that were saved in these flushes, or may have been, and are lost.
    """

    first: int
    last: int
    inputs: list[merge.MergeInput]
    is_complete: bool = True
    restored: int = 0
    lost: list[Lost] = field(default_factory=list)
    gone: list[tuple[Series, list[int]]] = field(default_factory=list)

    def encode(self, header: segment.Header) -> bytes:
        """Give the bytes of a segment with this content."""
        merged = merge.merge(self.inputs)
        return b"".join(segment.encode(header, merged.series, merged.shards, merged.pages))


class _Accepted:
    """Which steps of which chunks are there already, by the flushes that saved them."""

    def __init__(self) -> None:
        self._ranges: dict[tuple[object, ...], list[tuple[int, int, int, int]]] = {}
        self._arrays: dict[tuple[object, ...], np.ndarray] = {}

    def add(self, part: Part) -> None:
        last = part.entries.last_step.tolist()
        for i, row in enumerate(part.entries.rows):
            key = (part.series[row["series"]].identity, int(row["chunk"]))
            range_ = (int(row["step"]), last[i], int(row["first_flush"]), int(row["last_flush"]))
            self._ranges.setdefault(key, []).append(range_)
            self._arrays.pop(key, None)

    def new(self, part: Part) -> np.ndarray:
        """Say of each entry whether no part of it is there."""
        last = part.entries.last_step.tolist()
        is_new = np.ones(len(part.entries), np.bool_)
        for i, row in enumerate(part.entries.rows):
            key = (part.series[row["series"]].identity, int(row["chunk"]))
            if key not in self._ranges:
                continue
            known = self._arrays.get(key)
            if known is None:
                known = self._arrays[key] = np.array(self._ranges[key], np.int64)
            is_new[i] = not (
                (known[:, 0] <= last[i])
                & (known[:, 1] >= row["step"])
                & (known[:, 2] <= row["last_flush"])
                & (known[:, 3] >= row["first_flush"])
            ).any()
        return is_new


class Rebuilder:
    """Rebuilds flushes of one writer.

    Parameters
    ----------
    files
        All its segments, gone through; also those that only the bundle still has.
    read_rows
        Gives the proven rows of its shards of some flushes; reads whole shards.
    """

    def __init__(
        self,
        storage: Storage,
        run_id: bytes,
        key: layout.WriterKey,
        *,
        files: Sequence[SegmentFile],
        logged: Logged,
        read_rows: ReadRows,
    ) -> None:
        self._storage = storage
        self._run_id = run_id
        self._key = key
        self._files = {f.name: f for f in files}
        self._logged = logged
        self._read_rows = read_rows

    def copy(self, file: SegmentFile) -> Piece:
        """Take a segment of which everything can be read."""
        assert file.head is not None
        inputs = [merge.MergeInput(file.head, file.stored_page)]
        return Piece(file.name.first, file.name.last, inputs)

    def rebuild(self, first: int, last: int, top: SegmentFile | None) -> Piece:
        """Rebuild what a damaged segment held (`top`), or flushes of which none is left."""
        accepted = _Accepted()
        parts: list[Part] = []
        if top is not None and top.head is not None:
            parts.append(_good_pages(top))
            accepted.add(parts[0])
        elif top is not None and top.partial is not None:
            parts.append(_inline_entries(top))
            accepted.add(parts[0])
        covering: list[layout.SegmentName] = []
        inner = children(top.name, self._files) if top is not None else []
        for name in sorted(inner, key=lambda n: (-n.count, n.first)):
            file = self._files[name]
            if file.head is None or any(c.covers(name) for c in covering):
                continue
            part = self._wanted(_good_pages(file), top)
            part = part.take(accepted.new(part)) if parts else part
            accepted.add(part)
            parts.append(part)
            if file.is_readable:
                covering.append(name)
        left = gaps(covering, first, last)
        if left:
            part = self._wanted(part_of_rows(self._read_rows(left)), top)
            part = part.take(accepted.new(part))
            parts.append(part)
        restored = sum(len(p.entries) for p in parts[1 if top and top.head else 0 :])
        if top is not None and top.partial is not None:
            is_all = _has_all_pages(top) and not _not_there(top, top.partial, parts)
            is_complete = not left or is_all
        else:
            is_complete = not left or (top is not None and self._is_all(top, parts, restored))
        piece = Piece(first, last, [], is_complete=is_complete, restored=restored)
        if not is_complete:
            self._note_lost(piece, top, parts)
            parts = self._without_halves(piece, parts)
        header = self._any_header(first, last)
        piece.inputs = [p.input(header) for p in parts if len(p.entries)]
        return piece

    def _wanted(self, part: Part, top: SegmentFile | None) -> Part:
        """Leave only what may have been in damaged pages."""
        if top is None or top.head is None:
            return part
        head = top.head
        catalog = head.catalog
        numbers = {catalog[n].identity: n for n in range(len(catalog))}
        of_part = np.array([numbers.get(s.identity, -1) for s in part.series] or [0], np.int64)
        series = of_part[part.entries.rows["series"]]
        last = part.entries.last_step
        keep = np.zeros(len(part.entries), np.bool_)
        for number in top.bad_pages:
            row = head.root[number]
            keep |= (
                (series >= int(row["first_series"]))
                & (series <= int(row["last_series"]))
                & (part.entries.rows["step"] <= int(row["max_step"]))
                & (last >= int(row["min_step"]))
            )
        return part.take(keep)

    def _is_all(self, top: SegmentFile, parts: Sequence[Part], restored: int) -> bool:
        """Say whether the damaged pages are all there again: as many entries, the same ranges."""
        head = top.head
        if head is None or restored != sum(int(head.root[n]["rows"]) for n in top.bad_pages):
            return False
        ranges: dict[tuple[object, ...], tuple[int, int]] = {}
        for part in parts:
            for series in part.tidy().series:
                low, high = ranges.get(series.identity, (series.first_step, series.last_step))
                ranges[series.identity] = min(low, series.first_step), max(high, series.last_step)
        return all(
            ranges.get(s.identity) == (s.first_step, s.last_step)
            for s in (head.catalog[n] for n in range(len(head.catalog)))
        )

    # --- what is lost -----------------------------------------------------------------------

    def _note_lost(self, piece: Piece, top: SegmentFile | None, parts: Sequence[Part]) -> None:
        if top is not None and top.partial is not None:
            for series, gone in _not_there(top, top.partial, parts):
                piece.gone.append((series, gone))
                what = f"which shard holds it stood in {top.path}, in a page that is gone"
                piece.lost.append(_lost(series, gone, what))
        if top is None or top.head is None:
            if top is not None and _has_all_pages(top):
                return
            what = (
                f"flushes {piece.first} to {piece.last} of writer {self._key}: what was in them "
                f"besides the {sum(len(p.entries) for p in parts):,} entries that were restored"
            )
            piece.lost.append(Lost(name=None, what=what))
            return
        for number in sorted(top.bad_pages):
            for series, steps in lost_of_page(top, number, self._logged):
                there = set(_steps_of(series, parts))
                gone = [s for s in steps if s not in there]
                if gone or not (steps or there):
                    piece.gone.append((series, gone))
                    what = f"its page of the index in {top.path} is gone"
                    piece.lost.append(_lost(series, gone, what))

    def _any_header(self, first: int, last: int) -> segment.Header:
        return segment.Header(
            run_id=self._run_id,
            key=self._key,
            num_workers=self._key.worker + 1,
            resume_step=0,
            first_flush=first,
            last_flush=last,
            opened_us=0,
            published_us=0,
        )

    def _without_halves(self, piece: Piece, parts: list[Part]) -> list[Part]:
        """Take out tensors of which a chunk is missing: they would not be readable."""
        header = self._any_header(piece.first, piece.last)
        for _ in range(_ROUNDS):
            piece.inputs = [p.input(header) for p in parts if len(p.entries)]
            data = piece.encode(header) if piece.inputs else b""
            checker = self._check(data, header) if data else None
            halves = checker.halves if checker is not None else []
            if checker is None or not halves:
                return parts
            catalog = checker.catalog
            for number, steps in halves:
                series = catalog[number]
                parts = [p.without(series.identity, steps) for p in parts]
                piece.gone.append((series, steps))
                piece.lost.append(_lost(series, steps, "some of its chunks are gone"))
        return [p.without_grids() for p in parts]

    def shadow(self, piece: Piece, older: Sequence[Piece]) -> None:
        """Keep older values of lost steps from being taken for the lost ones: these are dropped.

        Where a step was saved in earlier flushes too, readers would find that value now.
        """
        rows: list[tuple[Series, int]] = []
        for series, steps in piece.gone:
            if series.kind != layout.KIND_STEPS:
                known = set(_steps_in(older, series))
                rows += [(series, step) for step in steps if step in known]
        if rows:
            header = self._any_header(piece.first, piece.last)
            piece.inputs.append(dropped_part(rows, piece.last).input(header))

    def _check(self, data: bytes, header: segment.Header) -> EntryChecker | None:
        # Nothing is read from the storage: all bytes are spare ones.
        file = open_segment(self._storage, self._run_id, header.name, 0, data)
        return check_segment(file, Claims())


def _lost(series: Series, steps: Sequence[int], what: str) -> Lost:
    return Lost(
        name=series.name,
        mode=mode_text(series.mode),
        kind=KIND_TEXTS.get(series.kind, "data"),
        steps=tuple(steps),
        what=what,
    )


def _steps_in(pieces: Sequence[Piece], series: Series) -> list[int]:
    """Give the steps that pieces hold of a series, or of one that stands for the same tensor."""
    runs = []
    for source in (source for piece in pieces for source in piece.inputs):
        catalog = source.head.catalog
        for n in catalog.rows_of(series.name):
            if catalog[n].group != series.group:
                continue
            for number in source.head.entry_pages(n).tolist():
                entries = source.head.decode_entries(number, source.read_page(number))
                rows = entries.rows[entries.rows["series"] == n]
                runs += [(int(r["step"]), int(r["stride"]), int(r["count"])) for r in rows]
    return expand(runs)


def _steps_of(series: Series, parts: Sequence[Part]) -> list[int]:
    runs = []
    for part in parts:
        for n, other in enumerate(part.series):
            if other.identity == series.identity:
                rows = part.entries.rows[part.entries.rows["series"] == n]
                runs += [(int(r["step"]), int(r["stride"]), int(r["count"])) for r in rows]
    return expand(runs)


def _inline_entries(file: SegmentFile) -> Part:
    """Take the entries of a segment without shard page that need no shard."""
    head = file.partial
    assert head is not None
    entries = Entries.concat(list(file.partial_pages()))
    part = Part([head.catalog[n] for n in range(len(head.catalog))], list(head.shards), entries)
    return part.take(entries.rows["shard"] == layout.INLINE_SHARD)


def _has_all_pages(file: SegmentFile) -> bool:
    """Say whether all entries of a segment without shard page are known."""
    head = file.partial
    if head is None:
        return False
    return len(list(file.partial_pages())) == len(head.entry_pages())


def _not_there(
    file: SegmentFile, head: segment.Head, parts: Sequence[Part]
) -> list[tuple[Series, list[int]]]:
    """Give what a segment without shard page had, and `parts` have not."""
    entries = Entries.concat(list(file.partial_pages()))
    found = []
    for n in np.unique(entries.rows["series"]).tolist():
        rows = entries.rows[entries.rows["series"] == n]
        there = _chunks_of(head.catalog[n], parts)
        gone = {
            int(row["step"]) + k * int(row["stride"])
            for row in rows
            for k in range(int(row["count"]))
            if (int(row["chunk"]), int(row["step"]) + k * int(row["stride"])) not in there
        }
        if gone:
            found.append((head.catalog[n], sorted(gone)))
    return found


def _chunks_of(series: Series, parts: Sequence[Part]) -> set[tuple[int, int]]:
    """Give (chunk, step) of a series."""
    return {
        (int(row["chunk"]), int(row["step"]) + k * int(row["stride"]))
        for part in parts
        for n, other in enumerate(part.series)
        if other.identity == series.identity
        for row in part.entries.rows[part.entries.rows["series"] == n]
        for k in range(int(row["count"]))
    }


def _good_pages(file: SegmentFile) -> Part:
    """Take all entries of the good pages of a segment."""
    head = file.head
    assert head is not None
    numbers = [n for n in file.page_numbers() if n not in file.bad_pages]
    entries = Entries.concat([e for _, e in file.pages(numbers)])
    return Part([head.catalog[n] for n in range(len(head.catalog))], list(head.shards), entries)
