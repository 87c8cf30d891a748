"""A bucket whose past is kept, and listings that begin in one state and end in a later one."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tensorstore_fmt.errors import TruncatedError
from tensorstore_fmt.format import layout
from tensorstore_fmt.storage.base import (
    BytesLike,
    FileInfo,
    Listing,
    Prefix,
    Range,
    Request,
    Storage,
)

Files = Mapping[str, bytes]


class DictStorage(Storage):
    """An object store in a dict.

    Attributes
    ----------
    states
        What was there after each change of the index, the first being nothing.
    """

    is_local = False
    can_list = True
    can_write = True
    max_gap_bytes = 0

    def __init__(self) -> None:
        self.url = "dict://run"
        self.files: dict[str, bytes] = {}
        self.states: list[Files] = [{}]
        self._lock = threading.Lock()

    def fetch_settled(self, requests: Sequence[Request[Any]]) -> list[Any]:
        with self._lock:
            return [settled(self.files, request) for request in requests]

    def publish(
        self,
        path: str,
        buffers: Sequence[BytesLike],
        *,
        if_absent: bool = False,
        synced: bool = False,
    ) -> None:
        with self._lock:
            if if_absent and path in self.files:
                raise FileExistsError(path)
            self.files[path] = b"".join(buffers)
            self._changed(path)

    def sync(self, paths: Iterable[str]) -> None:
        pass

    def delete(self, paths: Iterable[str]) -> None:
        for path in paths:
            with self._lock:
                self.files.pop(path, None)
                self._changed(path)

    def _changed(self, path: str) -> None:
        if path.startswith(f"{layout.INDEX_DIR}/"):
            self.states.append(dict(self.files))


class PagedStorage(Storage):
    """Show one state of a bucket until a listing has come to a key, then a later one.

    Only one listing is cut: the one after `whole` others.

    Attributes
    ----------
    listings
        How often it was listed.
    """

    is_local = False
    can_list = True
    can_write = False
    max_gap_bytes = 0

    def __init__(self, before: Files, after: Files, cut: str, whole: int = 0) -> None:
        self.url = "dict://run"
        self.files = before
        self.listings = 0
        self._whole = whole
        self._after = after
        self._cut = cut

    def fetch_settled(self, requests: Sequence[Request[Any]]) -> list[Any]:
        found = [settled(self.files, request) for request in requests]
        for i, request in enumerate(requests):
            if not isinstance(request, Listing):
                continue
            self.listings += 1
            if self.listings == self._whole + 1:
                first = [file for file in found[i] if file.base <= self._cut]
                self.files = self._after
                second = settled(self.files, request)
                found[i] = first + [file for file in second if file.base > self._cut]
        return found

    def publish(
        self,
        path: str,
        buffers: Sequence[BytesLike],
        *,
        if_absent: bool = False,
        synced: bool = False,
    ) -> None:
        raise NotImplementedError

    def sync(self, paths: Iterable[str]) -> None:
        raise NotImplementedError

    def delete(self, paths: Iterable[str]) -> None:
        raise NotImplementedError


def settled(files: Files, request: Request[Any]) -> Any:
    """Give what a store with these files answers."""
    if isinstance(request, Listing):
        begin = f"{request.directory}/" if request.directory else ""
        paths = sorted(path for path in files if path.startswith(begin))
        bases = [(path.removeprefix(begin), len(files[path])) for path in paths]
        return [FileInfo(base, size) for base, size in bases if "/" not in base]
    assert isinstance(request, Prefix | Range)
    data = files.get(request.path)
    if data is None:
        return FileNotFoundError(request.path)
    if isinstance(request, Prefix):
        return data[: request.nbytes], len(data)
    if request.stop > len(data):
        return TruncatedError(f"{request.path} is short", file=request.path)
    return data[request.start : request.stop]
