"""A new local file that appears whole under its name, or not at all."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from tensorstore_fmt.errors import ArgumentError

__all__ = ["check_free", "new_file"]


def check_free(path: str, *, replace: bool) -> None:
    """Refuse a path that cannot become a new file, before any work is done for it.

    Raises
    ------
    ArgumentError
        It is a URL, a folder, in no folder, or exists and `replace` is False (code
        ``out_exists``).
    """
    if "://" in path:
        raise ArgumentError(
            f"{path} is a URL; the output is a file on this machine, copy it from there", file=path
        )
    if os.path.isdir(path):
        raise ArgumentError(f"{path} is a folder; give the name of a file in it", file=path)
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise ArgumentError(f"{path}: there is no folder {folder}; create it first", file=path)
    if os.path.lexists(path) and not replace:
        raise _exists(path)


def _exists(path: str) -> ArgumentError:
    return ArgumentError(
        f"{path} exists already; choose another name or replace it with --force (force=True)",
        code="out_exists",
        file=path,
    )


@contextmanager
def new_file(path: str, *, replace: bool) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` that takes its name when the block ends well.

    Raises
    ------
    ArgumentError
        As `check_free`, also if somebody creates the file meanwhile.
    """
    check_free(path, replace=replace)
    # A link is followed, so that what it points to is replaced and the link stays.
    final = os.path.realpath(path) if replace else path
    folder, base = os.path.split(final)
    temporary = os.path.join(folder, f".{base[:100]}.{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "xb") as file:
            yield file
        if replace:
            os.replace(temporary, final)
        else:
            _rename_if_free(temporary, final)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def _rename_if_free(temporary: str, final: str) -> None:
    try:
        os.link(temporary, final)
    except FileExistsError:
        raise _exists(final) from None
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        # A file system without hard links; nearly as good.
        if os.path.lexists(final):
            raise _exists(final) from None
        os.replace(temporary, final)
