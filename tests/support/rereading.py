"""One run read again and again, with one of its files changed each time.

Every change is tried, but what it cannot touch is not done again: what was parsed of the same bytes
is remembered (parsing is pure), an equal index over equal bytes gives equal answers, and bytes that
a reader never asks for cannot change what it gives. Each of these is tried out now and then.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from unittest import mock

from support.mutate import (
    Files,
    MemoryStorage,
    Oracle,
    Outcome,
    WrongError,
    ask,
    ask_all,
    caught_opening,
    check_names,
    opened,
)

from tensorstore_fmt.format import layout, runfile, segment
from tensorstore_fmt.reading.run import Run
from tensorstore_fmt.reading.session import Session
from tensorstore_fmt.reading.view import Segment
from tensorstore_fmt.storage import Prefix, Range

TRUST_BUT_CHECK = 29
"""Of so many changes that cannot matter one is tried all the same."""

OTHERS = 3
"""After so many changes one name is asked for in which nothing was changed."""

Place = tuple[int, int, frozenset[str]]
"""Bytes of a file, and the names that lie in them."""


@contextlib.contextmanager
def remembered_parsing() -> Iterator[None]:
    """Parse the same bytes once only."""
    decode_head, decode_header = segment.decode_head, segment.decode_header
    decode_entries = segment.Head.decode_entries

    @functools.lru_cache(512)
    def head_of(header: segment.Header, data: bytes) -> segment.Head:
        return decode_head(header, data)

    @functools.lru_cache(512)
    def entries_of(number: int, stored: bytes, head_id: int) -> object:
        return decode_entries(heads[head_id], number, stored)

    @functools.lru_cache(512)
    def header_of(data: bytes, facts: tuple[tuple[str, object], ...]) -> segment.Header:
        return decode_header(data, **dict(facts))

    def remembered_header(data: bytes | memoryview, **facts: object) -> segment.Header:
        return header_of(bytes(data[: layout.SEGMENT_HEADER.size]), tuple(facts.items()))

    heads: dict[int, segment.Head] = {}

    def remembered_entries(head: segment.Head, number: int, stored: bytes | memoryview) -> object:
        heads.setdefault(id(head), head)
        return entries_of(number, bytes(stored), id(head))

    with (
        mock.patch.object(
            segment, "decode_head", lambda h, data: head_of(h, bytes(data[: h.head_nbytes]))
        ),
        mock.patch.object(segment, "decode_header", remembered_header),
        mock.patch.object(segment.Head, "decode_entries", remembered_entries),
        mock.patch.object(runfile, "decode", functools.lru_cache(64)(runfile.decode)),
    ):
        yield


class LoggedStorage(MemoryStorage):
    """Notes which bytes are asked for; no more than is needed are."""

    max_gap_bytes = 0

    def __init__(self, files: Files) -> None:
        super().__init__(files)
        self.asked: dict[str, list[tuple[int, int]]] = {}

    def _answer(self, request: object) -> object:
        if isinstance(request, Range):
            self.asked.setdefault(request.path, []).append((request.start, request.stop))
        elif isinstance(request, Prefix):
            self.asked.setdefault(request.path, []).append((0, request.nbytes))
        return super()._answer(request)


class Rereader:
    """Reads a run with one file changed; use it within `remembered_parsing`.

    Attributes
    ----------
    never_read
        How many changes were of bytes that no reader asks for.
    """

    def __init__(self, files: Files, oracle: Oracle) -> None:
        self.files, self.oracle = files, oracle
        self.never_read = 0
        self._whole = opened(files)._session.view
        self._heads = {s.name: s.head for s in self._whole.segments}
        self._page_bytes = {s.name: _pages(s, files) for s in self._whole.segments}
        storage = LoggedStorage(files)
        outcome = Outcome()
        ask_all(Run(Session("memory://run", None, storage=storage)), oracle, outcome)
        assert not outcome.is_detected
        self._asked = storage.asked
        self._open = opened(files)
        self._places = dict(self._named_places())

    def _named_places(self) -> Iterator[tuple[str, list[Place]]]:
        """Give the entry pages of segments and the payloads in shards, with their names."""
        shards: dict[str, list[Place]] = {}
        for each in self._whole.segments:
            pages: list[Place] = []
            for number in each.head.entry_pages().tolist():
                row, data = each.head.root[number], self.files[each.name.path]
                begin, end = int(row["offset"]), int(row["offset"]) + int(row["nbytes"])
                entries = each.head.decode_entries(number, data[begin:end]).rows
                names = frozenset(each.head.catalog.names[n] for n in entries["series"].tolist())
                pages.append((begin, end, names))
                for entry in entries[entries["shard"] != layout.INLINE_SHARD]:
                    path = each.head.shards[int(entry["shard"])][0].path
                    at, name = int(entry["offset"]), each.head.catalog.names[int(entry["series"])]
                    place = (at, at + int(entry["nbytes"]), frozenset([name]))
                    shards.setdefault(path, []).append(place)
            yield each.name.path, pages
        yield from shards.items()

    def is_read(self, path: str, begin: int, end: int) -> bool:
        """Say whether a reader asks for any of these bytes."""
        return any(a < end and begin < b for a, b in self._asked.get(path, ()))

    def names_in(self, path: str, begin: int, end: int) -> frozenset[str]:
        """Give the names that have entries or payloads in these bytes."""
        found = (names for a, b, names in self._places.get(path, ()) if a < end and begin < b)
        return frozenset[str]().union(*found) - {""}

    def reread(self, path: str, changed: bytes, *, begin: int, end: int, turn: int) -> Outcome:
        """Change the bytes begin … end of a file, and read.

        All that is asked for is right or a typed error. Asked for are names that have something in
        these bytes and others that take turns, or none if nothing can differ; where the index says
        that it is damaged, only every fifth time.
        """
        is_checked = not turn % TRUST_BUT_CHECK
        has_its_length = len(changed) == len(self.files[path])
        is_listed = path.startswith(layout.INDEX_DIR)
        if (has_its_length or not is_listed) and not self.is_read(path, begin, end):
            self.never_read += 1
            if not is_checked:
                return Outcome()
        if path.startswith(layout.SHARDS_DIR):
            return self._with_other_shard(path, changed, self.names_in(path, begin, end), turn)
        storage = MemoryStorage({**self.files, path: changed})
        outcome = Outcome()
        session = caught_opening(storage, outcome)
        if session is None:
            return outcome
        run = Run(session)
        check_names(run, self.oracle, outcome)
        if self._is_same(session, storage) and not is_checked:
            return outcome
        self._ask_some(run, self.names_in(path, begin, end), outcome, turn)
        return outcome

    def _with_other_shard(
        self, path: str, changed: bytes, hit: Iterable[str], turn: int
    ) -> Outcome:
        """Go on with a run that is open: opening reads no shard."""
        run, outcome = self._open, Outcome()
        storage = run._session.storage
        assert isinstance(storage, MemoryStorage)
        storage.files[path] = changed
        run._session.checked.clear()
        try:
            self._ask_some(run, hit, outcome, turn)
        finally:
            storage.files[path] = self.files[path]
        return outcome

    def _is_same(self, session: Session, storage: MemoryStorage) -> bool:
        """Say whether the index is the same, to the bytes of its pages."""
        view = session.view
        return (
            not view.damage
            and len(view.segments) == len(self._heads)
            and all(s.head is self._heads[s.name] for s in view.segments)
            and all(_pages(s, storage.files) == self._page_bytes[s.name] for s in view.segments)
        )

    def _ask_some(self, run: Run, hit: Iterable[str], outcome: Outcome, turn: int) -> None:
        answers = self.oracle.answers
        n = len(answers)
        first = [a for a in answers if a.name in hit]
        if outcome.has_damage and turn % 5:
            return
        for i in range(len(first)):
            ask(run, first[(turn + i) % len(first)], outcome)
            if outcome.is_detected:  # else this selection of the name does not need these bytes
                break
        if not (first and turn % OTHERS):
            ask(run, answers[turn // OTHERS % n], outcome)


def _pages(segment_: Segment, files: Files) -> bytes:
    """Give the entry pages of a segment as a reader takes them."""
    header = segment_.head.header
    data = segment_.kept if len(segment_.kept) else memoryview(files[segment_.name.path])
    return bytes(data[header.head_nbytes : header.file_nbytes - 256 - header.root_nbytes])


def check_sound(outcome: Outcome, *, expected: bool) -> Outcome:
    """Require that a change was noticed exactly if it had to be."""
    if outcome.is_detected != expected:
        raise WrongError(f"detected {outcome.is_detected}, {outcome}")
    return outcome


__all__: Sequence[str] = ("LoggedStorage", "Rereader", "check_sound", "remembered_parsing")
