"""Folders that are no run themselves but hold some."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

__all__ = ["find_runs", "join"]

_MARK: Final = "run.json"
_AT_ONCE: Final = 16


def join(url: str, name: str) -> str:
    """Give the URL of a run in a folder."""
    return f"{url.rstrip('/')}/{name}"


def find_runs(url: str, storage_options: Mapping[str, object] | None) -> list[str]:
    """Give the names of the runs directly in a folder or prefix, sorted; none if it has none.

    What cannot be listed has none: this only helps to say more about an error.
    """
    if "://" not in url:
        return _local(url)
    if url.startswith("file://"):
        return _local(url.removeprefix("file://"))
    if url.startswith(("http://", "https://")):
        return []
    return _remote(url, dict(storage_options or {}))


def _local(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(
                entry.name for entry in entries if os.path.isfile(os.path.join(entry.path, _MARK))
            )
    except OSError:
        return []


def _remote(url: str, options: dict[str, object]) -> list[str]:
    # Of a run's files only `storage` knows; that there are folders around runs, it does not.
    from fsspec.core import url_to_fs  # costs 0.1 s

    try:
        filesystem, root = url_to_fs(url, use_listings_cache=False, **options)
        folders = [
            entry["name"].rstrip("/")
            for entry in filesystem.ls(root, detail=True)
            if entry["type"] == "directory"
        ]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            has_run = list(pool.map(lambda f: filesystem.exists(f"{f}/{_MARK}"), folders))
    except Exception:  # noqa: BLE001 - any failure here must not hide the one being explained
        return []
    return sorted(
        folder.rsplit("/", 1)[-1] for folder, is_run in zip(folders, has_run, strict=True) if is_run
    )
