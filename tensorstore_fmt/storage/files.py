"""Files below one local directory, opened so that nothing else can be reached.

A run may come from a stranger: a symbolic link in it could lead anywhere, opening a FIFO
would hang, reading a device could do anything. So every component below the root is opened
without following links, and only regular files are taken.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

from tensorstore_fmt.errors import FormatError, TruncatedError
from tensorstore_fmt.storage.base import BytesLike, FileInfo, check_path

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE: Final = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | getattr(os, "O_NOCTTY", 0)
_IOV_MAX: Final = 1024  # what Linux and macOS take in one call
_MOST_LISTINGS: Final = 100
_CHECKED_NBYTES: Final = 64 * 1024  # from here on the length is checked before allocating


def refuse(path: str, what: str) -> FormatError:
    """Say why a name inside a run is not opened."""
    return FormatError(f"{path} is {what}; a run consists of regular files only", file=path)


def missing(where: str) -> FileNotFoundError:
    """Say that a file is not there."""
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), where)


def open_directory(root: str, directory: str, *, create: bool = False) -> int:
    """Open a directory of a run; the caller closes the descriptor.

    The root itself is the user's choice, so it may be a link.
    """
    parts = check_path(directory).split("/") if directory else []
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts:
            if create:
                with suppress(FileExistsError):
                    os.mkdir(part, dir_fd=fd)
            fd, outer = _open_part(fd, part, directory), fd
            os.close(outer)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _open_part(outer: int, part: str, directory: str) -> int:
    try:
        return os.open(part, _DIRECTORY, dir_fd=outer)
    except OSError as error:
        # Linux says ENOTDIR of a link here, others ELOOP
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        if stat.S_ISLNK(os.stat(part, dir_fd=outer, follow_symlinks=False).st_mode):
            raise refuse(directory, "a symbolic link") from error
        raise


@contextmanager
def parent(root: str, path: str, *, create: bool = False) -> Iterator[tuple[int, str]]:
    """Give the descriptor of the directory that holds a file, and the file's base name."""
    directory, _, base = check_path(path).rpartition("/")
    fd = open_directory(root, directory, create=create)
    try:
        yield fd, base
    finally:
        os.close(fd)


def open_file(root: str, path: str, flags: int, *, create: bool = False) -> int:
    """Open a regular file of a run; the caller closes the descriptor."""
    try:
        with parent(root, path, create=create) as (directory, base):
            try:
                fd = os.open(base, flags | _FILE, 0o666, dir_fd=directory)
            except OSError as error:
                if error.errno == errno.ELOOP:
                    raise refuse(path, "a symbolic link") from error
                if error.errno == errno.ENXIO:  # a FIFO opened for writing, a socket
                    raise refuse(path, "no regular file") from error
                raise
    except NotADirectoryError as error:
        # nothing can lie below a file
        raise missing(os.path.join(root, path)) from error
    except OSError as error:
        # the descriptor-relative name alone would tell the user little
        error.filename = os.path.join(root, path)
        raise
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise refuse(path, "no regular file")
    except BaseException:
        os.close(fd)
        raise
    return fd


def list_files(root: str, directory: str) -> list[FileInfo]:
    """List what is in a directory but for directories; nothing if it does not exist.

    Links, FIFOs and devices are in it: who opens them is told that they are refused. Left out,
    they would look like files that were never there.
    """
    try:
        fd = open_directory(root, directory)
    except FileNotFoundError:
        return []
    try:
        for _ in range(_MOST_LISTINGS):
            # One that was deleted after its name was read may not be left out: what stands for
            # it, a merged segment, can be newer than the names.
            with suppress(FileNotFoundError):
                return _entries(fd)
    finally:
        os.close(fd)
    raise OSError(
        errno.EBUSY, "files keep vanishing while they are listed; try again",
        os.path.join(root, directory),
    )  # fmt: skip


def _entries(fd: int) -> list[FileInfo]:
    """Read all names first, so that they are of one moment, as far as the system can do it."""
    with os.scandir(fd) as entries:
        names = list(entries)
    found = []
    for entry in names:
        status = entry.stat(follow_symlinks=False)
        if not stat.S_ISDIR(status.st_mode):
            found.append(FileInfo(entry.name, status.st_size))
    return sorted(found, key=lambda info: info.base)


class OpenFile:
    """A descriptor that is closed with the last reference to it.

    So a file that falls out of the cache stays open as long as some thread reads it: a number
    closed under a reader could already mean another file.
    """

    __slots__ = ("fd", "path")

    def __init__(self, fd: int, path: str) -> None:
        self.fd = fd
        self.path = path

    def __del__(self) -> None:
        os.close(self.fd)

    def nbytes(self) -> int:
        """Length of the file now."""
        return os.fstat(self.fd).st_size

    def read(self, start: int, stop: int) -> bytes:
        """Read exactly these bytes."""
        wanted = stop - start
        if wanted > _CHECKED_NBYTES and self.nbytes() < stop:
            raise self.truncated(stop)
        data = os.pread(self.fd, wanted, start)
        if len(data) == wanted:
            return data
        parts = [data]
        got = len(data)
        while data and got < wanted:  # one call reads at most 2 GiB
            data = os.pread(self.fd, wanted - got, start + got)
            parts.append(data)
            got += len(data)
        if got < wanted:
            raise self.truncated(stop)
        return b"".join(parts)

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill the buffer from this place on."""
        rest = buffer.cast("B")
        place = start
        while rest:
            got = os.preadv(self.fd, [rest], place)
            if got == 0:
                raise self.truncated(start + buffer.nbytes)
            rest = rest[got:]
            place += got

    def truncated(self, stop: int) -> TruncatedError:
        """Say that the file ends before this place."""
        found = self.nbytes()
        return TruncatedError(
            f"{self.path}: {found} bytes found, {stop} expected; the file was cut short",
            file=self.path,
            offset=found,
            expected=stop,
        )


class OpenFiles:
    """The files of one run that are open for reading, the least recently used dropped first."""

    def __init__(self, root: str, capacity: int) -> None:
        self._root = root
        self._capacity = capacity
        self._open: OrderedDict[str, OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: str, *, fresh: bool = False) -> OpenFile:
        """Give the open file; ``fresh`` opens what bears the name now."""
        with self._lock:
            found = self._open.get(path)
            if found is not None and not fresh:
                self._open.move_to_end(path)
                return found
        opened = OpenFile(open_file(self._root, path, os.O_RDONLY), path)
        with self._lock:
            self._open[path] = opened
            self._open.move_to_end(path)
            if len(self._open) > self._capacity:
                self._open.popitem(last=False)
        return opened

    def drop(self, path: str) -> None:
        """Forget a file: its name means another one now, or none."""
        with self._lock:
            self._open.pop(path, None)

    def clear(self) -> None:
        """Forget all files."""
        with self._lock:
            self._open.clear()


def write_all(fd: int, buffers: Sequence[BytesLike]) -> int:
    """Write all buffers, one behind the other; give the number of bytes."""
    pending = [view for view in (memoryview(each).cast("B") for each in buffers) if view.nbytes]
    total = sum(view.nbytes for view in pending)
    first = 0
    while first < len(pending):
        written = os.writev(fd, pending[first : first + _IOV_MAX])
        while first < len(pending) and written >= pending[first].nbytes:
            written -= pending[first].nbytes
            first += 1
        if written:
            pending[first] = pending[first][written:]
    return total
