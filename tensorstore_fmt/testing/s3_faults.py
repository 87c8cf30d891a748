"""What may happen to a request on its way through an `S3Proxy`.

Each function gives an act for `S3Proxy.add`. Some change the request or the reply, and further
acts see what they made of it: `late`, `pages`, `hiding`, `longer` ... Others end the exchange:
`status`, `reset`, `hang`, `cut` ...
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from random import Random
from typing import Final

from tensorstore_fmt.testing.s3_proxy import Act, Exchange, S3Request, replaced
from tensorstore_fmt.testing.servers import Reply

__all__ = [
    "before",
    "content_range",
    "cut",
    "done_but",
    "error_reply",
    "etag",
    "gzipped",
    "hang",
    "hiding",
    "late",
    "longer",
    "one_of",
    "pages",
    "plain",
    "reset",
    "shorter",
    "slowly",
    "stale",
    "status",
    "unconditional",
    "whole",
]

_KEY: Final = re.compile(rb"<Contents>.*?<Key>(.*?)</Key>.*?</Contents>", re.DOTALL)
_MAX_KEYS: Final = re.compile(r"&max-keys=\d+")


def error_reply(status: int, code: str) -> Reply:
    """Give the answer with which S3 says that something went wrong."""
    body = f"<Error><Code>{code}</Code><Message>made to fail</Message></Error>".encode()
    return Reply(status, body, {"content-type": "application/xml"})


# --- answers that are errors, or none -------------------------------------------------


def status(status: int, code: str) -> Act:
    """Answer with an error of S3; the server is not asked.

    ``503 SlowDown``, ``500 InternalError``, ``409 ConditionalRequestConflict``,
    ``412 PreconditionFailed``, ``403 ExpiredToken``, ``403 InvalidAccessKeyId``,
    ``501 NotImplemented`` ...
    """

    def act(exchange: Exchange) -> None:
        exchange.reply = error_reply(status, code)
        exchange.send()

    return act


def done_but(status: int, code: str = "InternalError") -> Act:
    """Let the server do it, and answer that it failed."""

    def act(exchange: Exchange) -> None:
        _ = exchange.reply
        exchange.reply = error_reply(status, code)
        exchange.send()

    return act


def reset(*, after: int | None = None, is_done: bool = False) -> Act:
    """Reset the connection: at once, or after the head and so many bytes of the body.

    ``is_done``: the server has done it, but nothing of its answer arrives.
    """

    def act(exchange: Exchange) -> None:
        if is_done:
            _ = exchange.reply
        if after is not None:
            exchange.send(until=after)
            exchange.is_gone(0.002)  # let it arrive: a reset may overtake what was sent
        exchange.reset()

    return act


def hang() -> Act:
    """Never answer."""
    return Exchange.hang


def cut(nbytes: int) -> Act:
    """Send only so many bytes of the body, though Content-Length says more; then close."""
    return lambda exchange: exchange.send(until=nbytes)


# --- bodies and heads that are wrong -------------------------------------------------------


def shorter(nbytes: int) -> Act:
    """Keep only so many bytes of the body, and let Content-Length agree."""
    return _with_body(lambda body: body[:nbytes])


def longer(extra: bytes) -> Act:
    """Append bytes to the body, and let Content-Length agree."""
    return _with_body(lambda body: body + extra)


def _with_body(change: Callable[[bytes], bytes]) -> Act:
    def act(exchange: Exchange) -> None:
        body = change(exchange.reply.body)
        headers = {**exchange.reply.headers, "content-length": str(len(body))}
        exchange.reply = replace(exchange.reply, body=body, headers=headers)

    return act


def content_range(value: str | None) -> Act:
    """Say that the body is another range; None: say nothing about it."""
    return _with_header("content-range", value)


def etag(value: str = '"0123456789abcdef0123456789abcdef"') -> Act:
    """Say that the object has another ETag."""
    return _with_header("etag", value)


def _with_header(name: str, value: str | None) -> Act:
    def act(exchange: Exchange) -> None:
        headers = {k: v for k, v in exchange.reply.headers.items() if k != name}
        if value is not None:
            headers[name] = value
        exchange.reply = replace(exchange.reply, headers=headers)

    return act


def plain() -> Act:
    """Answer a range with 200 instead of 206, and no Content-Range, though it is one."""

    def act(exchange: Exchange) -> None:
        _with_header("content-range", None)(exchange)
        exchange.reply = replace(exchange.reply, status=200)

    return act


def whole() -> Act:
    """Ignore that a range was asked for: send all of the object."""

    def act(exchange: Exchange) -> None:
        exchange.request = replaced(exchange.request, range=None)

    return act


def gzipped(*, packs: bool = True) -> Act:
    """Say that the body is compressed; ``packs``: and compress it."""

    def act(exchange: Exchange) -> None:
        _with_header("content-encoding", "gzip")(exchange)
        if packs:
            _with_body(lambda body: gzip.compress(body, mtime=0))(exchange)

    return act


def one_of(random: Random, acts: Mapping[Act, float]) -> Act:
    """Choose one of several acts for each request, with these weights."""
    choices, weights = list(acts), list(acts.values())

    def act(exchange: Exchange) -> None:
        random.choices(choices, weights)[0](exchange)

    return act


# --- slow ----------------------------------------------------------------------------


def late(delay_s: float) -> Act:
    """Wait before anything else: latency, or a first byte that comes late."""
    return lambda exchange: _wait(exchange, delay_s)


def _wait(exchange: Exchange, delay_s: float) -> None:
    if exchange.is_gone(delay_s):
        exchange.reset()


def slowly(bytes_per_s: float) -> Act:
    """Send the head at once, and the body at this rate."""
    return lambda exchange: exchange.send(bytes_per_s=bytes_per_s)


# --- stores that differ ----------------------------------------------------------------


def unconditional() -> Act:
    """Ignore ``If-None-Match`` and ``If-Match``, as stores do that do not know them."""

    def act(exchange: Exchange) -> None:
        exchange.request = replaced(exchange.request, if_none_match=None, if_match=None)

    return act


def pages(nkeys: int) -> Act:
    """Cut listings into pages of so many keys."""

    def act(exchange: Exchange) -> None:
        request = exchange.request
        if request.op == "LIST":
            target = _MAX_KEYS.sub("", request.target) + f"&max-keys={nkeys}"
            exchange.request = replace(request, target=target)

    return act


def before(call: Callable[[S3Request], object]) -> Act:
    """Call a function before the server is asked, such as one that changes what is there."""

    def act(exchange: Exchange) -> None:
        call(exchange.request)

    return act


def hiding(is_hidden: Callable[[str], bool]) -> Act:
    """Leave keys out of listings, as stores do whose listings come later than the objects."""

    def act(exchange: Exchange) -> None:
        def keep(match: re.Match[bytes]) -> bytes:
            return b"" if is_hidden(match[1].decode()) else match[0]

        if exchange.request.op == "LIST":
            _with_body(lambda body: _KEY.sub(keep, body))(exchange)

    return act


def stale(pick: Callable[[], int]) -> Act:
    """Answer listings as they were: `pick` says how many listings ago, 0 for now.

    Only for listings of one page.
    """
    seen: dict[str, list[Reply]] = {}

    def act(exchange: Exchange) -> None:
        if exchange.request.op == "LIST":
            replies = seen.setdefault(exchange.request.key, [])
            replies.append(exchange.reply)
            del replies[:-64]
            exchange.reply = replies[max(-1 - pick(), -len(replies))]

    return act
