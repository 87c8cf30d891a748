"""Where a run's bytes lie: the only place that knows disks, fsspec and retries."""

from __future__ import annotations

from tensorstore_fmt.storage.base import (
    Appender,
    BytesLike,
    FileInfo,
    Listing,
    Lock,
    Prefix,
    Range,
    Request,
    Storage,
    StoreNotFoundError,
)
from tensorstore_fmt.storage.urls import open_storage

__all__ = [
    "Appender",
    "BytesLike",
    "FileInfo",
    "Listing",
    "Lock",
    "Prefix",
    "Range",
    "Request",
    "Storage",
    "StoreNotFoundError",
    "open_storage",
]
