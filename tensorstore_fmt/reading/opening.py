"""Opening: from the files of a run to a `View` (spec, "Opening", "Damage and merges")."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tensorstore_fmt.errors import (
    ChecksumError,
    FormatError,
    MissingFileError,
    NotARunError,
    UnsupportedError,
)
from tensorstore_fmt.format import bundle, layout, runfile, segment
from tensorstore_fmt.format.runfile import RunInfo
from tensorstore_fmt.format.segment import Head, Header
from tensorstore_fmt.reading.view import NO_BYTES, Cut, Segment, View
from tensorstore_fmt.storage import FileInfo, Listing, Prefix, Range, Request, Storage

__all__ = ["WriterSnapshot", "heal", "maximal", "open_view", "refresh", "restore", "snapshot"]

_RELISTS: Final = 8
_LOOKS_FOR_GAP: Final = 3
_MOST_HINTED_NBYTES: Final = 64 * 1024 * 1024
_KEPT_NBYTES: Final = 32 * 1024 * 1024
_HEADER_NBYTES: Final = layout.SEGMENT_HEADER.size

Listed = dict[layout.SegmentName, int | None]


def open_view(storage: Storage) -> View:
    """Look at a run for the first time.

    Costs one round of requests if all heads are in the bundle's first 512 KiB, two if each
    head fits its segment's, else three.

    Raises
    ------
    NotARunError
        There is no run.
    UnsupportedError
        A newer version wrote it.
    """
    requests: list[Prefix | Listing] = [
        Prefix(layout.RUN_JSON, layout.MAX_RUN_JSON_NBYTES + 1),
        Prefix(layout.BUNDLE, layout.PREFIX_NBYTES),
    ]
    if storage.can_list:
        requests.append(Listing(layout.INDEX_DIR))
    results: list[object] = storage.fetch_settled(requests)
    run_json, bundled = results[0], results[1]
    if isinstance(run_json, FileNotFoundError):
        raise NotARunError(
            f"{storage.describe()} is not a run: there is no {layout.RUN_JSON}",
            file=layout.RUN_JSON,
        )
    if isinstance(run_json, Exception):
        raise run_json
    assert isinstance(run_json, tuple)
    info = runfile.decode(run_json[0])
    cache = _Bundle.decode(bundled, info)
    if storage.can_list:
        listing = results[2]
        if isinstance(listing, Exception):
            raise listing
        assert isinstance(listing, list)
        listed = _segments(listing)
    else:
        listed = cache.listed(storage)
    return _Loader(storage, info, cache).load(listed)


def refresh(storage: Storage, view: View) -> View:
    """Look again; gives the same view if nothing changed. Then it costs one LIST.

    Never goes back: some stores answer with a listing from before what was seen.
    """
    loader = _Loader(storage, view.info)
    listed = loader.list_again()
    if _is_behind(listed, view.listed):
        return view
    if frozenset(listed) == view.listed and all(s.cut is None for s in view.segments):
        return view
    loader.segments = {s.name: s if s.cut is None else s.with_cut(None) for s in view.segments}
    return loader.load(listed)


def _is_behind(listed: Listed, seen: Iterable[layout.SegmentName]) -> bool:
    """Say whether a listing lacks the end of what a writer is known to have written."""
    newest: dict[layout.WriterKey, int] = {}
    for name in listed:
        newest[name.key] = max(name.last, newest.get(name.key, -1))
    return any(newest.get(name.key, -1) < name.last for name in seen)


def heal(storage: Storage, view: View, lost: Mapping[layout.SegmentName, FormatError]) -> View:
    """Show the same as `view` without some of its segments.

    Parameters
    ----------
    lost
        Segments that have vanished, with what to raise if nothing can stand for them.

    Raises
    ------
    FormatError
        Of `lost`: nothing that stands for it is there.
    """
    loader = _Loader(storage, view.info)
    loader.segments = {s.name: s.with_cut(None) for s in view.segments if s.name not in lost}
    listed = loader.list_again()
    loader.bad = {name: error for name, error in lost.items() if name in listed}
    found = loader.load(listed)
    seen = view.last_flushes()
    for name, error in lost.items():
        if not _is_covered(name, min(name.last, seen[name.key]), found):
            raise error
    return _cut(found, view, {key: view.cut_of(key) for key in seen})


def _is_covered(name: layout.SegmentName, last: int, found: View) -> bool:
    """Say whether a view has all flushes of a segment up to `last`."""
    expected = name.first
    for each in found.segments:  # in the order of `maximal`
        if each.name.key == name.key and each.name.first <= expected:
            expected = max(expected, each.name.last + 1)
    return expected > last


def _cut(found: View, view: View, cuts: Mapping[layout.WriterKey, Cut]) -> View:
    """Hide of `found` what `view` had not seen."""
    segments = []
    for each in found.segments:
        cut = cuts.get(each.name.key)
        if cut is None or each.name.first > cut.flush:
            continue
        segments.append(each.with_cut(cut) if each.name.last > cut.flush else each)
    headers = {key: writer.header for key, writer in view.writers.items()}
    return View(found.info, segments, damage=found.damage, listed=view.listed, headers=headers)


# --- snapshots ------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterSnapshot:
    """What a pickled view remembers of a writer."""

    key: layout.WriterKey
    flush: int
    names: tuple[tuple[int, int], ...]
    last_step_by_mode: tuple[int, ...]
    complete_through: tuple[int, int, int, int]
    is_closed: bool


def snapshot(view: View) -> tuple[WriterSnapshot, ...]:
    """Remember of a view what `restore` needs to show the same steps; a few bytes a segment."""
    kept = []
    for key, flush in view.last_flushes().items():
        header = view.writers[key].header
        names = tuple((s.name.last, s.name.count) for s in view.segments if s.name.key == key)
        by_mode = [-1] * len(layout.MODES)
        for each in view.segments:
            if each.name.key == key and len(each.head.catalog):
                last = each.head.catalog.column("last_step")
                mode = each.head.catalog.mode
                for m in range(len(by_mode)):
                    by_mode[m] = max(by_mode[m], int(last[mode == m].max(initial=-1)))
                if each.cut is not None:
                    by_mode = [
                        min(a, b) for a, b in zip(by_mode, each.cut.last_step_by_mode, strict=True)
                    ]
        kept.append(
            WriterSnapshot(
                key=key,
                flush=flush,
                names=names,
                last_step_by_mode=tuple(by_mode),
                complete_through=header.complete_through,
                is_closed=header.is_closed,
            )
        )
    return tuple(kept)


def restore(storage: Storage, kept: Sequence[WriterSnapshot]) -> View:
    """Open a run and show what a view showed when its snapshot was taken.

    Of entries that were joined with later ones since, steps up to the greatest that the writer
    had logged in the mode are shown.
    """
    found = open_view(storage)
    names = {
        layout.SegmentName(key=w.key, last=last, count=count)
        for w in kept
        for last, count in w.names
    }
    if {s.name for s in found.segments} == names:
        return found
    cuts = {w.key: Cut(w.flush, {}, w.last_step_by_mode) for w in kept}
    headers = {
        w.key: dataclasses.replace(
            found.writers[w.key].header,
            last_flush=w.flush,
            complete_through=w.complete_through,
            is_closed=w.is_closed,
        )
        for w in kept
        if w.key in found.writers
    }
    segments = []
    for each in found.segments:
        cut = cuts.get(each.name.key)
        if cut is None or each.name.first > cut.flush:
            continue
        segments.append(each.with_cut(cut) if each.name.last > cut.flush else each)
    return View(found.info, segments, damage=found.damage, listed=frozenset(names), headers=headers)


# --- which segments ----------------------------------------------------------------


def _segments(listing: Iterable[FileInfo]) -> Listed:
    listed: Listed = {}
    for file in listing:
        name = layout.parse_segment_name(file.base)
        if name is not None:
            listed[name] = file.nbytes
    return listed


def maximal(names: Iterable[layout.SegmentName]) -> list[layout.SegmentName]:
    """Give the segments that no other one covers, by writer and flush."""
    chosen: list[layout.SegmentName] = []
    for name in sorted(names, key=lambda n: (n.key, n.first, -n.last)):
        if chosen and chosen[-1].key == name.key and name.last <= chosen[-1].last:
            continue
        chosen.append(name)
    return chosen


def _gaps(
    chosen: Iterable[layout.SegmentName], listed: Iterable[layout.SegmentName]
) -> list[tuple[layout.WriterKey, int, int]]:
    """Give the flushes (first, last) that a writer made but no chosen segment covers."""
    last_flush: dict[layout.WriterKey, int] = {}
    for name in listed:
        last_flush[name.key] = max(name.last, last_flush.get(name.key, -1))
    following = dict.fromkeys(last_flush, 0)
    gaps = []
    for name in chosen:  # in the order of `maximal`
        expected = following[name.key]
        if name.first > expected:
            gaps.append((name.key, expected, name.first - 1))
        following[name.key] = max(expected, name.last + 1)
    for key, expected in following.items():
        if expected <= last_flush[key]:
            gaps.append((key, expected, last_flush[key]))
    return gaps


# --- the bundle ----------------------------------------------------------------------


class _Bundle:
    """The part of the bundle that came with the first read; empty if it is of no use."""

    def __init__(
        self,
        data: memoryview = NO_BYTES,
        rows: Sequence[bundle.BundleRow] = (),
        problem: Exception | None = None,
    ) -> None:
        self._data = data
        self._rows = {row.name: row for row in rows}
        self._problem = problem

    @classmethod
    def decode(cls, result: object, info: RunInfo) -> _Bundle:
        if isinstance(result, Exception):
            return cls(problem=result)
        assert isinstance(result, tuple)
        data, total = result
        try:
            rows = bundle.decode(data, run_id=info.run_id, nbytes=total)
        except FormatError as error:  # a cache: everything is elsewhere too
            return cls(problem=error)
        return cls(memoryview(data), rows)

    def head(self, name: layout.SegmentName) -> memoryview:
        """Give the first bytes of a segment that are here; maybe none."""
        row = self._rows.get(name)
        if row is None:
            return NO_BYTES
        return self._data[row.offset : row.offset + row.nbytes]

    def prefix_nbytes(self, name: layout.SegmentName) -> int:
        """Say how much of a segment to read first: its head, as far as the bundle tells."""
        row = self._rows.get(name)
        hint = 0 if row is None else min(row.nbytes, _MOST_HINTED_NBYTES)
        return max(layout.PREFIX_NBYTES, hint)

    def listed(self, storage: Storage) -> Listed:
        """Take the table for the listing, where nothing can be listed."""
        if self._problem is None:
            return {name: row.file_nbytes for name, row in self._rows.items()}
        if isinstance(self._problem, FileNotFoundError):
            raise MissingFileError(
                f"{storage.describe()}: files cannot be listed here and there is no "
                f"{layout.BUNDLE}; close the run, or compact it, to get one",
                file=layout.BUNDLE,
            ) from None
        raise self._problem


# --- heads ----------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Candidate:
    """A segment whose head is being read."""

    name: layout.SegmentName
    nbytes: int | None
    data: memoryview = NO_BYTES
    header: Header | None = None
    error: Exception | None = None

    @property
    def rest(self) -> Range | None:
        """What is still to be read of a head whose beginning is known; None: nothing."""
        if self.header is None or self.header.head_nbytes <= len(self.data):
            return None
        return Range(self.name.path, len(self.data), self.header.head_nbytes)

    def take_rest(self, result: object) -> None:
        """Put what was read, or what went wrong, where it belongs."""
        if isinstance(result, Exception):
            self.error = result
        else:
            assert isinstance(result, bytes)
            self.data = memoryview(bytes(self.data) + result)


class _Loader:
    """Reads the heads of what is listed until it holds together."""

    def __init__(self, storage: Storage, info: RunInfo, cache: _Bundle | None = None) -> None:
        self._storage = storage
        self._info = info
        self._cache = cache or _Bundle()
        self._kept = 0
        self.segments: dict[layout.SegmentName, Segment] = {}
        self.bad: dict[layout.SegmentName, FormatError] = {}

    def list_again(self) -> Listed:
        """List the segments that are there now."""
        if not self._storage.can_list:
            (result,) = self._storage.fetch_settled([Prefix(layout.BUNDLE, layout.PREFIX_NBYTES)])
            self._cache = _Bundle.decode(result, self._info)
            return self._cache.listed(self._storage)
        (listing,) = self._storage.fetch([Listing(layout.INDEX_DIR)])
        return _segments(listing)

    def load(self, listed: Listed) -> View:
        """Give the view of what is listed."""
        looks = 0
        for _ in range(_RELISTS):
            chosen = maximal(name for name in listed if name not in self.bad)
            gaps = _gaps(chosen, listed)
            if gaps and looks < _LOOKS_FOR_GAP and self._is_unexplained(gaps):
                # A listing in pages can miss both a segment and what covers it.
                looks += 1
                listed = self.list_again()
                continue
            n_bad = len(self.bad)
            if not self._read_heads([n for n in chosen if n not in self.segments], listed):
                listed = self.list_again()
            elif len(self.bad) == n_bad:
                return View(
                    self._info,
                    [self.segments[name] for name in chosen],
                    damage=self._damage(chosen, gaps),
                    listed=frozenset(listed),
                )
        raise MissingFileError(
            f"{self._storage.describe()}: segments keep vanishing while they are read; try again",
            code="missing_segment",
        )

    def _is_unexplained(self, gaps: Sequence[tuple[layout.WriterKey, int, int]]) -> bool:
        return any(
            not any(
                name.key == key and name.first <= last and first <= name.last for name in self.bad
            )
            for key, first, last in gaps
        )

    def _damage(
        self,
        chosen: Sequence[layout.SegmentName],
        gaps: Sequence[tuple[layout.WriterKey, int, int]],
    ) -> list[FormatError]:
        damage = list(self.bad.values())
        for one, other in itertools.pairwise(chosen):  # in the order of `maximal`
            if one.key == other.key and other.first <= one.last:
                damage.append(
                    FormatError(
                        f"{self._storage.describe(one.path)} and {other.path} overlap, but neither "
                        "covers the other",
                        file=one.path,
                    )
                )
        for key, first, last in gaps:
            damage.append(
                FormatError(
                    f"{self._storage.describe(layout.INDEX_DIR)}: flushes {first} to {last} of "
                    f"writer {key} are missing; what they committed cannot be read",
                    code="missing_segment",
                    writer=str(key),
                    worker=key.worker,
                    attempt=key.attempt,
                    first=first,
                    last=last,
                )
            )
        return damage

    def _read_heads(self, names: Sequence[layout.SegmentName], listed: Listed) -> bool:
        """Read heads into `segments` and `bad`; False if one has vanished."""
        candidates = [_Candidate(name, listed[name], self._cache.head(name)) for name in names]
        again: list[layout.SegmentName] = []
        for each in candidates:
            self._decode_header(each)
        # What the bundle has the beginning of is read on, in the same round.
        unread = [each for each in candidates if each.header is None]
        begun = [each for each in candidates if each.rest is not None]
        requests: list[Request[object]] = [
            Prefix(each.name.path, self._cache.prefix_nbytes(each.name)) for each in unread
        ]
        requests += [each.rest for each in begun if each.rest is not None]
        results = self._storage.fetch_settled(requests) if requests else []
        for each, result in zip(unread, results, strict=False):
            self._take_prefix(each, result)
        for each, result in zip(begun, results[len(unread) :], strict=True):
            each.take_rest(result)
        short = [each for each in unread if each.error is None and each.rest is not None]
        requests = [each.rest for each in short if each.rest is not None]
        results = self._storage.fetch_settled(requests) if requests else []
        for each, result in zip(short, results, strict=True):
            each.take_rest(result)
        has_all = True
        for each in candidates:
            if each.error is None:
                self._decode_head(each)
            if isinstance(each.error, FormatError) and each not in unread:
                again.append(each.name)  # only the bundle's copy may be damaged
            elif isinstance(each.error, FileNotFoundError):
                has_all = False
            elif isinstance(each.error, UnsupportedError):
                raise each.error
            elif isinstance(each.error, FormatError):
                self.bad[each.name] = each.error
            elif each.error is not None:
                raise each.error
        if again:
            self._cache = _Bundle()
            has_all &= self._read_heads(again, listed)
        return has_all

    def _take_prefix(self, each: _Candidate, result: object) -> None:
        if isinstance(result, Exception):
            each.error = result
            return
        assert isinstance(result, tuple)
        data, total = result
        each.data, each.error = memoryview(data), None
        each.nbytes = total if total is not None else each.nbytes
        self._decode_header(each)
        if each.header is None:
            self._header_from_end(each)

    def _decode_header(self, each: _Candidate) -> None:
        try:
            each.header = segment.decode_header(
                each.data,
                where=each.name.path,
                run_id=self._info.run_id,
                name=each.name,
                nbytes=each.nbytes,
            )
        except FormatError as error:
            each.error = error
        else:
            each.error = None

    def _header_from_end(self, each: _Candidate) -> None:
        """Take the copy of a damaged header at the end of the file."""
        is_damaged = isinstance(each.error, ChecksumError) or (
            isinstance(each.error, FormatError) and each.error.code == "bad_magic"
        )
        if not is_damaged or each.nbytes is None or each.nbytes < 2 * _HEADER_NBYTES:
            return
        damage, path = each.error, each.name.path
        (tail,) = self._storage.fetch_settled(
            [Range(path, each.nbytes - _HEADER_NBYTES, each.nbytes)]
        )
        if isinstance(tail, Exception):
            each.error = tail
            return
        data, each.data = each.data, memoryview(tail)
        self._decode_header(each)
        each.data = memoryview(bytes(tail) + bytes(data[_HEADER_NBYTES:]))
        if each.error is not None:
            each.error = damage

    def _decode_head(self, each: _Candidate) -> None:
        assert each.header is not None
        try:
            try:
                head = segment.decode_head(each.header, each.data)
            except ChecksumError:
                head = self._head_with_other_root(each)
        except (FormatError, FileNotFoundError) as error:
            each.error = error
            return
        kept = NO_BYTES
        if len(each.data) > each.header.head_nbytes and self._kept < _KEPT_NBYTES:
            kept = each.data
            self._kept += len(kept)
        self.segments[each.name] = Segment(each.name, head, kept)

    def _head_with_other_root(self, each: _Candidate) -> Head:
        """Read a head with the copy of its root at the end of the file."""
        header = each.header
        assert header is not None
        begin = header.file_nbytes - _HEADER_NBYTES - header.root_nbytes
        (tail,) = self._storage.fetch([Range(each.name.path, begin, header.file_nbytes)])
        start = segment.recover_head_parts(tail, header)
        data = start + bytes(each.data[len(start) :])
        head = segment.decode_head(header, data)
        each.data = memoryview(data)
        return head
