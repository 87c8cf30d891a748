"""Which storage serves a URL."""

from __future__ import annotations

import os
from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.storage.base import Storage, without_credentials
from tensorstore_fmt.storage.local import LocalStorage


def open_storage(
    url: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, object] | None = None,
    writable: bool,
) -> Storage:
    """Open the place of one run; sends no request and creates nothing.

    Parameters
    ----------
    url
        A local path, ``file://`` or any URL that fsspec knows.
    storage_options
        Passed to the fsspec file system; none for local paths.
    writable
        Whether anything may be written.

    Raises
    ------
    ArgumentError
        No such kind of URL, an option it does not know, or it cannot be written to.
    """
    text = os.fspath(url)
    if not text:
        raise ArgumentError("an empty text is neither a path nor a URL")
    root = _local_path(text)
    if root is None:
        # fsspec costs 0.1 s to import, which users of local runs need not pay
        from tensorstore_fmt.storage.remote import open_remote

        return open_remote(text, dict(storage_options or {}), writable=writable)
    if storage_options:
        names = ", ".join(sorted(storage_options))
        raise ArgumentError(f"a local path takes no storage_options, but got {names}")
    return LocalStorage(root, url=text, writable=writable)


def _local_path(url: str) -> str | None:
    """Give the path that a URL means on this machine, None if it lies elsewhere."""
    if "://" not in url:
        return url
    if not url.startswith("file://"):
        return None
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path or parts.query or parts.fragment:
        raise ArgumentError(
            f"{without_credentials(url)} is not of the form file:///absolute/path; "
            "give the plain path instead"
        )
    return unquote(parts.path)
