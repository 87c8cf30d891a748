"""Folders of files that are no run: what importers read, on a disk or behind any fsspec URL."""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from tensorstore_fmt.errors import ArgumentError, FormatError, TruncatedError
from tensorstore_fmt.storage.base import (
    FileInfo,
    Listing,
    Prefix,
    Range,
    check_path,
    without_credentials,
)
from tensorstore_fmt.storage.remote import RemoteStorage, open_remote

__all__ = ["ForeignFolder", "open_folder"]

_AT_ONCE: Final = 64


class ForeignFolder(ABC):
    """Files below one folder, by POSIX paths relative to it; only reads.

    Unlike a run, it may hold symbolic links (caches of checkpoints are made of them).
    """

    @abstractmethod
    def describe(self, path: str = "") -> str:
        """Name a file for a message, without credentials."""

    @abstractmethod
    def files(self, folder: str = "") -> list[FileInfo]:
        """Give the files directly in a folder, sorted by name; none if there is no such folder."""

    @abstractmethod
    def folders(self, folder: str = "") -> list[str]:
        """Give the names of the folders directly in a folder, sorted."""

    @abstractmethod
    def read(self, path: str, start: int, nbytes: int) -> bytes:
        """Read bytes from a place on: `nbytes` of them, fewer only where the file ends.

        Raises
        ------
        FileNotFoundError
            It is not there.
        FormatError
            It is no regular file.
        OSError
            The storage failed.
        """

    @abstractmethod
    def begins(self, paths: Sequence[str], nbytes: int) -> list[bytes | Exception]:
        """Read the first bytes of many files, in few rounds; or what reading them raised."""

    def close(self) -> None:  # noqa: B027 - a local one has nothing to give back
        """Give connections back."""


class _LocalFolder(ForeignFolder):
    def __init__(self, root: str) -> None:
        self._root = root

    def describe(self, path: str = "") -> str:
        return os.path.join(self._root, path) if path else self._root

    def _place(self, path: str) -> str:
        return os.path.join(self._root, check_path(path)) if path else self._root

    def _entries(self, folder: str, *, wanted: int) -> list[FileInfo]:
        found = []
        try:
            with os.scandir(self._place(folder)) as entries:
                for entry in entries:
                    try:
                        status = entry.stat()
                    except FileNotFoundError:
                        continue  # gone since, or a link that leads nowhere
                    if stat.S_IFMT(status.st_mode) == wanted:
                        found.append(FileInfo(entry.name, status.st_size))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(found, key=lambda info: info.base)

    def files(self, folder: str = "") -> list[FileInfo]:
        return self._entries(folder, wanted=stat.S_IFREG)

    def folders(self, folder: str = "") -> list[str]:
        return [info.base for info in self._entries(folder, wanted=stat.S_IFDIR)]

    def read(self, path: str, start: int, nbytes: int) -> bytes:
        place = self._place(path)
        fd = os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not hang
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise FormatError(f"{place} is no regular file", file=path)
            rest = max(min(nbytes, status.st_size - start), 0)
            parts = []
            while rest > 0:
                data = os.pread(fd, rest, start)  # one call reads at most 2 GiB
                if not data:
                    break
                parts.append(data)
                start, rest = start + len(data), rest - len(data)
        finally:
            os.close(fd)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def begins(self, paths: Sequence[str], nbytes: int) -> list[bytes | Exception]:
        found: list[bytes | Exception] = []
        for path in paths:
            try:
                found.append(self.read(path, 0, nbytes))
            except (OSError, FormatError, ArgumentError) as error:
                found.append(error)
        return found


class _RemoteFolder(ForeignFolder):
    def __init__(self, url: str, options: Mapping[str, object] | None) -> None:
        self._storage: RemoteStorage = open_remote(url, dict(options or {}), writable=False)
        self._url = url
        self._options = dict(options or {})
        self._lister: tuple[Any, str] | None = None

    def describe(self, path: str = "") -> str:
        return self._storage.describe(path)

    def files(self, folder: str = "") -> list[FileInfo]:
        (found,) = self._storage.fetch([Listing(folder)])
        return [info for info in found if info.base]  # some stores list the folder itself

    def folders(self, folder: str = "") -> list[str]:
        # The storage of a run knows of no folders.
        from fsspec.core import url_to_fs  # costs 0.1 s

        if self._lister is None:
            self._lister = url_to_fs(self._url, use_listings_cache=False, **self._options)
        filesystem, root = self._lister
        place = f"{root.rstrip('/')}/{check_path(folder)}" if folder else root
        try:
            rows = filesystem.ls(place, detail=True)
        except FileNotFoundError:
            return []
        names = [row["name"].rstrip("/") for row in rows if row["type"] == "directory"]
        return sorted({name.rpartition("/")[2] for name in names if name != place.rstrip("/")})

    def read(self, path: str, start: int, nbytes: int) -> bytes:
        if nbytes <= 0:
            return b""
        if start == 0:
            return self._storage.fetch([Prefix(path, nbytes)])[0][0]
        try:
            return self._storage.fetch([Range(path, start, start + nbytes)])[0]
        except TruncatedError as error:
            end = error.facts.get("offset")
            if not isinstance(end, int) or end <= start:
                return b""
        return self._storage.fetch([Range(path, start, end)])[0]

    def begins(self, paths: Sequence[str], nbytes: int) -> list[bytes | Exception]:
        found: list[bytes | Exception] = []
        for at in range(0, len(paths), _AT_ONCE):
            requests = [Prefix(path, nbytes) for path in paths[at : at + _AT_ONCE]]
            results = self._storage.fetch_settled(requests)
            found += [r if isinstance(r, Exception) else r[0] for r in results]
        return found

    def close(self) -> None:
        self._storage.close()


def open_folder(
    url: str | os.PathLike[str], *, storage_options: Mapping[str, object] | None = None
) -> ForeignFolder:
    """Open a folder to read what is in it; sends no request.

    Parameters
    ----------
    url
        A local path, ``file://`` or any URL that fsspec can list.
    storage_options
        For the fsspec file system; none for local paths.

    Raises
    ------
    ArgumentError
        No such kind of URL, or one whose files cannot be listed (``http://``).
    """
    text = os.fspath(url)
    if text.startswith("file://"):
        text = unquote(urlsplit(text).path)
    if not text:
        raise ArgumentError("an empty text is neither a path nor a URL")
    if "://" not in text:
        if storage_options:
            raise ArgumentError("a local path takes no storage options")
        return _LocalFolder(text)
    folder = _RemoteFolder(text, storage_options)
    if not folder._storage.can_list:
        raise ArgumentError(
            f"{without_credentials(text)}: files cannot be listed there; copy the folder first"
        )
    return folder
