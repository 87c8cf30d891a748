"""One segment of a run, taken apart as far as it is whole: header, root, head, good pages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import crc32c
import numpy as np

from tensorstore_fmt.errors import FormatError, TruncatedError, UnsupportedError
from tensorstore_fmt.format import layout, segment
from tensorstore_fmt.format.page import Entries
from tensorstore_fmt.storage import Range, Storage
from tensorstore_fmt.upkeep.report import Problem

__all__ = ["SegmentFile", "open_segment"]

_HEADER_NBYTES: Final = layout.SEGMENT_HEADER.size
_WINDOW_NBYTES: Final = 4 * 1024 * 1024


@dataclass(slots=True)
class SegmentFile:
    """A segment that was looked at.

    Attributes
    ----------
    name, nbytes
        Of the file as it is.
    header, head
        None if they cannot be had, also not from their copies.
    partial
        The head with made up names of shards, if only the shard page is damaged.
    spare
        First bytes of the segment from the bundle, for what the file does not give.
    problems
        What was found; pages are looked at by `pages`.
    bad_pages
        Numbers of entry pages that are damaged, as far as `pages` came.
    """

    storage: Storage
    name: layout.SegmentName
    nbytes: int
    spare: bytes = b""
    header: segment.Header | None = None
    head: segment.Head | None = None
    partial: segment.Head | None = None
    problems: list[Problem] = field(default_factory=list)
    bad_pages: dict[int, FormatError] = field(default_factory=dict)
    is_foreign: bool = False

    @property
    def path(self) -> str:
        """Place relative to the run."""
        return self.name.path

    @property
    def is_whole(self) -> bool:
        """Whether nothing is wrong with the file; only after `pages` was gone through."""
        return not self.problems and not self.bad_pages and self.head is not None

    @property
    def is_readable(self) -> bool:
        """Whether every entry can be had, maybe with copies; only after `pages`."""
        return self.head is not None and not self.bad_pages

    def note(self, error: FormatError, what: str, offset: int | None = None) -> None:
        """Add a problem."""
        is_newer = isinstance(error, UnsupportedError)
        place = error.facts.get("offset", offset)
        self.is_foreign |= is_newer
        self.problems.append(
            Problem(
                code=error.code,
                severity="note" if is_newer else "damage",
                file=self.path,
                offset=place if isinstance(place, int) else None,
                what=f"{what}: {error.message}",
            )
        )

    # --- pages --------------------------------------------------------------------------

    def page_numbers(self) -> list[int]:
        """Give the numbers (rows of the root) of all entry pages."""
        return [] if self.head is None else self.head.entry_pages().tolist()

    def rows_of(self, number: int) -> int:
        """Give the number of entries in a page."""
        assert self.head is not None
        return int(self.head.root["rows"][number])

    def pages(self, numbers: list[int] | None = None) -> Iterator[tuple[int, Entries]]:
        """Decode entry pages, a few MB at a time; those that are damaged go to `bad_pages`."""
        head = self.head
        if head is None:
            return
        wanted = self.page_numbers() if numbers is None else numbers
        for group in _groups(head.root, wanted):
            begin = int(head.root[group[0]]["offset"])
            data = self._read(begin, _end(head.root[group[-1]]))
            for number in group:
                start = int(head.root[number]["offset"]) - begin
                stored = data[start : start + int(head.root[number]["nbytes"])]
                try:
                    entries = self._decode(number, stored)
                except FormatError as error:
                    self.bad_pages[number] = error
                else:
                    yield number, entries

    def partial_pages(self) -> Iterator[Entries]:
        """Decode the good entry pages of a segment of which only the shard page is damaged."""
        head = self.partial
        for number in [] if head is None else head.entry_pages().tolist():
            assert head is not None
            row = head.root[number]
            stored = self._read(int(row["offset"]), _end(row))
            with contextlib.suppress(FormatError):
                yield head.decode_entries(number, stored)

    def _decode(self, number: int, stored: memoryview) -> Entries:
        head = self.head
        assert head is not None
        try:
            return head.decode_entries(number, stored)
        except FormatError:
            row = head.root[number]
            if _end(row) > len(self.spare):
                raise
            copy = memoryview(self.spare)[int(row["offset"]) : _end(row)]
            entries = head.decode_entries(number, copy)
        self.problems.append(
            Problem(
                code="checksum",
                severity="damage",
                file=self.path,
                offset=int(row["offset"]),
                what="a page is damaged; the bundle has a copy of it",
            )
        )
        return entries

    def stored_page(self, number: int) -> bytes | memoryview:
        """Give the stored bytes of a page, which `pages` found good."""
        head = self.head
        assert head is not None
        row = head.root[number]
        stored = self._read(int(row["offset"]), _end(row))
        if crc32c.crc32c(stored) != int(row["crc32c"]):
            return memoryview(self.spare)[int(row["offset"]) : _end(row)]
        return stored

    def _read(self, start: int, stop: int) -> memoryview:
        """Read what is there of these bytes."""
        stop = min(stop, self.nbytes)
        if start >= stop:
            return memoryview(b"")
        (data,) = self.storage.fetch([Range(self.path, start, stop)])
        return memoryview(data)

    # --- opening ------------------------------------------------------------------------

    def open(self, run_id: bytes) -> None:
        """Read header, root and head, with their copies where the first ones are damaged."""
        data = self._open_header(run_id)
        if self.header is not None:
            self._check_length()
            root = self._open_root(self.header)
            if root is not None:
                self._open_head(data + root, self.header)
        if self.head is None and self.spare:
            self._open_spare(run_id)

    def _open_header(self, run_id: bytes) -> bytes:
        ends = [
            self._read(0, _HEADER_NBYTES),
            self._read(max(0, self.nbytes - _HEADER_NBYTES), self.nbytes),
        ]
        headers: list[segment.Header | None] = []
        errors: list[FormatError | None] = []
        for data in ends:
            header, error = None, None
            try:
                header = segment.decode_header(data, where=self.path, run_id=run_id, name=self.name)
                _check_header(header, self.path)
            except FormatError as failure:
                header, error = None, failure
            headers.append(header)
            errors.append(error)
        offsets = (0, max(0, self.nbytes - _HEADER_NBYTES))
        first, last = errors
        if first is not None:
            self.note(first, "the header cannot be used", offsets[0])
            if first.code not in ("bad_magic", "checksum", "truncated"):
                return b""
        elif last is not None and headers[0] is not None:
            if headers[0].file_nbytes == self.nbytes:
                self.note(last, "the copy of the header cannot be used", offsets[1])
        elif bytes(ends[0]) != bytes(ends[1]):
            self.note(FormatError("they differ"), "header and its copy", offsets[1])
        self.header = headers[0] or headers[1]
        return bytes(ends[0] if headers[0] is not None else ends[1])

    def _check_length(self) -> None:
        assert self.header is not None
        wanted = self.header.file_nbytes
        if self.nbytes < wanted:
            error: FormatError = TruncatedError(f"{self.nbytes:,} bytes, should have {wanted:,}")
            self.note(error, "the file was cut short", self.nbytes)
        elif self.nbytes > wanted:
            error = FormatError(f"{self.nbytes:,} bytes, should have {wanted:,}")
            self.note(error, "the file is too long", wanted)

    def _open_root(self, header: segment.Header) -> bytes | None:
        begin = header.file_nbytes - _HEADER_NBYTES - header.root_nbytes
        good = None
        for offset, what in ((_HEADER_NBYTES, "the root"), (begin, "the copy of the root")):
            root = bytes(self._read(offset, offset + header.root_nbytes))
            if len(root) < header.root_nbytes:
                if self.nbytes >= header.file_nbytes or good is None:
                    self.note(TruncatedError("it is not all there"), what, offset)
            elif crc32c.crc32c(root) != header.root_crc32c:
                self.note(FormatError("its checksum is wrong", code="checksum"), what, offset)
            elif good is None:
                good = root
        return good

    def _open_head(self, start: bytes, header: segment.Header) -> None:
        data = start + bytes(self._read(len(start), header.head_nbytes))
        try:
            self.head = segment.decode_head(header, data)
        except FormatError as error:
            self.note(error, "the head cannot be used")
            with contextlib.suppress(FormatError):
                self.partial = segment.decode_head_without_shards(header, data)

    def _open_spare(self, run_id: bytes) -> None:
        """Take header and head from the bundle."""
        try:
            header = segment.decode_header(
                self.spare, where=self.path, run_id=run_id, name=self.name
            )
            self.head = segment.decode_head(header, self.spare)
            self.header, self.partial = header, None
        except FormatError:
            return  # the bundle is a cache, and this file's problems are noted


def open_segment(
    storage: Storage, run_id: bytes, name: layout.SegmentName, nbytes: int, spare: bytes = b""
) -> SegmentFile:
    """Open a segment as far as it is whole.

    Raises
    ------
    FileNotFoundError
        It is not there any more: it was merged, or is gone.
    OSError
        The storage failed.
    """
    file = SegmentFile(storage, name, nbytes, spare)
    try:
        file.open(run_id)
    except FormatError as error:  # no regular file, or shorter than when it was listed
        file.note(error, "the file cannot be read")
    return file


def _check_header(header: segment.Header, where: str) -> None:
    """Check what the spec says of a header and `decode_header` leaves out."""
    if header.key.worker >= header.num_workers or not header.key.writer:
        what = f"worker {header.key.worker} of {header.num_workers}"
        raise FormatError(f"{where}: {what}, writer {header.key.writer}", file=where)


def _end(row: np.void) -> int:
    return int(row["offset"]) + int(row["nbytes"])


def _groups(root: np.ndarray, numbers: list[int]) -> Iterator[list[int]]:
    """Cut page numbers into groups that lie together and are a few MB."""
    group: list[int] = []
    for number in numbers:
        if group and (
            number != group[-1] + 1
            or _end(root[number]) - int(root[group[0]]["offset"]) > _WINDOW_NBYTES
        ):
            yield group
            group = []
        group.append(number)
    if group:
        yield group
