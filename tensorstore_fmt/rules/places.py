"""Places beside a run's own files: the folder of its companion runs, and that of stop requests."""

from __future__ import annotations

import os
import re
from typing import Final

from tensorstore_fmt.storage import Listing, Storage, open_storage
from tensorstore_fmt.storage.folders import join
from tensorstore_fmt.storage.local import LocalStorage
from tensorstore_fmt.storage.remote import RemoteStorage

__all__ = ["COMPANIONS", "STOP", "companion_ids", "reopen"]

COMPANIONS: Final = "rules"
"""Folder of companion runs (spec, "Companion runs")."""
STOP: Final = "stop"
"""Folder of requests to stop (spec, "Requests to stop")."""

_ANNOUNCED: Final = re.compile(r"([0-9a-f]{16})\.json")


def reopen(storage: Storage, folder: str = "", *, writable: bool) -> Storage:
    """Open the place of a storage, or a folder in it, anew: with the same URL and options."""
    inner = getattr(storage, "inner", None)
    if isinstance(inner, Storage):  # a double that counts or fails
        return reopen(inner, folder, writable=writable)
    url = join(storage.url, folder) if folder else storage.url
    if isinstance(storage, LocalStorage):
        return LocalStorage(os.path.join(storage._root, folder), url=url, writable=writable)
    options = dict(storage._options) if isinstance(storage, RemoteStorage) else {}
    return open_storage(url, storage_options=options, writable=writable)


def companion_ids(storage: Storage) -> list[str]:
    """Give the ids of companion runs, ascending: one LIST."""
    if not storage.can_list:
        return []
    (files,) = storage.fetch([Listing(COMPANIONS)])
    return [match[1] for file in files if (match := _ANNOUNCED.fullmatch(file.base))]
