"""The numbers of the spec as code: magics, struct formats, codes, limits, file names.

A change here is a change of the format (`spec/format.md`, `spec/changes.md`, vectors).
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

FORMAT_NAME: Final = "tensorstore_fmt"
MAJOR: Final = 1
MINOR: Final = 0
KNOWN_FEATURES: Final = 0
KNOWN_FEATURE_NAMES: Final[frozenset[str]] = frozenset()

# --- places -----------------------------------------------------------------
RUN_JSON: Final = "run.json"
BUNDLE: Final = "index.bundle"
INDEX_DIR: Final = "index"
SHARDS_DIR: Final = "shards"
LOCKS_DIR: Final = "locks"
TMP_SUFFIX: Final = ".tmp"
RUN_JSON_TAIL: Final = b',"crc32c":"'

# --- segment ----------------------------------------------------------------
SEGMENT_MAGIC: Final = b"\x89TSFSEG\n"
SEGMENT_HEADER: Final = struct.Struct("<8sHHI16sQIIIIqQQQQQIIqq4qQ84xI")
ROOT_ROW: Final = np.dtype(
    [
        ("offset", "<u8"),
        ("nbytes", "<u4"),
        ("raw_nbytes", "<u4"),
        ("crc32c", "<u4"),
        ("rows", "<u4"),
        ("first_series", "<u4"),
        ("last_series", "<u4"),
        ("min_step", "<i8"),
        ("max_step", "<i8"),
        ("kind", "u1"),
        ("reserved", "V15"),
    ]
)
FLAG_CLOSED: Final = 1

PAGE_CATALOG: Final = 1
PAGE_SHARDS: Final = 2
PAGE_ENTRIES: Final = 3

# --- bundle -----------------------------------------------------------------
BUNDLE_MAGIC: Final = b"\x89TSFIDX\n"
BUNDLE_HEADER: Final = struct.Struct("<8sHHI16sQQI8xI")
BUNDLE_ROW: Final = struct.Struct("<IIQQQQQQ8x")

# --- what the integers in tables mean ----------------------------------------
KIND_DATA: Final = 0
KIND_STATS: Final = 1
KIND_STEPS: Final = 2

MODES: Final[tuple[str | None, ...]] = (None, "TRAIN", "EVAL", "PREDICT")

CODEC_RAW: Final = 0
CODEC_CONSTANT: Final = 1
CODEC_ZSTD: Final = 2
CODEC_PLANES: Final = 3
CODEC_DELTA: Final = 4
CODEC_SPARSE: Final = 5
CODEC_DROPPED: Final = 255
CODEC_NAMES: Final = {
    CODEC_RAW: "raw",
    CODEC_CONSTANT: "constant",
    CODEC_ZSTD: "zstd",
    CODEC_PLANES: "planes",
    CODEC_DELTA: "delta",
    CODEC_SPARSE: "sparse",
    CODEC_DROPPED: "dropped",
}

ENTRY_REPEAT: Final = 1
ENTRY_HAS_DIGEST: Final = 2
INLINE_SHARD: Final = 0xFFFFFFFF

PLANES_ROTATED: Final = 1
PLANES_WIDE: Final = 2
PLANES_HEADER_NBYTES: Final = 4

STATS_FIELDS: Final = (
    "count", "nan", "posinf", "neginf", "zero", "min", "max", "sum", "sumsq", "sumabs",
)  # fmt: skip
STATS_LEN: Final = len(STATS_FIELDS)

PAYLOAD_ALIGNMENT: Final = 64

# --- limits: each is checked before the allocation it guards ------------------
MAX_NAME_NBYTES: Final = 1024  # names as memory
MAX_RANK: Final = 32  # loops over axes; NumPy takes 64
MAX_WORKER: Final = 999_999  # names of files; attempts likewise; num_workers is at most one more
MAX_NUMBER: Final = 999_999_999_999  # names of files: flushes and shards
MAX_STEP: Final = 2**62 - 1  # overflow of step + stride * count
MAX_AXIS: Final = 2**48  # overflow of products
MAX_CHUNK_RAW_NBYTES: Final = 128 * 1024 * 1024  # bombs; CRC32C weakens above 256 MiB
MAX_CHUNK_NBYTES: Final = MAX_CHUNK_RAW_NBYTES + 8192  # the same, stored
MAX_INLINE_NBYTES: Final = 64 * 1024  # pages as memory
MAX_PAGE_RAW_NBYTES: Final = 16 * 1024 * 1024  # bombs; writers aim at 256 KiB
MAX_PAGE_NBYTES: Final = MAX_PAGE_RAW_NBYTES + 4096  # the same, stored
MAX_PAGE_ROWS: Final = 65536  # rows without bytes
MAX_ROOT_NBYTES: Final = 16 * 1024 * 1024  # a root as memory
MAX_HEAD_NBYTES: Final = 1024 * 1024 * 1024  # catalogs as memory
MAX_SERIES: Final = 2**24  # the same
MAX_ENTRY_STEPS: Final = 2**20  # step lists from a few bytes
MAX_RUN_JSON_NBYTES: Final = 16 * 1024 * 1024  # attributes as memory
MAX_BUNDLE_ROWS: Final = 65536  # a table as memory

PREFIX_NBYTES: Final = 512 * 1024
"""What is read first of a bundle and of a segment: one request."""

# --- what a writer aims at (not limits; spec, "Duties of a writer") -----------
TARGET_PAGE_RAW_NBYTES: Final = 256 * 1024
TARGET_PAGE_ROWS: Final = 4096
JOINED_INLINE_NBYTES: Final = 32 * 1024
INLINE_STEP_NBYTES: Final = 256

FileKind = Literal["segment", "shard"]


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class WriterKey:
    """A writer: the three numbers that name all of its files."""

    worker: int
    attempt: int
    writer: int

    def __str__(self) -> str:
        return f"{self.worker:06d}-{self.attempt:06d}-{self.writer:016x}"


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class SegmentName:
    """The file name of a segment (spec, "Layout of a run")."""

    key: WriterKey
    last: int
    count: int

    @property
    def first(self) -> int:
        """First flush covered."""
        return self.last - self.count + 1

    @property
    def path(self) -> str:
        """Place relative to the run."""
        return f"{INDEX_DIR}/{self.key}-{self.last:012d}-{self.count:012d}.seg"

    def covers(self, other: SegmentName) -> bool:
        """Say whether this one holds all that `other` holds (also if they are the same)."""
        return self.key == other.key and self.first <= other.first and other.last <= self.last


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class ShardName:
    """The file name of a shard (spec, "Layout of a run")."""

    key: WriterKey
    number: int

    @property
    def path(self) -> str:
        """Place relative to the run."""
        return f"{SHARDS_DIR}/{self.key}-{self.number:012d}.arrow"


_KEY = r"([0-9]{6})-([0-9]{6})-([0-9a-f]{16})"
_SEGMENT_RE: Final = re.compile(_KEY + r"-([0-9]{12})-([0-9]{12})\.seg", re.ASCII)
_SHARD_RE: Final = re.compile(_KEY + r"-([0-9]{12})\.arrow", re.ASCII)
_LOCK_RE: Final = re.compile(_KEY + r"\.lock", re.ASCII)


def _key(match: re.Match[str]) -> WriterKey:
    return WriterKey(worker=int(match[1]), attempt=int(match[2]), writer=int(match[3], 16))


def parse_segment_name(base: str) -> SegmentName | None:
    """Read the base name of a file in ``index/``; None if it is not a segment's."""
    match = _SEGMENT_RE.fullmatch(base)
    if match is None:
        return None
    name = SegmentName(key=_key(match), last=int(match[4]), count=int(match[5]))
    return name if 1 <= name.count <= name.last + 1 else None


def parse_shard_name(base: str) -> ShardName | None:
    """Read the base name of a file in ``shards/``; None if it is not a shard's."""
    match = _SHARD_RE.fullmatch(base)
    return None if match is None else ShardName(key=_key(match), number=int(match[4]))


def parse_lock_name(base: str) -> WriterKey | None:
    """Read the base name of a file in ``locks/``; None if it is not a lock's."""
    match = _LOCK_RE.fullmatch(base)
    return None if match is None else _key(match)


def lock_path(key: WriterKey) -> str:
    """Place of a writer's lock relative to the run."""
    return f"{LOCKS_DIR}/{key}.lock"
