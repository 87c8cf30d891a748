"""The files of a run on a local disk: pread, rename, fsync."""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Final, TypeVar, cast
from weakref import WeakValueDictionary

from tensorstore_fmt.errors import ArgumentError, StateError
from tensorstore_fmt.format.layout import TMP_SUFFIX
from tensorstore_fmt.storage import locks
from tensorstore_fmt.storage.appender import LocalAppender, sync_descriptor
from tensorstore_fmt.storage.base import (
    BytesLike,
    Listing,
    Prefix,
    Range,
    Request,
    Storage,
    check_buffers,
    check_path,
)
from tensorstore_fmt.storage.files import (
    OpenFiles,
    list_files,
    open_directory,
    open_file,
    parent,
    write_all,
)

T = TypeVar("T")

_OPEN_FILES: Final = 64
_SPREAD_NBYTES: Final = 1024 * 1024  # below this, handing work to threads costs more than it gains
_THREADS: Final = min(4, os.cpu_count() or 1)
_NO_LINKS: Final = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK}

_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


def _shared_pool() -> ThreadPoolExecutor:
    global _pool  # noqa: PLW0603 - one pool for all runs of the process, made when first needed
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="tensorstore_fmt-read")
        return _pool


def _after_fork() -> None:
    global _pool, _pool_lock  # noqa: PLW0603 - threads and held locks do not survive a fork
    _pool = None
    _pool_lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


class LocalStorage(Storage):
    """A run in a local directory.

    Parameters
    ----------
    root
        The directory; it may not exist yet. Nothing is read or created here.
    url
        As the user gave it.
    writable
        Whether anything may be written.
    """

    is_local = True
    can_list = True
    max_gap_bytes = 64 * 1024

    def __init__(self, root: str, *, url: str, writable: bool) -> None:
        self.url = url
        self.can_write = writable
        self._root = os.path.abspath(root)
        self._start_process()

    def _start_process(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._files = OpenFiles(self._root, _OPEN_FILES)
        self._maps: dict[str, mmap.mmap] = {}
        self._appenders: WeakValueDictionary[str, LocalAppender] = WeakValueDictionary()
        # Directories that got a new directory in them; the root, as another worker may have
        # made those that it holds.
        self._unsynced = {self._root}

    def _check_process(self) -> None:
        # After a fork a lock may be held by a thread that does not exist here.
        if os.getpid() != self._pid:
            self._start_process()

    def __reduce__(self) -> tuple[Callable[..., LocalStorage], tuple[object, ...]]:
        return partial(_reopen, url=self.url, writable=self.can_write), (self._root,)

    # --- reading --------------------------------------------------------------
    def fetch_settled(self, requests: Sequence[Request[T]]) -> list[T | Exception]:
        """Do as `fetch`, but put what a request would have raised in the place of its result."""
        self._check_process()
        return self._spread(self._settle, requests, [_nbytes(each) for each in requests])

    def fetch_into(self, ranges: Sequence[Range], buffers: Sequence[memoryview]) -> None:
        """Read each range straight into the writable buffer of the same length beside it."""
        check_buffers(ranges, buffers)
        self._check_process()
        pairs = list(zip(ranges, buffers, strict=True))
        for error in self._spread(self._fill, pairs, [each.nbytes for each in ranges]):
            if error is not None:
                raise error

    def _settle(self, request: Request[T]) -> T | Exception:
        try:
            return cast("T", self._read(request))
        except Exception as error:  # noqa: BLE001 - the caller asked to be given it
            return error

    def _fill(self, pair: tuple[Range, memoryview]) -> Exception | None:
        request, buffer = pair
        try:
            if buffer.nbytes:
                self._files.get(request.path).read_into(request.start, buffer)
        except Exception as error:  # noqa: BLE001 - raised by the caller's thread
            return error
        return None

    def _read(self, request: Request[object]) -> object:
        if isinstance(request, Range):
            if request.start == request.stop:
                return b""
            return self._files.get(request.path).read(request.start, request.stop)
        if isinstance(request, Prefix):
            # Opened anew: what bears the name may have been replaced since. Ranges that
            # follow then read the same file as this prefix.
            file = self._files.get(request.path, fresh=True)
            found = file.nbytes()
            return file.read(0, min(found, request.nbytes)), found
        if isinstance(request, Listing):
            return list_files(self._root, request.directory)
        raise ArgumentError(f"{request!r} is not a request")

    def _spread(self, work: Callable[[R], S], items: Sequence[R], sizes: Sequence[int]) -> list[S]:
        """Do the work on each item, in a few threads if there are many bytes."""
        total = sum(sizes)
        if len(items) < 2 or total < _SPREAD_NBYTES or _THREADS < 2:
            return [work(item) for item in items]
        groups: list[list[R]] = [[]]
        share = max(total // _THREADS, _SPREAD_NBYTES // 4)
        filled = 0
        for item, size in zip(items, sizes, strict=True):
            if groups[-1] and filled + size // 2 > share and len(groups) < _THREADS:
                groups.append([])
                filled = 0
            groups[-1].append(item)
            filled += size
        try:
            pending = [
                _shared_pool().submit(lambda group: [work(item) for item in group], group)
                for group in groups[1:]
            ]
        except RuntimeError:  # the interpreter is shutting down and starts no threads
            return [work(item) for item in items]
        results = [work(item) for item in groups[0]]
        for future in pending:
            results += future.result()
        return results

    def map(self, path: str, nbytes_needed: int) -> memoryview:
        """Map a whole file read-only, which must have at least ``nbytes_needed`` bytes.

        The same file is mapped once; it stays mapped while a view of it lives.
        """
        self._check_process()
        with self._lock:
            mapped = self._maps.get(path)
            if mapped is not None and len(mapped) >= nbytes_needed <= mapped.size():
                return memoryview(mapped)
            file = self._files.get(path)
            found = file.nbytes()
            if found < nbytes_needed:
                raise file.truncated(nbytes_needed)
            if found == 0:
                return memoryview(b"")
            mapped = mmap.mmap(file.fd, found, access=mmap.ACCESS_READ)
            self._maps[path] = mapped
            return memoryview(mapped)

    # --- writing --------------------------------------------------------------
    def publish(
        self,
        path: str,
        buffers: Sequence[BytesLike],
        *,
        if_absent: bool = False,
        synced: bool = False,
    ) -> None:
        """Make a whole file appear at once under its name: written aside, then renamed."""
        self._begin_write(path)
        aside = f"{path}.{secrets.token_hex(8)}{TMP_SUFFIX}"
        fd = open_file(self._root, aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            try:
                write_all(fd, buffers)
                if synced:
                    sync_descriptor(fd)
            finally:
                os.close(fd)  # some file systems report a full disk only here
            with parent(self._root, path) as (directory, base):
                name = os.path.basename(aside)
                if if_absent:
                    self._link(directory, name, base, path, buffers, synced=synced)
                    os.unlink(name, dir_fd=directory)
                else:
                    os.rename(name, base, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            with suppress(OSError):  # what went wrong first is what the caller has to know
                self._unlink(aside)
            raise
        self._files.drop(path)

    def _link(
        self,
        directory: int,
        name: str,
        base: str,
        path: str,
        buffers: Sequence[BytesLike],
        *,
        synced: bool,
    ) -> None:
        try:
            os.link(name, base, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                error.filename, error.filename2 = os.path.join(self._root, path), None
                raise
            # No hard links here (FAT, some network drives): exclusive, but seen half written
            # by who looks at the wrong moment.
            fd = open_file(self._root, path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            try:
                write_all(fd, buffers)
                if synced:
                    sync_descriptor(fd)
            finally:
                os.close(fd)

    def create(self, path: str) -> LocalAppender:
        """Create a new file to append to; `FileExistsError` if it exists."""
        self._begin_write(path)
        fd = open_file(self._root, path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        appender = LocalAppender(fd, path)
        with self._lock:
            self._appenders[path] = appender
        return appender

    def local_path(self, path: str) -> str:
        """Give the absolute path of a file, for another process to open."""
        return os.path.abspath(os.path.join(self._root, check_path(path)))

    def reopen(self, path: str, *, nbytes: int, keep: int) -> LocalAppender:
        """Cut a file off behind its first bytes, to append to these."""
        self._begin_write(path)
        fd = open_file(self._root, path, os.O_RDWR)
        try:
            found = os.fstat(fd).st_size
            if found != nbytes:
                raise StateError(
                    f"{self.describe(path)} has {found:,} bytes, not {nbytes:,}: it changed",
                    code="changed",
                    file=path,
                )
            os.ftruncate(fd, keep)
            os.lseek(fd, keep, os.SEEK_SET)
        except BaseException:
            os.close(fd)
            raise
        return LocalAppender(fd, path, position=keep)

    def sync(self, paths: Iterable[str]) -> None:
        """Make files and their names survive power loss.

        Syncs each file, its directory, and the directories in which this storage made new ones.

        Raises
        ------
        OSError
            The bytes may be lost, and syncing again proves nothing: write a new file.
        """
        self._check_process()
        directories = set()
        for path in dict.fromkeys(paths):
            appender = self._appenders.get(path)
            if appender is not None and not appender.is_closed:
                appender.sync()
            else:
                fd = open_file(self._root, path, os.O_RDONLY)
                try:
                    sync_descriptor(fd)
                finally:
                    os.close(fd)
            directories.add(path.rpartition("/")[0])
        for directory in directories:
            _sync_directory(open_directory(self._root, directory))
        with self._lock:
            unsynced = list(self._unsynced)
        for place in unsynced:
            _sync_directory(os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        with self._lock:
            self._unsynced.difference_update(unsynced)

    def delete(self, paths: Iterable[str]) -> None:
        """Remove files; those that do not exist are fine."""
        self._check_writable()
        for path in paths:
            self._unlink(path)
            self._files.drop(path)
            with self._lock:
                self._maps.pop(path, None)

    def _unlink(self, path: str) -> None:
        with suppress(FileNotFoundError), parent(self._root, path) as (directory, base):
            os.unlink(base, dir_fd=directory)

    def _check_writable(self) -> None:
        self._check_process()
        if not self.can_write:
            raise ArgumentError(f"{self.describe()} was opened for reading only")

    def _begin_write(self, path: str) -> None:
        """Make the directories that lead to a file, remembering which must be synced."""
        self._check_writable()
        directory = check_path(path).rpartition("/")[0]
        place = os.path.join(self._root, directory).rstrip("/")
        made = []
        while not os.path.isdir(place):
            place = os.path.dirname(place)
            made.append(place)
        if not made:
            return
        with self._lock:
            self._unsynced.update(made)
        os.makedirs(self._root, exist_ok=True)
        os.close(open_directory(self._root, directory, create=True))

    # --- locks ----------------------------------------------------------------
    def lock(self, path: str) -> locks.LocalLock:
        """Take the exclusive lock on a file, creating it.

        Raises
        ------
        StateError
            Somebody else holds it (code ``locked``).
        """
        self._begin_write(path)
        return locks.take(self._root, path)

    def is_locked(self, path: str) -> bool:
        """Say whether some process, this one included, holds the lock on a file."""
        return locks.is_taken(self._root, path)

    def is_abandoned(self, path: str) -> bool:
        """Say whether a lock was taken on a file, and its holder died; False if nobody can tell."""
        return locks.is_abandoned(self._root, path)

    def close(self) -> None:
        """Give back handles; views from `map` stay valid."""
        self._check_process()
        self._files.clear()
        with self._lock:
            self._maps.clear()


R = TypeVar("R")
S = TypeVar("S")


def _reopen(root: str, *, url: str, writable: bool) -> LocalStorage:
    return LocalStorage(root, url=url, writable=writable)


def _nbytes(request: Request[object]) -> int:
    if isinstance(request, Range):
        return request.nbytes
    return request.nbytes if isinstance(request, Prefix) else 0


def _sync_directory(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise  # some file systems sync directories by themselves and say EINVAL
    finally:
        os.close(fd)
