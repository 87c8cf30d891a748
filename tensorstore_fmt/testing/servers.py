"""Real servers on this machine to run storages against: any answers, plain files, moto."""

from __future__ import annotations

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import unquote, urlsplit

__all__ = [
    "Asked",
    "Reply",
    "S3Server",
    "Server",
    "forward",
    "serve",
    "serve_http",
    "serve_s3",
]


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
        named = {name.lower(): value for name, value in asked.headers.items()}
        asked_range = named.get("range", "")
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
