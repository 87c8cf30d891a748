"""The end of a run: the bundle, which lets readers open it with one request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tensorstore_fmt.errors import FormatError
from tensorstore_fmt.format import bundle, layout, segment
from tensorstore_fmt.storage import Listing, Range, Storage
from tensorstore_fmt.writing.segments import SegmentLog

__all__ = ["finish", "write_bundle"]

_LARGEST_BUNDLE_NBYTES: Final = 64 * 1024 * 1024


def finish(storage: Storage, run_id: bytes, own: SegmentLog) -> None:
    """Tidy up the writer's segments and, if it is the last of its attempt, write the bundle."""
    own.finish()
    own.sync()
    if not storage.can_list:
        return
    names = maximal_segments(storage)
    headers = _headers(storage, run_id, names)
    if headers is not None and _is_closed(headers):
        write_bundle(storage, run_id, headers)


def maximal_segments(storage: Storage) -> list[tuple[layout.SegmentName, int]]:
    """List the segments of a run that no other covers, with their lengths."""
    found: dict[layout.WriterKey, list[tuple[layout.SegmentName, int]]] = {}
    for file in storage.fetch([Listing(layout.INDEX_DIR)])[0]:
        name = layout.parse_segment_name(file.base)
        if name is not None:
            found.setdefault(name.key, []).append((name, file.nbytes))
    maximal = []
    for key in sorted(found):
        first_free: int | None = None
        # From the newest and longest down: what overlaps one that was taken is covered by it.
        for name, nbytes in sorted(found[key], key=lambda f: (-f[0].last, f[0].first)):
            if first_free is None or name.last < first_free:
                maximal.append((name, nbytes))
                first_free = name.first
    return maximal


def _headers(
    storage: Storage, run_id: bytes, names: Sequence[tuple[layout.SegmentName, int]]
) -> list[segment.Header] | None:
    """Read headers; None if one cannot be had (merged this moment, or damaged): no bundle then."""
    requests = [Range(name.path, 0, layout.SEGMENT_HEADER.size) for name, _ in names]
    headers = []
    for (name, nbytes), data in zip(names, storage.fetch_settled(requests), strict=True):
        if isinstance(data, FileNotFoundError | FormatError):
            return None
        if isinstance(data, Exception):
            raise data
        try:
            headers.append(
                segment.decode_header(
                    data, where=name.path, run_id=run_id, name=name, nbytes=nbytes
                )
            )
        except FormatError:
            return None
    return headers


def _is_closed(headers: Sequence[segment.Header]) -> bool:
    """Say whether the newest attempt is finished (spec, "What is visible")."""
    newest = max(h.key.attempt for h in headers)
    last: dict[layout.WriterKey, segment.Header] = {}
    for header in headers:
        if header.key.attempt == newest:
            known = last.get(header.key)
            if known is None or header.last_flush > known.last_flush:
                last[header.key] = header
    spoken_for = {h.recovers for h in last.values() if h.recovers and h.is_closed}
    workers = {h.key.worker for h in last.values()}
    wanted = max(h.num_workers for h in last.values())
    return workers >= set(range(wanted)) and all(
        h.is_closed or h.key.writer in spoken_for for h in last.values()
    )


def write_bundle(storage: Storage, run_id: bytes, headers: Sequence[segment.Header]) -> bool:
    """Write `index.bundle` from whole segments if they are small, else from their heads.

    Returns
    -------
    bool
        False if the heads are too large for a bundle to be of use.
    """
    whole = sum(h.file_nbytes for h in headers) + 128 * len(headers)
    sizes = [h.file_nbytes if whole <= layout.PREFIX_NBYTES else h.head_nbytes for h in headers]
    if sum(sizes) > _LARGEST_BUNDLE_NBYTES or len(headers) > layout.MAX_BUNDLE_ROWS:
        return False
    data = storage.fetch(
        [Range(h.name.path, 0, size) for h, size in zip(headers, sizes, strict=True)]
    )
    rows = [(h.name, h.file_nbytes, d) for h, d in zip(headers, data, strict=True)]
    storage.publish(layout.BUNDLE, bundle.encode(run_id, rows))
    storage.sync([layout.BUNDLE])
    return True
