"""Sealing: giving a shard of a dead writer the footer that it did not come to write.

Bytes that entries name are never touched. What is cut off is only what no entry names,
behind the last whole record batch.
"""

from __future__ import annotations

from typing import Final

from tensorstore_fmt.errors import FormatError, StateError
from tensorstore_fmt.format import layout
from tensorstore_fmt.storage import Range, Storage
from tensorstore_fmt.upkeep import arrow_file
from tensorstore_fmt.upkeep.arrow_file import ArrowFrame
from tensorstore_fmt.upkeep.shard_child import ChildDiedError, ShardChild
from tensorstore_fmt.upkeep.shard_file import read_frame

__all__ = ["SealError", "needs_seal", "seal"]

_TAIL_NBYTES: Final = 10


class SealError(Exception):
    """Why a shard was left as it is."""


def needs_seal(frame: ArrowFrame) -> bool:
    """Say whether a shard has no footer, or a wrong one."""
    if frame.schema is None:
        return False  # its writer did not come to write anything
    if frame.is_sealed:
        is_right = [b.place for b in frame.batches] == [b.place for b in frame.footer or ()]
        return not is_right and frame.problem is None
    return True


def seal(
    storage: Storage,
    run_id: bytes,
    name: layout.ShardName,
    nbytes: int,
    *,
    needed: int | None,
    child: ShardChild,
    dry_run: bool,
) -> str | None:
    """Write the footer of a shard, if it needs one.

    Parameters
    ----------
    needed
        Where the last byte that an entry names ends; None if that is not known for sure.

    Returns
    -------
    str or None
        What was done; None if nothing had to be.

    Raises
    ------
    SealError
        It was left as it is.
    """
    frame = read_frame(storage, name, nbytes)
    if not needs_seal(frame):
        if frame.problem and (frame.schema is not None or needed):
            raise SealError(f"damaged Arrow file: {frame.problem}")
        return None
    cut = 0 if frame.is_ended else nbytes - frame.end
    if cut and needed is None:
        raise SealError(f"{cut:,} bytes are torn, and it cannot be told whether entries name them")
    if needed is not None and needed > nbytes:
        raise SealError(f"it was cut short: {nbytes:,} bytes, entries name up to {needed:,}")
    if needed is not None and needed > frame.end:
        raise SealError(f"damaged Arrow file: {frame.problem}; entries name bytes behind that")
    if not storage.is_local:
        raise SealError("an object cannot be appended to; tensors can be read all the same")
    tail = _make_tail(storage, run_id, name, frame, child)
    what = f"{len(frame.batches)} record batches" + (f", {cut:,} torn bytes cut off" if cut else "")
    if not dry_run:
        _append(storage, name, frame, tail)
        _check(storage, name, frame, tail, child)
    return what


def _make_tail(
    storage: Storage, run_id: bytes, name: layout.ShardName, frame: ArrowFrame, child: ShardChild
) -> bytes:
    place = frame.schema
    assert place is not None
    (schema,) = storage.fetch([Range(name.path, place.offset, place.end)])
    try:
        answer = child.schema(run_id, name, schema)
        if not answer:
            answer, tail = child.seal(frame, schema)
    except ChildDiedError as error:
        raise SealError(str(error)) from error
    if answer:
        raise SealError(answer["what"])
    # What was made is read again by the few lines that everything else here rests on.
    try:
        listed = arrow_file.parse_footer(tail[8:-_TAIL_NBYTES], frame.end)
    except FormatError as error:
        raise SealError(f"the footer that was made is not good: {error.message}") from error
    if [b.place for b in listed] != [b.place for b in frame.batches]:
        raise SealError("the footer that was made is not good")
    return tail


def _append(storage: Storage, name: layout.ShardName, frame: ArrowFrame, tail: bytes) -> None:
    try:
        appender = storage.reopen(name.path, nbytes=frame.nbytes, keep=frame.end)
    except StateError as error:
        raise SealError("it changed meanwhile") from error
    with appender:
        appender.append([tail])
        appender.sync()


def _check(
    storage: Storage, name: layout.ShardName, frame: ArrowFrame, tail: bytes, child: ShardChild
) -> None:
    """Open the sealed file in the child; take the footer away again if it does not open."""
    nbytes = frame.end + len(tail)
    try:
        answer = child.open(storage.local_path(name.path), nbytes)
    except ChildDiedError as error:
        answer = {"what": str(error)}
    if answer.get("batches") == len(frame.batches):
        return
    with storage.reopen(name.path, nbytes=nbytes, keep=frame.end) as appender:
        appender.sync()
    raise SealError(f"the sealed file does not open: {answer.get('what', 'other batches')}")
