"""The answer of an HTTP server to a ranged GET, believed only after it was checked.

Servers ignore ranges, send another one, or stop in the middle. None of this may pass for
data, for the end of a file, or for a missing one.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from tensorstore_fmt.errors import TruncatedError
from tensorstore_fmt.storage.retry import TransientError

_CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", re.ASCII)

# The last is about the request with which the object was put, not about its bytes.
_PLAIN_ENCODINGS: Final = (None, "", "identity", "aws-chunked")

OK: Final = 200
PARTIAL: Final = 206
UNSATISFIABLE: Final = 416


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the server sent.

    Attributes
    ----------
    where
        The file, for messages.
    status
        200 or 206; others are errors before it comes to this.
    content_range, nbytes, encoding
        The headers Content-Range, Content-Length and Content-Encoding; None if absent.
    read
        Gives the next bytes of the body, at most as many as asked for; none at its end.
    """

    where: str
    status: int
    content_range: str | None
    nbytes: int | None
    encoding: str | None
    read: Callable[[int], Awaitable[bytes]]


async def take_range(answer: Answer, start: int, stop: int) -> bytes:
    """Read exactly the range that was asked for."""
    _check_encoding(answer)
    if answer.status == OK:
        # The whole file: reading on to `start` could mean gigabytes for a few bytes.
        if start != 0 or answer.nbytes != stop:
            raise OSError(
                errno.EPROTO, "the server ignores Range requests and sends the whole file",
                answer.where,
            )  # fmt: skip
    else:
        first, end, total = _content_range(answer)
        if first != start or end != stop or (total is not None and total < stop):
            if total is not None and total < stop and first == start and end == total:
                raise truncated(answer.where, total, stop)
            raise TransientError(_other_range(answer, start, stop))
    return await _take_all(answer, stop - start)


async def take_prefix(answer: Answer, nbytes: int) -> tuple[bytes, int | None]:
    """Read the first bytes, or all of a shorter file; give the file's length too."""
    _check_encoding(answer)
    if answer.status == OK:  # all of it; the rest is left unread
        if answer.nbytes is not None:
            # Exactly as much as was asked for may be the range, with the wrong status.
            total = None if answer.nbytes == nbytes else answer.nbytes
            return await _take(answer, min(nbytes, answer.nbytes)), total
        raise OSError(
            errno.EPROTO, "the server neither honours Range requests nor tells the length",
            answer.where,
        )  # fmt: skip
    first, end, total = _content_range(answer)
    # Without a total nothing says that a shorter body is the whole file.
    if first != 0 or end != (nbytes if total is None else min(nbytes, total)):
        raise TransientError(_other_range(answer, 0, nbytes))
    return await _take_all(answer, end), total


def truncated(where: str, found: int | None, stop: int) -> TruncatedError:
    """Say that a file ends before a place."""
    length = "fewer" if found is None else found
    return TruncatedError(
        f"{where}: {length} bytes found, {stop} expected; the file was cut short",
        file=where,
        offset=found,
        expected=stop,
    )


def _content_range(answer: Answer) -> tuple[int, int, int | None]:
    match = _CONTENT_RANGE.fullmatch(answer.content_range or "")
    if match is None:
        raise OSError(
            errno.EPROTO,
            f"partial content with the Content-Range {answer.content_range!r}",
            answer.where,
        )
    total = None if match[3] == "*" else int(match[3])
    return int(match[1]), int(match[2]) + 1, total


def _other_range(answer: Answer, start: int, stop: int) -> OSError:
    return OSError(
        errno.EPROTO,
        f"asked for bytes {start} to {stop}, the server sent {answer.content_range!r}",
        answer.where,
    )


def _check_encoding(answer: Answer) -> None:
    """Refuse a compressed body: its bytes are others than those that were asked for."""
    if answer.encoding not in _PLAIN_ENCODINGS:
        raise OSError(errno.EPROTO, f"the server sent it as {answer.encoding}", answer.where)


async def _take_all(answer: Answer, wanted: int) -> bytes:
    """Read a body of so many bytes; a longer one is something else than what its head says."""
    data = b""
    if answer.nbytes in (None, wanted):
        data = await _take(answer, wanted)
        if answer.nbytes == wanted or not await answer.read(1):
            return data
    raise TransientError(
        OSError(
            errno.EPROTO,
            f"{answer.nbytes or 'more'} bytes came, {wanted} were announced",
            answer.where,
        )
    )


async def _take(answer: Answer, wanted: int) -> bytes:
    """Read so many bytes of the body, never more."""
    parts = []
    got = 0
    while got < wanted:
        part = await answer.read(wanted - got)
        if not part:
            raise TransientError(
                OSError(errno.EIO, f"the body ended after {got} of {wanted} bytes", answer.where)
            )
        parts.append(part)
        got += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
