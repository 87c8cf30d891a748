"""A writer's own segments: publishing, merging in the background, deleting after a grace time."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from tensorstore_fmt.format import layout, merge, page, segment
from tensorstore_fmt.storage import Prefix, Range, Storage
from tensorstore_fmt.writing.commit import Tables
from tensorstore_fmt.writing.failures import Failures
from tensorstore_fmt.writing.options import MIB, WriterOptions

__all__ = ["OwnSegment", "SegmentLog", "merge_segments"]

FANOUT: Final = 8
_LARGEST_NBYTES: Final = 64 * MIB
_LARGEST_ROWS: Final = 1_000_000
_READ_WHOLE_NBYTES: Final = 8 * MIB
_FIRST_NBYTES: Final = MIB // 4  # what one flush publishes is mostly smaller
_LEAST_GRACE_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnSegment:
    """A published segment of this writer."""

    header: segment.Header
    nbytes: int
    rows: int
    is_stuck: bool = False  # merging it has failed, and is not tried again

    @property
    def name(self) -> layout.SegmentName:
        """Its file name."""
        return self.header.name

    @property
    def level(self) -> int:
        """How often its parts were merged."""
        level, count = 0, self.name.count
        while count >= FANOUT:
            count //= FANOUT
            level += 1
        return level

    @property
    def is_full(self) -> bool:
        """Whether so many of its size would be too large together."""
        return (
            self.is_stuck
            or self.nbytes > _LARGEST_NBYTES // FANOUT
            or self.rows > _LARGEST_ROWS // FANOUT
        )


class SegmentLog:
    """Publishes segments in order and merges them in a thread of its own."""

    def __init__(self, storage: Storage, options: WriterOptions, failures: Failures) -> None:
        self._storage = storage
        self._options = options
        self._failures = failures
        self._lock = threading.Lock()
        self._deleting = threading.Lock()  # held while files are synced, or deleted
        self._segments: list[OwnSegment] = []  # maximal ones, in the order of flushes
        self._unsynced: list[str] = []
        self._covered: list[tuple[float, list[str]]] = []
        self._wake = threading.Condition(self._lock)
        self._stopping = False
        self._thread: threading.Thread | None = None

    @property
    def segments(self) -> list[OwnSegment]:
        """The maximal segments, in the order of flushes."""
        with self._lock:
            return list(self._segments)

    def publish(self, header: segment.Header, tables: Tables) -> None:
        """Publish the segment of one or more flushes: this is the commit.

        Raises
        ------
        OSError
            The storage failed; whether the segment is there is not known.
        """
        parts = segment.encode(
            header, tables.series, tables.shards, page.encode_entries(tables.entries)
        )
        path = header.name.path
        self._storage.publish(path, parts)
        nbytes = sum(map(len, parts))
        with self._wake:
            self._segments.append(
                OwnSegment(header=header, nbytes=nbytes, rows=len(tables.entries))
            )
            self._unsynced.append(path)
            if self._mergeable():
                self._start()
            self._wake.notify_all()

    def sync(self) -> None:
        """Make all that was published survive power loss."""
        with self._deleting:
            with self._lock:
                paths, self._unsynced = self._unsynced, []
            try:
                self._storage.sync(paths)
            except BaseException:
                with self._lock:
                    live = {s.name.path for s in self._segments}
                    self._unsynced = [path for path in paths if path in live] + self._unsynced
                raise

    def stop(self) -> None:
        """Finish the merge under way and end the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """Merge what is many, and delete what is covered; for closing, after `stop`."""
        if len(self._segments) > FANOUT:
            while (group := self._largest_group()) is not None:
                self._merge(group)
        with self._lock:
            youngest = max((when for when, _ in self._covered), default=None)
        if youngest is not None:
            # The shortest grace time: a reader that has just listed them reads them now.
            age = time.monotonic() - (youngest - self._options.grace_s)
            self._options.sleep(max(0.0, min(_LEAST_GRACE_S, self._options.grace_s) - age))
        self._delete_covered(at_once=True)

    # --- the thread -----------------------------------------------------------------

    def _start(self) -> None:
        if self._thread is None and not self._stopping:
            self._thread = threading.Thread(
                target=self._run, name="tensorstore_fmt-merger", daemon=True
            )
            self._thread.start()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (group := self._mergeable()) and not self._stopping:
                    self._wake.wait(timeout=1.0 if self._covered else None)
                    if self._covered and self._covered[0][0] <= time.monotonic():
                        break
                if self._stopping:
                    return
            if group:
                self._merge(group)
            self._delete_covered()

    def _mergeable(self) -> list[OwnSegment]:
        """Give neighbours of one level to be merged: enough of them, and the longest row.

        More than the fan-out are merged at once where merging has fallen behind.
        """
        best: list[OwnSegment] = []
        for (_, is_full), row in itertools.groupby(
            self._segments, key=lambda s: (s.level, s.is_full)
        ):
            group = [] if is_full else _small_head(list(row))
            if len(group) >= max(FANOUT, len(best) + 1):
                best = group
        return best

    def _largest_group(self) -> list[OwnSegment] | None:
        with self._lock:
            group: list[OwnSegment] = []
            for candidate in self._segments:
                if _is_small([*group, candidate]):
                    group.append(candidate)
                elif len(group) > 1:
                    break
                else:
                    group = [candidate]
            return group if len(group) > 1 else None

    def _merge(self, group: Sequence[OwnSegment]) -> None:
        try:
            header, nbytes, rows = merge_segments(
                self._storage, [s.header for s in group], self._options.clock_us()
            )
            self._storage.sync([header.name.path])
        except Exception as error:  # noqa: BLE001 - a merge that fails must not end the thread
            # Nothing is lost: what would have been merged stays as it is, and is not tried again.
            self._failures.note(error)
            with self._lock:
                tried = {s.name for s in group}
                self._segments = [
                    replace(s, is_stuck=True) if s.name in tried else s for s in self._segments
                ]
            return
        merged = OwnSegment(header=header, nbytes=nbytes, rows=rows)
        with self._lock:
            at = self._segments.index(group[0])
            self._segments[at : at + len(group)] = [merged]
            due = time.monotonic() + self._options.grace_s
            covered = {s.name.path for s in group}
            self._covered.append((due, list(covered)))
            # What was merged need not be synced any more: what covers it was.
            self._unsynced = [path for path in self._unsynced if path not in covered]

    def _delete_covered(self, *, at_once: bool = False) -> None:
        with self._lock:
            now = math.inf if at_once else time.monotonic()
            due = [paths for when, paths in self._covered if when <= now]
            self._covered = [(when, paths) for when, paths in self._covered if when > now]
        for paths in due:
            try:
                with self._deleting:
                    self._storage.delete(paths)
            except (OSError, MemoryError) as error:
                self._failures.note(error)  # they are garbage, not damage


def _small_head(group: list[OwnSegment]) -> list[OwnSegment]:
    """Give the first segments of a row that are small enough to be merged."""
    nbytes = list(itertools.accumulate(s.nbytes for s in group))
    rows = list(itertools.accumulate(s.rows for s in group))
    count = sum(
        n <= _LARGEST_NBYTES and r <= _LARGEST_ROWS for n, r in zip(nbytes, rows, strict=True)
    )
    return group[: min(count, FANOUT * FANOUT)]


def _is_small(group: Sequence[OwnSegment]) -> bool:
    return (
        not any(s.is_stuck for s in group)
        and sum(s.nbytes for s in group) <= _LARGEST_NBYTES
        and sum(s.rows for s in group) <= _LARGEST_ROWS
    )


def merge_segments(
    storage: Storage, headers: Sequence[segment.Header], now_us: int
) -> tuple[segment.Header, int, int]:
    """Merge published segments of one writer, which follow each other, and publish the result.

    Returns
    -------
    tuple
        Its header, length in bytes, and number of entries.
    """
    merged = merge.merge(_inputs(storage, headers))
    first, last = headers[0], headers[-1]
    header = replace(last, first_flush=first.first_flush, published_us=now_us)
    parts = segment.encode(header, merged.series, merged.shards, merged.pages)
    # Readers prefer it to what it covers: if a power cut tore it, it would hide what is safe.
    storage.publish(header.name.path, parts, synced=True)
    return header, sum(map(len, parts)), sum(p.rows for p in merged.pages)


def _inputs(storage: Storage, headers: Sequence[segment.Header]) -> list[merge.MergeInput]:
    """Open segments, small ones in a store with one request each, all at the same time."""
    paths = [header.name.path for header in headers]
    nbytes = layout.SEGMENT_HEADER.size if storage.is_local else _FIRST_NBYTES
    starts = storage.fetch([Prefix(path, nbytes) for path in paths])
    return [
        _input(storage, header, start) for header, (start, _) in zip(headers, starts, strict=True)
    ]


def _input(storage: Storage, header: segment.Header, data: bytes) -> merge.MergeInput:
    path = header.name.path
    found = segment.decode_header(data, where=path, run_id=header.run_id, name=header.name)
    is_whole = not storage.is_local and found.file_nbytes <= _READ_WHOLE_NBYTES
    needed = found.file_nbytes if is_whole else found.head_nbytes
    if len(data) < needed:
        (data,) = storage.fetch([Range(path, 0, needed)])
    head = segment.decode_head(found, data)

    def read_page(number: int) -> bytes | memoryview:
        row = head.root[number]
        begin, end = int(row["offset"]), int(row["offset"]) + int(row["nbytes"])
        if is_whole:
            return memoryview(data)[begin:end]
        (stored,) = storage.fetch([Range(path, begin, end)])
        return stored

    return merge.MergeInput(head, read_page)
