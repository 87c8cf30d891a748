"""What has to be done about one writer: nothing, closing it, or rebuilding its index."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tensorstore_fmt.format import layout, merge, segment
from tensorstore_fmt.storage import Range, Storage
from tensorstore_fmt.upkeep.inventory import (
    Inventory,
    children,
    gaps,
    is_known_loss,
    maximal,
    overlaps,
    spoken_for,
)
from tensorstore_fmt.upkeep.lost import Logged
from tensorstore_fmt.upkeep.rebuild import Piece, Rebuilder
from tensorstore_fmt.upkeep.report import Action, Lost
from tensorstore_fmt.upkeep.segment_file import SegmentFile
from tensorstore_fmt.upkeep.shard_child import ChildDiedError, ShardChild
from tensorstore_fmt.upkeep.shard_file import read_frame

__all__ = ["Plan", "WriterRecovery"]


@dataclass(slots=True)
class Plan:
    """What to do about one writer.

    Attributes
    ----------
    pieces
        With the headers of the segments that they become, oldest flushes first.
    headers
        Of all segments to be published.
    set_aside, delete
        What is taken away afterwards.
    """

    key: layout.WriterKey
    run_id: bytes
    pieces: list[tuple[segment.Header, Piece | None]] = field(default_factory=list)
    actions: list[Action] = field(default_factory=list)
    lost: list[Lost] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    set_aside: list[SegmentFile] = field(default_factory=list)
    delete: list[layout.SegmentName] = field(default_factory=list)
    restored: int = 0

    @property
    def headers(self) -> list[segment.Header]:
        """The headers of what will be published."""
        return [header for header, _ in self.pieces]

    @property
    def has_changes(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.pieces or self.set_aside or self.delete)

    def segments(self) -> Iterator[tuple[segment.Header, bytes]]:
        """Give the segments to publish, newest first, one in memory at a time."""
        for header, piece in reversed(self.pieces):
            if piece is None or not piece.inputs:
                yield header, b"".join(segment.encode(header, [], [], []))
            else:
                yield header, piece.encode(header)


class WriterRecovery:
    """Makes plans; reads, but changes nothing."""

    def __init__(
        self,
        storage: Storage,
        inventory: Inventory,
        files: Mapping[layout.SegmentName, SegmentFile],
        shards: Mapping[layout.ShardName, int],
        *,
        child: ShardChild,
        logged: Logged,
        now_us: int,
        closed: set[layout.WriterKey],
    ) -> None:
        self._storage = storage
        self._inventory = inventory
        self._files = files
        self._shards = shards
        self._child = child
        self._logged = logged
        self._now_us = now_us
        self._closed = closed

    def _of(self, key: layout.WriterKey) -> list[SegmentFile]:
        return [self._files[n] for n in sorted(self._files) if n.key == key]

    def plan(self, key: layout.WriterKey) -> Plan:
        """Find out what to do about a writer."""
        plan = Plan(key, self._inventory.run_id)
        files = self._of(key)
        top = maximal(f.name for f in files)
        if any(f.is_foreign for f in files):
            plan.left.append(f"writer {key}: written by a newer version")
            return plan
        if overlaps(top):
            plan.left.append(f"writer {key}: flushes of its segments overlap")
            return plan
        if self._finish_earlier(plan, files):
            return plan
        known = is_known_loss([f for f in files if f.name in top])
        last = max((n.last for n in top), default=-1)
        missing = [gap for gap in gaps(top, 0, last) if gap != known]
        is_damaged = any(not self._files[n].is_whole for n in top) or bool(missing)
        if is_damaged or not files:
            self._rebuild(plan, files, top, known)
            return plan
        for file in files:
            if not file.is_whole:  # covered by one that is
                plan.delete.append(file.name)
                what = "damaged, and covered by another segment: nothing is lost"
                plan.actions.append(Action(kind="delete", file=file.path, what=what))
        if key not in self._closed:
            self._close(plan, files)
        return plan

    # --- what an earlier recovery left ------------------------------------------------------

    def _replacements(self, key: layout.WriterKey) -> list[layout.WriterKey]:
        """Give writers that were made to hold everything of this one (not only to close it)."""
        return sorted(
            {
                h.key
                for f in self._files.values()
                if (h := f.header) is not None and h.recovers and spoken_for(h) == key
                if any(n.last > 0 for n in self._files if n.key == h.key)
            }
        )

    def _is_finished(self, key: layout.WriterKey) -> bool:
        """Say whether all segments of a replacement were published, and are good."""
        files = self._of(key)
        top = maximal(f.name for f in files)
        known = is_known_loss([self._files[n] for n in top])
        left = [gap for gap in gaps(top, 0, max(n.last for n in top)) if gap != known]
        return not left and all(self._files[n].is_readable for n in top) and key in self._closed

    def _finish_earlier(self, plan: Plan, files: Sequence[SegmentFile]) -> bool:
        """Go on where an earlier recovery was stopped; say whether that is all there is to do."""
        key = plan.key
        listed = [f for f in files if f.nbytes]
        if any(self._is_finished(r) for r in self._replacements(key)):
            self._remove(plan, listed, "replaced by an earlier recovery")
            return True
        header = next((f.header for f in files if f.header is not None), None)
        if header is None or not header.recovers or max(f.name.last for f in files) == 0:
            return False
        if self._is_finished(key) or not self._of(spoken_for(header)):
            return False
        # It was stopped while it was published: whom it was to replace still has everything.
        for file in sorted(listed, key=lambda f: f.name.last):
            plan.delete.append(file.name)
            what = "left by a recovery that was stopped"
            plan.actions.append(Action(kind="delete", file=file.path, what=what))
        return True

    def _remove(self, plan: Plan, files: Sequence[SegmentFile], what: str) -> None:
        for file in files:
            if file.is_whole:
                plan.delete.append(file.name)
                plan.actions.append(Action(kind="delete", file=file.path, what=what))
            else:
                plan.set_aside.append(file)
                action = Action(kind="set_aside", file=file.path, what=f"damaged; {what}")
                plan.actions.append(action)

    # --- closing ----------------------------------------------------------------------------

    def _new_key(self, key: layout.WriterKey) -> layout.WriterKey:
        """Give a new writer that comes directly behind this one where both hold a step.

        It has the same opened_us, and a greater id.
        """
        room = 2**64 - 1 - key.writer
        taken = {n.key for n in self._files} | {n.key for n in self._shards}
        while True:
            step = 1 + secrets.randbelow(min(room, 2**32)) if room else 0
            made = replace(key, writer=key.writer + step if step else secrets.randbits(63) | 1)
            if made not in taken:
                return made

    def _header(self, plan: Plan, files: Sequence[SegmentFile]) -> segment.Header | None:
        """Give what the segments of the new writer say; None if that cannot be known."""
        key = plan.key
        headers = [f.header for f in files if f.header is not None]
        if headers:
            base = max(headers, key=lambda h: h.last_flush)
        else:
            same = [f.header for f in self._files.values() if f.header is not None]
            same = [h for h in same if h.key.attempt == key.attempt]
            if not same and key.attempt:
                return None
            workers = {n.key.worker for n in self._shards if n.key.attempt == key.attempt}
            workers.add(key.worker)
            info = self._inventory.info
            base = segment.Header(
                run_id=plan.run_id,
                key=key,
                num_workers=max([*(w + 1 for w in workers), *(h.num_workers for h in same)]),
                resume_step=min((h.resume_step for h in same), default=0),
                first_flush=0,
                last_flush=0,
                opened_us=info.created_us if info is not None else 0,
                published_us=0,
            )
        made = self._new_key(key)
        return replace(
            base,
            key=made,
            opened_us=base.opened_us + (made.writer < key.writer),
            published_us=self._now_us,
            is_closed=False,
            recovers=key.writer,
            series=0,
        )

    def _close(self, plan: Plan, files: Sequence[SegmentFile]) -> None:
        header = self._header(plan, files)
        assert header is not None
        header = replace(header, first_flush=0, last_flush=0, is_closed=True)
        plan.pieces.append((header, None))
        what = f"writer {plan.key} is dead; closed by {header.key.writer:016x}"
        plan.actions.append(Action(kind="close", file=header.name.path, what=what))

    # --- rebuilding -------------------------------------------------------------------------

    def _rebuild(
        self,
        plan: Plan,
        files: Sequence[SegmentFile],
        top: Sequence[layout.SegmentName],
        known: tuple[int, int] | None,
    ) -> None:
        key = plan.key
        header = self._header(plan, files)
        if header is None:
            plan.left.append(
                f"writer {key}: no segment of attempt {key.attempt} is left to say from which step "
                "it resumed; its shards cannot be used"
            )
            return
        rebuilder = Rebuilder(
            self._storage,
            plan.run_id,
            key,
            files=files,
            logged=self._logged,
            read_rows=lambda flushes: self._rows(key, flushes),
        )
        names = [n for n in top if known is None or n.first <= known[1]]
        pieces = self._pieces(rebuilder, names, known)
        if not files:
            pieces = self._orphan(rebuilder)
            if not pieces:
                return
        for i, piece in enumerate(pieces):
            rebuilder.shadow(piece, pieces[:i])
        is_lossy = known is not None or not all(p.is_complete for p in pieces)
        for piece in pieces:
            made = replace(header, first_flush=piece.first, last_flush=piece.last)
            plan.pieces.append((made, piece))
            plan.lost += piece.lost
            plan.restored += piece.restored
        end = max(p.last for p in pieces) + (2 if is_lossy else 1)
        closing = replace(header, first_flush=end, last_flush=end, is_closed=True)
        plan.pieces.append((closing, None))
        what = f"index of writer {key}, now held by {header.key.writer:016x}"
        if is_lossy:
            what += f"; flush {end - 1} is left out to say that something is lost"
        plan.actions.append(Action(kind="rebuild", file=layout.INDEX_DIR, what=what))
        self._remove(plan, [f for f in files if f.nbytes], "replaced")

    def _pieces(
        self,
        rebuilder: Rebuilder,
        names: Sequence[layout.SegmentName],
        known: tuple[int, int] | None,
    ) -> list[Piece]:
        """Rebuild all flushes of a writer, in order."""
        pieces = []
        last = max((n.last for n in names), default=-1)
        if known is not None:
            last = known[0] - 1
        ranges: list[tuple[int, int, SegmentFile | None]] = [
            (n.first, n.last, self._files[n]) for n in names
        ]
        ranges += [(a, b, None) for a, b in gaps(names, 0, last)]
        for first, stop, file in sorted(ranges, key=lambda r: r[0]):
            if file is not None and file.is_readable:
                pieces.append(rebuilder.copy(file))
            elif file is not None and self._is_covered(file):
                pieces += self._inner(rebuilder, file)
            else:
                pieces.append(rebuilder.rebuild(first, stop, file))
        return pieces

    def _is_covered(self, file: SegmentFile) -> bool:
        """Say whether good segments together hold all that a damaged one did."""
        good = [n for n in children(file.name, self._files) if self._files[n].is_readable]
        return not gaps(maximal(good), file.name.first, file.name.last)

    def _inner(self, rebuilder: Rebuilder, file: SegmentFile) -> list[Piece]:
        good = [n for n in children(file.name, self._files) if self._files[n].is_readable]
        pieces = [rebuilder.copy(self._files[n]) for n in maximal(good)]
        for piece in pieces:
            piece.restored = sum(
                int(i.head.root["rows"][i.head.entry_pages()].sum()) for i in piece.inputs
            )
        return pieces

    def _orphan(self, rebuilder: Rebuilder) -> list[Piece]:
        """Rebuild a writer of which only shards are left: nothing says what was committed."""
        piece = rebuilder.rebuild(0, layout.MAX_NUMBER - 2, None)
        if not piece.inputs:
            return []
        piece.last = max(self._last_flush(i) for i in piece.inputs)
        for i, lost in enumerate(piece.lost):
            piece.lost[i] = replace(lost, what=f"all segments are gone; {lost.what}")
        return [piece]

    def _last_flush(self, source: merge.MergeInput) -> int:
        pages = source.head.entry_pages().tolist()
        entries = [source.head.decode_entries(n, source.read_page(n)) for n in pages]
        return max(int(e.rows["last_flush"].max()) for e in entries)

    def _rows(
        self, key: layout.WriterKey, flushes: Sequence[tuple[int, int]]
    ) -> list[dict[str, Any]]:
        """Read the rows of some flushes from a writer's shards; only those that are proven."""
        found: list[dict[str, Any]] = []
        for name, nbytes in sorted(self._shards.items()):
            if name.key != key:
                continue
            frame = read_frame(self._storage, name, nbytes)
            try:
                if frame.schema is not None:
                    place = frame.schema
                    (data,) = self._storage.fetch([Range(name.path, place.offset, place.end)])
                    self._child.schema(self._inventory.run_id, name, data)
            except ChildDiedError:
                continue
            for block in frame.batches:
                (data,) = self._storage.fetch([Range(name.path, block.offset, block.end)])
                try:
                    answer = self._child.batch(block, data, flushes)
                except ChildDiedError:
                    continue
                found += [row | {"shard": name} for row in answer.get("found", ())]
        return found
