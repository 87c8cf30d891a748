"""What lies where in a folder that smdebug wrote; and its JSON files."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from tensorstore_fmt.errors import ArgumentError, FormatError
from tensorstore_fmt.interop.importing.report import ImportReport
from tensorstore_fmt.storage.foreign import ForeignFolder

__all__ = ["Found", "Index", "decode_index", "event_path", "index_path", "scan"]

_INDEX_NAME: Final = re.compile(r"(\d{1,18})_(.+)\.json", re.ASCII)
_EVENT_NAME: Final = re.compile(r"(\d{1,18})_(.+)\.tfevents", re.ASCII)
_COLLECTIONS_NAME: Final = re.compile(r"(.+)_collections\.json")
_END_NAME: Final = "training_job_end.ts"
_COLLECTIONS: Final = "collections/000000000"
_MAX_JSON_NBYTES: Final = 64 * 1024 * 1024
_STEPS_PER_FOLDER: Final = 1000


def index_path(step: int, worker: str) -> str:
    """Give the place of the index of a step of a worker."""
    return f"index/{step // _STEPS_PER_FOLDER:09d}/{step:012d}_{worker}.json"


def event_path(step: int, worker: str) -> str:
    """Give the place of the values of a step of a worker, if the index does not say another."""
    return f"events/{step:012d}/{step:012d}_{worker}.tfevents"


@dataclass(slots=True, kw_only=True)
class Found:
    """What is in a folder.

    Attributes
    ----------
    steps
        By worker, ascending: the steps that have an index, or values without one. Eight bytes
        each; nothing else of the folder's listing is kept.
    collections
        By worker.
    num_workers
        As the first collections file says; 0 if none does.
    is_finished
        Whether there is an end marker. Jobs in SageMaker write none.
    """

    steps: dict[str, array[int]] = field(default_factory=dict)
    collections: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    num_workers: int = 0
    is_finished: bool = False

    @property
    def workers(self) -> list[str]:
        """Names of all workers that left anything, ``worker_2`` before ``worker_10``."""
        return sorted({*self.steps, *self.collections}, key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(d) if d else 0, s) for d, s in re.findall(r"(\d*)(\D*)", name, re.ASCII)]


def scan(folder: ForeignFolder, report: ImportReport) -> Found:
    """Look at what is in a folder; reads the collections.

    Raises
    ------
    ArgumentError
        Code ``unknown_format``: this is no folder that smdebug wrote.
    """
    if not {"index", "events", "collections"} & set(folder.folders()):
        raise ArgumentError(
            f"{folder.describe()} holds no smdebug run: it has none of the folders index, events "
            "and collections; name the folder that has them",
            code="unknown_format",
            source=folder.describe(),
        )
    found = Found()
    found.is_finished = any(info.base == _END_NAME for info in folder.files())
    per_step: dict[int, int] = {}
    for sub in folder.folders("index"):
        for info in folder.files(f"index/{sub}"):
            match = _INDEX_NAME.fullmatch(info.base)
            if match and index_path(int(match[1]), match[2]) == f"index/{sub}/{info.base}":
                found.steps.setdefault(match[2], array("q")).append(int(match[1]))
                per_step[int(match[1])] = per_step.get(int(match[1]), 0) + 1
            else:
                _note_stray(report, f"index/{sub}/{info.base}")
    _add_orphans(folder, found, per_step, report)
    for worker, steps in found.steps.items():
        found.steps[worker] = array("q", sorted(steps))
    _read_collections(folder, found, report)
    return found


def _note_stray(report: ImportReport, path: str) -> None:
    if path.endswith(".tmp"):
        report.skip(path, None, "unfinished", "its writer was stopped before it was complete")
    else:
        report.skip(path, None, "unknown_file", "no name that smdebug gives", is_damage=False)


def _add_orphans(
    folder: ForeignFolder, found: Found, per_step: Mapping[int, int], report: ImportReport
) -> None:
    """Add values whose index is missing: the writer died between the two."""
    for sub in folder.folders("events"):
        if not (sub.isascii() and sub.isdigit()) or len(sub) > 18:
            continue
        if per_step.get(int(sub), 0) >= len(found.steps) > 0:
            continue  # every worker has an index of it: nothing can be hidden there
        for info in folder.files(f"events/{sub}"):
            match = _EVENT_NAME.fullmatch(info.base)
            if not match or event_path(int(match[1]), match[2]) != f"events/{sub}/{info.base}":
                _note_stray(report, f"events/{sub}/{info.base}")
                continue
            steps = found.steps.setdefault(match[2], array("q"))
            if int(match[1]) not in steps:
                steps.append(int(match[1]))


def _read_collections(folder: ForeignFolder, found: Found, report: ImportReport) -> None:
    names = []
    for info in folder.files(_COLLECTIONS):
        match = _COLLECTIONS_NAME.fullmatch(info.base)
        if match:
            names.append((match[1], f"{_COLLECTIONS}/{info.base}"))
        else:
            _note_stray(report, f"{_COLLECTIONS}/{info.base}")
    contents = folder.begins([path for _, path in names], _MAX_JSON_NBYTES)
    for (worker, path), data in zip(names, contents, strict=True):
        try:
            document = _json(data)
            collections = document["collections"]
            if not isinstance(collections, dict):
                raise FormatError("its collections are no object")
            number = document.get("_meta", {}).get("num_workers", 0)
        except (FormatError, KeyError, AttributeError) as error:
            report.skip(path, None, "bad_json", f"no collections: {error}")
            continue
        found.collections[worker] = collections
        if found.num_workers == 0 and isinstance(number, int) and 0 < number < 2**31:
            found.num_workers = number


def _json(data: bytes | Exception) -> dict[str, Any]:
    if isinstance(data, FileNotFoundError):
        raise FormatError("it is not there any more")
    if isinstance(data, Exception):
        raise data
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"no JSON: {error}", code="bad_json") from None
    if not isinstance(document, dict):
        raise FormatError("JSON, but no object", code="bad_json")
    return document


@dataclass(slots=True, kw_only=True)
class Index:
    """What the index of a step says.

    Attributes
    ----------
    places
        Names by offset in the file of values.
    shapes
        Shapes of tensors of which only these were saved, by name.
    """

    mode: str = "GLOBAL"
    mode_step: int
    path: str
    places: dict[int, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def offsets(self) -> list[int]:
        """Where records begin, ascending."""
        return sorted(self.places)


def decode_index(data: bytes | Exception, *, step: int, worker: str) -> Index:
    """Decode an index.

    Raises
    ------
    FormatError
        It is none.
    """
    document = _json(data)
    try:
        meta = document["meta"]
        index = Index(
            mode=str(meta["mode"]),
            mode_step=int(meta["mode_step"]),
            path=str(meta.get("event_file_name") or event_path(step, worker)),
        )
        for row in document.get("tensor_payload", ()):
            index.places[int(row["start_idx"])] = str(row["tensorname"])
        for row in document.get("shape_payload", ()):
            index.shapes[str(row["tensorname"])] = tuple(int(n) for n in row["shape"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"an index without what it must have: {error!r}") from None
    return index
