"""A small S3 in a process of its own, whose answers take as long as those of a far one.

Objects are kept in memory and, if a folder is given, as files there. Requests wait for the
latency, as many at a time as clients send, and each is written down with when it came and when
it was answered. Understands what S3 clients need to store and read: GET with ranges, HEAD, LIST,
PUT (also conditional, in parts, and in AWS's chunks), DELETE. Needs the standard library alone;
signatures are not checked.

``python benchmarks/suite/bucket.py [FOLDER]`` prints its port, and ends when its input ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit
from xml.sax.saxutils import escape

BUCKET = "tensors"
_CONTROL = "/-/"
_DATE = "Thu, 01 Jan 2026 00:00:00 GMT"
_HEADER = '<?xml version="1.0" encoding="UTF-8"?>\n'
_RANGE = re.compile(r"bytes=(\d*)-(\d*)$")
_PART = re.compile(rb"<PartNumber>(\d+)</PartNumber>")
_KEY = re.compile(rb"<Key>(.*?)</Key>", re.DOTALL)


# --- the side of those who measure ----------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """One request as the server saw it; times by `time.monotonic`."""

    op: str
    key: str
    begin: float
    end: float
    nbytes: int


def rounds(requests: list[Request]) -> int:
    """Give the longest chain of requests of which each began after the one before had ended."""
    count, free = 0, float("-inf")
    for request in sorted(requests, key=lambda r: r.end):
        if request.begin >= free:
            count, free = count + 1, request.end
    return count


class Bucket:
    """A running server, and what to ask of it."""

    def __init__(self, port: int) -> None:
        self.endpoint = f"http://127.0.0.1:{port}"

    def url(self, key: str) -> str:
        """Give the URL of a key."""
        return f"s3://{BUCKET}/{key}"

    def use(self) -> None:
        """Let this process's clients find it: by variables that all of them know."""
        os.environ.update(
            AWS_ENDPOINT_URL=self.endpoint,
            AWS_ENDPOINT=self.endpoint,
            AWS_ACCESS_KEY_ID="testing",
            AWS_SECRET_ACCESS_KEY="testing",
            AWS_REGION="us-east-1",
            AWS_DEFAULT_REGION="us-east-1",
            AWS_ALLOW_HTTP="true",
            AWS_EC2_METADATA_DISABLED="true",
        )

    def set_latency(self, seconds: float) -> None:
        """Let every answer from now on take so much longer."""
        self._ask("latency", seconds=str(seconds))

    def take_log(self) -> list[Request]:
        """Give the requests that were answered since the last time."""
        return [Request(*row) for row in json.loads(self._ask("log"))]

    def count(self, prefix: str) -> int:
        """Count the objects whose keys begin so."""
        return int(self._ask("count", prefix=prefix))

    def _ask(self, what: str, **query: str) -> bytes:
        url = f"{self.endpoint}{_CONTROL}{what}?{urlencode(query)}"
        with urllib.request.urlopen(url, timeout=60) as reply:
            return reply.read()


@contextlib.contextmanager
def serving(folder: Path | None = None) -> Iterator[Bucket]:
    """Run a server, whose clients are those of this process."""
    command = [sys.executable, __file__, *([str(folder)] if folder else [])]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        bucket = Bucket(int(process.stdout.readline()))
        bucket.use()
        yield bucket
    finally:
        process.kill()
        process.communicate()


# --- the server -----------------------------------------------------------------------------


@dataclass
class _Asked:
    method: str
    key: str  # without the bucket; "" of requests about the bucket itself
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    @property
    def op(self) -> str:
        return "LIST" if self.method == "GET" and not self.key else self.method


@dataclass
class _Reply:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    nbytes: int | None = None  # of a HEAD: the length of what is not sent


@dataclass
class _Object:
    data: bytes
    metadata: dict[str, str] = field(default_factory=dict)
    etag: str = ""

    def __post_init__(self) -> None:
        self.etag = f'"{hashlib.md5(self.data, usedforsecurity=False).hexdigest()}"'


def _xml(text: str, status: int = 200) -> _Reply:
    return _Reply(status, (_HEADER + text).encode(), {"content-type": "application/xml"})


def _error(status: int, code: str) -> _Reply:
    return _xml(f"<Error><Code>{code}</Code><Message>{code}</Message></Error>", status)


class _Store:
    """The objects."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._objects: dict[str, _Object] = {}
        self._uploads: dict[str, dict[int, bytes]] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for file in folder.iterdir():
                self._objects[unquote(file.name)] = _Object(file.read_bytes())

    def count(self, prefix: str) -> int:
        """Count keys."""
        return sum(key.startswith(prefix) for key in self._objects)

    def answer(self, asked: _Asked) -> _Reply:
        """Do what is asked for."""
        if not asked.key:
            return self._bucket(asked)
        if asked.method in ("GET", "HEAD"):
            return self._get(asked)
        if asked.method == "PUT":
            return self._put(asked)
        if asked.method == "POST":
            return self._multipart(asked)
        self._remove(asked.key)
        return _Reply(204)

    def _bucket(self, asked: _Asked) -> _Reply:
        if asked.method == "POST" and "delete" in asked.query:
            for key in _KEY.findall(asked.body):
                self._remove(key.decode())
            return _xml("<DeleteResult></DeleteResult>")
        if asked.method == "GET" and "location" in asked.query:
            return _xml("<LocationConstraint></LocationConstraint>")
        if asked.method == "GET":
            return self._list(asked.query)
        return _Reply(200, headers={"x-amz-bucket-region": "us-east-1"})

    def _list(self, query: dict[str, str]) -> _Reply:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        is_new = query.get("list-type") == "2"
        token = query.get("continuation-token") or query.get("start-after") or query.get("marker")
        is_folder = bool(token and delimiter and token.endswith(delimiter))
        most = min(int(query.get("max-keys", 1000)), 1000)
        encode = quote if query.get("encoding-type") == "url" else escape
        rows, seen, last, is_cut = [], set(), "", False
        for key in sorted(k for k in self._objects if k.startswith(prefix)):
            if token and (key <= token or (is_folder and key.startswith(token))):
                continue
            cut = key.find(delimiter, len(prefix)) if delimiter else -1
            common = key[: cut + len(delimiter)] if cut >= 0 else ""
            if common in seen:
                continue
            if len(rows) == most:
                is_cut = True
                break
            last = common or key
            if common:
                seen.add(common)
                rows.append(f"<CommonPrefixes><Prefix>{encode(common)}</Prefix></CommonPrefixes>")
                continue
            found = self._objects[key]
            rows.append(
                f"<Contents><Key>{encode(key)}</Key><Size>{len(found.data)}</Size>"
                f"<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                f"<ETag>{escape(found.etag)}</ETag><StorageClass>STANDARD</StorageClass></Contents>"
            )
        following = "NextContinuationToken" if is_new else "NextMarker"
        more = f"<{following}>{escape(last)}</{following}>" if is_cut else ""
        return _xml(
            f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{BUCKET}</Name><Prefix>{encode(prefix)}</Prefix>"
            f"<KeyCount>{len(rows)}</KeyCount><MaxKeys>{most}</MaxKeys>"
            f"<IsTruncated>{str(is_cut).lower()}</IsTruncated>{more}{''.join(rows)}"
            f"</ListBucketResult>"
        )

    def _get(self, asked: _Asked) -> _Reply:
        found = self._objects.get(asked.key)
        if found is None:
            return _Reply(404) if asked.method == "HEAD" else _error(404, "NoSuchKey")
        facts = {"etag": found.etag, "last-modified": _DATE, "accept-ranges": "bytes"}
        facts |= {"content-type": "binary/octet-stream", **found.metadata}
        if asked.headers.get("if-match", found.etag) not in (found.etag, "*"):
            return _error(412, "PreconditionFailed")
        if asked.headers.get("if-none-match") == found.etag:
            return _Reply(304, headers=facts)
        if asked.method == "HEAD":
            return _Reply(200, headers=facts, nbytes=len(found.data))
        wanted = _RANGE.match(asked.headers.get("range", ""))
        if wanted is None:
            return _Reply(200, found.data, facts)
        size = len(found.data)
        first, last = wanted.groups()
        start = int(first) if first else max(0, size - int(last))
        stop = min(int(last) + 1, size) if first and last else size
        if start >= size:
            return _error(416, "InvalidRange")
        facts["content-range"] = f"bytes {start}-{stop - 1}/{size}"
        return _Reply(206, found.data[start:stop], facts)

    def _put(self, asked: _Asked) -> _Reply:
        if "uploadId" in asked.query:
            part = _Object(asked.body)
            self._uploads[asked.query["uploadId"]][int(asked.query["partNumber"])] = asked.body
            return _Reply(200, headers={"etag": part.etag})
        source = asked.headers.get("x-amz-copy-source")
        data = asked.body
        if source is not None:
            data = self._objects[unquote(source).lstrip("/").split("/", 1)[1]].data
        refused = self._refused(asked)
        if refused:
            return refused
        kept = {k: v for k, v in asked.headers.items() if k.startswith("x-amz-meta-")}
        stored = self._store(asked.key, data, kept)
        if source is not None:
            return _xml(
                f"<CopyObjectResult><ETag>{escape(stored.etag)}</ETag>"
                "<LastModified>2026-01-01T00:00:00.000Z</LastModified></CopyObjectResult>"
            )
        return _Reply(200, headers={"etag": stored.etag})

    def _refused(self, asked: _Asked) -> _Reply | None:
        there = self._objects.get(asked.key)
        if asked.headers.get("if-none-match") == "*" and there is not None:
            return _error(412, "PreconditionFailed")
        wanted = asked.headers.get("if-match")
        if wanted is not None and (there is None or wanted != there.etag):
            return _error(412, "PreconditionFailed")
        return None

    def _multipart(self, asked: _Asked) -> _Reply:
        if "uploads" in asked.query:
            name = f"upload-{len(self._uploads)}"
            self._uploads[name] = {}
            return _xml(
                f"<InitiateMultipartUploadResult><Bucket>{BUCKET}</Bucket>"
                f"<Key>{escape(asked.key)}</Key><UploadId>{name}</UploadId>"
                "</InitiateMultipartUploadResult>"
            )
        refused = self._refused(asked)
        if refused:
            return refused
        parts = self._uploads.pop(asked.query["uploadId"])
        numbers = [int(n) for n in _PART.findall(asked.body)] or sorted(parts)
        stored = self._store(asked.key, b"".join(parts[n] for n in numbers), {})
        return _xml(
            f"<CompleteMultipartUploadResult><Bucket>{BUCKET}</Bucket>"
            f"<Key>{escape(asked.key)}</Key><ETag>{escape(stored.etag)}</ETag>"
            "</CompleteMultipartUploadResult>"
        )

    def _store(self, key: str, data: bytes, metadata: dict[str, str]) -> _Object:
        stored = self._objects[key] = _Object(data, metadata)
        if self._folder is not None:
            (self._folder / quote(key, safe="")).write_bytes(data)
        return stored

    def _remove(self, key: str) -> None:
        if self._objects.pop(key, None) is not None and self._folder is not None:
            (self._folder / quote(key, safe="")).unlink()


class _Server:
    """Answers connections, late."""

    def __init__(self, store: _Store) -> None:
        self._store = store
        self._latency = 0.0
        self._log: list[tuple[str, str, float, float, int]] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of a connection, one after the other."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while await self._one(reader, writer):
                pass
        writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        first = await reader.readline()
        if not first.strip():
            return False
        method, target, _ = first.decode("latin-1").split(None, 2)
        headers = {}
        while line := (await reader.readline()).strip():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.strip().lower()] = value.strip()
        begin = time.monotonic()
        if headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await _body(reader, headers)
        parts = urlsplit(target)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        if parts.path.startswith(_CONTROL):
            reply, asked = self._control(parts.path.removeprefix(_CONTROL), query), None
        else:
            key = unquote(parts.path).lstrip("/").partition("/")[2]
            asked = _Asked(method, key, query, headers, body)
            await asyncio.sleep(self._latency)
            reply = self._store.answer(asked)
        length = len(reply.body) if reply.nbytes is None else reply.nbytes
        lines = [
            f"HTTP/1.1 {reply.status} Answer",
            *(f"{k}: {v}" for k, v in reply.headers.items()),
        ]
        if reply.status not in (204, 304):
            lines.append(f"content-length: {length}")
        writer.write("\r\n".join([*lines, "", ""]).encode("latin-1") + reply.body)
        await writer.drain()
        if asked is not None:
            key = query.get("prefix", "") if asked.op == "LIST" else asked.key
            self._log.append((asked.op, key, begin, time.monotonic(), len(reply.body)))
        return headers.get("connection", "").lower() != "close"

    def _control(self, what: str, query: dict[str, str]) -> _Reply:
        if what == "latency":
            self._latency = float(query["seconds"])
            return _Reply()
        if what == "count":
            return _Reply(200, str(self._store.count(query["prefix"])).encode())
        taken, self._log = self._log, []
        return _Reply(200, json.dumps(taken).encode())


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if headers.get("transfer-encoding", "").lower() == "chunked":
        data = await _chunks(reader)
    else:
        data = await reader.readexactly(int(headers.get("content-length", 0)))
    is_aws = "aws-chunked" in headers.get("content-encoding", "") or headers.get(
        "x-amz-content-sha256", ""
    ).startswith("STREAMING-")
    if not is_aws:
        return data
    inner = asyncio.StreamReader(limit=1 << 30)
    inner.feed_data(data)
    inner.feed_eof()
    return await _chunks(inner)


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    """Read ``length[;signature] data`` until a length of 0, and the trailers after it."""
    parts = []
    while length := int((await reader.readline()).split(b";")[0], 16):
        parts.append(await reader.readexactly(length))
        await reader.readline()
    while (await reader.readline()).strip():
        pass
    return b"".join(parts)


async def _main(folder: Path | None) -> None:
    server = _Server(_Store(folder))
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0, limit=1 << 20, backlog=512)
    print(listener.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
