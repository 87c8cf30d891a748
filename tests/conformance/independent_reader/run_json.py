"""run.json ("5. run.json")."""

from __future__ import annotations

import json
import re
from typing import Any

from .checksums import crc32c
from .errors import SpecError, fail, need
from .limits import MAX_RUN_JSON_NBYTES

TAIL_NBYTES = 22


def read_run_json(data: bytes) -> dict[str, Any]:
    """Check the checksum, then parse."""
    need(len(data) <= MAX_RUN_JSON_NBYTES, "run.json", "limit")
    need(data[:1] == b"{", "run.json is not one of a run", "not_a_run")
    tail = re.fullmatch(rb',"crc32c":"([0-9a-f]{8})"\}\n', data[-TAIL_NBYTES:])
    stated = int(tail[1], 16) if tail else -1
    need(crc32c(data[:-TAIL_NBYTES]) == stated, "run.json", "checksum")
    try:
        run: Any = json.loads(data.decode(), parse_constant=lambda text: fail("malformed", text))
    except (ValueError, RecursionError) as error:
        raise SpecError("malformed", f"run.json: {error}") from None
    need(isinstance(run, dict) and run.get("format") == "tensorstore_fmt", "format", "not_a_run")
    version = run.get("format_version")
    pair = isinstance(version, list) and len(version) == 2
    need(pair and all(type(x) is int and x >= 0 for x in version or ()), "format_version")
    need(version[0] == 1, f"version {version}", "unsupported_version")
    required = run.get("required")
    need(isinstance(required, list) and all(type(x) is str for x in required), "required")
    need(not required, f"required {required}", "unknown_feature")
    run_id = run.get("run_id")
    need(isinstance(run_id, str) and re.fullmatch("[0-9a-f]{32}", run_id), "run_id")
    need(type(run.get("created_us")) is int and isinstance(run.get("attrs"), dict), "members")
    return dict(run)
