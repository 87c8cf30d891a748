"""Records of an index: names of files, header, rows of root and pages (sections 4 and 6)."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

Part = tuple[tuple[int, ...], tuple[int, ...]]

_SEGMENT_NAME = re.compile(r"([0-9]{6})-([0-9]{6})-([0-9a-f]{16})-([0-9]{12})-([0-9]{12})\.seg")


class SegmentName(NamedTuple):
    """The five fields of a segment's file name ("4. Layout of a run")."""

    worker: int
    attempt: int
    writer: int
    last: int
    flushes: int

    @property
    def first(self) -> int:
        return self.last - self.flushes + 1

    def __str__(self) -> str:
        prefix = f"{self.worker:06}-{self.attempt:06}-{self.writer:016x}"
        return f"{prefix}-{self.last:012}-{self.flushes:012}.seg"


def parse_segment_name(text: str) -> SegmentName | None:
    """Parse a file name; None if it is one of those that section 4 ignores."""
    match = _SEGMENT_NAME.fullmatch(text)
    if match is None:
        return None
    name = SegmentName(*[int(x, 16 if i == 2 else 10) for i, x in enumerate(match.groups())])
    return name if 1 <= name.flushes <= name.last + 1 else None


class Header(NamedTuple):
    """Section "6.1 Header"."""

    magic: bytes
    major: int
    minor: int
    flags: int
    run_id: bytes
    writer: int
    worker: int
    attempt: int
    num_workers: int
    root_crc32c: int
    resume_step: int
    first_flush: int
    last_flush: int
    required: int
    file_nbytes: int
    head_nbytes: int
    root_nbytes: int
    series: int
    opened_us: int
    published_us: int
    complete_through: tuple[int, int, int, int]
    recovers: int

    @property
    def is_closed(self) -> bool:
        return self.flags & 1 == 1


class RootRow(NamedTuple):
    """Section "6.2 Root"."""

    offset: int
    nbytes: int
    raw_nbytes: int
    crc32c: int
    rows: int
    first_series: int
    last_series: int
    min_step: int
    max_step: int
    kind: int
    reserved: bytes


class Series(NamedTuple):
    """A row of the catalog page."""

    name: str
    kind: int
    mode: int
    dtype: str
    shape: list[int]
    grid: list[int]
    global_shape: list[int]
    origin: list[int]
    first_step: int
    last_step: int
    steps: int
    raw_nbytes: int
    stored_nbytes: int

    @property
    def part(self) -> Part | None:
        return (tuple(self.global_shape), tuple(self.origin)) if self.global_shape else None

    def sort_key(self) -> tuple[Any, ...]:
        return (self.name.encode(), self.kind, self.mode, self.dtype.encode(), *self[5:8])


class Shard(NamedTuple):
    """A row of the shard page."""

    worker: int
    attempt: int
    writer: int
    number: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.worker:06}-{self.attempt:06}-{self.writer:016x}-{self.number:012}.arrow"


class Entry(NamedTuple):
    """A row of an entry page."""

    series: int
    step: int
    stride: int
    num_steps: int
    chunk: int
    dims: list[int]
    first_flush: int
    last_flush: int
    codec: int
    flags: int
    shard: int
    offset: int
    nbytes: int
    raw_nbytes: int
    crc32c: int
    digest: int
    inline: bytes

    @property
    def last_step(self) -> int:
        return self.step + (self.num_steps - 1) * self.stride

    @property
    def rows(self) -> int:
        """Number of steps in the payload."""
        return 1 if self.flags & 1 else self.num_steps

    def covers(self, step: int) -> bool:
        return self.step <= step <= self.last_step and (step - self.step) % self.stride == 0


def full_shape(series: Series, entry: Entry) -> list[int]:
    """Give the shape with the lengths that the entry adds (column dims)."""
    dims = iter(entry.dims)
    return [next(dims) if length < 0 else length for length in series.shape]
