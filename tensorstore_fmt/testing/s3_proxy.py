"""A proxy before an S3 server on this machine, which counts, delays and fails as it is told.

::

    with serve_s3() as s3, serve_s3_proxy(s3) as proxy:
        proxy.add(s3_faults.status(503, "SlowDown"), ops=["GET"], probability=0.1)
        run = tsf.open_run(proxy.url("run"), storage_options=proxy.storage_options)

What may happen to a request is in `s3_faults`; any function that takes an `Exchange` will do.
"""

from __future__ import annotations

import random
import select
import socket
import socketserver
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from io import BufferedIOBase
from typing import Any, Final, TypeAlias
from urllib.parse import parse_qs, unquote, urlsplit

from tensorstore_fmt.testing.servers import Reply, S3Server

__all__ = ["Act", "Exchange", "Logged", "Rule", "S3Proxy", "S3Request", "serve_s3_proxy"]

_UPSTREAM_TIMEOUT_S: Final = 60.0
_LOG_LENGTH: Final = 100_000
_HOP_BY_HOP: Final = {"connection", "transfer-encoding", "keep-alive", "expect"}
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST


@dataclass(frozen=True, slots=True)
class S3Request:
    """What a client asks for.

    Attributes
    ----------
    op
        ``GET PUT HEAD DELETE POST``, or ``LIST``, which is a GET of the bucket.
    key
        Without the bucket; of a LIST its prefix.
    method, target, headers, body
        As they came; the names of headers in small letters.
    """

    op: str
    key: str
    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def page(self) -> bool:
        """Whether it asks for a further page of a listing."""
        return self.op == "LIST" and "continuation-token=" in self.target


@dataclass(frozen=True, slots=True)
class Logged:
    """A request that is over; status 0: it got no answer."""

    op: str
    key: str
    status: int
    sent_nbytes: int
    received_nbytes: int


class Exchange:
    """One request and what becomes of it; acts change it, or end it.

    Attributes
    ----------
    request
        May be replaced until it was forwarded.
    number
        Of the requests that the rule has met, from 1 on.
    is_over
        An answer was sent, or there will be none.
    """

    def __init__(self, proxy: S3Proxy, connection: socket.socket, request: S3Request) -> None:
        self.request = request
        self.number = 0
        self.is_over = False
        self.keeps = request.headers.get("connection", "").lower() != "close"
        self.status = 0
        self.sent_nbytes = 0
        self._proxy = proxy
        self._connection = connection
        self._reply: Reply | None = None
        self._is_recorded = False

    @property
    def reply(self) -> Reply:
        """What the server answers; asking for it forwards the request, once."""
        if self._reply is None:
            is_conditional = "if-none-match" in self.request.headers
            # moto looks and then writes, S3 does both at once
            with self._proxy.conditional if is_conditional else nullcontext():
                self._reply = _forward(self.request, self._proxy.s3.endpoint_url)
        return self._reply

    @reply.setter
    def reply(self, reply: Reply) -> None:
        self._reply = reply

    def send(self, *, until: int | None = None, bytes_per_s: float | None = None) -> None:
        """Answer with the reply: its head, and the body up to a byte, after which it ends.

        Content-Length is that of the reply's headers, if there is one.
        """
        reply = self.reply
        self.is_over, self.status = True, reply.status
        body = b"" if self.request.method == "HEAD" else reply.body
        cut = body if until is None else body[:until]
        lines = [f"HTTP/1.1 {reply.status} Answer"]
        lines += [f"{name}: {value}" for name, value in reply.headers.items()]
        if "content-length" not in reply.headers:
            lines.append(f"content-length: {len(reply.body)}")
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        self.sent_nbytes = len(cut)
        if until is not None:
            self.keeps = False
        self.record()  # before the client can know that it is over
        if bytes_per_s is None:
            self._connection.sendall(head + cut)
            return
        self._connection.sendall(head)
        for i in range(len(cut)):
            self._connection.sendall(cut[i : i + 1])
            if self.is_gone(1 / bytes_per_s):
                return

    def record(self) -> None:
        """Put it into the log."""
        request, self._is_recorded = self.request, True
        logged = Logged(request.op, request.key, self.status, self.sent_nbytes, len(request.body))
        self._proxy.log.append(logged)

    def reset(self) -> None:
        """End the connection as a crashed server does; what was sent before may be lost, too."""
        self.is_over, self.keeps = True, False
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)

    def hang(self) -> None:
        """Never answer; ends when the client has had enough, or the proxy is closed."""
        self.is_over, self.keeps = True, False
        while not self.is_gone(0.2):
            pass

    def finish(self) -> None:
        """Put into the log what got no answer."""
        if not self._is_recorded:
            self.record()

    def is_gone(self, wait_s: float) -> bool:
        """Wait; True as soon as the client has closed the connection, or the proxy is closed."""
        deadline = time.monotonic() + wait_s
        while not self._proxy.is_closing:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            if select.select([self._connection], [], [], min(left, 0.1))[0]:
                with suppress(OSError):
                    if self._connection.recv(1, socket.MSG_PEEK):
                        time.sleep(min(left, 0.1))  # it sends already what comes next
                        continue
                return True
        return True


Act: TypeAlias = Callable[[Exchange], None]


@dataclass(slots=True, eq=False)
class Rule:
    """Which requests something happens to; made by `S3Proxy.add`.

    Attributes
    ----------
    met, done
        How many requests fitted, and to how many of them it happened.
    """

    act: Act
    ops: frozenset[str] | None
    key: str
    skip: int
    times: int | None
    probability: float
    met: int = 0
    done: int = 0

    def fits(self, request: S3Request) -> bool:
        """Say whether it is about such requests."""
        return (self.ops is None or request.op in self.ops) and fnmatchcase(request.key, self.key)


@dataclass(slots=True, eq=False)
class S3Proxy:
    """A running proxy. Threads share it; requests are served at the same time.

    Attributes
    ----------
    s3
        The server behind it.
    endpoint_url, storage_options
        How to reach it, instead of the server.
    log
        The last 100,000 requests that are over.
    conditional
        Held while a conditional put is forwarded.
    """

    s3: S3Server
    endpoint_url: str
    random: random.Random
    rules: list[Rule] = field(default_factory=list)
    log: deque[Logged] = field(default_factory=lambda: deque(maxlen=_LOG_LENGTH))
    is_closing: bool = False
    conditional: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def storage_options(self) -> dict[str, object]:
        """What `open_run` and `create_run` need to go through it."""
        return {**self.s3.storage_options, "endpoint_url": self.endpoint_url}

    def url(self, key: str) -> str:
        """Give the URL of a key of the bucket."""
        return self.s3.url(key)

    def add(
        self,
        act: Act,
        *,
        ops: Collection[str] | None = None,
        key: str = "*",
        skip: int = 0,
        times: int | None = None,
        probability: float = 1.0,
    ) -> Rule:
        """Let something happen to requests from now on, after the rules that are there.

        Parameters
        ----------
        act
            Called with the exchange, in the thread that serves it, unless an earlier rule ended
            the exchange. If no rule does, the server's reply is sent.
        ops
            ``GET PUT HEAD DELETE POST LIST``; None: all.
        key
            Pattern of the key, as of `fnmatch`; of a LIST, of its prefix.
        skip, times
            Let so many requests that fit pass; then meet so many. None: all that follow.
        probability
            Of each request that is met; the proxy's seed decides.
        """
        rule = Rule(act, None if ops is None else frozenset(ops), key, skip, times, probability)
        with self._lock:
            self.rules = [*self.rules, rule]
        return rule

    def remove(self, *rules: Rule) -> None:
        """Forget rules; without any, all of them."""
        with self._lock:
            self.rules = [rule for rule in self.rules if rules and rule not in rules]

    @contextmanager
    def during(self, act: Act, **which: Any) -> Iterator[Rule]:  # noqa: ANN401 - those of `add`
        """Let something happen only within a ``with`` statement."""
        rule = self.add(act, **which)
        try:
            yield rule
        finally:
            self.remove(rule)

    def count(self, *ops: str) -> int:
        """Count requests in the log; of these kinds, or all."""
        return sum(not ops or each.op in ops for each in list(self.log))

    def nbytes(self, *ops: str) -> tuple[int, int]:
        """Count bytes of bodies in the log: sent to clients, received from them."""
        logged = [each for each in list(self.log) if not ops or each.op in ops]
        return sum(e.sent_nbytes for e in logged), sum(e.received_nbytes for e in logged)

    def _serve(self, exchange: Exchange) -> None:
        try:
            for rule in self.rules:
                if exchange.is_over:
                    break
                with self._lock:
                    if not rule.fits(exchange.request):
                        continue
                    rule.met += 1
                    number = rule.met - rule.skip
                    if number < 1 or (rule.times is not None and number > rule.times):
                        continue
                    if rule.probability < 1 and self.random.random() >= rule.probability:
                        continue
                    rule.done += 1
                exchange.number = number
                rule.act(exchange)
            if not exchange.is_over:
                exchange.send()
        except OSError:  # the client went away, or the server did
            exchange.keeps = False
        exchange.finish()


@contextmanager
def serve_s3_proxy(s3: S3Server, *, seed: int = 0) -> Iterator[S3Proxy]:
    """Run a proxy before a server, in threads of this process; other processes may use it, too.

    Parameters
    ----------
    s3
        What answers in truth.
    seed
        Of the rules that happen with a probability.
    """

    class Handler(socketserver.StreamRequestHandler):
        disable_nagle_algorithm = True
        rbufsize = 1 << 16

        def handle(self) -> None:
            connection: socket.socket = self.request
            while not proxy.is_closing:
                try:
                    request = _read_request(self.rfile, connection, proxy.s3.bucket)
                except OSError:
                    return
                if request is None:
                    return
                exchange = Exchange(proxy, connection, request)
                proxy._serve(exchange)
                if not exchange.keeps:
                    return

    class Listener(socketserver.ThreadingTCPServer):
        allow_reuse_address = True
        daemon_threads = True
        block_on_close = False
        request_queue_size = 256

        def shutdown_request(self, request: Any) -> None:  # noqa: ANN401 - as it is there
            # No shutdown first: with SO_LINGER set, closing alone is what sends RST.
            self.close_request(request)

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # a client that went away in the middle is part of the tests

    with Listener(("127.0.0.1", 0), Handler) as listener:
        port = listener.server_address[1]
        proxy = S3Proxy(s3, f"http://127.0.0.1:{port}", random.Random(seed))  # noqa: S311 - of tests
        thread = threading.Thread(target=listener.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.is_closing = True
            listener.shutdown()
            thread.join()


# --- HTTP, as much of it as S3 clients use ------------------------------------------------


def _read_request(file: BufferedIOBase, connection: socket.socket, bucket: str) -> S3Request | None:
    first = file.readline(1 << 16)
    if not first.strip():
        return None
    method, target, _ = first.decode("latin-1").split(None, 2)
    headers = _read_headers(file)
    if headers.get("expect", "").lower() == "100-continue":
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = file.read(int(headers.get("content-length", 0)))
    parts = urlsplit(target)
    name, _, key = unquote(parts.path).lstrip("/").partition("/")
    op = method
    if method == "GET" and name == bucket and not key:
        op = "LIST"
        key = parse_qs(parts.query).get("prefix", [""])[0]
    return S3Request(op, key, method, target, headers, body)


def _read_headers(file: BufferedIOBase) -> dict[str, str]:
    headers: dict[str, str] = {}
    while line := file.readline(1 << 16).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    return headers


def _forward(request: S3Request, url: str) -> Reply:
    """Ask the server. HTTP/1.0, so that the body is not in chunks and its end is the end."""
    there = urlsplit(url)
    lines = [f"{request.method} {request.target} HTTP/1.0"]
    lines += [f"{k}: {v}" for k, v in request.headers.items() if k not in _HOP_BY_HOP]
    head = "\r\n".join([*lines, "connection: close", "", ""]).encode("latin-1")
    address = (there.hostname or "", there.port or 80)
    with socket.create_connection(address, timeout=_UPSTREAM_TIMEOUT_S) as server:
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server.sendall(head + request.body)
        with server.makefile("rb") as file:
            status = int(file.readline(1 << 16).split(None, 2)[1])
            headers = {k: v for k, v in _read_headers(file).items() if k not in _HOP_BY_HOP}
            return Reply(status, file.read(), headers)


def replaced(request: S3Request, **headers: str | None) -> S3Request:
    """Give the request with other headers; None removes one. ``_`` stands for ``-``."""
    changed = dict(request.headers)
    for name, value in headers.items():
        changed.pop(name.replace("_", "-"), None)
        if value is not None:
            changed[name.replace("_", "-")] = value
    return replace(request, headers=changed)
