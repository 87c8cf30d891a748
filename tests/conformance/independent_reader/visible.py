"""What is visible ("10.3 What is visible"): which of all entries win."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from .errors import need
from .limits import DROPPED, MAX_STEP
from .opening import Writer
from .records import Entry, Part, Series, full_shape
from .segment import EntryPage, Segment, is_in_grid


@dataclass(frozen=True)
class Question:
    """What is asked for; None: any."""

    name: str | None = None
    kind: int | None = None
    step: int | None = None
    mode: int | None = None
    worker: int | None = None
    attempt: int | None = None

    def means(self, row: Series) -> bool:
        wanted = (self.name in (None, row.name), self.kind in (None, row.kind))
        is_near = self.step is None or row.first_step <= self.step <= row.last_step
        return all(wanted) and self.mode in (None, row.mode) and is_near


class Saved(NamedTuple):
    """One save of one (name, kind, mode, part) and step by one writer."""

    writer: Writer
    segment: Segment
    series: Series
    step: int
    entries: list[Entry]

    @property
    def dropped(self) -> bool:
        return self.entries[0].codec == DROPPED

    @property
    def shape(self) -> list[int]:
        return full_shape(self.series, self.entries[0])


class SavedRow(NamedTuple):
    """What `Run.saved` lists."""

    name: str
    kind: int
    mode: int
    worker: int
    attempt: int
    dtype: str
    step: int
    part: Part | None
    shape: tuple[int, ...]


Candidate = tuple[Writer, Segment, Entry]


def choose(candidates: list[Candidate], step: int) -> Saved:
    """Rules 3 and 4 of "10.3 What is visible"."""

    def rank(item: Candidate) -> tuple[int, int, int]:
        return item[0].newest.opened_us, item[0].id, item[2].last_flush

    writer, segment, top = max(candidates, key=rank)
    best = [e for w, _, e in candidates if w is writer and e.last_flush == top.last_flush]
    clash = {(e.series, tuple(e.dims), e.codec == DROPPED) for e in best}
    need(len(clash) == 1, f"two saves of step {step} in flush {top.last_flush}")
    chunks: dict[int, Entry] = {}
    for w, s, e in candidates:
        same = w is writer and s is segment and (e.series, e.dims) == (top.series, top.dims)
        if same and (e.codec == DROPPED) == (top.codec == DROPPED):
            old = chunks.setdefault(e.chunk, e)
            need(old is e or old.last_flush != e.last_flush, "two entries of one chunk")
            chunks[e.chunk] = max(old, e, key=lambda x: x.last_flush)
    series = segment.series[top.series]
    return Saved(writer, segment, series, step, [chunks[key] for key in sorted(chunks)])


class Visible:
    """What of a run's entries is visible."""

    def __init__(self, writers: list[Writer], attempts: set[int]) -> None:
        self.writers, self.attempts = writers, attempts

    def candidates(self, asked: Question) -> Iterator[tuple[Candidate, Series, Iterable[int]]]:
        for writer in self.writers:
            if asked.attempt not in (None, writer.attempt):
                continue
            for segment in writer.segments:
                for page in segment.pages:
                    yield from self._of_page(asked, writer, segment, page)

    def _of_page(
        self, asked: Question, writer: Writer, segment: Segment, page: EntryPage
    ) -> Iterator[tuple[Candidate, Series, Iterable[int]]]:
        """A damaged page fails the questions that need it ("10.2")."""
        row = page.row
        is_near = asked.step is None or row.min_step <= asked.step <= row.max_step
        if not is_near or not any(
            asked.means(each) for each in segment.series[row.first_series : row.last_series + 1]
        ):
            return
        # Other workers only matter for which attempt wins (rule 2): their damage is not asked for.
        if page.error is not None and asked.worker in (None, writer.worker):
            raise page.error
        for entry in page.entries:
            row_of = segment.series[entry.series]
            if not asked.means(row_of) or not is_in_grid(row_of, entry):
                continue
            if asked.step is None:
                steps: Iterable[int] = range(entry.step, entry.last_step + 1, entry.stride)
            else:
                steps = (asked.step,) if entry.covers(asked.step) else ()
            yield (writer, segment, entry), row_of, steps

    def hidden_from(self, attempt: int) -> int:
        """Give the first step that later attempts hide of this one (rule 2)."""
        headers = [s.header for w in self.writers for s in w.segments]
        later = [h.resume_step for h in headers if h.attempt > attempt]
        return min(later, default=MAX_STEP + 1)

    def find(self, asked: Question) -> list[Saved]:
        """Give what is visible: the winners, dropped ones among them."""
        groups: dict[tuple[object, ...], list[Candidate]] = {}
        hidden = {a: self.hidden_from(a) for a in self.attempts}
        newest: dict[tuple[object, ...], int] = {}
        for item, row, steps in self.candidates(asked):
            at = item[0].attempt
            for s in steps:
                if at == asked.attempt or (asked.attempt is None and s < hidden[at]):
                    key = (row.name, row.kind, row.mode, s)
                    groups.setdefault((*key, at, item[0].worker, row.part or ()), []).append(item)
                    newest[key] = max(newest.get(key, 0), at)
        shown = [key for key in groups if key[4] == newest[key[:4]]]
        found = [choose(groups[key], int(str(key[3]))) for key in sorted(shown, key=repr)]
        return [x for x in found if asked.worker in (None, x.writer.worker)]
