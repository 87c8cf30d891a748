"""Import of folders of .safetensors and .npz files."""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import tensorstore_fmt as tsf
from tensorstore_fmt.cli import main
from tensorstore_fmt.interop.importing import import_npz, import_safetensors
from tensorstore_fmt.interop.importing.arrays import step_of


@pytest.mark.parametrize(
    ("path", "step"),
    [
        ("step_000100.npz", 100),
        ("ckpt-100/model.safetensors", 100),
        ("ckpt-100/model-00001-of-00002.safetensors", 100),
        ("v2/epoch3-step40.npz", 40),
        ("7/weights.npz", 7),
        ("a1/b/c.npz", 1),
        ("weights.npz", None),
        ("9" * 30 + ".npz", None),
    ],
)
def test_step_of_a_path(path: str, step: int | None) -> None:
    assert step_of(path) == step


def test_step_by_pattern() -> None:
    assert step_of("epoch=3-step=40.npz", re.compile(r"epoch=(\d+)")) == 3
    assert step_of("epoch=3-step=40.npz", re.compile(r"(e).*step=(?P<step>\d+)")) == 40
    assert step_of("x.npz", re.compile(r"step=(\d+)")) is None


def test_safetensors(tmp_path: Path) -> None:
    source = tmp_path / "checkpoints"
    rng = np.random.default_rng(0)
    kinds = ["float32", "float16", "float64", "int8", "uint16", "int64", "bool", "uint8"]
    expected: dict[tuple[int, str], np.ndarray] = {}
    for step in (10, 200):
        folder = source / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        values = {f"w.{kind}": (rng.random((3, 5)) * 9).astype(kind) for kind in kinds}
        values["empty"] = np.empty((0, 2), np.float32)
        values["b.bf16"] = rng.random(7).astype(ml_dtypes.bfloat16)
        names = sorted(values)
        save_file({n: values[n] for n in names[:5]}, folder / "model-00001-of-00002.safetensors")
        save_file({n: values[n] for n in names[5:]}, folder / "model-00002-of-00002.safetensors")
        expected |= {(step, name): value for name, value in values.items()}
    report = import_safetensors(source, tmp_path / "run", mode="TRAIN")
    assert (report.ok, report.values) == (True, len(expected))
    run = tsf.open_run(tmp_path / "run")
    assert run.steps("TRAIN").tolist() == [10, 200]
    for (step, name), value in expected.items():
        found = run[name].read(step=step)
        assert (found.dtype, found.shape) == (value.dtype, value.shape)
        assert found.tobytes() == value.tobytes()


def test_npz(tmp_path: Path) -> None:
    source = tmp_path / "out"
    source.mkdir()
    rng = np.random.default_rng(0)
    for step in (1, 20, 3):
        values = {
            "w": np.asfortranarray(rng.random((4, 6))),
            "deep/name": rng.random(3).astype(">f4"),
            "text": np.array(["a", "grün"]),
            "c": np.array(1j, np.complex64),
        }
        save = np.savez_compressed if step == 3 else np.savez
        save(source / f"epoch{step}.npz", **values)
    report = import_npz(source, tmp_path / "run")
    assert report.ok
    run = tsf.open_run(tmp_path / "run")
    assert run["w"].steps.tolist() == [1, 3, 20]
    found = np.load(source / "epoch3.npz")
    assert np.array_equal(run["w"].read(step=3), found["w"])
    assert np.array_equal(run["deep/name"].read(step=3), found["deep/name"])
    assert run["text"].read(step=3).tolist() == ["a", "grün"]
    assert run["c"].read(step=3) == 1j


def test_one_file_and_a_pattern(tmp_path: Path) -> None:
    np.savez(tmp_path / "epoch=3-loss=0.25.npz", w=np.ones(3))
    np.savez(tmp_path / "epoch=4-loss=0.20.npz", w=np.ones(3))
    one = tmp_path / "epoch=3-loss=0.25.npz"
    report = import_npz(one, tmp_path / "one", step_pattern=r"epoch=(\d+)")
    assert report.values == 1
    assert tsf.open_run(tmp_path / "one")["w"].steps.tolist() == [3]
    import_npz(tmp_path, tmp_path / "all", step_pattern=r"epoch=(?P<step>\d+)")
    assert tsf.open_run(tmp_path / "all")["w"].steps.tolist() == [3, 4]
    for pattern in ("(", "no group"):
        with pytest.raises(tsf.ArgumentError):
            import_npz(tmp_path, tmp_path / "none", step_pattern=pattern)


def test_what_cannot_be_taken_is_said(tmp_path: Path) -> None:
    source = tmp_path / "out"
    source.mkdir()
    objects = np.array([{"a": 1}], object)
    np.savez(source / "s1.npz", w=np.ones(2), objects=objects, dates=np.array(["2020-01-01"], "M8"))
    (source / "s2.npz").write_bytes(b"no archive")
    np.savez(source / "noname.npz", w=np.ones(2))
    np.savez(source / "again1.npz", w=np.ones(2))
    whole = (source / "s1.npz").read_bytes()
    (source / "s3.npz").write_bytes(whole[:-40])
    report = import_npz(source, tmp_path / "run")
    found = {(s.file, s.code) for s in report.skipped}
    assert found == {
        ("s1.npz", "unknown_dtype"),
        ("s1.npz", "bad_argument"),
        ("s2.npz", "malformed"),
        ("noname.npz", "no_step"),
        ("s1.npz", "repeated"),
        ("s3.npz", "malformed"),
    }
    assert [n for n in tsf.open_run(tmp_path / "run").names() if "/" not in n] == ["w"]


def test_bombs_are_refused(tmp_path: Path) -> None:
    """What a header claims is compared with the file before anything is allocated."""
    source = tmp_path / "out"
    source.mkdir()
    buffer = io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": (2**40,)}
    np.lib.format.write_array_header_1_0(buffer, header)
    with zipfile.ZipFile(source / "s1.npz", "w") as archive:
        archive.writestr("w.npy", buffer.getvalue())
    assert [s.code for s in import_npz(source, tmp_path / "a").skipped] == ["malformed"]
    text = json.dumps({"w": {"dtype": "F64", "shape": [2**40], "data_offsets": [0, 2**43]}})
    (source / "s1.safetensors").write_bytes(len(text).to_bytes(8, "little") + text.encode())
    (source / "s2.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    report = import_safetensors(source, tmp_path / "b")
    assert [s.code for s in report.skipped] == ["truncated", "malformed"]


def test_every_cut_of_a_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "step5.safetensors"
    save_file({"a": np.arange(6.0), "b": np.arange(4.0)}, path)
    whole = path.read_bytes()
    for cut in range(0, len(whole), 11):
        path.write_bytes(whole[:cut])
        place = f"memory://st-cut/{cut}"
        report = import_safetensors(tmp_path, place)
        assert not report.ok
        run = tsf.open_run(place)
        for name, value in {"a": np.arange(6.0), "b": np.arange(4.0)}.items():
            if name in run:
                assert np.array_equal(run[name].read(step=5), value)
        assert "b" not in run


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    np.savez(tmp_path / "out" / "e3-s7.npz", w=np.ones(3))
    out, run = str(tmp_path / "out"), str(tmp_path / "run")
    options = ["--step-pattern", "e([0-9]+)", "--mode", "eval"]
    assert main(["import", "npz", out, run, *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["values"] == 1
    assert tsf.open_run(run).steps("EVAL").tolist() == [3]
    assert main(["import", "tensorboard", out, f"{run}2", "--mode", "EVAL"]) == 2
    assert main(["import", "safetensors", out, f"{run}3"]) == 2
