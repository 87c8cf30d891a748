"""Opening a run: which segments are read, and what is damaged (sections 10.1 and 10.2)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .bundle import BundleRow, read_bundle
from .errors import SpecError, fail, need
from .limits import PREFIX_NBYTES
from .records import Header, SegmentName, parse_segment_name
from .run_json import read_run_json
from .segment import Segment, read_entry_pages, read_head

# What the caller gets instead of a replacement ("10.2").
FOR_THE_CALLER = ("unsupported_version", "unknown_feature")


@dataclass
class Writer:
    """The good segments of one writer ("2. Terms")."""

    worker: int
    attempt: int
    id: int
    segments: list[Segment]

    @property
    def newest(self) -> Header:
        return max((s.header for s in self.segments), key=lambda h: h.last_flush)


@dataclass
class Opened:
    """What was found: `damage` is every failure met, `missing` those that lost flushes."""

    json: dict[str, Any]
    writers: list[Writer] = field(default_factory=list)
    attempts: set[int] = field(default_factory=set)
    damage: list[SpecError] = field(default_factory=list)
    missing: list[tuple[SegmentName, SpecError]] = field(default_factory=list)


class Opener:
    """Opens the run in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            document = (folder / "run.json").read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            fail("not_a_run", str(folder))
        self.opened = Opened(read_run_json(document))
        self.run_id = bytes.fromhex(self.opened.json["run_id"])
        try:
            rows = read_bundle((folder / "index.bundle").read_bytes(), run_id=self.run_id)
        except (OSError, SpecError):
            rows = []  # a damaged bundle is ignored
        self.bundle = {row.name: row for row in rows}

    def open(self) -> Opened:
        opened = self.opened
        for _ in range(4):  # "list again, up to three times"
            opened.writers, opened.damage, opened.missing = [], [], []
            names = self._listing()
            keys = sorted({name[:3] for name in names})
            vanished = [self._load_writer([n for n in names if n[:3] == key]) for key in keys]
            if not any(vanished) and not opened.missing:
                break
        opened.attempts = {name.attempt for name in names}
        return opened

    def _listing(self) -> list[SegmentName]:
        folder = self.folder / "index"
        found = [parse_segment_name(p.name) for p in folder.iterdir()] if folder.is_dir() else []
        return sorted(name for name in found if name is not None)

    def _load_writer(self, names: list[SegmentName]) -> bool:
        """Load the maximal segments, or in place of bad ones those they cover."""
        good: dict[SegmentName, Segment] = {}
        vanished = False
        for name in sorted(names, key=lambda n: (-n.flushes, n.last)):
            try:
                if any(g.first <= name.first and name.last <= g.last for g in good):
                    continue
                good[name] = self._load(name)
                for g in good:
                    apart = g.last < name.first or name.last < g.first
                    need(apart or g == name, f"{g} and {name} are not nested")
            except FileNotFoundError:
                vanished = True
            except SpecError as error:
                if error.code in FOR_THE_CALLER:
                    raise
                self.opened.damage.append(error)
        self._check_gaps(names, good)
        if good:
            self.opened.writers.append(Writer(*names[0][:3], list(good.values())))
        return vanished

    def _check_gaps(self, names: list[SegmentName], good: Iterable[SegmentName]) -> None:
        """The maximal segments begin at flush 0 and follow each other ("4. Layout of a run")."""
        expected = 0
        for first, last in [*sorted((g.first, g.last) for g in good), (names[-1].last + 1, 0)]:
            if first > expected:
                text = f"{names[0]}: flushes {expected} to {first - 1}"
                self.opened.missing.append((names[0], SpecError("missing_segment", text)))
                self.opened.damage.append(self.opened.missing[-1][1])
            expected = max(expected, last + 1)

    def _load(self, name: SegmentName) -> Segment:
        """Take the first bytes from the bundle if it has them; it is only a cache."""
        path, row = self.folder / "index" / str(name), self.bundle.get(name)
        whole = path.read_bytes()
        data = self._from_bundle(row, whole) if row is not None else whole
        try:
            return self._read(name, data)
        except SpecError:
            if data is whole:
                raise
            return self._read(name, whole)

    def _from_bundle(self, row: BundleRow, whole: bytes) -> bytes:
        """Put the copied bytes, as far as they came with the first read, before the rest."""
        if len(whole) != row.file_nbytes:
            return whole
        copied = row.data[:PREFIX_NBYTES]
        return copied + whole[len(copied) :]

    def _read(self, name: SegmentName, data: bytes) -> Segment:
        segment = read_head(data, name, self.run_id, len(data))
        read_entry_pages(segment, data)
        return segment
