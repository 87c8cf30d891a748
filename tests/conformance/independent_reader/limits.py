"""Numbers of the specification: limits ("13. Limits") and dtypes ("7.1 dtypes")."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

MAX_NAME_NBYTES = 1024
MAX_RANK = 32
MAX_WORKER = 999999
MAX_NUMBER = 999999999999
MAX_STEP = 4611686018427387903
MAX_AXIS = 281474976710656
MAX_CHUNK_RAW_NBYTES = 134217728
MAX_CHUNK_NBYTES = 134225920
MAX_INLINE_NBYTES = 65536
MAX_PAGE_RAW_NBYTES = 16777216
MAX_PAGE_NBYTES = 16781312
MAX_PAGE_ROWS = 65536
MAX_ROOT_NBYTES = 16777216
MAX_HEAD_NBYTES = 1073741824
MAX_SERIES = 16777216
MAX_ENTRY_STEPS = 1048576
MAX_RUN_JSON_NBYTES = 16777216
MAX_BUNDLE_ROWS = 65536
PREFIX_NBYTES = 524288

SEGMENT_MAGIC, BUNDLE_MAGIC = b"\x89TSFSEG\n", b"\x89TSFIDX\n"
NO_SHARD, DROPPED = 0xFFFFFFFF, 255
CATALOG, SHARDS, ENTRIES = 1, 2, 3

# The NumPy dtype in which the bits of each dtype are returned.
DTYPES: dict[str, np.dtype[Any]] = {
    **{f"{s}int{b}": np.dtype(f"<{s or 'i'}{b // 8}") for s in ("", "u") for b in (8, 16, 32, 64)},
    **{f"float{b}": np.dtype(f"<f{b // 8}") for b in (16, 32, 64)},
    "bool": np.dtype("?"),
    "complex64": np.dtype("<c8"),
    "complex128": np.dtype("<c16"),
    "bfloat16": np.dtype("<u2"),
    "string": np.dtype(object),
}
for _name in ("e3m4", "e4m3", "e4m3b11fnuz", "e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu"):
    DTYPES[f"float8_{_name}"] = np.dtype("u1")
for _name in ("float6_e2m3fn", "float6_e3m2fn", "float4_e2m1fn", "int4", "int2", "uint4", "uint2"):
    DTYPES[_name] = np.dtype("u1")
