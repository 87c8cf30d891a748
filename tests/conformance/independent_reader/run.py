"""A run: listing, what is not there, reading ("10.4", "10.5")."""

from __future__ import annotations

import functools
import itertools
import math
from pathlib import Path

import numpy as np

from .checksums import crc32c
from .codecs import cut_strings, decode_payload
from .errors import SpecError, fail, need
from .grid import Index, as_slice, chunk_box, count_chunks, pick, selection, shift
from .limits import DTYPES, MAX_INLINE_NBYTES, NO_SHARD, Array
from .opening import Opener, Writer
from .records import Entry
from .segment import Segment, check_part, check_use
from .statistics import compute_stats, merge_stats
from .visible import Question, Saved, SavedRow, Visible


class Run:
    """A run, as it was when it was opened.

    `damage` holds every failure met at opening, `fetched` the byte ranges (shard, offset,
    nbytes) that were read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        opened = Opener(folder).open()
        self.json, self.attrs = opened.json, opened.json["attrs"]
        self.writers, self.damage = opened.writers, opened.damage
        self.fetched: list[tuple[str, int, int]] = []
        self._missing, self._attempts = opened.missing, opened.attempts
        self._visible = Visible(opened.writers, opened.attempts)
        self._decoded: dict[int, bytes] = {}

    def saved(self, name: str | None = None, attempt: int | None = None) -> list[SavedRow]:
        """List all that is visible and was not dropped."""
        rows = [
            SavedRow(
                *x.series[:3], x.writer.worker, x.writer.attempt, x.series.dtype, x.step,
                x.series.part, tuple(x.shape),
            )
            for x in self._visible.find(Question(name=name, attempt=attempt))
            if not x.dropped
        ]  # fmt: skip
        return sorted(rows, key=lambda r: (*r[:5], r.step, r.part or ()))

    def names(self) -> list[str]:
        """Names in the catalogs, whatever of their steps is visible."""
        every = {row.name for w in self.writers for s in w.segments for row in s.series}
        return sorted(every - {""}, key=str.encode)

    def step_table(self) -> list[tuple[int, int, int, int, int]]:
        """Give (worker, mode, step, mode_step, wall_us) ("7.7 The step table")."""
        rows: list[tuple[int, int, int, int, int]] = []
        for found in self._visible.find(Question(kind=2)):
            if not found.dropped:
                pair = self._box(found, [range(2)]).tolist()
                rows.append((found.writer.worker, found.series.mode, found.step, *pair))
        return sorted(rows)

    # ---- "10.4 What is not there" --------------------------------------------------------

    def _is_writer_closed(self, writer: Writer) -> bool:
        """Rule 1: by its own newest segment or that of one that recovers it."""
        speakers = [
            w.newest
            for w in self.writers
            if w.newest.recovers == writer.id
            and (w.worker, w.attempt) == (writer.worker, writer.attempt)
        ]
        return writer.newest.is_closed or any(header.is_closed for header in speakers)

    def _newest_attempt(self) -> tuple[list[Writer], range]:
        """Give the writers of the newest attempt, and its workers."""
        newest = max(self._attempts, default=0)
        writers = [w for w in self.writers if w.attempt == newest]
        counts = [s.header.num_workers for w in writers for s in w.segments]
        return writers, range(max(counts, default=1))

    @property
    def is_closed(self) -> bool:
        """Rule 1."""
        writers, workers = self._newest_attempt()
        is_there = set(workers) <= {w.worker for w in writers}
        return is_there and all(map(self._is_writer_closed, writers))

    def _is_complete(self, asked: Question) -> bool:
        """Every worker (or the one asked for) has a writer that is closed or complete.

        Without a mode: in those in which the name has a series.
        """
        writers, workers = self._newest_attempt()
        modes = {asked.mode} - {None} or self._modes(asked.name) or set(range(4))

        def is_through(writer: Writer, mode: int) -> bool:
            through = writer.newest.complete_through[mode]
            return self._is_writer_closed(writer) or through >= (asked.step or 0)

        wanted = workers if asked.worker is None else (asked.worker,)
        return all(
            any(is_through(writer, mode or 0) for writer in writers if writer.worker == worker)
            for worker in wanted
            for mode in modes
        )

    def _modes(self, name: str | None) -> set[int | None]:
        catalogs = [segment.series for w in self.writers for segment in w.segments]
        return {row.mode for rows in catalogs for row in rows if row.name == name and row.kind < 2}

    def state(
        self,
        name: str,
        step: int,
        mode: int | None = None,
        worker: int | None = None,
        attempt: int | None = None,
    ) -> str:
        """Give here, dropped, never_saved or not_yet_written."""
        asked = Question(name, 0, step, mode, worker, attempt)
        found = self._visible.find(asked)
        if found:
            return "dropped" if all(x.dropped for x in found) else "here"
        return self._absence(asked)

    def _absence(self, asked: Question) -> str:
        step = asked.step or 0
        for name, error in self._missing:  # "MUST NOT answer …, but fails with the damage"
            is_asked = asked.attempt in (None, name.attempt) and asked.worker in (None, name.worker)
            if is_asked and (
                asked.attempt is not None or step < self._visible.hidden_from(name.attempt)
            ):
                raise error
        return "never_saved" if self._is_complete(asked) else "not_yet_written"

    # ---- "10.5 Reading a slice" ----------------------------------------------------------

    def _wanted(self, asked: Question) -> list[Saved]:
        """Give the one tensor, or the parts of one, that a question means (rules 5 and 6)."""
        text = f"{asked.name!r} at step {asked.step}"
        every = self._visible.find(asked)
        if not every:
            fail(self._absence(asked), text)
        found = [x for x in every if not x.dropped]
        need(found, text, "dropped")
        need(len({x.series.mode for x in found}) == 1, text, "ambiguous")
        mode = found[0].series.mode
        if asked.worker is None and all(x.series.part for x in found):
            lost = [x for x in every if x.dropped and x.series.mode == mode and x.series.part]
            need(not lost, text, "dropped")  # "A dropped part makes the step dropped"
        else:
            need(len(found) == 1, text, "ambiguous")
        return found

    def read(
        self,
        name: str,
        step: int,
        mode: int | None = None,
        worker: int | None = None,
        attempt: int | None = None,
        *,
        index: Index = (),
    ) -> Array:
        """Read a tensor or a slice of it; strings come as objects.

        Parts are put together; with `worker`, its part alone is given (rules 5 and 6).
        """
        found = self._wanted(Question(name, 0, step, mode, worker, attempt))
        return self._assemble(found, index, is_alone=worker is not None)

    def dtype(
        self,
        name: str,
        step: int,
        mode: int | None = None,
        worker: int | None = None,
        attempt: int | None = None,
    ) -> str:
        """Name of the dtype, for the bits that `read` gives."""
        return self._wanted(Question(name, 0, step, mode, worker, attempt))[0].series.dtype

    def _assemble(self, found: list[Saved], index: Index, *, is_alone: bool) -> Array:
        series = found[0].series
        if series.part is None or is_alone:
            need(series.dtype in DTYPES, series.dtype, "unknown_dtype")
            ranges, kept = selection(index, found[0].shape)
            return self._box(found[0], ranges).reshape(kept)
        same = {(tuple(x.series.global_shape), x.series.dtype) for x in found}
        need(len(same) == 1, "global shapes or dtypes differ", "parts")
        need(series.dtype in DTYPES, series.dtype, "unknown_dtype")
        ranges, kept = selection(index, series.global_shape)
        picks = [
            [pick(r, o, o + n) for r, o, n in zip(ranges, x.series.origin, x.shape, strict=True)]
            for x in found
        ]
        _check_cover(picks, ranges)
        result = np.empty([len(r) for r in ranges], DTYPES[series.dtype])
        for x, picked in zip(found, picks, strict=True):
            if all(picked):
                own = [r[p.start : p.stop] for r, p in zip(ranges, picked, strict=True)]
                own = [shift(r, -o) for r, o in zip(own, x.series.origin, strict=True)]
                result[tuple(map(as_slice, picked))] = self._box(x, own)
        return result.reshape(kept)

    def _box(self, found: Saved, ranges: list[range]) -> Array:
        """Read a selection of one saved tensor, chunk by chunk."""
        shape, grid = found.shape, found.series.grid
        check_part(found.series, shape)
        lengths = [len(r) for r in ranges]
        if 0 in lengths:  # no chunk is touched
            return np.empty(lengths, DTYPES[found.series.dtype])
        for entry in found.entries:
            check_use(found.series, entry)
        # Each number is below the count and stands once, so the length says all.
        need(len(found.entries) == count_chunks(shape, grid), "chunks are missing")
        result = np.empty(lengths, DTYPES[found.series.dtype])
        for entry in found.entries:
            box = chunk_box(shape, grid, entry.chunk)
            picked = [pick(r, a, b) for r, (a, b) in zip(ranges, box, strict=True)]
            if all(picked):
                values = self._chunk(found, entry).reshape([b - a for a, b in box])
                own = [r[p.start : p.stop] for r, p in zip(ranges, picked, strict=True)]
                own = [shift(r, -a) for r, (a, _) in zip(own, box, strict=True)]
                result[tuple(map(as_slice, picked))] = values[tuple(map(as_slice, own))]
        return result

    def _chunk(self, found: Saved, entry: Entry) -> Array:
        """Give the elements of one step of a chunk ("7.2 Raw chunks")."""
        raw, dtype = self._decoded.get(id(entry)), found.series.dtype
        if raw is None:
            payload = self._payload(found.segment, entry)
            need(crc32c(payload) == entry.crc32c, f"payload at step {found.step}", "checksum")
            raw = decode_payload(entry.codec, payload, dtype, entry.raw_nbytes, entry.rows)
            if len(raw) <= MAX_INLINE_NBYTES:
                self._decoded[id(entry)] = raw
        row = 0 if entry.flags & 1 else (found.step - entry.step) // entry.stride
        if dtype == "string":
            box = chunk_box(found.shape, found.series.grid, entry.chunk)
            return cut_strings(raw, entry.rows, row, math.prod(b - a for a, b in box))
        size = len(raw) // entry.rows
        return np.frombuffer(raw[row * size : (row + 1) * size], DTYPES[dtype])

    def _payload(self, segment: Segment, entry: Entry) -> bytes:
        """Fetch exactly [offset, offset + nbytes) of the shard."""
        if entry.shard == NO_SHARD:
            return entry.inline
        name = str(segment.shards[entry.shard])
        try:
            with (self.folder / "shards" / name).open("rb", buffering=0) as file:
                end = file.seek(0, 2)
                need(end >= entry.offset + entry.nbytes, name, "truncated")
                file.seek(entry.offset)
                payload = file.read(entry.nbytes)
        except FileNotFoundError:
            fail("missing_file", name)
        self.fetched.append((name, entry.offset, entry.nbytes))
        need(len(payload) == entry.nbytes, name, "truncated")
        return payload

    def stats(
        self,
        name: str,
        step: int,
        mode: int | None = None,
        worker: int | None = None,
        attempt: int | None = None,
    ) -> Array:
        """Give the ten statistics, stored or computed from the values ("7.8 Statistics")."""
        try:
            found = self._wanted(Question(name, 1, step, mode, worker, attempt))
        except SpecError as error:
            if error.code not in ("never_saved", "not_yet_written"):
                raise
            data = self._wanted(Question(name, 0, step, mode, worker, attempt))
            values = self._assemble(data, (), is_alone=worker is not None)
            return compute_stats(values, data[0].series.dtype)
        return functools.reduce(merge_stats, [self._box(x, [range(10)]) for x in found])


def _check_cover(picks: list[list[range]], ranges: list[range]) -> None:
    """No two parts overlap and no hole is left under the selection (rule 6)."""
    picks = [pick for pick in picks if all(pick)]
    for one, two in itertools.combinations(picks, 2):
        pairs = zip(one, two, strict=True)
        apart = any(a.stop <= b.start or b.stop <= a.start for a, b in pairs)
        need(apart, "parts overlap", "parts")
    covered = sum(math.prod(map(len, pick)) for pick in picks)
    need(covered == math.prod(map(len, ranges)), "parts leave a hole", "parts")


def open_run(folder: str | Path) -> Run:
    """Open a run ("10.1 Opening")."""
    return Run(Path(folder))
