"""Views: what a run held when it was looked at (spec, "Duties of a reader"); immutable."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np

from tensorstore_fmt.errors import FormatError
from tensorstore_fmt.format import layout
from tensorstore_fmt.format.catalog import Series
from tensorstore_fmt.format.runfile import RunInfo
from tensorstore_fmt.format.segment import Head, Header
from tensorstore_fmt.lazy import lazy
from tensorstore_fmt.reading.cache import Cache

__all__ = ["MANY", "Cut", "Segment", "Source", "View", "Writer", "step_key"]

NO_BYTES: Final = memoryview(b"")
MANY: Final = 16
"""From so many questions on, one call of NumPy for all takes less than a few for each."""

_ALL: Final = layout.MAX_STEP + 1
_MAX_LINES_NBYTES: Final = 16 * 1024 * 1024


def step_key(series: Series) -> tuple[object, ...]:
    """What makes a series, across segments."""
    return (*series.identity, len(series.shape))


@dataclass(frozen=True, slots=True)
class Cut:
    """How much of a covering segment a view shows (spec, "Damage and merges").

    Attributes
    ----------
    flush
        Last flush of the writer that the view had seen.
    last_steps
        By `step_key`: the last step the series had then.
    last_step_by_mode
        The same by mode, for series that are not in `last_steps` (of a pickled view, which
        has room for no more).
    """

    flush: int
    last_steps: Mapping[tuple[object, ...], int] = field(default_factory=dict)
    last_step_by_mode: tuple[int, ...] = (-1,) * len(layout.MODES)

    def last_step(self, series: Series) -> int:
        """Give the last step that the view shows of a series in joined entries."""
        return self.last_steps.get(step_key(series), self.last_step_by_mode[series.mode])


class Segment:
    """One segment of a view, with its head.

    Attributes
    ----------
    name, head
        As published.
    kept
        First bytes of the file, as far as they came along with the head.
    cut
        What of it is shown; None: all.
    """

    def __init__(
        self,
        name: layout.SegmentName,
        head: Head,
        kept: memoryview = NO_BYTES,
        cut: Cut | None = None,
    ) -> None:
        self.name = name
        self.head = head
        self.kept = kept
        self.cut = cut
        root = head.root
        self._numbers = np.flatnonzero(root["kind"] == layout.PAGE_ENTRIES)
        pages = root[self._numbers]
        self._first_series = np.ascontiguousarray(pages["first_series"])
        self._last_series = np.ascontiguousarray(pages["last_series"])
        self._min_step = np.ascontiguousarray(pages["min_step"])
        self._max_step = np.ascontiguousarray(pages["max_step"])

    def pages_of(self, series: int, low: int, high: int) -> list[int]:
        """Give the root rows of the pages that can hold steps low … high of a series."""
        # Entries are sorted by series, so both columns ascend (checked with the root).
        begin = int(self._last_series.searchsorted(series, side="left"))
        end = int(self._first_series.searchsorted(series, side="right"))
        if end - begin == 1:
            fits = self._min_step[begin] <= high and low <= self._max_step[begin]
            return [int(self._numbers[begin])] if fits else []
        keep = (self._min_step[begin:end] <= high) & (low <= self._max_step[begin:end])
        found: list[int] = self._numbers[begin:end][keep].tolist()
        return found

    def only_page(self, series: int, step: int) -> int:
        """Give the root row of the only page that can hold a step of a series; −1: not one."""
        found = self.pages_of(series, step, step)
        return found[0] if len(found) == 1 else -1

    def only_pages(self, series: Sequence[int], steps: Sequence[int]) -> list[int]:
        """Do as `only_page` for each.

        Parameters
        ----------
        series, steps
            One of each for each answer.
        """
        if not len(self._numbers):
            return [-1] * len(series)
        begin = self._last_series.searchsorted(np.array(series, np.uint32), side="left")
        end = self._first_series.searchsorted(np.array(series, np.uint32), side="right")
        low = self._min_step.take(begin, mode="clip")
        high = self._max_step.take(begin, mode="clip")
        fits = (end - begin == 1) & (low <= steps) & (steps <= high)
        numbers: list[int] = np.where(fits, self._numbers.take(begin, mode="clip"), -1).tolist()
        for i in np.flatnonzero(end - begin > 1).tolist():
            numbers[i] = self.only_page(series[i], steps[i])
        return numbers

    def with_cut(self, cut: Cut | None) -> Segment:
        """Give the same segment, cut otherwise."""
        return Segment(self.name, self.head, self.kept, cut)


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """What a writer's newest segment says about it.

    Attributes
    ----------
    rank
        Position among all writers of the run; of two that saved the same, the greater wins.
    is_closed
        By its own word or that of a writer that speaks for it.
    """

    key: layout.WriterKey
    header: Header
    rank: int
    is_closed: bool


class Source(NamedTuple):
    """One series in one segment: where entries of a name come from."""

    segment: Segment
    row: int
    series: Series
    writer: Writer

    @property
    def worker(self) -> int:
        """Worker that saved it."""
        return self.writer.key.worker

    @property
    def attempt(self) -> int:
        """Attempt in which it was saved."""
        return self.writer.key.attempt

    @property
    def part(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Global shape and origin, if the series is a part."""
        return (self.series.global_shape, self.series.origin) if self.series.global_shape else None


class View:
    """What is in a run, as of one look at it. Never changes; threads share it.

    Parameters
    ----------
    info
        Of the run.
    segments
        What to read: the maximal segments, or what stands for them.
    damage
        What is wrong with the run's index.
    listed
        All segments that were there.
    headers
        What writers said when the view was made, if `segments` are newer than that.
    """

    def __init__(
        self,
        info: RunInfo,
        segments: Sequence[Segment],
        *,
        damage: Sequence[FormatError] = (),
        listed: frozenset[layout.SegmentName] = frozenset(),
        headers: Mapping[layout.WriterKey, Header] | None = None,
    ) -> None:
        self.info = info
        self.segments = tuple(segments)
        self.damage = tuple(damage)
        self.listed = listed
        self._headers = dict(headers or {})
        self.lines: Cache[Hashable, Any] = Cache(_MAX_LINES_NBYTES)  # by query: see `timelines`
        self._sources: dict[tuple[str, int], tuple[Source, ...]] = {}

    # --- writers, attempts ----------------------------------------------------
    @lazy
    def writers(self) -> dict[layout.WriterKey, Writer]:
        """All writers, by key."""
        newest: dict[layout.WriterKey, Header] = dict(self._headers)
        for segment in self.segments:
            header = segment.head.header
            known = newest.get(segment.name.key)
            if known is None or (segment.cut is None and known.last_flush < header.last_flush):
                newest[segment.name.key] = header
        closed = {key for key, header in newest.items() if header.is_closed}
        for key, header in newest.items():
            if header.recovers and header.is_closed:
                closed.add(
                    layout.WriterKey(worker=key.worker, attempt=key.attempt, writer=header.recovers)
                )
        ordered = sorted(newest, key=lambda k: (k.attempt, newest[k].opened_us, k.writer))
        return {
            key: Writer(key=key, header=newest[key], rank=rank, is_closed=key in closed)
            for rank, key in enumerate(ordered)
        }

    @lazy
    def attempts(self) -> tuple[int, ...]:
        """All attempts of which there is a file, in order."""
        found = {key.attempt for key in self.writers} | {n.key.attempt for n in self.listed}
        return tuple(sorted(found))

    @lazy
    def workers(self) -> tuple[int, ...]:
        """All workers that wrote something, in order."""
        return tuple(sorted({key.worker for key in self.writers}))

    @lazy
    def newest_writers(self) -> dict[int, list[Writer]]:
        """Writers of the newest attempt, by worker; workers that have none yet are not in it."""
        by_worker: dict[int, list[Writer]] = {}
        for writer in self.writers.values():
            if writer.key.attempt == self.attempts[-1]:
                by_worker.setdefault(writer.key.worker, []).append(writer)
        return by_worker

    @lazy
    def num_workers(self) -> int:
        """Workers of the newest attempt; 0 if there is none."""
        return max(
            (
                w.header.num_workers
                for w in self.writers.values()
                if w.key.attempt == self.attempts[-1]
            ),
            default=0,
        )

    @lazy
    def has_all_workers(self) -> bool:
        """Whether every worker of the newest attempt has a writer."""
        # Workers are below num_workers (checked with each header), so counting them is enough:
        # a header may claim a million of them.
        return bool(self.newest_writers) and len(self.newest_writers) == self.num_workers

    @lazy
    def is_closed(self) -> bool:
        """Whether every worker of the newest attempt is there and has closed its writers."""
        return self.has_all_workers and all(
            w.is_closed for writers in self.newest_writers.values() for w in writers
        )

    def resume_step(self, attempt: int) -> int:
        """Give the step from which an attempt hides earlier ones; nothing, if none can tell."""
        return min(
            (w.header.resume_step for w in self.writers.values() if w.key.attempt == attempt),
            default=_ALL,
        )

    @lazy
    def _visible_below(self) -> dict[int, int]:
        limits = {}
        limit = _ALL
        for attempt in reversed(self.attempts):
            limits[attempt] = limit
            limit = min(limit, self.resume_step(attempt))
        return limits

    def visible_below(self, attempt: int) -> int:
        """Give the step from which later attempts hide this one."""
        return self._visible_below.get(attempt, _ALL)

    def complete_through(self, mode: int, worker: int | None = None) -> int:
        """Give the last step up to which all of a mode is there; −1 for none.

        Of one worker, or of all. A run that is closed is complete through every step. While
        flushes of a writer that goes on are missing, only what came before them counts: a store
        may list them later.
        """
        by_worker = self.newest_writers
        if worker is not None:
            by_worker = {worker: by_worker.get(worker, [])}
        elif not self.has_all_workers:
            return -1
        return min(
            max(
                (_ALL if w.is_closed else self._through(w)[mode] for w in writers),
                default=-1,
            )
            for writers in by_worker.values()
        )

    def _through(self, writer: Writer) -> tuple[int, int, int, int]:
        """Give through which steps a writer that goes on is complete, by mode."""
        gaps = [
            int(str(problem.facts["first"]))
            for problem in self.damage
            if problem.code == "missing_segment" and problem.facts.get("writer") == str(writer.key)
        ]
        if not gaps:
            return writer.header.complete_through
        before = [
            segment.head.header
            for segment in self.segments
            if segment.name.key == writer.key and segment.name.last < min(gaps)
        ]
        if not before:
            return (-1, -1, -1, -1)
        return max(before, key=lambda header: header.last_flush).complete_through

    def missing(
        self, *, step: int | None = None, worker: int | None = None, attempt: int | None = None
    ) -> FormatError | None:
        """Give the damage because of which nobody can say what is not there; None: all is there.

        A writer whose flushes are missing might have saved any step that is not hidden (spec,
        "Damage and merges").
        """
        for problem in self.damage:
            if problem.code != "missing_segment":
                continue
            lost = problem.facts.get("attempt")
            assert isinstance(lost, int)
            if (
                worker in (None, problem.facts.get("worker"))
                and attempt in (None, lost)
                and (attempt is not None or step is None or step < self.visible_below(lost))
            ):
                return problem
        return None

    # --- names ------------------------------------------------------------------
    @lazy
    def names(self) -> tuple[str, ...]:
        """All names, in order."""
        found = set().union(*(segment.head.catalog.names for segment in self.segments))
        found.discard("")
        return tuple(sorted(found))

    @lazy
    def used_modes(self) -> tuple[int, ...]:
        """Modes in which anything was logged, in order."""
        return tuple(sorted({source.series.mode for source in self.sources("", layout.KIND_STEPS)}))

    def has(self, name: str) -> bool:
        """Say whether a name is in the run."""
        for segment in self.segments:  # a loop takes half of the time of `any`
            if segment.head.catalog.has(name):
                return name != ""
        return False

    def sources(self, name: str, kind: int) -> tuple[Source, ...]:
        """Give all series of a name, in the order of their writers."""
        key = (name, kind)
        found = self._sources.get(key)
        if found is None:
            rows = [
                Source(segment, row, series, self.writers[segment.name.key])
                for segment in self.segments
                for row in segment.head.catalog.rows_of(name)
                if (series := segment.head.catalog[row]).kind == kind
            ]
            if len(rows) > 1:
                rows.sort(key=lambda s: (s.writer.rank, s.segment.name.last))
            found = tuple(rows)
            self._sources[key] = found
        return found

    # --- snapshots ----------------------------------------------------------------
    def last_flushes(self) -> dict[layout.WriterKey, int]:
        """Give the last flush seen of each writer."""
        seen: dict[layout.WriterKey, int] = {}
        for segment in self.segments:
            last = segment.name.last if segment.cut is None else segment.cut.flush
            seen[segment.name.key] = max(last, seen.get(segment.name.key, -1))
        return seen

    def cut_of(self, key: layout.WriterKey) -> Cut:
        """Say how to cut a covering segment of this writer so that the view stays the same."""
        flush = -1
        last_steps: dict[tuple[object, ...], int] = {}
        by_mode = [-1] * len(layout.MODES)
        for segment in self.segments:
            if segment.name.key != key:
                continue
            cut = segment.cut
            flush = max(flush, segment.name.last if cut is None else cut.flush)
            catalog = segment.head.catalog
            for row in range(len(catalog)):
                series = catalog[row]
                last = series.last_step
                if cut is not None:
                    last = min(last, cut.last_step(series))
                identity = step_key(series)
                last_steps[identity] = max(last, last_steps.get(identity, -1))
                by_mode[series.mode] = max(by_mode[series.mode], last)
        return Cut(flush, last_steps, tuple(by_mode))
