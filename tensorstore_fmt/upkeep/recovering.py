"""`recover`: close dead writers, and put together again what is left of a damaged run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence

from tensorstore_fmt.errors import FormatError
from tensorstore_fmt.format import layout, runfile, segment
from tensorstore_fmt.storage import Prefix, Storage, open_storage
from tensorstore_fmt.upkeep.claims import Claims
from tensorstore_fmt.upkeep.entry_check import check_segment
from tensorstore_fmt.upkeep.inventory import (
    SET_ASIDE,
    Inventory,
    closed_writers,
    is_run_closed,
    list_shards,
    maximal,
    read_inventory,
    spoken_for,
)
from tensorstore_fmt.upkeep.liveness import Liveness
from tensorstore_fmt.upkeep.lost import Logged
from tensorstore_fmt.upkeep.report import Action, Lost, RecoverReport
from tensorstore_fmt.upkeep.sealing import SealError, seal
from tensorstore_fmt.upkeep.segment_file import SegmentFile, open_segment
from tensorstore_fmt.upkeep.shard_child import ShardChild
from tensorstore_fmt.upkeep.verifying import differs
from tensorstore_fmt.upkeep.writer_recovery import Plan, WriterRecovery
from tensorstore_fmt.writing.closing import write_bundle

__all__ = ["recover"]

_GRACE_S = 1.0


def recover(
    url: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, object] | None = None,
    dry_run: bool = False,
    force: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> RecoverReport:
    """Bring a run whose writers are dead, or that is damaged, into the best state it can have.

    A dead writer is closed by a new one that speaks for it (spec, "What is visible"). If
    segments of a writer are damaged or gone, the new one holds all that is left of it: from
    undamaged pages, from segments they cover, from the bundle, and from rows of shards that
    prove themselves. If something remains lost, the new writer leaves out one flush on purpose,
    so that readers never answer "never saved" for what may be lost; and a lost step that was
    saved earlier too is marked as dropped, so that its older value is not taken for it.
    Shards without footer get one (on a disk). Committed bytes are never changed; damaged files
    are set aside as ``NAME.damaged``. Recovering twice changes nothing the second time.

    Flushes that were never committed are not brought back: rows of shards beyond the last
    segment stay invisible, as their writer never promised them. Only where no segment of a
    writer is left at all, and so nothing says what was committed, every tensor of which all
    chunks are there is taken.

    Payloads in shards are not read, unless the index has to be rebuilt from them: `verify`
    checks these. Readers that have a damaged run open should refresh afterwards.

    Parameters
    ----------
    url, storage_options
        As for `create_run`.
    dry_run
        Only say what would be done.
    force
        Where there are no locks (object stores), take writers for dead that published something
        less than 10 minutes ago. A lock that is held is always respected.
    progress
        Called with what is done, of how much, and what it is.

    Raises
    ------
    StateError
        Code ``locked``: a writer is alive, or may be. Nothing was changed.
    NotARunError, UnsupportedError
        There is no run, or one of a newer version.
    OSError
        The storage failed; recover again when it works.
    """
    with open_storage(url, storage_options=storage_options, writable=not dry_run) as storage:
        recovery = _Recovery(storage, progress or (lambda *_: None), dry_run=dry_run, force=force)
        try:
            return recovery.run()
        finally:
            recovery.release()


class _Recovery:
    def __init__(
        self,
        storage: Storage,
        progress: Callable[[int, int, str], None],
        *,
        dry_run: bool,
        force: bool,
    ) -> None:
        self._storage = storage
        self._progress = progress
        self._dry_run = dry_run
        self._now_us = time.time_ns() // 1000
        self._liveness = Liveness(storage, now_us=self._now_us, force=force)
        self._child = ShardChild()
        self._actions: list[Action] = []
        self._lost: list[Lost] = []
        self._left: list[str] = []
        self._files: dict[layout.SegmentName, SegmentFile] = {}
        self._claims = Claims()
        self._logged = Logged()
        self._restored = 0

    def release(self) -> None:
        """End the child process and let go of locks."""
        self._child.close()
        if not self._dry_run:
            self._liveness.release()

    def _act(self, kind: str, file: str, what: str) -> None:
        self._actions.append(Action(kind=kind, file=file, what=what))

    def run(self) -> RecoverReport:
        """Do everything, in an order in which stopping anywhere leaves the run no worse."""
        inventory = read_inventory(self._storage)
        self._liveness.refuse_locked([*inventory.writers(), *inventory.locks])
        self._open_segments(inventory)
        shards, _ = list_shards(self._storage)
        headers = [f.header for f in self._files.values() if f.header is not None]
        keys = self._keys(shards, headers)
        closed = closed_writers(headers)
        for key in keys:
            if key not in closed:
                if not self._dry_run:
                    self._liveness.hold(key)
                self._liveness.refuse_living(key, headers)
        self._run_json(inventory)
        plans = self._plan(inventory, shards, headers, keys)
        for plan in plans if not self._dry_run else ():
            self._liveness.hold(plan.key)
        if plans:
            self._drop_bundle(inventory)
        for i, plan in enumerate(plans):
            self._progress(i, len(plans), str(plan.key))
            self._apply(plan)
        self._delete(plans)
        headers = self._headers_now(headers, plans)
        self._seal(inventory, shards)
        self._check_shards(shards)
        is_closed = is_run_closed(headers)
        self._bundle(inventory, is_closed=is_closed)
        self._stale_locks(inventory)
        return RecoverReport(
            url=self._storage.describe(),
            dry_run=self._dry_run,
            actions=tuple(self._actions),
            lost=tuple(self._lost),
            left=tuple(self._left),
            restored_entries=self._restored,
            is_closed=is_closed,
        )

    # --- what is there ----------------------------------------------------------------------

    def _open_segments(self, inventory: Inventory) -> None:
        names = dict(inventory.segments) | dict.fromkeys(inventory.unlisted(), 0)
        for i, name in enumerate(sorted(names)):
            self._progress(i, len(names), name.path)
            spare = inventory.spare(name)
            file = open_segment(self._storage, inventory.run_id, name, names[name], spare)
            checker = check_segment(file, self._claims)
            self._files[name] = file
            if checker is not None:
                self._logged.add(name.key, checker.logged)

    def _keys(
        self,
        shards: Mapping[layout.ShardName, int],
        headers: Sequence[segment.Header],
    ) -> list[layout.WriterKey]:
        """Give all writers: with segments, or with shards that no other one took over."""
        known = {name.key for name in self._files}
        replaced = {spoken_for(h) for h in headers if h.recovers}
        named = set(self._claims.needed)
        orphans = {n.key for n in shards if n.key not in replaced and n not in named}
        return sorted(known | orphans)

    def _plan(
        self,
        inventory: Inventory,
        shards: Mapping[layout.ShardName, int],
        headers: Sequence[segment.Header],
        keys: Sequence[layout.WriterKey],
    ) -> list[Plan]:
        closed = closed_writers(headers)
        recovery = WriterRecovery(
            self._storage,
            inventory,
            self._files,
            shards,
            child=self._child,
            logged=self._logged,
            now_us=self._now_us,
            closed=closed,
        )
        plans = [recovery.plan(key) for key in keys]
        for plan in plans:
            self._left += plan.left
            self._lost += plan.lost
        return [p for p in plans if p.has_changes]

    # --- writers ----------------------------------------------------------------------------

    def _apply(self, plan: Plan) -> None:
        """Publish what a plan says: newest flushes first, so that no old value ever wins."""
        self._actions += plan.actions
        self._restored += plan.restored
        if self._dry_run:
            return
        paths = []
        for header, data in plan.segments():
            self._storage.publish(header.name.path, [data], synced=True)
            paths.append(header.name.path)
        if paths:
            self._storage.sync(paths)
            self._check_published(paths, plan)

    def _check_published(self, paths: Sequence[str], plan: Plan) -> None:
        """Read back what was published, before anything is taken away for it."""
        for path in paths:
            name = layout.parse_segment_name(path.rpartition("/")[2])
            assert name is not None
            ((_, nbytes),) = self._storage.fetch([Prefix(path, 1)])
            if nbytes is None:
                ((data, _),) = self._storage.fetch([Prefix(path, layout.MAX_HEAD_NBYTES)])
                nbytes = len(data)
            file = open_segment(self._storage, plan.run_id, name, nbytes)
            check_segment(file, Claims())
            if not file.is_whole:
                self._storage.delete(paths)
                raise FormatError(
                    f"{path}: what was just written cannot be read again: {file.problems[:1]}; "
                    "nothing was changed",
                    file=path,
                )

    def _delete(self, plans: Sequence[Plan]) -> None:
        """Take away what was replaced, after readers had time to see what replaces it."""
        aside = [file for plan in plans for file in plan.set_aside]
        gone = [name for plan in plans for name in plan.delete]
        if self._dry_run or not (aside or gone):
            return
        for file in aside:
            ((data, _),) = self._storage.fetch([Prefix(file.path, max(file.nbytes, 1))])
            self._storage.publish(file.path + SET_ASIDE, [data], synced=True)
        if aside:
            self._storage.sync([file.path + SET_ASIDE for file in aside])
        time.sleep(_GRACE_S)
        names = [file.name for file in aside] + gone
        # What is covered goes first, then the newest: what is left never has a gap.
        order = sorted(names, key=lambda n: (n in maximal(names), -n.last, n.count))
        for name in order:
            self._storage.delete([name.path])

    def _headers_now(
        self, headers: Sequence[segment.Header], plans: Sequence[Plan]
    ) -> list[segment.Header]:
        gone = {n for p in plans for n in (*p.delete, *(f.name for f in p.set_aside))}
        left = [h for h in headers if h.name not in gone and self._files[h.name].nbytes]
        return left + [h for plan in plans for h in plan.headers]

    # --- shards -----------------------------------------------------------------------------

    def _seal(self, inventory: Inventory, shards: Mapping[layout.ShardName, int]) -> None:
        unsure = {n.key for n, f in self._files.items() if not f.is_readable}
        for i, (name, nbytes) in enumerate(sorted(shards.items())):
            self._progress(i, len(shards), name.path)
            needed = None if name.key in unsure else self._claims.needed.get(name, 0)
            try:
                done = seal(
                    self._storage,
                    inventory.run_id,
                    name,
                    nbytes,
                    needed=needed,
                    child=self._child,
                    dry_run=self._dry_run,
                )
            except (SealError, FormatError) as error:
                self._left.append(f"{name.path}: {error}")
            except FileNotFoundError:
                continue
            else:
                if done:
                    self._act("seal", name.path, done)

    def _check_shards(self, shards: Mapping[layout.ShardName, int]) -> None:
        """Say which tensors are gone because a shard is missing or too short."""
        for name in self._claims.shards():
            claims = self._claims.of(name)
            nbytes = shards.get(name)
            if nbytes is not None:
                claims = claims[claims["offset"] + claims["nbytes"] > nbytes]
            what = f"{name.path} is {'not there' if nbytes is None else 'cut short'}"
            for tensor, steps in self._claims.names(claims):
                self._lost.append(Lost(name=tensor, steps=steps, what=what))

    # --- the rest ---------------------------------------------------------------------------

    def _run_json(self, inventory: Inventory) -> None:
        """Write ``run.json`` again from what segments know, if it is damaged or gone."""
        error = inventory.run_json_error
        if error is None:
            return
        opened = [f.header.opened_us for f in self._files.values() if f.header is not None]
        info = runfile.RunInfo(run_id=inventory.run_id, created_us=min(opened), attrs={})
        self._act("run_json", layout.RUN_JSON, f"written again, without attributes ({error})")
        self._lost.append(Lost(name=None, what="the attributes of the run, in run.json"))
        if self._dry_run:
            return
        if inventory.run_json_nbytes:
            ((data, _),) = self._storage.fetch(
                [Prefix(layout.RUN_JSON, layout.MAX_RUN_JSON_NBYTES)]
            )
            self._storage.publish(layout.RUN_JSON + SET_ASIDE, [data], synced=True)
        self._storage.publish(layout.RUN_JSON, [runfile.encode(info)], synced=True)
        self._storage.sync([layout.RUN_JSON])

    def _drop_bundle(self, inventory: Inventory) -> None:
        """Remove the bundle before anything changes: it would say something else."""
        if inventory.bundle_bytes and not self._dry_run:
            self._storage.delete([layout.BUNDLE])
        inventory.bundle, inventory.had_bundle = None, bool(inventory.bundle_bytes)

    def _bundle(self, inventory: Inventory, *, is_closed: bool) -> None:
        """Write the bundle anew if it is not what it should be; remove it if the run is open."""
        fresh = inventory if self._dry_run else read_inventory(self._storage)
        names = maximal(fresh.segments)
        is_good = fresh.bundle is not None and {r.name for r in fresh.bundle} == set(names)
        for row in fresh.bundle or () if is_good else ():
            file = SegmentFile(self._storage, row.name, fresh.segments[row.name])
            is_good = is_good and not differs(self._storage, file, fresh.spare(row.name))
        if is_good or (not fresh.bundle_bytes and not is_closed):
            if inventory.had_bundle and not is_closed:
                self._act("bundle", layout.BUNDLE, "removed: it was outdated")
            return
        if not is_closed:
            self._act("bundle", layout.BUNDLE, "removed: it was outdated or damaged")
            if not self._dry_run:
                self._storage.delete([layout.BUNDLE])
            return
        if self._dry_run:
            self._act("bundle", layout.BUNDLE, "written anew")
            return
        found = [open_segment(self._storage, fresh.run_id, n, fresh.segments[n]) for n in names]
        headers = [f.header for f in found if f.header is not None]
        if all(not f.problems for f in found) and len(headers) == len(found):
            if write_bundle(self._storage, fresh.run_id, headers):
                self._act("bundle", layout.BUNDLE, "written anew")
        elif fresh.bundle_bytes:
            self._storage.delete([layout.BUNDLE])
            self._act("bundle", layout.BUNDLE, "removed: it was outdated or damaged")

    def _stale_locks(self, inventory: Inventory) -> None:
        for key in inventory.locks:
            path = layout.lock_path(key)
            self._act("delete", path, "the lock of a writer that does not live")
            if not self._dry_run:
                self._storage.delete([path])
