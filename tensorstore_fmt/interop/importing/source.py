"""What an import is given: a folder, or one file of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.storage.base import FileInfo
from tensorstore_fmt.storage.foreign import ForeignFolder, open_folder

__all__ = ["files_below", "open_source"]

_MAX_DEPTH: Final = 16

Fits = Callable[[str], bool]


def open_source(
    source: str | os.PathLike[str], options: Mapping[str, object] | None, fits: Fits
) -> tuple[ForeignFolder, str | None]:
    """Open a folder; or the one that a file lies in, and give the name of the file.

    Parameters
    ----------
    fits
        Whether a name is that of a file to import; then `source` is one.
    """
    text = os.fspath(source)
    place, _, base = text.rpartition("/")
    is_file = fits(base) and ("://" in text or not os.path.isdir(text))
    if not is_file:
        return open_folder(text, storage_options=options), None
    if not place:
        place = "/" if text.startswith("/") else "."
    return open_folder(place, storage_options=options), base


def files_below(
    folder: ForeignFolder, only: str | None, fits: Fits
) -> Iterator[tuple[str, list[FileInfo]]]:
    """Iterate over the folders at any depth that have files to import, with these.

    Raises
    ------
    ArgumentError
        Code ``unknown_format``: there are none.
    """
    has_any = False
    for place in [""] if only else _places(folder, "", 0):
        files = [f for f in folder.files(place) if f.base == only or (not only and fits(f.base))]
        if files:
            has_any = True
            yield place, files
    if not has_any:
        raise ArgumentError(
            f"{folder.describe(only or '')}: nothing to import there; name a folder that has such "
            "files, at any depth",
            code="unknown_format",
            source=folder.describe(),
        )


def _places(folder: ForeignFolder, place: str, depth: int) -> Iterator[str]:
    yield place
    if depth < _MAX_DEPTH:
        for name in folder.folders(place):
            yield from _places(folder, f"{place}/{name}" if place else name, depth + 1)
