"""D8: runs of every released version stay readable, bit for bit; newer ones are refused clearly."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - gives NumPy the names of its dtypes
import numpy as np
import pytest
from compat.make_golden import GOLDEN, MANIFEST, RUNS, checksums
from conformance.independent_reader import open_run as open_independently
from support.editing import SegmentEditor, run_json
from support.goals import record

import tensorstore_fmt as tsf
from tensorstore_fmt.errors import StepDroppedError, UnsupportedError
from tensorstore_fmt.format import layout
from tensorstore_fmt.reading.modes import mode_number

CASES = sorted(
    (release.name, path.stem)
    for release in GOLDEN.iterdir()
    for path in release.glob("*.json")
    if path.name != MANIFEST
)


def loaded(release: str, name: str) -> tuple[Path, dict[str, Any]]:
    folder = GOLDEN / release / name
    return folder, json.loads((GOLDEN / release / f"{name}.json").read_text())


def value_of(expected: dict[str, Any]) -> np.ndarray:
    if expected["dtype"] == "string":
        return np.array(expected["texts"], object).reshape(expected["shape"])
    data = base64.b64decode(expected["bytes"])
    return np.frombuffer(data, np.dtype(expected["dtype"])).reshape(expected["shape"])


def is_same(found: object, expected: dict[str, Any]) -> bool:
    wanted = value_of(expected)
    array = np.asarray(found)
    if expected["dtype"] == "string":
        return array.shape == wanted.shape and array.astype(object).tolist() == wanted.tolist()
    has_form = array.dtype == wanted.dtype and array.shape == wanted.shape
    return has_form and array.tobytes() == wanted.tobytes()


def test_the_first_release_is_there() -> None:
    assert {("v1.0", name) for name in RUNS} <= set(CASES)


@pytest.mark.parametrize("release", sorted({release for release, _ in CASES}))
def test_no_byte_was_edited(release: str) -> None:
    manifest = json.loads((GOLDEN / release / MANIFEST).read_text())
    assert checksums(GOLDEN / release) == manifest
    assert sum(p.stat().st_size for p in (GOLDEN / release).rglob("*") if p.is_file()) < 300_000


def test_what_is_there_is_not_written_over() -> None:
    script = Path(__file__).with_name("make_golden.py")
    tests = Path(__file__).resolve().parents[1]
    code = f"import sys, runpy; sys.path[:0] = [{str(tests)!r}, {str(tests.parent)!r}]; "
    code += f"sys.argv[1:] = ['v1.0']; runpy.run_path({str(script)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 1
    assert b"never edited" in done.stderr


@pytest.mark.parametrize(("release", "name"), CASES)
def test_library_reads_it(release: str, name: str) -> None:
    folder, expected = loaded(release, name)
    run = tsf.open_run(folder)
    assert dict(run.attrs) == expected["attrs"]
    assert run.is_closed == expected["is_closed"]
    assert run.names() == sorted(expected["names"])
    for each in expected["values"]:
        tensor = run[each["name"]].select(**each["select"])
        if each.get("state") == "dropped":
            with pytest.raises(StepDroppedError):
                tensor.read(step=each["step"])
        else:
            assert is_same(tensor.read(step=each["step"]), each), (each["name"], each["step"])
    for each in expected["statistics"]:
        found = run[each["name"]].stats([each["step"]])
        numbers = [float(found[key][0]).hex() for key in layout.STATS_FIELDS]
        assert numbers == each["numbers"]
    n = len(expected["values"])
    record(f"D8 {release} {name}", n, statistics=len(expected["statistics"]), wrong=0)


@pytest.mark.parametrize(("release", "name"), CASES)
def test_independent_reader_agrees(release: str, name: str) -> None:
    folder, expected = loaded(release, name)
    run = open_independently(folder)
    assert run.attrs == expected["attrs"]
    assert run.is_closed == expected["is_closed"]
    assert run.names() == sorted(expected["names"], key=str.encode)
    for each in expected["values"]:
        select = dict(each["select"])
        if "mode" in select:
            select["mode"] = mode_number(select["mode"])
        if each.get("state") == "dropped":
            assert run.state(each["name"], each["step"], **select) == "dropped"
        else:
            found = run.read(each["name"], each["step"], **select)
            assert run.dtype(each["name"], each["step"], **select) == each["dtype"]
            if each["dtype"] != "string":  # dtypes that NumPy lacks come as their bits
                found = found.view(value_of(each).dtype)
            assert is_same(found, each), (each["name"], each["step"])


@pytest.mark.parametrize(("release", "name"), CASES)
def test_tools_work_on_it(release: str, name: str, tmp_path: Path) -> None:
    folder, expected = loaded(release, name)
    report = tsf.verify(folder)
    assert report.ok, report
    copy = tmp_path / name
    shutil.copytree(folder, copy)
    assert tsf.recover(copy).ok
    assert tsf.compact(copy).ok
    run = tsf.open_run(copy)
    assert run.is_closed
    for each in expected["values"]:
        if "state" not in each:
            tensor = run[each["name"]].select(**each["select"])
            assert is_same(tensor.read(step=each["step"]), each)


def test_newer_major_version_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(GOLDEN / "v1.0" / "closed", folder)
    (folder / layout.BUNDLE).unlink()
    document = (folder / layout.RUN_JSON).read_bytes()
    newer = document[: document.rindex(layout.RUN_JSON_TAIL)].replace(b"[1,0]", b"[2,0]")
    assert newer not in document
    segment = max((folder / "index").iterdir(), key=lambda p: p.stat().st_size)
    editor = SegmentEditor(segment.read_bytes())
    editor.header["major"] = 2
    for path, data in ((folder / layout.RUN_JSON, run_json(newer)), (segment, editor.encode())):
        before = path.read_bytes()
        path.write_bytes(data)
        with pytest.raises(UnsupportedError) as caught, warnings.catch_warnings():
            warnings.simplefilter("error")
            tsf.open_run(folder)
        assert caught.value.code == "unsupported_version"
        assert "2" in str(caught.value)
        path.write_bytes(before)
    assert not tsf.open_run(folder).damage
