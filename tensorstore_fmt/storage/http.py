"""A run on a plain web server: reading only, and nothing can be listed."""

from __future__ import annotations

import asyncio
import errno
import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

import aiohttp
from fsspec.implementations.http import HTTPFileSystem

from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.storage.base import without_credentials
from tensorstore_fmt.storage.ranged import (
    OK,
    PARTIAL,
    UNSATISFIABLE,
    Answer,
    take_prefix,
    take_range,
    truncated,
)
from tensorstore_fmt.storage.remote import ObjectStore, OpenStore, check_options
from tensorstore_fmt.storage.retry import TransientError

T = TypeVar("T")

_OURS: Final = {"self", "storage_options", "asynchronous", "loop", "method", "str_or_url"}
_TRANSIENT_STATUS: Final = {408, 425, 429, 500, 502, 503, 504}
_DENIED_STATUS: Final = {401, 403, 407}
_MISSING_STATUS: Final = {404, 410}
_TIMEOUT: Final = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=15)  # as s3fs has


def http_opener(url: str, options: Mapping[str, object]) -> OpenStore:
    """Check the options, and give what opens the store."""
    where = without_credentials(url)
    accepted = {
        name
        for method in (HTTPFileSystem.__init__, aiohttp.ClientSession._request)
        for name in inspect.signature(method).parameters
    }
    check_options(options, accepted - _OURS, where)

    def open_store(loop: asyncio.AbstractEventLoop) -> ObjectStore:
        try:
            filesystem = HTTPFileSystem(
                # without asynchronous, a finalizer would close inherited connections after a fork
                **options, asynchronous=True, loop=loop, skip_instance_cache=True
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"{where}: {error}") from error
        return HttpStore(filesystem, url, where)

    return open_store


class HttpStore(ObjectStore):
    """Ranged GETs to one server.

    A query of the URL is kept for every file: it may hold what gives access.
    """

    def __init__(self, filesystem: Any, url: str, where: str) -> None:  # noqa: ANN401 - untyped
        self._fs = filesystem
        self._root = urlsplit(url)
        self._where = where.partition("?")[0].rstrip("/")

    async def read(self, path: str, start: int, stop: int) -> bytes:
        """Get exactly these bytes: one GET."""
        data = await self._get(path, start, stop, lambda got: take_range(got, start, stop))
        if data is None:
            raise truncated(self._name(path), None, stop)
        return data

    async def read_prefix(self, path: str, nbytes: int) -> tuple[bytes, int | None]:
        """Get the first bytes: one GET, whose answer tells the length."""
        found = await self._get(path, 0, nbytes, lambda got: take_prefix(got, nbytes))
        return (b"", 0) if found is None else found  # only an empty file has no first byte

    async def _get(
        self, path: str, start: int, stop: int, take: Callable[[Answer], Awaitable[T]]
    ) -> T | None:
        """Send the request; None if the file ends before the range begins."""
        name = self._name(path)
        asked = {"timeout": _TIMEOUT, **self._fs.kwargs}
        # A range of a compressed stream would be a range of other bytes.
        asked["headers"] = {
            **(asked.get("headers") or {}),
            "Range": f"bytes={start}-{stop - 1}",
            "Accept-Encoding": "identity",
        }
        try:
            session: aiohttp.ClientSession = await self._fs.set_session()
            async with session.get(self._fs.encode_url(self._url(path)), **asked) as reply:
                if reply.status == UNSATISFIABLE:
                    return None
                self._check(reply, name)
                nbytes = reply.headers.get("Content-Length", "")
                return await take(
                    Answer(
                        where=name,
                        status=reply.status,
                        content_range=reply.headers.get("Content-Range"),
                        nbytes=int(nbytes) if nbytes.isdecimal() else None,
                        encoding=reply.headers.get("Content-Encoding"),
                        read=reply.content.read,
                    )
                )
        except aiohttp.InvalidURL as error:
            raise ArgumentError(f"{name} is not a URL") from error
        except aiohttp.ClientConnectorCertificateError as error:  # does not get better
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}", name) from error
        except TimeoutError as error:
            failure = TimeoutError(errno.ETIMEDOUT, "the server does not answer", name)
            raise TransientError(failure) from error
        except (aiohttp.ClientError, ConnectionError) as error:
            said = f"{type(error).__name__}: {error}"
            raise TransientError(OSError(errno.EIO, said, name)) from error

    def _check(self, reply: aiohttp.ClientResponse, name: str) -> None:
        """Refuse every answer that does not bring bytes of the file."""
        said = f"the server answered {reply.status} {reply.reason}"
        if reply.status in _MISSING_STATUS:
            raise FileNotFoundError(errno.ENOENT, said, name)
        if reply.status in _DENIED_STATUS:
            raise PermissionError(errno.EACCES, said, name)
        if reply.status in _TRANSIENT_STATUS:
            raise TransientError(OSError(errno.EIO, said, name))
        if reply.status not in (OK, PARTIAL):
            raise OSError(errno.EIO, said, name)

    async def close(self) -> None:
        """Close connections."""
        session = await self._fs.set_session()
        await session.close()

    def _name(self, path: str) -> str:
        return f"{self._where}/{path}"

    def _url(self, path: str) -> str:
        place = f"{self._root.path.rstrip('/')}/{quote(path)}"
        return urlunsplit(self._root._replace(path=place, fragment=""))
