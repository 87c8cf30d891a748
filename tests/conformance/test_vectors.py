"""Two readers and every vector: both give what the vector says.

The library's own reader, and the one written by somebody who had only the spec. What the members
of a vector's document ask is said once, in `spec/vectors/conformance.py`.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import pytest
from conformance.independent_reader.adapter import Adapter

import tensorstore_fmt as tsf
from tensorstore_fmt import dtypes
from tensorstore_fmt.format import bundle, codec, layout, runfile, strings
from tensorstore_fmt.reading import steptable
from tensorstore_fmt.reading.modes import MODE_NAMES

VECTORS = Path(__file__).resolve().parents[2] / "spec" / "vectors"

T = TypeVar("T")


def _load() -> ModuleType:
    """Import `spec/vectors/conformance.py`, which is no package."""
    spec = importlib.util.spec_from_file_location("vectors_kit", VECTORS / "conformance.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["vectors_kit"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


kit = _load()


def _or_failure(work: Callable[[], T]) -> T:
    try:
        return work()
    except tsf.TensorStoreError as error:
        raise kit.Failure(error.code) from error


class LibraryRun:
    def __init__(self, run: tsf.Run) -> None:
        self._run = run

    def facts(self) -> dict[str, Any]:
        run = self._run
        return {
            "run_id": run.run_id,
            "attrs": dict(run.attrs),
            "is_closed": run.is_closed,
            "names": sorted(run.names(), key=str.encode),
        }

    def damage(self) -> list[str]:
        return [error.code for error in self._run.damage]

    def steps(self, name: str) -> set[tuple[int, int, int]]:
        tensor = self._run[name]
        found = set()
        for mode, worker in itertools.product(tensor.modes, tensor.workers):
            narrow = tensor.select(mode=mode, worker=worker)
            steps = _or_failure(partial(getattr, narrow, "steps"))
            found |= {(MODE_NAMES.index(mode), worker, step) for step in steps.tolist()}
        return found

    def step_table(self) -> set[tuple[int, int, int, int, int]]:
        rows = _or_failure(lambda: steptable.step_rows(self._run._session, None))
        columns = (rows.worker, rows.mode, rows.step, rows.mode_step, rows.wall_time_us)
        return set(zip(*(column.tolist() for column in columns), strict=True))

    def value(self, question: Any) -> Any:
        value = _or_failure(
            lambda: self._run[question.name].read(
                step=question.step, index=question.index, **_which(question)
            )
        )
        if isinstance(value, str):
            return kit.Value(dtype="string", shape=(), content=[value])
        if value.dtype == object:
            return kit.Value(dtype="string", shape=value.shape, content=value.ravel().tolist())
        name = dtypes.dtype_name(value.dtype)
        stored = value.astype(dtypes.numpy_dtype(name), copy=False)
        return kit.Value(dtype=name, shape=value.shape, content=stored.tobytes())

    def statistics(self, question: Any) -> list[float]:
        stats = _or_failure(
            lambda: self._run[question.name].stats([question.step], **_which(question))
        )
        return [float(stats[field][0]) for field in layout.STATS_FIELDS]


def _which(question: Any) -> dict[str, Any]:
    mode = None if question.mode is None else MODE_NAMES[question.mode]
    return {"mode": mode, "worker": question.worker, "attempt": question.attempt}


class LibraryReader:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self, folder: Path) -> LibraryRun:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # damage; it is asked for
            return LibraryRun(_or_failure(lambda: tsf.open_run(str(folder))))

    def codes(self, data: bytes, document: dict[str, Any]) -> set[str]:
        if document["type"] == "segment":
            return self._codes_of_segment(data, document)
        try:
            _read_file(data, document)
        except tsf.TensorStoreError as error:
            return {error.code}
        return set()

    def _codes_of_segment(self, data: bytes, document: dict[str, Any]) -> set[str]:
        """Make a run around the segment, and touch all of it."""
        run_id = bytes.fromhex(document["run_id"])
        info = runfile.RunInfo(run_id=run_id, created_us=0, attrs={})
        (self._folder / "run.json").write_bytes(runfile.encode(info))
        (self._folder / "index").mkdir()
        (self._folder / "index" / document["name"]).write_bytes(data)
        try:
            run = self.open(self._folder)
        except kit.Failure as failure:
            return {failure.code}
        names = run.facts()["names"]
        works: list[Callable[[], object]] = [run.step_table]
        works += [partial(run.steps, name) for name in names]
        works += [partial(run.value, kit.Question(name=name, step=1)) for name in names]
        found = set(run.damage())
        for work in works:
            try:
                work()
            except kit.Failure as failure:
                found.add(failure.code)
        return found


def _read_file(data: bytes, facts: dict[str, Any]) -> None:
    kind = facts["type"]
    if kind == "bundle":
        bundle.decode(data, run_id=bytes.fromhex(facts["run_id"]), nbytes=len(data))
    elif kind == "run.json":
        runfile.decode(data)
    elif kind == "payload":
        out = np.empty(facts["raw_nbytes"], np.uint8)
        codec.decode(data, out, codec=facts["codec"], dtype=facts["dtype"], rows=facts["rows"])
    else:
        strings.unpack_strings(data, facts["count"])


def _vectors() -> list[Any]:
    paths = [*kit.vectors("valid"), *kit.vectors("invalid")]
    return [pytest.param(path, id=f"{path.parent.name}/{path.stem}") for path in paths]


@pytest.mark.parametrize("kind", ["valid", "invalid"])
def test_there_are_vectors(kind: str) -> None:
    assert len(kit.vectors(kind)) > 40


def test_every_file_belongs_to_a_vector() -> None:
    for kind in ("valid", "invalid"):
        stems = {path.stem for path in kit.vectors(kind)}
        for path in (VECTORS / kind).iterdir():
            assert (path.name if path.is_dir() else path.stem) in stems


@pytest.mark.parametrize("path", _vectors())
def test_the_library_follows_the_vector(path: Path, tmp_path: Path) -> None:
    assert not kit.problems(path, LibraryReader(tmp_path))


@pytest.mark.parametrize("path", _vectors())
def test_the_independent_reader_follows_the_vector(path: Path) -> None:
    assert not kit.problems(path, Adapter(kit))
