"""Any file system of fsspec that has no module of its own, ``memory://`` among them."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import fsspec
from fsspec.core import split_protocol, url_to_fs

from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.storage.base import FileInfo, without_credentials
from tensorstore_fmt.storage.ranged import truncated
from tensorstore_fmt.storage.remote import ObjectStore, OpenStore, WritableStore, check_options
from tensorstore_fmt.storage.retry import TransientError


def generic_opener(url: str, options: Mapping[str, object]) -> OpenStore:
    """Check URL and options, and give what opens the store."""
    where = without_credentials(url)
    protocol = url.partition("::")[0] if "::" in url else split_protocol(url)[0]
    try:
        kind = fsspec.get_filesystem_class(protocol)
    except ValueError as error:
        raise ArgumentError(f"{where}: fsspec knows no protocol {protocol!r}") from error
    if protocol == "memory":
        check_options(options, (), where)  # it would take anything

    def open_store(loop: asyncio.AbstractEventLoop) -> ObjectStore:
        asked = {**options, "skip_instance_cache": True, "use_listings_cache": False}
        if kind.async_impl:
            asked |= {"asynchronous": True, "loop": loop}
        try:
            filesystem, root = url_to_fs(url, **asked)
        except TypeError as error:
            raise ArgumentError(f"{where}: {error}") from error
        return GenericStore(filesystem, root, where)

    return open_store


class GenericStore(WritableStore):
    """Single requests through the common methods of fsspec.

    Put-if-absent is as good as the file system's own. The length of a file is never part of an
    answer, so a short one costs a second request.
    """

    def __init__(self, filesystem: Any, root: str, where: str) -> None:  # noqa: ANN401 - untyped
        self._fs = filesystem
        self._root = root.rstrip("/")
        self._where = where
        self._is_async = bool(filesystem.async_impl)
        # Operations of the memory file system are too short to be worth a thread; all on the
        # loop's own thread they also cannot meet (it reads through one shared position).
        self._is_inline = "memory" in filesystem.protocol
        if not self._is_async:
            self.max_in_flight = 1  # most of them are not made for several threads

    async def read(self, path: str, start: int, stop: int) -> bytes:
        """Get exactly these bytes."""
        data: bytes = await self._call("cat_file", self._place(path), start=start, end=stop)
        if len(data) == stop - start:
            return data
        found = (await self._call("info", self._place(path)))["size"]
        if found is not None and found < stop:
            raise truncated(f"{self._where}/{path}", found, stop)
        raise TransientError(
            OSError(f"{len(data)} bytes came, {stop - start} were asked for", path)
        )

    async def read_prefix(self, path: str, nbytes: int) -> tuple[bytes, int | None]:
        """Get the first bytes; a file that has fewer is told apart by them."""
        try:
            data: bytes = await self._call("cat_file", self._place(path), start=0, end=nbytes)
        except (FileNotFoundError, TransientError):
            raise
        except Exception:
            # some stores refuse any range of an empty file
            if (await self._call("info", self._place(path)))["size"] != 0:
                raise
            return b"", 0
        if len(data) > nbytes:
            raise OSError(f"{len(data)} bytes came, {nbytes} were asked for", path)
        if len(data) == nbytes:
            return data, None
        found = (await self._call("info", self._place(path)))["size"]
        if found is not None and found > len(data):
            raise TransientError(OSError(f"{len(data)} of {found} bytes came", path))
        return data, len(data)

    async def list_page(
        self,
        directory: str,
        token: str | None,  # noqa: ARG002 - there is only one page
    ) -> tuple[list[FileInfo], str | None]:
        """Get all files of a directory at once."""
        place = self._place(directory) if directory else self._root
        try:
            rows = await self._call("ls", place, detail=True)
        except FileNotFoundError:
            return [], None
        return [
            FileInfo(row["name"].rpartition("/")[2], row["size"])
            for row in rows
            if row["type"] == "file"
        ], None

    async def write(self, path: str, data: bytes, *, once: str | None, attempt: int) -> None:
        """Put a whole file."""
        place = self._place(path)
        if once is None:
            await self._call("pipe_file", place, data)
        elif "mode" in inspect.signature(self._method("pipe_file")).parameters:
            try:
                await self._call("pipe_file", place, data, mode="create")
            except FileExistsError:
                # perhaps an earlier attempt of ours did arrive
                if attempt == 0 or await self._call("cat_file", place) != data:
                    raise
        else:
            raise ArgumentError(f"{self._where}: this file system cannot create exclusively")

    async def delete(self, paths: Sequence[str]) -> None:
        """Remove files one by one."""
        for path in paths:
            with suppress(FileNotFoundError):
                await self._call("rm_file", self._place(path))

    def _place(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _method(self, name: str) -> Callable[..., Any]:
        method: Callable[..., Any] = getattr(self._fs, f"_{name}" if self._is_async else name)
        return method

    async def _call(self, name: str, *args: object, **kwargs: object) -> Any:  # noqa: ANN401 - untyped
        method = self._method(name)
        try:
            if self._is_async:
                pending: Awaitable[Any] = method(*args, **kwargs)
                return await pending
            if self._is_inline:
                return method(*args, **kwargs)
            return await asyncio.to_thread(method, *args, **kwargs)
        except (ConnectionError, TimeoutError) as error:
            raise TransientError(error) from error
