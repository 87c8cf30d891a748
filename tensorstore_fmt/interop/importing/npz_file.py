"""Reading ``.npz`` files, array by array, from a disk or a store."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt.errors import FormatError, UnsupportedError
from tensorstore_fmt.storage.foreign import ForeignFolder

__all__ = ["read"]

_BUFFER_NBYTES: Final = 1024 * 1024
_MOST_DEFLATED: Final = 1100  # deflate makes at most 1,032 bytes of one
_PROBLEMS: Final = (
    zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError,
)  # fmt: skip


class _File(io.RawIOBase):
    """A file of a foreign folder, as `zipfile` wants it."""

    def __init__(self, folder: ForeignFolder, path: str, nbytes: int) -> None:
        self._folder = folder
        self._path = path
        self._nbytes = nbytes
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._nbytes}[whence]
        if base + offset < 0:
            raise ValueError(f"{self._path}: a place before the file")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - any writable buffer
        view = memoryview(buffer).cast("B")
        wanted = max(min(len(view), self._nbytes - self._at), 0)
        data = self._folder.read(self._path, self._at, wanted)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)


def read(
    folder: ForeignFolder, path: str, nbytes: int
) -> Iterator[tuple[str, NDArray[Any] | FormatError]]:
    """Iterate over the arrays of a file.

    Raises
    ------
    FormatError
        It is no such file.
    """
    raw = io.BufferedReader(_File(folder, path, nbytes), _BUFFER_NBYTES)
    try:
        archive = zipfile.ZipFile(raw)
    except _PROBLEMS as error:
        raise FormatError(f"no .npz file: {error}") from None
    with archive:
        for entry in archive.infolist():
            if not entry.filename.endswith(".npy"):
                continue
            name = entry.filename.removesuffix(".npy")
            try:
                yield name, _array(archive, entry)
            except FormatError as error:
                yield name, error
            except _PROBLEMS as error:
                yield name, FormatError(f"cannot be read: {error}")


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> NDArray[Any]:
    if entry.file_size > _MOST_DEFLATED * (entry.compress_size + 1):
        raise FormatError(f"{entry.file_size} bytes out of {entry.compress_size}", code="limit")
    with archive.open(entry) as file:
        shape, dtype = _header(file)
    if dtype.hasobject:
        raise UnsupportedError("objects, which would have to be unpickled", code="unknown_dtype")
    if math.prod(shape) * dtype.itemsize > entry.file_size:
        raise FormatError(f"{entry.file_size} bytes for the shape {shape} of {dtype}")
    with archive.open(entry) as file:
        array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    return array


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise UnsupportedError(f"version {version} of .npy", code="unsupported_version")
    return shape, dtype
