"""Storages that count, delay and fail, and real servers on this machine to run them against.

The doubles wrap a real storage, so what passes through them is what would happen without.
"""

from __future__ import annotations

import errno
import http.client
import http.server
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, TypeVar, cast
from urllib.parse import unquote, urlsplit

from tensorstore_fmt.errors import TruncatedError
from tensorstore_fmt.storage.base import (
    Appender,
    BytesLike,
    Listing,
    Lock,
    Prefix,
    Range,
    Request,
    Storage,
)

__all__ = [
    "Asked",
    "CountingStorage",
    "FaultyStorage",
    "LatencyStorage",
    "Operation",
    "Reply",
    "S3Server",
    "Server",
    "WrappedStorage",
    "forward",
    "serve",
    "serve_http",
    "serve_s3",
]

T = TypeVar("T")


# --- doubles -------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Operation:
    """Something that a storage was asked to do.

    Attributes
    ----------
    op
        ``range prefix listing map publish create append sync delete lock``.
    path
        File or directory.
    start, stop
        Bytes, where the operation has any: of an append, the place in the file.
    round
        Number of the call: the requests of one fetch have the same.
    """

    op: str
    path: str
    start: int
    stop: int
    round: int


class WrappedStorage(Storage):
    """Pass everything on to another storage; the others override `before`."""

    def __init__(self, inner: Storage) -> None:
        self.inner = inner
        self.url = inner.url
        self.is_local = inner.is_local
        self.can_list = inner.can_list
        self.can_write = inner.can_write
        self.max_gap_bytes = inner.max_gap_bytes
        self._calls = 0
        self._calls_lock = threading.Lock()

    def before(self, operations: Sequence[Operation]) -> Sequence[int | Exception | None]:
        """Learn what is about to happen.

        Returns
        -------
        sequence
            For each operation None, an exception to raise instead, or a number: only so many
            bytes get through.
        """
        return [None] * len(operations)

    def _number(self) -> int:
        with self._calls_lock:
            self._calls += 1
            return self._calls

    def _one(self, op: str, path: str, start: int = 0, stop: int = 0) -> int | None:
        verdict = self.before([Operation(op, path, start, stop, self._number())])[0]
        if isinstance(verdict, Exception):
            raise verdict
        return verdict

    def fetch_settled(self, requests: Sequence[Request[T]]) -> list[T | Exception]:
        """Do as `fetch`, but put what a request would have raised in the place of its result."""
        number = self._number()
        verdicts = self.before([_operation(request, number) for request in requests])
        wanted = [
            request
            for request, verdict in zip(requests, verdicts, strict=True)
            if not isinstance(verdict, Exception)
        ]
        got = iter(self.inner.fetch_settled(wanted))
        return [
            verdict if isinstance(verdict, Exception) else _cut(request, next(got), verdict)
            for request, verdict in zip(requests, verdicts, strict=True)
        ]

    def map(self, path: str, nbytes_needed: int) -> memoryview:
        """Map a file."""
        self._one("map", path, 0, nbytes_needed)
        return self.inner.map(path, nbytes_needed)

    def publish(self, path: str, buffers: Sequence[BytesLike], *, if_absent: bool = False) -> None:
        """Publish a file; cut short, it does not appear."""
        verdict = self._one("publish", path, 0, _total(buffers))
        if verdict is not None:
            raise _disk_full(path)
        self.inner.publish(path, buffers, if_absent=if_absent)

    def create(self, path: str) -> Appender:
        """Create a file to append to."""
        self._one("create", path)
        return _WrappedAppender(self, self.inner.create(path))

    def sync(self, paths: Iterable[str]) -> None:
        """Sync files."""
        doomed = list(paths)
        for path in doomed:
            self._one("sync", path)
        self.inner.sync(doomed)

    def delete(self, paths: Iterable[str]) -> None:
        """Delete files."""
        doomed = list(paths)
        for path in doomed:
            self._one("delete", path)
        self.inner.delete(doomed)

    def lock(self, path: str) -> Lock:
        """Take a lock."""
        self._one("lock", path)
        return self.inner.lock(path)

    def is_locked(self, path: str) -> bool:
        """Ask for a lock."""
        return self.inner.is_locked(path)

    def close(self) -> None:
        """Close the inner storage."""
        self.inner.close()


class _WrappedAppender(Appender):
    def __init__(self, storage: WrappedStorage, inner: Appender) -> None:
        self._storage = storage
        self._inner = inner

    @property
    def path(self) -> str:
        return self._inner.path

    @property
    def position(self) -> int:
        return self._inner.position

    def append(self, buffers: Sequence[BytesLike]) -> int:
        start = self.position
        stop = start + _total(buffers)
        verdict = self._storage._one("append", self.path, start, stop)
        if verdict is not None:
            self._inner.append([b"".join(buffers)[:verdict]])
            raise _disk_full(self.path)
        return self._inner.append(buffers)

    def sync(self) -> None:
        self._storage._one("sync", self.path)
        self._inner.sync()

    def close(self) -> None:
        self._inner.close()


class CountingStorage(WrappedStorage):
    """Record every operation.

    Attributes
    ----------
    operations
        All of them, in the order in which they were asked for.
    rounds
        Number of fetches that asked for anything.
    """

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Begin to count anew."""
        self.operations: list[Operation] = []
        self.rounds = 0

    def before(self, operations: Sequence[Operation]) -> Sequence[int | Exception | None]:
        """Record them."""
        with self._lock:
            self.operations += operations
            self.rounds += any(each.op in ("range", "prefix", "listing") for each in operations)
        return super().before(operations)

    @property
    def requests(self) -> list[Operation]:
        """What was fetched."""
        return [each for each in self.operations if each.op in ("range", "prefix", "listing")]

    @property
    def nbytes(self) -> int:
        """Bytes that ranges and prefixes asked for."""
        return sum(each.stop - each.start for each in self.requests)


class LatencyStorage(WrappedStorage):
    """Let every round, and every publish and delete, take longer."""

    def __init__(self, inner: Storage, delay_s: float) -> None:
        super().__init__(inner)
        self.delay_s = delay_s

    def before(self, operations: Sequence[Operation]) -> Sequence[int | Exception | None]:
        """Wait."""
        if operations:
            time.sleep(self.delay_s)
        return super().before(operations)


class FaultyStorage(WrappedStorage):
    """Ask a hook before every operation.

    Parameters
    ----------
    inner
        What does the work.
    hook
        Called with each `Operation`. What it raises is the operation's failure. A number lets
        only so many bytes through: of a file that is read, as if it ended there; of one that is
        written, as if the disk were full then.
    """

    def __init__(self, inner: Storage, hook: Callable[[Operation], int | None]) -> None:
        super().__init__(inner)
        self.hook = hook

    def before(self, operations: Sequence[Operation]) -> Sequence[int | Exception | None]:
        """Ask the hook."""
        return [self._verdict(each) for each in operations]

    def _verdict(self, operation: Operation) -> int | Exception | None:
        try:
            return self.hook(operation)
        except Exception as error:  # noqa: BLE001 - it becomes the operation's failure
            return error


def _operation(request: Request[object], number: int) -> Operation:
    if isinstance(request, Range):
        return Operation("range", request.path, request.start, request.stop, number)
    if isinstance(request, Prefix):
        return Operation("prefix", request.path, 0, request.nbytes, number)
    assert isinstance(request, Listing)
    return Operation("listing", request.directory, 0, 0, number)


def _cut(
    request: Request[T], result: T | Exception, verdict: int | Exception | None
) -> T | Exception:
    if not isinstance(verdict, int) or isinstance(result, Exception):
        return result
    if isinstance(request, Range):
        return TruncatedError(f"{request.path}: cut short", file=request.path, offset=verdict)
    if isinstance(request, Prefix):
        data, _ = cast("tuple[bytes, int | None]", result)
        return cast("T", (data[:verdict], min(verdict, len(data))))
    return result


def _total(buffers: Sequence[BytesLike]) -> int:
    return sum(memoryview(each).nbytes for each in buffers)


def _disk_full(path: str) -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


# --- servers --------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Asked:
    """A request that reached a server; ``path`` includes the query."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server answers.

    Attributes
    ----------
    status
        0 closes the connection without an answer.
    cut
        Send only so many bytes of the body, then close the connection.
    """

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None


@dataclass(slots=True)
class Server:
    """A running server: its address, and what it was asked so far."""

    url: str
    asked: list[Asked] = field(default_factory=list)


@contextmanager
def serve(answer: Callable[[Asked], Reply]) -> Iterator[Server]:
    """Run a web server on this machine whose answers a function gives."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one_request(self) -> None:
            self.raw_requestline = self.rfile.readline(65537)
            self.close_connection = True
            if not self.raw_requestline or not self.parse_request():
                return
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked = Asked(self.command, self.path, dict(self.headers.items()), body)
            server.asked.append(asked)
            reply = answer(asked)
            if reply.status == 0:
                self.close_connection = True
                return
            self.send_response(reply.status)
            for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(reply.body[: reply.cut])
            self.close_connection = reply.cut is not None or not self._keeps()

        def _keeps(self) -> bool:
            return self.headers.get("Connection", "").lower() != "close"

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
            pass

    class Listener(http.server.ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            pass  # a client that went away in the middle is part of the tests

    with Listener(("127.0.0.1", 0), Handler) as listener:
        server = Server(f"http://127.0.0.1:{listener.server_port}")
        thread = threading.Thread(target=listener.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            listener.shutdown()
            thread.join()


@contextmanager
def serve_http(directory: str | os.PathLike[str], *, ranges: bool = True) -> Iterator[Server]:
    """Serve the files of a directory, with ranges or, as many simple servers, without."""
    root = os.path.realpath(directory)

    def answer(asked: Asked) -> Reply:
        path = os.path.realpath(root + unquote(urlsplit(asked.path).path))
        if not path.startswith(root + os.sep) or not os.path.isfile(path):
            return Reply(404)
        with open(path, "rb") as file:
            data = file.read()
        asked_range = asked.headers.get("Range", "")
        if not ranges or not asked_range.startswith("bytes="):
            return Reply(200, data)
        first, _, last = asked_range.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) + 1 if last else len(data), len(data))
        if start >= len(data):
            return Reply(416, headers={"Content-Range": f"bytes */{len(data)}"})
        where = f"bytes {start}-{stop - 1}/{len(data)}"
        return Reply(206, data[start:stop], {"Content-Range": where})

    with serve(answer) as server:
        yield server


def forward(asked: Asked, url: str) -> Reply:
    """Ask another server the same, so that a server in between can spoil its answers."""
    there = urlsplit(url)
    connection = http.client.HTTPConnection(there.hostname or "", there.port, timeout=20)
    try:
        connection.request(asked.method, asked.path, asked.body, asked.headers)
        reply = connection.getresponse()
        hop_by_hop = {"connection", "transfer-encoding", "date", "server"}
        headers = {
            name: value for name, value in reply.getheaders() if name.lower() not in hop_by_hop
        }
        return Reply(reply.status, reply.read(), headers)
    finally:
        connection.close()


_START_TIMEOUT_S: Final = 60
_COLOURS: Final = re.compile(r"\x1b\[\d+m")  # its log is made for terminals


@dataclass(frozen=True, slots=True)
class S3Server:
    """A running moto: an S3 that keeps everything in memory.

    Attributes
    ----------
    endpoint_url, storage_options
        How to reach it.
    bucket
        A bucket that exists.
    log
        File in which it writes a line for each request.
    """

    endpoint_url: str
    bucket: str
    storage_options: dict[str, object]
    log: str

    def url(self, key: str) -> str:
        """Give the URL of a key of the bucket."""
        return f"s3://{self.bucket}/{key}"

    def requests(self) -> list[str]:
        """Give method, path and status of every request so far."""
        with open(self.log, encoding="utf-8", errors="replace") as file:
            text = _COLOURS.sub("", file.read())
        lines = [line.split('"') for line in text.splitlines() if " HTTP/1.1" in line]
        return [f"{parts[1].removesuffix(' HTTP/1.1')} {parts[2].split()[0]}" for parts in lines]

    def ask(self, method: str, path: str, body: bytes = b"") -> bytes:
        """Send a request of one's own, without credentials."""
        asked = urllib.request.Request(  # noqa: S310 - our own server
            f"{self.endpoint_url}/{path}", body, {"Content-Type": "text/plain"}, method=method
        )
        with urllib.request.urlopen(asked, timeout=20) as reply:  # noqa: S310 - the same
            answer: bytes = reply.read()
            return answer


@contextmanager
def serve_s3(bucket: str = "tensors") -> Iterator[S3Server]:
    """Run moto in a process of its own, with one bucket."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=log)  # noqa: S603 - no user's text
        options: dict[str, object] = {
            "endpoint_url": f"http://127.0.0.1:{port}",
            "key": "testing",
            "secret": "testing",
            "client_kwargs": {"region_name": "us-east-1"},
        }
        server = S3Server(f"http://127.0.0.1:{port}", bucket, options, log.name)
        try:
            _wait_until_ready(server, process)
            yield server
        finally:
            process.terminate()
            process.wait()


def _wait_until_ready(server: S3Server, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            server.ask("PUT", server.bucket)
        except urllib.error.URLError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                with open(server.log, encoding="utf-8", errors="replace") as file:
                    said = file.read()[-2000:]
                raise RuntimeError(f"moto did not start: {said}") from error
            time.sleep(0.05)
        else:
            return
