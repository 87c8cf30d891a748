"""Where the run of a demo goes: a URL of its own, where nothing is yet."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import tensorstore_fmt as tsf
from tensorstore_fmt.errors import NotARunError, RunExistsError

__all__ = ["check_free", "folder", "free_folder", "is_remote", "run_name"]


def free_folder(first: str) -> str:
    """Give `first`, or the first of ``-2``, ``-3``, … after it at which nothing exists."""
    place, number = first, 1
    while os.path.lexists(place):
        number += 1
        place = f"{first}-{number}"
    return place


def is_remote(url: str) -> bool:
    """Say whether `url` is something else than a local folder."""
    return "://" in url and not url.startswith("file://")


def folder(url: str) -> Path:
    """Give the absolute local folder that `url` means; it must not be remote."""
    return Path(url.removeprefix("file://")).resolve()


def run_name(url: str) -> str:
    """Give the last part of `url`, as a name for what is made beside the run."""
    return url.rstrip("/").rsplit("/", 1)[-1] if is_remote(url) else folder(url).name


def check_free(url: str, *, storage_options: Mapping[str, object] | None) -> None:
    """Refuse a place that holds a run: `create_run` would join one that was never closed.

    Raises
    ------
    RunExistsError
        There is a run at `url`, open or closed.
    """
    try:
        tsf.open_run(url, storage_options=storage_options).close()
    except NotARunError:
        return
    raise RunExistsError(f"{run_name(url)}: there is a run already; choose another place")
