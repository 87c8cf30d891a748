"""What the rest of the library may ask of a storage, and in which words.

A path is relative to the run's root, in POSIX form: ``index/x.seg``. What is asked for is
plain data (`Range`, `Prefix`, `Listing`); `Storage.fetch` gets all of it at the same time,
so one call is one round of requests.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Self, TypeAlias, TypeVar, cast

from tensorstore_fmt.closeable import Closeable
from tensorstore_fmt.errors import ArgumentError

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
]

BytesLike: TypeAlias = bytes | bytearray | memoryview
T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")


class StoreNotFoundError(OSError):
    """The bucket itself does not exist; never raised for a key that is missing in one.

    On purpose not a `FileNotFoundError`: nobody may take it for an absent file.
    """


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file of a listing: its base name and its length in bytes."""

    base: str
    nbytes: int


class Request(Generic[T_co]):
    """Something to fetch, whose result has the type ``T_co``."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Range(Request[bytes]):
    """Exactly the bytes ``start`` to ``stop`` of a file; fewer is an error."""

    path: str
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ArgumentError(
                f"{self.path}: bytes {self.start} to {self.stop} are not a range",
                file=self.path,
                start=self.start,
                stop=self.stop,
            )

    @property
    def nbytes(self) -> int:
        """Number of bytes asked for."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Prefix(Request[tuple[bytes, int | None]]):
    """The first ``nbytes`` bytes of a file, or all of a shorter one.

    The result is the bytes and the length of the whole file, None where the store does not
    tell it in the same answer.
    """

    path: str
    nbytes: int

    def __post_init__(self) -> None:
        if self.nbytes < 1:
            raise ArgumentError(f"{self.path}: a prefix of {self.nbytes} bytes", file=self.path)


@dataclass(frozen=True, slots=True)
class Listing(Request[list[FileInfo]]):
    """The regular files directly in a directory, sorted by name; none if it does not exist."""

    directory: str


class Appender(Closeable):
    """A new file that grows at its end, owned by one thread at a time.

    After a failed append or sync nothing can be written to it any more (spec, "Duties of a
    writer"): what the file holds is then unknown, and only `close` is allowed.
    """

    @property
    @abstractmethod
    def path(self) -> str:
        """Place relative to the run."""

    @property
    @abstractmethod
    def position(self) -> int:
        """Bytes appended so far: where the next append begins."""

    @abstractmethod
    def append(self, buffers: Sequence[BytesLike]) -> int:
        """Hand all of the buffers to the operating system; give the offset of the first."""

    @abstractmethod
    def sync(self) -> None:
        """Make the file's bytes survive power loss (not its name: see `Storage.sync`)."""

    @abstractmethod
    def close(self) -> None:
        """Close the file without syncing it; more than once is fine."""


class Lock:
    """An exclusive lock that is held until released; this one guards nothing.

    Object stores have no locks, so they hand out this class itself.
    """

    @property
    def is_held(self) -> bool:
        """Whether somebody else would be kept out."""
        return False

    def release(self) -> None:
        """Let go; more than once is fine."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class Storage(Closeable):
    """The files of one run, on a disk or in an object store.

    Threads may share one. It survives a fork, and pickles as its URL and options.

    Attributes
    ----------
    url
        As the user gave it. It may contain credentials: show `describe` instead.
    is_local
        Whether `create`, `map` and real locks are there.
    can_list, can_write
        What this storage is able and was opened to do.
    max_gap_bytes
        Two ranges with a gap up to this are better fetched as one.
    """

    url: str
    is_local: bool
    can_list: bool
    can_write: bool
    max_gap_bytes: int

    # --- reading --------------------------------------------------------------
    def fetch(self, requests: Sequence[Request[T]]) -> list[T]:
        """Get everything asked for, all at the same time.

        Parameters
        ----------
        requests
            Any mixture of `Range`, `Prefix` and `Listing`.

        Returns
        -------
        list
            One result a request, in the same order; see the classes of the requests.

        Raises
        ------
        FileNotFoundError
            The file of a `Range` or `Prefix` is not there. Nothing else raises this.
        TruncatedError
            The file ends before the ``stop`` of a `Range`.
        FormatError
            What bears the name is no regular file.
        OSError
            The storage failed (`PermissionError`, `StoreNotFoundError`, ...), after retries
            where these could help.
        """
        results = self.fetch_settled(requests)
        for result in results:
            if isinstance(result, Exception):
                raise result
        return cast("list[T]", results)

    @abstractmethod
    def fetch_settled(self, requests: Sequence[Request[T]]) -> list[T | Exception]:
        """Do as `fetch`, but put what a request would have raised in the place of its result."""

    def fetch_each(
        self, ranges: Sequence[Range], *, most_nbytes: int
    ) -> Generator[tuple[int, BytesLike | Exception]]:
        """Do as `fetch_settled`, but give each result, and its number, when it is there.

        Parameters
        ----------
        most_nbytes
            How many bytes may be on their way or waiting to be taken; one range may have more.
        """
        sizes = [each.nbytes for each in ranges]
        begin = 0
        while begin < len(ranges):
            end, nbytes = begin + 1, sizes[begin]
            while end < len(ranges) and nbytes + sizes[end] <= most_nbytes:
                nbytes += sizes[end]
                end += 1
            yield from enumerate(self.fetch_settled(ranges[begin:end]), begin)
            begin = end

    def fetch_into(self, ranges: Sequence[Range], buffers: Sequence[memoryview]) -> None:
        """Read each range straight into the writable buffer of the same length beside it."""
        check_buffers(ranges, buffers)
        for data, buffer in zip(self.fetch(ranges), buffers, strict=True):
            buffer.cast("B")[:] = data

    def map(self, path: str, nbytes_needed: int) -> memoryview:  # noqa: ARG002 - for others
        """Map a whole file read-only, which must have at least ``nbytes_needed`` bytes.

        Local only. Who maps a file that is cut short later is killed on access, so use it only
        for views that the user asked for.
        """
        raise ArgumentError(f"{self.describe(path)} is not a local file and cannot be mapped")

    def local_path(self, path: str) -> str:
        """Give the absolute path of a local file, for another process to open."""
        raise ArgumentError(f"{self.describe(path)} is not a local file")

    # --- writing --------------------------------------------------------------
    @abstractmethod
    def publish(
        self,
        path: str,
        buffers: Sequence[BytesLike],
        *,
        if_absent: bool = False,
        synced: bool = False,
    ) -> None:
        """Make a whole file appear at once under its name, or not at all.

        Handed to the operating system or acknowledged by the store on return, but not synced.

        Parameters
        ----------
        if_absent
            Only if nobody has published this name yet.
        synced
            The file's bytes survive power loss before its name appears, so that no power cut shows
            the name of a file that lacks some of them. The name itself is synced by `sync`.

        Raises
        ------
        FileExistsError
            ``if_absent`` was asked for and somebody else has published this name.
        """

    def create(self, path: str) -> Appender:
        """Create a new file to append to. Local only; `FileExistsError` if it exists."""
        raise ArgumentError(f"{self.describe(path)} is not a local file and cannot be appended to")

    def reopen(self, path: str, *, nbytes: int, keep: int) -> Appender:  # noqa: ARG002 - for others
        """Cut a file off behind its first bytes, to append to these. Local only.

        Parameters
        ----------
        nbytes
            How long the file must be now.
        keep
            How many bytes stay.

        Raises
        ------
        StateError
            Code ``changed``: it has another length.
        """
        raise ArgumentError(f"{self.describe(path)} is not a local file and cannot be appended to")

    @abstractmethod
    def sync(self, paths: Iterable[str]) -> None:
        """Make files and their names survive power loss; nothing to do on object stores."""

    @abstractmethod
    def delete(self, paths: Iterable[str]) -> None:
        """Remove files; those that do not exist are fine."""

    # --- locks ----------------------------------------------------------------
    def lock(self, path: str) -> Lock:  # noqa: ARG002 - for others
        """Take the exclusive lock on a file, creating it.

        Raises
        ------
        StateError
            Somebody else holds it (code ``locked``).
        """
        return Lock()

    def is_locked(self, path: str) -> bool:  # noqa: ARG002 - for others
        """Say whether some process holds the lock on a file."""
        return False

    def is_abandoned(self, path: str) -> bool:  # noqa: ARG002 - for others
        """Say whether a lock was taken on a file, and its holder died; False if nobody can tell."""
        return False

    # --- the rest -------------------------------------------------------------
    def describe(self, path: str = "") -> str:
        """Name a file for a message: where it lies, without credentials."""
        root = without_credentials(self.url)
        return f"{root.rstrip('/')}/{path}" if path else root

    def close(self) -> None:
        """Give back handles and connections; more than once is fine."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.describe()}>"


def without_credentials(url: str) -> str:
    """Blank what may be secret in a URL: user and password, and the query."""
    scheme, mark, rest = url.partition("://")
    if not mark:
        return url
    place, question, _ = rest.partition("?")
    authority, slash, path = place.partition("/")
    authority = authority.rpartition("@")[2]
    return f"{scheme}://{authority}{slash}{path}" + ("?..." if question else "")


def check_path(path: str) -> str:
    """Refuse a path that could lead out of the run."""
    parts = path.split("/")
    if "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise ArgumentError(f"{path!r} is not a path inside a run", file=path)
    return path


def check_buffers(ranges: Sequence[Range], buffers: Sequence[memoryview]) -> None:
    """Refuse buffers that do not fit their ranges."""
    if [each.nbytes for each in ranges] != [buffer.nbytes for buffer in buffers]:
        raise ArgumentError("the buffers do not have the lengths of the ranges")
