"""The independent reader as `spec/vectors/conformance.py` wants a reader; no part of the reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .bundle import read_bundle
from .codecs import cut_strings, decode_payload
from .errors import SpecError
from .limits import Array
from .run import Run
from .run_json import read_run_json
from .segment import read_segment


class AdaptedRun:
    """An open run."""

    def __init__(self, module: Any, run: Run) -> None:
        self._module, self._run = module, run

    def facts(self) -> dict[str, Any]:
        run = self._run
        return {
            "run_id": run.json["run_id"],
            "attrs": run.attrs,
            "is_closed": run.is_closed,
            "names": run.names(),
        }

    def damage(self) -> list[str]:
        return [error.code for error in self._run.damage]

    def steps(self, name: str) -> set[tuple[int, int, int]]:
        try:
            rows = self._run.saved(name)
        except SpecError as error:
            raise self._module.Failure(error.code) from error
        return {(row.mode, row.worker, row.step) for row in rows if row.kind == 0}

    def step_table(self) -> set[tuple[int, int, int, int, int]]:
        return set(self._run.step_table())

    def value(self, question: Any) -> Any:
        q = question
        which = (q.name, q.step, q.mode, q.worker, q.attempt)
        try:
            dtype = self._run.dtype(*which)
            array = self._run.read(*which, index=q.index)
        except SpecError as error:
            raise self._module.Failure(error.code) from error
        return self._module.Value(dtype=dtype, shape=array.shape, content=_content(array))

    def statistics(self, question: Any) -> list[float]:
        q = question
        try:
            found = self._run.stats(q.name, q.step, q.mode, q.worker, q.attempt)
        except SpecError as error:
            raise self._module.Failure(error.code) from error
        return [float(x) for x in found]


class Adapter:
    """The reader; `module` is `spec/vectors/conformance.py`, which is no package."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def open(self, folder: Path) -> AdaptedRun:
        try:
            return AdaptedRun(self._module, Run(folder))
        except SpecError as error:
            raise self._module.Failure(error.code) from error

    def codes(self, data: bytes, document: dict[str, Any]) -> set[str]:
        try:
            _read_file(data, document)
        except SpecError as error:
            return {error.code}
        return set()


def _content(array: Array) -> bytes | list[str]:
    if array.dtype == object:
        texts: list[str] = array.ravel().tolist()
        return texts
    return array.tobytes()


def _read_file(data: bytes, facts: dict[str, Any]) -> None:
    kind = facts["type"]
    if kind == "segment":
        read_segment(data, name=facts["name"], run_id=facts["run_id"])
    elif kind == "bundle":
        read_bundle(data, run_id=facts["run_id"])
    elif kind == "run.json":
        read_run_json(data)
    elif kind == "payload":
        decode_payload(facts["codec"], data, facts["dtype"], facts["raw_nbytes"], facts["rows"])
    else:
        cut_strings(data, 1, 0, facts["count"])
