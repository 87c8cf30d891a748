"""How a reader is checked with the vectors: what each member of a vector's JSON asks of it.

A reader takes part through two small protocols; `problems` gives what it did otherwise than the
vector says, as texts. `generate.py --check` and `tests/conformance/test_vectors.py` use it.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

VECTORS = Path(__file__).resolve().parent

Json = dict[str, Any]


class Failure(Exception):  # noqa: N818 - it carries an answer as often as an error
    """A reader's refusal or answer: a code of "Failures", or dropped, never_saved, ….

    Attributes
    ----------
    code
        Its code. ``unknown_name`` may stand for never_saved and not_yet_written.
    """

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """What a reader gave: elements as bytes, or strings."""

    dtype: str
    shape: tuple[int, ...]
    content: bytes | list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked: None stands for any, an index is as NumPy takes it."""

    name: str
    step: int
    mode: int | None = None
    worker: int | None = None
    attempt: int | None = None
    index: tuple[int | slice, ...] = ()


class OpenRun(Protocol):
    """A run that a reader opened."""

    def facts(self) -> Json:
        """Give attrs, is_closed, names."""

    def damage(self) -> list[str]:
        """Give the codes of what was found damaged."""

    def steps(self, name: str) -> set[tuple[int, int, int]]:
        """Give (mode, worker, step) of all data of a name that is visible; may raise `Failure`."""

    def step_table(self) -> set[tuple[int, int, int, int, int]]:
        """Give (worker, mode, step, mode_step, wall_us) of all that is visible."""

    def value(self, question: Question) -> Value:
        """Read; may raise `Failure`."""

    def statistics(self, question: Question) -> list[float]:
        """Give the ten statistics; may raise `Failure`."""


class Reader(Protocol):
    """A reader under test."""

    def open(self, folder: Path) -> OpenRun:
        """Open a run; may raise `Failure`."""

    def codes(self, data: bytes, document: Json) -> set[str]:
        """Read a single file (of the type that the document says); give the codes met."""


def vectors(kind: str) -> list[Path]:
    """Give the JSON documents of ``valid`` or ``invalid``, in order."""
    return sorted((VECTORS / kind).glob("*.json"))


def problems(path: Path, reader: Reader) -> list[str]:
    """Check a reader with one vector.

    Parameters
    ----------
    path
        Of the vector's JSON document.
    """
    document: Json = json.loads(path.read_text("utf-8"))
    base = path.with_suffix("")
    if document["type"] != "run":
        (file,) = (p for p in path.parent.glob(f"{path.stem}.*") if p != path)
        found = reader.codes(file.read_bytes(), document)
        return [] if document["code"] in found else [f"codes {found}, not {document['code']}"]
    if document.get("operation") == "open":
        return list(_refusal(document, base, reader))
    try:
        run = reader.open(base)
    except Failure as failure:
        return [f"opening failed: {failure.code}"]
    if document.get("operation") == "damage" and document["code"] not in run.damage():
        return [f"damage {run.damage()} without {document['code']}"]
    return list(_content(document, run)) if "tensors" in document else []


def _refusal(document: Json, folder: Path, reader: Reader) -> Iterator[str]:
    try:
        reader.open(folder)
    except Failure as failure:
        if failure.code != document["code"]:
            yield f"opening failed with {failure.code}, not {document['code']}"
    else:
        yield f"opened, without {document['code']}"


def _content(document: Json, run: OpenRun) -> Iterator[str]:
    for key, found in run.facts().items():
        if found != document[key]:
            yield f"{key}: {found!r}, not {document[key]!r}"
    found_damage, wanted_damage = set(run.damage()), set(document.get("damage", ()))
    if found_damage != wanted_damage:
        yield f"damage {sorted(found_damage)}, not {sorted(wanted_damage)}"
    yield from _listing(document, run)
    rows = Counter(map(_key, document["tensors"]))
    for row in document["tensors"]:
        if rows[_key(row)] > 1:
            continue  # several parts of one worker: only the whole can be asked for
        question = _question(row)
        if row["kind"] == 1:
            yield from _check_statistics(row, run, question)
        else:
            yield from _check(row, run, question, row.get("code"))
    for row in document.get("reads", ()):
        yield from _check(row, run, _question(row), None)
    for row in document.get("absent", ()):
        yield from _check(row, run, _question(row), row["state"])
    for row in document.get("failures", ()):
        yield from _check(row, run, _question(row), row["code"])


def _listing(document: Json, run: OpenRun) -> Iterator[str]:
    unlistable = document.get("unlistable", {})
    for name in document["names"]:
        wanted = {
            (row["mode"], row["worker"], int(row["step"]))
            for row in document["tensors"]
            if row["name"] == name and row["kind"] == 0
        }
        try:
            found = run.steps(name)
        except Failure as failure:
            if failure.code != unlistable.get(name):
                yield f"listing {name!r} failed: {failure.code}"
            continue
        if name in unlistable:
            yield f"listing {name!r} worked"
        elif found != wanted:
            yield f"steps of {name!r}: {sorted(found ^ wanted)} are not in both"
    table = {
        (row["worker"], row["mode"], int(row["step"]), int(row["mode_step"]), int(row["wall_us"]))
        for row in document["step_table"]
    }
    try:
        found_table = run.step_table()
    except Failure as failure:
        yield f"the step table failed: {failure.code}"
        return
    if found_table != table:
        yield f"step table: {sorted(found_table ^ table)} are not in both"


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[k] for k in ("name", "kind", "mode", "worker", "attempt", "step"))


def _question(row: Mapping[str, Any]) -> Question:
    index = tuple(slice(*i) if isinstance(i, list) else i for i in row.get("index", ()))
    which = {key: row.get(key) for key in ("mode", "worker", "attempt")}
    return Question(name=row["name"], step=int(row["step"]), index=index, **which)


def _check(
    row: Mapping[str, Any], run: OpenRun, question: Question, code: str | None
) -> Iterator[str]:
    try:
        value = run.value(question)
    except Failure as failure:
        is_absent = code in ("never_saved", "not_yet_written")
        if failure.code != code and not (is_absent and failure.code == "unknown_name"):
            yield f"{question}: {failure.code}, not {code}"
        return
    if code is not None:
        yield f"{question}: a value, not {code}"
        return
    wanted = row["strings"] if "strings" in row else bytes.fromhex(row["data"])
    if (value.dtype, list(value.shape)) != (row["dtype"], row["shape"]):
        yield f"{question}: {value.dtype} {value.shape}, not {row['dtype']} {row['shape']}"
    elif value.content != wanted:
        found = value.content.hex() if isinstance(value.content, bytes) else value.content
        yield f"{question}: {str(found)[:200]}, not {str(wanted)[:200]}"


def _check_statistics(row: Mapping[str, Any], run: OpenRun, question: Question) -> Iterator[str]:
    wanted = struct.unpack("<10d", bytes.fromhex(row["data"]))
    try:
        found = run.statistics(question)
    except Failure as failure:
        yield f"statistics, {question}: {failure.code}"
        return
    for a, b in zip(found, wanted, strict=True):
        if a != b and not (math.isnan(a) and math.isnan(b)):
            yield f"statistics, {question}: {found}, not {wanted}"
            return
