"""A second reader of tensorstore_fmt 1.x, written from spec/format.md alone.

It shares no code with the package: standard library, NumPy, pyarrow and zstandard only. It reads
segments eagerly and checks what the specification demands of a reader; of shards it fetches only
the byte ranges of the chunks that a selection touches. XXH3 digests are not verified. Each
docstring names the section of the specification that it carries out.
"""

from .bundle import BundleRow, read_bundle
from .checksums import crc32c
from .codecs import decode_payload
from .errors import SpecError
from .records import SegmentName, parse_segment_name
from .run import Run, open_run
from .run_json import read_run_json
from .segment import Segment, read_head, read_segment, validate_segment

__all__ = [
    "BundleRow",
    "Run",
    "Segment",
    "SegmentName",
    "SpecError",
    "crc32c",
    "decode_payload",
    "open_run",
    "parse_segment_name",
    "read_bundle",
    "read_head",
    "read_run_json",
    "read_segment",
    "validate_segment",
]
