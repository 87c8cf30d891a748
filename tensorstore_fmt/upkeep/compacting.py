"""`compact`: as few segments as possible, and a bundle, for a run that nobody writes to."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from tensorstore_fmt.errors import FormatError
from tensorstore_fmt.format import layout
from tensorstore_fmt.format.segment import Header
from tensorstore_fmt.storage import Storage, open_storage
from tensorstore_fmt.upkeep.claims import Claims
from tensorstore_fmt.upkeep.entry_check import check_segment
from tensorstore_fmt.upkeep.inventory import (
    Inventory,
    children,
    closed_writers,
    maximal,
    overlaps,
    read_inventory,
)
from tensorstore_fmt.upkeep.liveness import Liveness
from tensorstore_fmt.upkeep.report import CompactReport
from tensorstore_fmt.upkeep.segment_file import SegmentFile, open_segment
from tensorstore_fmt.writing.closing import write_bundle
from tensorstore_fmt.writing.segments import merge_segments

__all__ = ["compact"]

_LARGEST_NBYTES: Final = 64 * 1024 * 1024
_LARGEST_ROWS: Final = 1_000_000
_GRACE_US: Final = 1_000_000
_MOST_PASSES: Final = 10


def compact(
    url: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, object] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> CompactReport:
    """Merge the segments of a run that nobody writes to, and write its bundle.

    Readers may have the run open meanwhile. Values do not change, shards are not touched.
    Segments of more than 64 MB stay as they are; no more than that is in memory. What is
    damaged stays as it is (see `recover`).

    Parameters
    ----------
    url, storage_options
        As for `create_run`.
    progress
        Called with what is done, of how much, and what it is.

    Raises
    ------
    StateError
        Code ``locked``: a writer is alive. On object stores, where there are no locks: one that
        is not closed published something within the last 10 minutes.
    NotARunError, UnsupportedError
        There is no run, or one of a newer version.
    OSError
        The storage failed; nothing is lost, compact again when it works.
    """
    with open_storage(url, storage_options=storage_options, writable=True) as storage:
        for _ in range(_MOST_PASSES):
            try:
                return _Compaction(storage, progress or (lambda *_: None)).run()
            except FileNotFoundError:
                # Somebody else compacts the same closed run, and deleted what both had listed.
                # What is there now has fewer segments, so this ends.
                continue
        return _Compaction(storage, progress or (lambda *_: None)).run()


class _Compaction:
    def __init__(self, storage: Storage, progress: Callable[[int, int, str], None]) -> None:
        self._storage = storage
        self._progress = progress
        self._left: list[str] = []
        self._now_us = time.time_ns() // 1000

    def run(self) -> CompactReport:
        """Merge, delete what is covered, write the bundle."""
        inventory = read_inventory(self._storage)
        if inventory.info is None:
            assert inventory.run_json_error is not None
            raise inventory.run_json_error
        liveness = Liveness(self._storage, now_us=self._now_us, force=False)
        keys = inventory.writers()
        liveness.refuse_locked([*keys, *inventory.locks])
        headers = self._headers(inventory)
        closed = closed_writers(headers)
        for key in keys:
            if key not in closed:
                liveness.refuse_living(key, headers)
        try:
            for key in inventory.locks:
                if key in keys:
                    liveness.hold(key)
            for key in keys:
                self._writer(inventory, key)
            self._delete_covered()
            has_bundle = self._bundle()
        finally:
            liveness.release()
        after = read_inventory(self._storage)
        return CompactReport(
            url=self._storage.describe(),
            segments_before=len(inventory.segments),
            segments_after=len(after.segments),
            nbytes_before=sum(inventory.segments.values()),
            nbytes_after=sum(after.segments.values()),
            has_bundle=has_bundle,
            left=tuple(self._left),
        )

    def _headers(self, inventory: Inventory) -> list[Header]:
        found = []
        for name in maximal(inventory.segments):
            file = open_segment(self._storage, inventory.run_id, name, inventory.segments[name])
            if file.header is not None:
                found.append(file.header)
        return found

    # --- merging ----------------------------------------------------------------------------

    def _writer(self, inventory: Inventory, key: layout.WriterKey) -> None:
        names = maximal(inventory.of(key))
        if overlaps(names):
            self._left.append(f"writer {key}: flushes of its segments overlap")
            return
        for i, group in enumerate(self._groups(inventory, names)):
            self._progress(i, len(names), group[0].path)
            try:
                headers = [f.header for f in group if f.header is not None]
                header, _, _ = merge_segments(self._storage, headers, self._now_us)
                self._storage.sync([header.name.path])
            except FormatError as error:
                self._left.append(f"{group[0].path} and what follows: {error.message}")

    def _groups(
        self, inventory: Inventory, names: Sequence[layout.SegmentName]
    ) -> Iterator[list[SegmentFile]]:
        """Give neighbours to merge: as many as stay below the limits, without gap and damage."""
        group: list[SegmentFile] = []
        nbytes = rows = 0
        for name in names:
            file = open_segment(self._storage, inventory.run_id, name, inventory.segments[name])
            check_segment(file, Claims())
            if not file.is_whole:
                what = (*(p.what for p in file.problems), *map(str, file.bad_pages.values()))
                self._left.append(f"{name.path}: {next(iter(what), 'it is damaged')}")
            file_rows = sum(file.rows_of(number) for number in file.page_numbers())
            fits = (
                file.is_whole
                and (not group or group[-1].name.last + 1 == name.first)
                and nbytes + file.nbytes <= _LARGEST_NBYTES
                and rows + file_rows <= _LARGEST_ROWS
            )
            if not fits:
                if len(group) > 1:
                    yield group
                group, nbytes, rows = [], 0, 0
            if file.is_whole:
                group.append(file)
                nbytes, rows = nbytes + file.nbytes, rows + file_rows
        if len(group) > 1:
            yield group

    # --- tidying up -------------------------------------------------------------------------

    def _delete_covered(self) -> None:
        """Delete what is covered by segments that were read again and are good."""
        inventory = read_inventory(self._storage)
        covered: list[layout.SegmentName] = []
        newest_us = 0
        for name in maximal(inventory.segments):
            inner = children(name, inventory.segments)
            if not inner:
                continue
            file = open_segment(self._storage, inventory.run_id, name, inventory.segments[name])
            check_segment(file, Claims())
            if not file.is_whole or file.header is None:
                self._left.append(f"{name.path}: damaged; what it covers is kept")
                continue
            self._storage.sync([name.path])
            newest_us = max(newest_us, file.header.published_us)
            covered += inner
        if not covered:
            return
        age_us = time.time_ns() // 1000 - newest_us
        time.sleep(min(max(0, _GRACE_US - age_us), 2 * _GRACE_US) / 1e6)
        self._storage.delete([name.path for name in covered])

    def _bundle(self) -> bool:
        if self._left:
            return False  # the one that is there may hold copies of what is damaged
        inventory = read_inventory(self._storage)
        headers = []
        for name in maximal(inventory.segments):
            file = open_segment(self._storage, inventory.run_id, name, inventory.segments[name])
            if file.header is None or file.problems:
                return False
            headers.append(file.header)
        return bool(headers) and write_bundle(self._storage, inventory.run_id, headers)
