"""What lies in the folder of a run, and whose it is."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from tensorstore_fmt.errors import ArgumentError, FormatError, MissingFileError, NotARunError
from tensorstore_fmt.format import bundle, layout, runfile, segment
from tensorstore_fmt.storage import FileInfo, Listing, Prefix, Range, Storage
from tensorstore_fmt.upkeep.segment_file import SegmentFile

__all__ = [
    "SET_ASIDE",
    "Inventory",
    "children",
    "closed_writers",
    "gaps",
    "is_known_loss",
    "is_run_closed",
    "list_segments",
    "list_shards",
    "maximal",
    "overlaps",
    "read_inventory",
    "spoken_for",
]

SET_ASIDE = ".damaged"
"""What `recover` puts behind the name of a file that it takes out of sight."""


@dataclass(slots=True)
class Inventory:
    """What was listed.

    Attributes
    ----------
    run_id
        From ``run.json``, or from segments if that is damaged.
    info, run_json_error
        What ``run.json`` says, or why it does not.
    segments
        With their lengths.
    bundle, bundle_error, bundle_bytes
        The table of ``index.bundle``, or why there is none; all bytes of it.
    others
        Files in ``index/`` and ``shards/`` that readers ignore.
    """

    run_id: bytes = b""
    info: runfile.RunInfo | None = None
    run_json_error: Exception | None = None
    run_json_nbytes: int = 0
    segments: dict[layout.SegmentName, int] = field(default_factory=dict)
    locks: list[layout.WriterKey] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    bundle: list[bundle.BundleRow] | None = None
    bundle_error: Exception | None = None
    bundle_bytes: bytes = b""
    had_bundle: bool = False

    def writers(self) -> list[layout.WriterKey]:
        """Give all writers that have a segment."""
        return sorted({name.key for name in self.segments})

    def of(self, key: layout.WriterKey) -> list[layout.SegmentName]:
        """Give the segments of a writer."""
        return sorted(name for name in self.segments if name.key == key)

    def spare(self, name: layout.SegmentName) -> bytes:
        """Give the first bytes of a segment that the bundle holds; maybe none."""
        for row in self.bundle or ():
            if row.name == name:
                return self.bundle_bytes[row.offset : row.offset + row.nbytes]
        return b""

    def unlisted(self) -> list[layout.SegmentName]:
        """Give segments that the bundle names, but that are gone and covered by none."""
        return sorted(
            row.name
            for row in self.bundle or ()
            if not any(name.covers(row.name) for name in self.segments)
        )


def list_segments(files: Iterable[FileInfo]) -> tuple[dict[layout.SegmentName, int], list[str]]:
    """Sort a listing of ``index/`` into segments and others."""
    found, others = {}, []
    for file in files:
        name = layout.parse_segment_name(file.base)
        if name is None:
            others.append(f"{layout.INDEX_DIR}/{file.base}")
        else:
            found[name] = file.nbytes
    return found, others


def list_shards(storage: Storage) -> tuple[dict[layout.ShardName, int], list[str]]:
    """List the shards with their lengths, and other files beside them.

    To be called after segments were read: what these name is then all there.
    """
    (files,) = storage.fetch([Listing(layout.SHARDS_DIR)])
    found, others = {}, []
    for file in files:
        name = layout.parse_shard_name(file.base)
        if name is None:
            others.append(f"{layout.SHARDS_DIR}/{file.base}")
        else:
            found[name] = file.nbytes
    return found, others


def read_inventory(storage: Storage) -> Inventory:
    """List a run and read ``run.json`` and the bundle.

    Raises
    ------
    NotARunError
        Nothing of a run is there.
    UnsupportedError
        Of a newer version.
    """
    if not storage.can_list:
        raise ArgumentError(
            f"{storage.describe()}: files cannot be listed here; use a path or URL that can"
        )
    document, found_bundle, in_index, in_locks = storage.fetch_settled(
        [
            Prefix(layout.RUN_JSON, layout.MAX_RUN_JSON_NBYTES + 1),
            Prefix(layout.BUNDLE, layout.PREFIX_NBYTES),
            Listing(layout.INDEX_DIR),
            Listing(layout.LOCKS_DIR),
        ]
    )
    for result in (in_index, in_locks):
        if isinstance(result, Exception):
            raise result
    assert isinstance(in_index, list)
    assert isinstance(in_locks, list)
    inventory = Inventory()
    inventory.segments, inventory.others = list_segments(in_index)
    inventory.locks = [
        key for file in in_locks if (key := layout.parse_lock_name(file.base)) is not None
    ]
    _read_run_json(storage, inventory, document)
    _read_bundle(storage, inventory, found_bundle)
    return inventory


def _read_run_json(storage: Storage, inventory: Inventory, document: object) -> None:
    try:
        if isinstance(document, Exception):
            raise document
        assert isinstance(document, tuple)
        inventory.run_json_nbytes = len(document[0])
        inventory.info = runfile.decode(document[0])
        inventory.run_id = inventory.info.run_id
    except FileNotFoundError as error:
        inventory.run_json_error = MissingFileError("it is not there", file=layout.RUN_JSON)
        if not inventory.segments:
            raise NotARunError(
                f"{storage.describe()}: there is no run here", url=storage.describe()
            ) from error
    except FormatError as error:
        if error.code in ("unsupported_version", "unknown_feature") or not inventory.segments:
            raise
        inventory.run_json_error = error
    if inventory.info is None:
        inventory.run_id = _run_id_of_segments(storage, inventory)
    else:
        _refuse_foreign_run_json(storage, inventory)


def _ids_of_segments(storage: Storage, inventory: Inventory) -> Iterator[bytes]:
    """Give the run that each segment says it belongs to, if its header can be read."""
    for name in sorted(inventory.segments):
        (data,) = storage.fetch_settled([Range(name.path, 0, layout.SEGMENT_HEADER.size)])
        if isinstance(data, bytes):
            try:
                header = segment.decode_header(data, where=name.path, name=name)
            except FormatError:
                continue
            yield header.run_id


def _refuse_foreign_run_json(storage: Storage, inventory: Inventory) -> None:
    """Take ``run.json`` for damaged if it is that of another run, as all segments say.

    One segment alone could as well be what is in the wrong place. Costs one small read as a rule.
    """
    found = []
    for run_id in _ids_of_segments(storage, inventory):
        if run_id == inventory.run_id:
            return
        found.append(run_id)
    if len(found) > 1 and len(set(found)) == 1:
        what = f"it is that of another run: all segments belong to {found[0].hex()}"
        inventory.run_json_error = FormatError(what, code="wrong_run", file=layout.RUN_JSON)
        inventory.run_id, inventory.info = found[0], None


def _run_id_of_segments(storage: Storage, inventory: Inventory) -> bytes:
    """Find out the id of a run whose ``run.json`` is damaged: all headers must agree."""
    found = set(_ids_of_segments(storage, inventory))
    if len(found) != 1:
        raise NotARunError(
            f"{storage.describe()}: run.json cannot be read, and the segments do not say which "
            "run they belong to",
            url=storage.describe(),
        ) from inventory.run_json_error
    return found.pop()


def _read_bundle(storage: Storage, inventory: Inventory, first: object) -> None:
    if isinstance(first, FileNotFoundError):
        return
    try:
        if isinstance(first, Exception):
            raise first
        assert isinstance(first, tuple)
        data, total = first
        if total is None or len(data) < total:
            # Bundles are bounded by the limits of a writer; a larger one is not ours.
            (found,) = storage.fetch([Prefix(layout.BUNDLE, layout.MAX_HEAD_NBYTES)])
            data = found[0]
        inventory.bundle_bytes = data
        inventory.bundle = bundle.decode(data, run_id=inventory.run_id, nbytes=len(data))
    except FormatError as error:
        inventory.bundle_error = error


# --- which segments hold what ---------------------------------------------------------


def maximal(names: Iterable[layout.SegmentName]) -> list[layout.SegmentName]:
    """Give the segments that no other one covers, in the order of writers and flushes."""
    chosen: list[layout.SegmentName] = []
    for name in sorted(names, key=lambda n: (n.key, n.first, -n.last)):
        if chosen and chosen[-1].covers(name):
            continue
        chosen.append(name)
    return chosen


def children(
    name: layout.SegmentName, names: Iterable[layout.SegmentName]
) -> list[layout.SegmentName]:
    """Give the segments that one covers."""
    return [other for other in names if other != name and name.covers(other)]


def gaps(names: Sequence[layout.SegmentName], first: int, last: int) -> list[tuple[int, int]]:
    """Give ranges of flushes from `first` to `last` that no segment of a writer covers."""
    found = []
    for name in sorted(names, key=lambda n: n.first):
        if name.first > first:
            found.append((first, min(name.first - 1, last)))
        first = max(first, name.last + 1)
    if first <= last:
        found.append((first, last))
    return [(a, b) for a, b in found if a <= b]


def overlaps(names: Sequence[layout.SegmentName]) -> list[layout.SegmentName]:
    """Give maximal segments that overlap with the one before, which must not be."""
    found = []
    for before, name in itertools.pairwise(names):
        if before.key == name.key and name.first <= before.last:
            found.append(name)
    return found


def is_known_loss(files: Sequence[SegmentFile]) -> tuple[int, int] | None:
    """Give the flush that a recovering writer left out on purpose, to say that data are lost.

    Such a writer ends with an empty segment, behind a gap of one flush (see `recover`).
    """
    if len(files) < 1:
        return None
    last = max(files, key=lambda f: f.name.last)
    header = last.header
    if header is None or not header.recovers or not header.is_closed or header.series:
        return None
    if header.first_flush != header.last_flush or header.first_flush < 1:
        return None
    gap = header.first_flush - 1
    if any(f.name.first <= gap <= f.name.last for f in files):
        return None
    return gap, gap


# --- who is closed ----------------------------------------------------------------------


def newest_headers(headers: Iterable[segment.Header]) -> dict[layout.WriterKey, segment.Header]:
    """Give the newest header of each writer: what holds for it."""
    newest: dict[layout.WriterKey, segment.Header] = {}
    for header in headers:
        known = newest.get(header.key)
        if known is None or header.last_flush > known.last_flush:
            newest[header.key] = header
    return newest


def spoken_for(header: segment.Header) -> layout.WriterKey:
    """Give the writer that this one recovers."""
    key = header.key
    return layout.WriterKey(worker=key.worker, attempt=key.attempt, writer=header.recovers)


def closed_writers(headers: Iterable[segment.Header]) -> set[layout.WriterKey]:
    """Give the writers that are closed, or that a closed one speaks for (chains included)."""
    newest = newest_headers(headers)
    closed = {key for key, header in newest.items() if header.is_closed}
    while True:
        spoken = {spoken_for(newest[k]) for k in closed & newest.keys() if newest[k].recovers}
        if spoken <= closed:
            return closed
        closed |= spoken


def is_run_closed(headers: Sequence[segment.Header]) -> bool:
    """Say whether the newest attempt is finished (spec, "What is visible")."""
    if not headers:
        return False
    newest = newest_headers(headers)
    attempt = max(key.attempt for key in newest)
    same = {key: header for key, header in newest.items() if key.attempt == attempt}
    workers = {key.worker for key in same}
    wanted = max(h.num_workers for h in headers if h.key.attempt == attempt)
    return workers >= set(range(wanted)) and same.keys() <= closed_writers(headers)
