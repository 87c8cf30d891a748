"""`run.json`: what a folder is (spec, "run.json")."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import crc32c

from tensorstore_fmt.errors import (
    ArgumentError,
    ChecksumError,
    FormatError,
    LimitError,
    NotARunError,
    UnsupportedError,
)
from tensorstore_fmt.format import layout

__all__ = ["RunInfo", "decode", "encode"]

_TAIL: Final = re.compile(rb',"crc32c":"([0-9a-f]{8})"\}\n\Z')
_TAIL_NBYTES: Final = len(layout.RUN_JSON_TAIL) + 8 + 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """What `run.json` says."""

    run_id: bytes
    created_us: int
    attrs: Mapping[str, object]
    version: tuple[int, int] = (layout.MAJOR, layout.MINOR)


def encode(info: RunInfo) -> bytes:
    """Give the bytes of `run.json`.

    Raises
    ------
    ArgumentError
        `attrs` cannot be said in JSON.
    """
    body = {
        "format": layout.FORMAT_NAME,
        "format_version": list(info.version),
        "run_id": info.run_id.hex(),
        "created_us": info.created_us,
        "required": [],
        "attrs": dict(info.attrs),
    }
    _check_json(info.attrs, "attrs")
    head = json.dumps(body, ensure_ascii=True, allow_nan=False, separators=(",", ":"))[:-1].encode()
    data = head + layout.RUN_JSON_TAIL + b"%08x" % crc32c.crc32c(head) + b'"}\n'
    if len(data) > layout.MAX_RUN_JSON_NBYTES:
        raise ArgumentError(
            f"attrs take {len(data):,} bytes as JSON; at most {layout.MAX_RUN_JSON_NBYTES:,} are "
            "possible: log large values as tensors or strings"
        )
    return data


def _check_json(value: object, where: str) -> None:
    """Refuse what JSON cannot say, naming the place in the document."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ArgumentError(f"{where}: key {key!r} is not a string; JSON needs strings")
            _check_json(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check_json(item, f"{where}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ArgumentError(f"{where}: {value} cannot be said in JSON; use a string or None")
    elif not (value is None or isinstance(value, str | bool | int | float)):
        raise ArgumentError(
            f"{where}: {type(value).__name__} cannot be said in JSON; use str, int, float, bool, "
            "None, list or dict"
        )


def decode(data: bytes) -> RunInfo:
    """Check and read the bytes of `run.json`.

    Raises
    ------
    NotARunError
        It is not a run's.
    ChecksumError, UnsupportedError, LimitError, FormatError
        As the spec says.
    """
    if len(data) > layout.MAX_RUN_JSON_NBYTES:
        raise LimitError(
            f"run.json has {len(data):,} bytes, at most {layout.MAX_RUN_JSON_NBYTES:,} are allowed"
        )
    if not data.startswith(b"{"):
        raise NotARunError("run.json is not the run.json of a tensorstore_fmt run")
    tail = _TAIL.search(data, max(0, len(data) - _TAIL_NBYTES))
    if tail is None:
        raise ChecksumError("run.json does not end with its checksum; it was cut short or edited")
    head = data[: tail.start()]
    found = crc32c.crc32c(head)
    if found != int(tail[1], 16):
        raise ChecksumError(
            f"run.json: checksum {found:08x}, expected {tail[1].decode()}; the file is damaged or "
            "was edited",
            file=layout.RUN_JSON,
        )
    try:
        body = json.loads(head + b"}", parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"run.json is not JSON: {error}", file=layout.RUN_JSON) from None
    return _read(body)


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _read(body: object) -> RunInfo:
    if not isinstance(body, dict) or body.get("format") != layout.FORMAT_NAME:
        raise NotARunError("run.json is not the run.json of a tensorstore_fmt run")
    version = body.get("format_version")
    if not (
        isinstance(version, list) and len(version) == 2 and all(type(v) is int for v in version)
    ):
        raise FormatError("run.json: format_version is not [major, minor]")
    if version[0] != layout.MAJOR:
        raise UnsupportedError(
            f"the run has format version {version[0]}.{version[1]}, this tensorstore_fmt "
            f"reads {layout.MAJOR}.x: use a newer one",
            version=tuple(version),
        )
    required = body.get("required")
    if not (isinstance(required, list) and all(isinstance(r, str) for r in required)):
        raise FormatError("run.json: required is not a list of strings")
    unknown = [r for r in required if r not in layout.KNOWN_FEATURE_NAMES]
    if unknown:
        raise UnsupportedError(
            f"the run needs features this version does not know: {', '.join(unknown)}; use a newer "
            "tensorstore_fmt",
            code="unknown_feature",
            features=unknown,
        )
    run_id, created, attrs = body.get("run_id"), body.get("created_us"), body.get("attrs")
    if not (isinstance(run_id, str) and re.fullmatch("[0-9a-f]{32}", run_id)):
        raise FormatError("run.json: run_id is not 32 hexadecimal digits")
    if type(created) is not int or not isinstance(attrs, dict):
        raise FormatError("run.json: created_us or attrs has the wrong type")
    return RunInfo(
        run_id=bytes.fromhex(run_id),
        created_us=created,
        attrs=attrs,
        version=(version[0], version[1]),
    )
