"""`verify`: check every byte of a run, and say what is hit."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Final

from tensorstore_fmt.errors import FormatError, MissingFileError
from tensorstore_fmt.format import layout, segment
from tensorstore_fmt.storage import Listing, Range, Storage, open_storage
from tensorstore_fmt.upkeep.claims import Claims
from tensorstore_fmt.upkeep.entry_check import check_segment
from tensorstore_fmt.upkeep.inventory import (
    SET_ASIDE,
    Inventory,
    children,
    closed_writers,
    gaps,
    is_known_loss,
    list_segments,
    list_shards,
    maximal,
    overlaps,
    read_inventory,
    spoken_for,
)
from tensorstore_fmt.upkeep.lost import Logged, lost_of_head, lost_of_page, merge_names
from tensorstore_fmt.upkeep.report import Names, Problem, VerifyReport
from tensorstore_fmt.upkeep.segment_file import SegmentFile, open_segment
from tensorstore_fmt.upkeep.shard_child import ShardChild
from tensorstore_fmt.upkeep.shard_file import ShardCheck

__all__ = ["verify"]

_RELISTS: Final = 3
_COMPARED_NBYTES: Final = 4 * 1024 * 1024


def verify(
    url: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, object] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> VerifyReport:
    """Check every byte of a run; reads all of it and changes nothing.

    Memory is bounded by the largest catalog, the largest record batch of a shard, and some
    60 bytes for each chunk in shards. A run may be written to meanwhile.

    Parameters
    ----------
    url, storage_options
        As for `create_run`.
    progress
        Called with what is done, of how much, and what it is.

    Returns
    -------
    VerifyReport
        Everything that was found, not only the first.

    Raises
    ------
    NotARunError
        There is no run.
    UnsupportedError
        The run is of a newer version.
    OSError
        The storage failed, which says nothing about the run.
    """
    with open_storage(url, storage_options=storage_options, writable=False) as storage:
        return _Verification(storage, progress or (lambda *_: None)).run()


class _Verification:
    def __init__(self, storage: Storage, progress: Callable[[int, int, str], None]) -> None:
        self._storage = storage
        self._progress = progress
        self._problems: list[Problem] = []
        self._claims = Claims()
        self._files: dict[layout.SegmentName, SegmentFile] = {}
        self._logged = Logged()
        self._entries = self._chunks = self._nbytes = 0
        self._missing: dict[layout.WriterKey, list[tuple[int, int]]] = {}

    def _problem(
        self,
        code: str,
        file: str | None,
        what: str,
        *,
        names: Names = (),
        offset: int | None = None,
        is_note: bool = False,
    ) -> None:
        self._problems.append(
            Problem(
                code=code,
                severity="note" if is_note else "damage",
                file=file,
                offset=offset,
                what=what,
                names=names,
            )
        )

    def run(self) -> VerifyReport:
        """Check everything in turn."""
        inventory = read_inventory(self._storage)
        self._run_json(inventory)
        self._segments(inventory)
        self._damaged_segments(inventory)
        for key in inventory.writers():
            self._writer(inventory, key)
        self._attempts()
        self._bundle(inventory)
        shards, unreferenced = self._shards(inventory)
        self._others(inventory)
        for file in self._files.values():
            self._problems += file.problems
        order = {"damage": 0, "note": 1}
        self._problems.sort(key=lambda p: (order[p.severity], p.file or "", p.offset or 0))
        return VerifyReport(
            url=self._storage.describe(),
            problems=tuple(self._problems),
            segments=len(self._files),
            shards=shards,
            entries=self._entries,
            chunks=self._chunks,
            nbytes=self._nbytes,
            unreferenced_nbytes=unreferenced,
        )

    def _run_json(self, inventory: Inventory) -> None:
        error = inventory.run_json_error
        self._nbytes += inventory.run_json_nbytes
        if isinstance(error, FormatError):
            self._problem(
                error.code, layout.RUN_JSON, f"{error.message}; no reader opens the run without it"
            )

    # --- segments ---------------------------------------------------------------------------

    def _segments(self, inventory: Inventory) -> None:
        """Check every segment; those that vanish meanwhile were merged."""
        for listings_left in range(_RELISTS, -1, -1):
            vanished = []
            names = [n for n in sorted(inventory.segments) if n not in self._files]
            for i, name in enumerate(names):
                self._progress(i, len(names), name.path)
                try:
                    self._segment(inventory, name)
                except FileNotFoundError:
                    vanished.append(name)
            if not vanished:
                return
            if listings_left:
                self._list_again(inventory)
        for name in vanished:  # listed each time, and never there
            del inventory.segments[name]

    def _list_again(self, inventory: Inventory) -> None:
        (files,) = self._storage.fetch([Listing(layout.INDEX_DIR)])
        inventory.segments, inventory.others = list_segments(files)
        self._files = {n: f for n, f in self._files.items() if n in inventory.segments}
        self._claims = Claims()  # those of what is gone would stay
        for file in self._files.values():
            check_segment(file, self._claims)

    def _segment(self, inventory: Inventory, name: layout.SegmentName) -> None:
        file = open_segment(self._storage, inventory.run_id, name, inventory.segments[name])
        is_maximal = not any(other != name and other.covers(name) for other in inventory.segments)
        # What a segment claims that another one covers is claimed by that one too.
        checker = check_segment(file, self._claims if is_maximal else Claims())
        self._files[name] = file
        self._nbytes += file.nbytes
        if checker is not None:
            self._logged.add(name.key, checker.logged)
            self._entries += checker.entries if is_maximal else 0
            self._chunks += checker.inline_chunks if is_maximal else 0

    def _damaged_segments(self, inventory: Inventory) -> None:
        """Say what damaged pages and heads hit; let covered segments stand in for heads."""
        for name in maximal(inventory.segments):
            file = self._files[name]
            if file.head is None:
                self._stand_in(inventory, file)
        for file in self._files.values():
            for number, error in sorted(file.bad_pages.items()):
                lost = lost_of_page(file, number, self._logged)
                assert file.head is not None
                names = merge_names(((s.name, tuple(steps)),) for s, steps in lost)
                self._problem(
                    error.code,
                    file.path,
                    f"an entry page is damaged: {error.message}",
                    offset=int(file.head.root[number]["offset"]),
                    names=names,
                )

    def _stand_in(self, inventory: Inventory, file: SegmentFile) -> None:
        """Use what a segment with a damaged head covers, and say what it held."""
        inner = children(file.name, inventory.segments)
        chosen = maximal(n for n in inner if self._files[n].head is not None)
        for name in chosen:
            check_segment(self._files[name], self._claims)
        names = self._names_of_flushes(inventory, [file.name, *inner])
        if file.is_foreign:
            return
        for i, problem in enumerate(file.problems):
            if problem.severity == "damage":
                file.problems[i] = Problem(
                    code=problem.code,
                    severity="damage",
                    file=problem.file,
                    offset=problem.offset,
                    what=problem.what,
                    names=names,
                )
                return

    def _names_of_flushes(
        self, inventory: Inventory, candidates: list[layout.SegmentName]
    ) -> Names:
        """Give what segments held of which a catalog can be had: in the bundle, or covered ones."""
        found: list[Names] = []
        for name in candidates:
            file = self._files.get(name)
            head = (file.head or file.partial) if file is not None else None
            if head is None and (spare := inventory.spare(name)):
                head = _spare_head(spare, name)
            if head is not None:
                found.append(lost_of_head(head.catalog, name.key, self._logged))
        return merge_names(found)

    # --- writers and attempts ---------------------------------------------------------------

    def _writer(self, inventory: Inventory, key: layout.WriterKey) -> None:
        """Check that a writer's segments are nested and leave no gap."""
        names = maximal(inventory.of(key))
        for name in overlaps(names):
            what = "its flushes overlap with those of another segment"
            self._problem("malformed", name.path, what)
        last = max(name.last for name in names)
        known = is_known_loss([self._files[n] for n in names])
        for gap in gaps(names, 0, last):
            if gap == known:
                what = (
                    "what `recover` could not bring back of a dead writer is lost for good "
                    f"(marked by flush {gap[0]} of writer {key})"
                )
                self._problem("missing_segment", layout.INDEX_DIR, what)
                continue
            self._missing.setdefault(key, []).append(gap)
        for name in inventory.unlisted():
            if name.key == key and name.first > last:
                self._missing.setdefault(key, []).append((name.first, name.last))

    def _attempts(self) -> None:
        """Check what the segments of an attempt have to agree in, and who is not closed."""
        headers = [f.header for f in self._files.values() if f.header is not None]
        for attempt in sorted({h.key.attempt for h in headers}):
            same = [h for h in headers if h.key.attempt == attempt]
            if len({(h.num_workers, h.resume_step) for h in same}) > 1:
                self._problem(
                    "attempt",
                    layout.INDEX_DIR,
                    f"segments of attempt {attempt} differ in num_workers or resume_step",
                    is_note=True,
                )
        for key in sorted({h.key for h in headers} - closed_writers(headers)):
            what = "not closed: it lives, or was killed (`recover` closes it)"
            self._problem("not_closed", str(key), what, is_note=True)

    # --- the bundle -------------------------------------------------------------------------

    def _bundle(self, inventory: Inventory) -> None:
        error = inventory.bundle_error
        if error is not None and not isinstance(error, FormatError):
            raise error
        if error is not None:
            what = f"{error.message}; only a cache: nothing is lost"
            self._problem(error.code, layout.BUNDLE, what)
        self._nbytes += len(inventory.bundle_bytes)
        for row in inventory.bundle or ():
            copy = inventory.spare(row.name)
            if row.name not in self._files:
                if any(name.covers(row.name) for name in self._files):
                    what = f"names {row.name.path}, which was merged since"
                    self._problem("outdated", layout.BUNDLE, what, is_note=True)
                continue
            if differs(self._storage, self._files[row.name], copy):
                what = f"the copy of {row.name.path} differs from it; only a cache: nothing is lost"
                if self._files[row.name].is_whole:
                    self._problem("checksum", layout.BUNDLE, what, offset=row.offset)
        for name in inventory.unlisted():
            if name.key not in {n.key for n in self._files}:
                self._missing.setdefault(name.key, []).append((name.first, name.last))

    # --- shards -----------------------------------------------------------------------------

    def _shards(self, inventory: Inventory) -> tuple[int, int]:
        """Check all shards, named or not; give their number and the bytes nobody names."""
        listed, others = list_shards(self._storage)
        inventory.others += others
        headers = [f.header for f in self._files.values() if f.header is not None]
        closed = closed_writers(headers)
        known = {h.key for h in headers} | {n.key for n in self._files}
        known |= {spoken_for(h) for h in headers if h.recovers}
        for name in self._claims.shards():
            if name not in listed:
                self._problem(
                    "missing_file",
                    name.path,
                    "entries name chunks in it, but it is not there",
                    names=self._claims.names(self._claims.of(name)),
                )
        named = set(self._claims.shards())
        for name in sorted(listed):
            if name.key not in known and name not in named and name.key not in self._missing:
                self._missing[name.key] = [(0, layout.MAX_NUMBER)]
        unreferenced = 0
        rows: dict[layout.WriterKey, list[Names]] = {}
        with ShardChild() as child:
            for i, name in enumerate(sorted(listed)):
                self._progress(i, len(listed), name.path)
                check = ShardCheck(
                    storage=self._storage,
                    run_id=inventory.run_id,
                    name=name,
                    nbytes=listed[name],
                    claims=self._claims,
                    child=child,
                    is_closed=name.key in closed,
                    flushes=self._missing.get(name.key, ()),
                )
                try:
                    check.run()
                except (FormatError, FileNotFoundError) as error:
                    code = error.code if isinstance(error, FormatError) else "missing_file"
                    check.problem(code, f"it cannot be read: {error}", None)
                self._problems += check.problems
                self._chunks += check.chunks
                self._nbytes += check.checked_nbytes
                unreferenced += check.unreferenced_nbytes
                for row in check.found:
                    steps = [row["step"] + k * row["stride"] for k in range(row["count"])]
                    rows.setdefault(name.key, []).append(((row["name"], tuple(steps)),))
        self._report_missing(inventory, {k: merge_names(v) for k, v in rows.items()})
        return len(listed), unreferenced

    def _report_missing(
        self, inventory: Inventory, in_shards: dict[layout.WriterKey, Names]
    ) -> None:
        for key, missing in sorted(self._missing.items()):
            for first, last in missing:
                rows = [n for n in inventory.unlisted() if n.key == key]
                here = [n for n in rows if n.first <= last and first <= n.last]
                known = self._names_of_flushes(inventory, here)
                names = merge_names([known, in_shards.get(key, ())])
                flushes = f"flushes {first} to {last}" if last < layout.MAX_NUMBER else "segments"
                what = f"{flushes} of writer {key} are missing"
                self._problem("missing_segment", layout.INDEX_DIR, what, names=names)

    def _others(self, inventory: Inventory) -> None:
        for path in inventory.others:
            code = "set_aside" if path.endswith(SET_ASIDE) else "leftover"
            self._problem(code, path, "not part of the run; readers ignore it", is_note=True)
        for key in inventory.locks:
            if not any(name.key == key for name in self._files):
                what = "the lock of a writer that has no segment"
                self._problem("leftover", layout.lock_path(key), what, is_note=True)


def _spare_head(spare: bytes, name: layout.SegmentName) -> segment.Head | None:
    try:
        return segment.decode_head(segment.decode_header(spare, where=name.path, name=name), spare)
    except FormatError:
        return None


def differs(storage: Storage, file: SegmentFile, copy: bytes) -> bool:
    """Compare the first bytes of a segment with a copy of them."""
    if len(copy) > file.nbytes:
        return True
    for begin in range(0, len(copy), _COMPARED_NBYTES):
        end = min(begin + _COMPARED_NBYTES, len(copy))
        try:
            (data,) = storage.fetch([Range(file.path, begin, end)])
        except (FileNotFoundError, MissingFileError):
            return False  # merged since
        if data != copy[begin:end]:
            return True
    return False
