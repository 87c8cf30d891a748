"""Beginning to write: make a run or join one, and find out which attempt this is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from tensorstore_fmt.errors import (
    ArgumentError,
    FormatError,
    NotARunError,
    RunExistsError,
)
from tensorstore_fmt.format import codec, layout, runfile, segment
from tensorstore_fmt.storage import FileInfo, Listing, Prefix, Range, Storage

__all__ = ["Joined", "join_run"]

_POLL_S: Final = 0.2
_LOOKS: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """What a writer learned when it joined a run."""

    info: runfile.RunInfo
    attempt: int
    resume_step: int
    mode_steps: Mapping[int, int]
    is_first: bool
    also_here: bool  # another writer of this worker and attempt, not closed


def join_run(
    storage: Storage,
    *,
    attrs: Mapping[str, object],
    worker: int,
    num_workers: int,
    resume_from: int | None,
    attempt: int | None,
    join_timeout_s: float,
    now_us: int,
    new_run_id: Callable[[], bytes],
) -> Joined:
    """Create the run if it is not there (worker 0), or join it.

    Raises
    ------
    RunExistsError
        The run is finished, and the caller did not say from which step to go on.
    NotARunError
        The folder holds something else; or, for another worker than 0, no run appeared in time.
    FormatError
        Nothing of the newest attempt can be read, and the caller does not begin another.
    """
    info, is_first = _run_info(
        storage,
        attrs=attrs,
        worker=worker,
        join_timeout_s=join_timeout_s,
        now_us=now_us,
        new_run_id=new_run_id,
    )
    heads, newest = ([], -1) if is_first else _newest_headers(storage, info.run_id)
    if resume_from is None:
        number = _current_attempt(storage, heads, newest, attempt, num_workers)
        same = [h for h in heads if h.key.attempt == number]
        resume_step = same[0].resume_step if same else 0
    else:
        number = _next_attempt(
            heads,
            newest,
            attempt=attempt,
            worker=worker,
            num_workers=num_workers,
            resume_from=resume_from,
        )
        resume_step = resume_from
    also_here = any(
        h.key.attempt == number and h.key.worker == worker and not h.is_closed for h in heads
    )
    mode_steps = _mode_steps(storage, resume_step) if resume_step and heads else {}
    return Joined(
        info=info,
        attempt=number,
        resume_step=resume_step,
        mode_steps=mode_steps,
        is_first=is_first,
        also_here=also_here,
    )


def _run_info(
    storage: Storage,
    *,
    attrs: Mapping[str, object],
    worker: int,
    join_timeout_s: float,
    now_us: int,
    new_run_id: Callable[[], bytes],
) -> tuple[runfile.RunInfo, bool]:
    """Read `run.json`, or create it; say whether it was created here."""
    deadline = time.monotonic() + join_timeout_s
    while True:
        (found,) = storage.fetch_settled([Prefix(layout.RUN_JSON, layout.MAX_RUN_JSON_NBYTES + 1)])
        if isinstance(found, tuple):
            return runfile.decode(found[0]), False
        if not isinstance(found, FileNotFoundError):
            raise found
        if worker == 0:
            break
        if time.monotonic() > deadline:
            raise NotARunError(
                f"{storage.describe()}: no run appeared within {join_timeout_s:g} s; worker 0 "
                "creates it, the others wait (join_timeout_s)",
                url=storage.describe(),
            )
        time.sleep(_POLL_S)
    _refuse_foreign_folder(storage)
    info = runfile.RunInfo(run_id=new_run_id(), created_us=now_us, attrs=dict(attrs))
    try:
        storage.publish(layout.RUN_JSON, [runfile.encode(info)], if_absent=True)
    except FileExistsError:  # another worker 0 was faster: it is the same run
        ((data, _),) = storage.fetch([Prefix(layout.RUN_JSON, layout.MAX_RUN_JSON_NBYTES + 1)])
        return runfile.decode(data), False
    return info, True


def _refuse_foreign_folder(storage: Storage) -> None:
    if not storage.can_list:
        return
    found: list[FileInfo] = storage.fetch([Listing("")])[0]
    ours = {layout.RUN_JSON, layout.INDEX_DIR, layout.SHARDS_DIR, layout.LOCKS_DIR, layout.BUNDLE}
    foreign = [f.base for f in found if f.base not in ours and not f.base.endswith(".tmp")]
    if foreign:
        raise NotARunError(
            f"{storage.describe()} exists and is no run: it holds {foreign[0]!r}"
            f"{' and more' if len(foreign) > 1 else ''}; choose an empty or new folder",
            url=storage.describe(),
            found=foreign[:10],
        )


def _newest_headers(storage: Storage, run_id: bytes) -> tuple[list[segment.Header], int]:
    """Give the newest header of each writer of the run, and the newest attempt; −1 for none.

    Headers that cannot be read are left out, but their names still tell of their attempts: a
    number that is taken must not be taken again.
    """
    names: list[layout.SegmentName] = []
    found: list[bytes | Exception] = []
    for _ in range(_LOOKS):
        newest: dict[layout.WriterKey, layout.SegmentName] = {}
        for file in storage.fetch([Listing(layout.INDEX_DIR)])[0]:
            name = layout.parse_segment_name(file.base)
            if name is None:
                continue
            known = newest.get(name.key)
            if known is None or (name.last, name.count) > (known.last, known.count):
                newest[name.key] = name
        names = list(newest.values())
        found = storage.fetch_settled([Range(n.path, 0, layout.SEGMENT_HEADER.size) for n in names])
        if not any(isinstance(data, FileNotFoundError) for data in found):
            break  # else they were merged this moment
    headers = []
    for name, data in zip(names, found, strict=True):
        if isinstance(data, FileNotFoundError | FormatError):
            continue  # damaged: `verify` says so, a new writer need not
        if isinstance(data, Exception):
            raise data
        try:
            headers.append(segment.decode_header(data, where=name.path, run_id=run_id, name=name))
        except FormatError as error:
            if error.code in ("unsupported_version", "unknown_feature"):
                raise
    return headers, max((name.key.attempt for name in names), default=-1)


def _current_attempt(
    storage: Storage,
    heads: list[segment.Header],
    newest: int,
    attempt: int | None,
    num_workers: int,
) -> int:
    """Give the attempt that a writer joins which does not resume."""
    if newest < 0:
        return attempt or 0
    same = [h for h in heads if h.key.attempt == newest]
    if not same:
        raise FormatError(
            f"{storage.describe()}: nothing of attempt {newest} can be read, so nobody knows from "
            "which step it went on; try `tensorstore-fmt recover`, or begin a new attempt with "
            "resume_from=STEP",
            code="missing_segment",
            attempt=newest,
        )
    wanted = max(h.num_workers for h in same)
    if len({h.key.worker for h in same}) >= wanted and all(h.is_closed for h in same):
        raise RunExistsError(
            f"{storage.describe()} holds a finished run; to go on in it give resume_from=STEP, "
            "else choose another folder",
            url=storage.describe(),
        )
    if wanted != num_workers:
        raise ArgumentError(
            f"{storage.describe()}: attempt {newest} of this run has num_workers={wanted}, not "
            f"{num_workers}; to begin a new attempt give resume_from=STEP",
            url=storage.describe(),
        )
    return newest if attempt is None else attempt


def _next_attempt(
    heads: list[segment.Header],
    newest: int,
    *,
    attempt: int | None,
    worker: int,
    num_workers: int,
    resume_from: int,
) -> int:
    """Give the attempt of a writer that resumes: a new one, or the one its fellows began."""
    if attempt is not None:
        return attempt
    same = [h for h in heads if h.key.attempt == newest]
    is_fellow = bool(same) and all(
        h.num_workers == num_workers and h.resume_step == resume_from for h in same
    )
    is_here = any(h.key.worker == worker for h in same)
    return newest if is_fellow and not is_here and newest > 0 else newest + 1


def _mode_steps(storage: Storage, resume_step: int) -> dict[int, int]:
    """Give, per mode, how many steps of it were logged before `resume_step`."""
    names: list[layout.SegmentName] = []
    for file in storage.fetch([Listing(layout.INDEX_DIR)])[0]:
        name = layout.parse_segment_name(file.base)
        if name is not None:
            names.append(name)
    maximal = [n for n in names if not any(o != n and o.covers(n) for o in names)]
    counts: dict[int, int] = {}
    for name in maximal:
        (found,) = storage.fetch_settled([Prefix(name.path, layout.PREFIX_NBYTES)])
        if not isinstance(found, tuple):
            continue
        try:
            header = segment.decode_header(found[0], where=name.path, name=name)
            data = found[0]
            if len(data) < header.head_nbytes:
                (data,) = storage.fetch([Range(name.path, 0, header.head_nbytes)])
            head = segment.decode_head(header, data)
            _count_mode_steps(storage, head, resume_step, counts)
        except FormatError:
            continue  # damage is `verify`'s matter; the count is a convenience
    return counts


def _count_mode_steps(
    storage: Storage, head: segment.Head, resume_step: int, counts: dict[int, int]
) -> None:
    for number in head.catalog.rows_of(""):
        series = head.catalog[number]
        for at in head.entry_pages(number).tolist():
            row = head.root[at]
            if row["min_step"] >= resume_step:
                continue
            begin = int(row["offset"])
            path = head.header.name.path
            (stored,) = storage.fetch([Range(path, begin, begin + int(row["nbytes"]))])
            entries = head.decode_entries(at, stored)
            for i in np.flatnonzero(entries.rows["series"] == number).tolist():
                entry = entries.rows[i]
                count = int(entry["count"])
                raw = np.empty(int(entry["raw_nbytes"]), np.uint8)
                codec.decode(
                    entries.inline[i], raw, codec=int(entry["codec"]), dtype="int64", rows=count
                )
                table = raw.view("<i8").reshape(count, 2)
                steps = int(entry["step"]) + int(entry["stride"]) * np.arange(count)
                before = table[steps < resume_step, 0]
                if len(before):
                    most = int(before.max()) + 1
                    counts[series.mode] = max(counts.get(series.mode, 0), most)
