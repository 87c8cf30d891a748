"""Exports: what is in the files, exactly; what is refused; what a failure leaves behind."""

from __future__ import annotations

import csv
import itertools
import json
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv as arrow_csv
from pyarrow import parquet

from tensorstore_fmt import dtypes
from tensorstore_fmt.errors import (
    AmbiguousError,
    ArgumentError,
    NameNotFoundError,
    StepNotFoundError,
)
from tensorstore_fmt.interop import export, picking, safetensors, tables
from tensorstore_fmt.reading.run import Run, open_run
from tensorstore_fmt.writing.run import create_run

NUMBERS = [name for name in dtypes.NAMES if name != dtypes.STRING]


_NIBBLES = {"int4": (-8, 8), "uint4": (0, 16), "int2": (-2, 2), "uint2": (0, 4)}
_BITS = {"float6_e2m3fn": 64, "float6_e3m2fn": 64, "float4_e2m1fn": 16, "bool": 2}


def tensor(name: str, step: int = 0) -> np.ndarray:
    """Random bit patterns of a dtype, NaN payloads included; shape (2, 3, 4)."""
    dtype = dtypes.numpy_dtype(name)
    generator = np.random.default_rng(step)
    if name in _NIBBLES:
        return generator.integers(*_NIBBLES[name], (2, 3, 4)).astype(dtype)
    raw = generator.integers(0, _BITS.get(name, 256), 24 * dtype.itemsize).astype(np.uint8)
    return raw.view(dtype).reshape(2, 3, 4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    url = str(tmp_path_factory.mktemp("runs") / "run")
    with create_run(url) as writer:
        for step in range(20):
            writer.log(
                {"loss": 1 / (step + 1), "acc": np.float32(0.1) * step, "n": step},
                step=step,
                mode="TRAIN",
            )
            if step % 5 == 0:
                writer.log({"loss": float("nan")}, step=step, mode="EVAL")
                writer.log({f"of/{name}": tensor(name, step) for name in NUMBERS}, step=step)
                writer.log(
                    {
                        "big": np.arange(300_000, dtype="f4") + step,
                        "empty": np.empty((0, 3), "i2"),
                        "ragged": np.arange(step),
                        "note": 'a "quoted", text\nof two lines' if step else "",
                        "words": np.array(["a", "größe", "", "b\0c"], object),
                        "seed": np.uint64(2**63 + step),
                        "flag": step == 5,
                        "NaN": np.nan,
                    },
                    step=step,
                )
    return open_run(url)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# --- .npy and .npz ---------------------------------------------------------------------
def test_npy_of_one_step(run: Run, tmp_path: Path) -> None:
    report = export(run, tmp_path / "x.npy", names=["of/float64"], step=5)
    loaded = np.load(tmp_path / "x.npy")
    assert same_bits(loaded, tensor("float64", 5))
    assert (report.names, report.steps) == (["of/float64"], [5])
    assert report.nbytes == (tmp_path / "x.npy").stat().st_size
    assert json.dumps(report.as_dict())


def test_npy_of_several_steps(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picking, "_PIECE_NBYTES", 3_000_000)  # two steps a piece
    done: list[tuple[int, int]] = []
    export(
        run,
        tmp_path / "x.npy",
        names=["big"],
        steps=slice(5, None),
        progress=lambda n, total, _: done.append((n, total)),
    )
    loaded = np.load(tmp_path / "x.npy")
    assert same_bits(loaded, run["big"].read(steps=slice(5, None)))
    assert loaded.shape == (3, 300_000)
    assert done == [(2_400_000, 3_600_000), (3_600_000, 3_600_000)]


def test_npz_of_a_step(run: Run, tmp_path: Path) -> None:
    plain = [name for name in NUMBERS if not hasattr(ml_dtypes, name)]
    names = [*(f"of/{name}" for name in plain), "empty", "words", "note", "flag"]
    export(run, tmp_path / "x.npz", names=names, step=10)
    with np.load(tmp_path / "x.npz", allow_pickle=False) as loaded:
        assert sorted(loaded) == sorted(names)
        for name in plain:
            assert same_bits(loaded[f"of/{name}"], tensor(name, 10))
        assert loaded["empty"].shape == (0, 3)
        assert loaded["words"].tolist() == ["a", "größe", "", "b\0c"]
        assert loaded["note"][()] == 'a "quoted", text\nof two lines'
        assert loaded["flag"][()] == np.False_


def test_npz_is_deterministic(run: Run, tmp_path: Path) -> None:
    for name in ("a", "b"):
        export(run, tmp_path / f"{name}.npz", names=["big", "empty"], step=10)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize("name", [name for name in NUMBERS if hasattr(ml_dtypes, name)])
def test_npy_of_ml_dtypes_needs_a_cast(run: Run, tmp_path: Path, name: str) -> None:
    out = tmp_path / "x.npy"
    with pytest.raises(ArgumentError) as caught:
        export(run, out, names=[f"of/{name}"], step=5)
    assert caught.value.code == "unfit_dtype"
    assert caught.value.facts["names"] == [f"of/{name}"]
    assert list(tmp_path.iterdir()) == []
    expected = tensor(name, 5)
    export(run, out, names=[f"of/{name}"], step=5, cast="float32")
    loaded = np.load(out)
    assert loaded.dtype == np.float32
    assert np.array_equal(loaded, expected.astype("f4"), equal_nan=True)
    assert np.array_equal(loaded.astype(expected.dtype), expected, equal_nan=True)
    export(run, out, names=[f"of/{name}"], step=5, cast="bits", force=True)
    bits = np.load(out)
    assert bits.dtype.kind == "u"
    again = bits.view(expected.dtype)
    # The unused high bits of an int4 in memory are no data.
    assert np.array_equal(again, expected) if name in _NIBBLES else same_bits(again, expected)


def test_what_the_format_has_is_not_cast(run: Run, tmp_path: Path) -> None:
    export(run, tmp_path / "x.npz", names=["of/float64", "of/bfloat16"], step=5, cast="float32")
    with np.load(tmp_path / "x.npz") as loaded:
        assert loaded["of/float64"].dtype == np.float64
        assert loaded["of/bfloat16"].dtype == np.float32


def test_strings_that_numpy_would_cut_are_refused(tmp_path: Path) -> None:
    with create_run(str(tmp_path / "run")) as writer:
        writer.log({"s": np.array(["a\0", "b"], object), "nul\0name": 1.0}, step=0)
    run = open_run(str(tmp_path / "run"))
    with pytest.raises(ArgumentError):
        export(run, tmp_path / "x.npy", names=["s"], step=0)
    with pytest.raises(ArgumentError):
        export(run, tmp_path / "x.npz", names=["nul\0name"], step=0)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# --- .safetensors ------------------------------------------------------------------------
def test_safetensors(run: Run, tmp_path: Path) -> None:
    package = pytest.importorskip("safetensors")
    names = [f"of/{name}" for name in safetensors.DTYPES]
    out = tmp_path / "x.safetensors"
    export(run, out, names=[*names, "empty"], step=5)
    found = dict(package.deserialize(out.read_bytes()))
    assert sorted(found) == sorted([*names, "empty"])
    for name, label in safetensors.DTYPES.items():
        expected = tensor(name, 5)
        entry = found[f"of/{name}"]
        assert (entry["dtype"], entry["shape"]) == (label, list(expected.shape))
        assert bytes(entry["data"]) == expected.tobytes()
    with package.safe_open(out, "np") as file:
        assert file.metadata()["run_id"] == run.run_id
        assert file.metadata()["step"] == "5"
        assert same_bits(file.get_tensor("of/float64"), tensor("float64", 5))


def test_safetensors_are_aligned(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    export(run, out, names=[f"of/{name}" for name in safetensors.DTYPES], step=5)
    data = out.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + size])
    header.pop("__metadata__")
    ends = sorted(entry["data_offsets"] for entry in header.values())
    assert ends[0][0] == 0
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ends))
    assert ends[-1][1] == len(data) - 8 - size
    for name, entry in header.items():
        itemsize = dtypes.itemsize(name.removeprefix("of/"))
        assert (8 + size + entry["data_offsets"][0]) % min(itemsize, 8) == 0


def test_safetensors_refuse_what_they_lack(run: Run, tmp_path: Path) -> None:
    lacking = {name for name in NUMBERS if name not in safetensors.DTYPES}
    with pytest.raises(ArgumentError) as caught:
        export(run, tmp_path / "x.safetensors", names=["of/*"], step=5)
    assert caught.value.facts["names"] == sorted(f"of/{name}" for name in lacking)
    with pytest.raises(ArgumentError):
        export(run, tmp_path / "x.safetensors", names=["note"], step=5)
    assert list(tmp_path.iterdir()) == []


def test_all_of_a_step_says_what_is_left_out(run: Run, tmp_path: Path) -> None:
    report = export(
        run, tmp_path / "x.safetensors", step=5, mode="NONE", names=["[bnl]*", "of/i*"], cast="bits"
    )
    assert report.left_out["note"] == "a string"
    assert "big" in report.names
    assert "mode" in report.left_out["loss"]


# --- .csv and .parquet -------------------------------------------------------------------
def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_wide_csv(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "x.csv"
    report = export(run, out, names=["loss", "acc", "n"])
    rows = rows_of(out)
    assert list(rows[0]) == ["step", "mode", "worker", "wall_time", "loss", "acc", "n"]
    assert [(row["step"], row["mode"]) for row in rows[:3]] == [
        ("0", "EVAL"),
        ("0", "TRAIN"),
        ("1", "TRAIN"),
    ]
    train = [row for row in rows if row["mode"] == "TRAIN"]
    assert [float(row["loss"]) for row in train] == [1 / (step + 1) for step in range(20)]
    assert [float(row["acc"]) for row in train] == run["acc"].read().tolist()
    assert [row["n"] for row in train] == [str(step) for step in range(20)]
    assert [row["loss"] for row in rows if row["mode"] == "EVAL"] == ["nan"] * 4
    assert rows[0]["n"] == ""
    assert report.steps == list(range(20))
    table = arrow_csv.read_csv(out)
    assert table["wall_time"].type.equals(pa.timestamp("ns", "UTC"))


def test_wide_csv_in_several_parts(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(run, tmp_path / "one.csv")
    monkeypatch.setattr(tables, "_ROWS_AT_ONCE", 3)
    export(run, tmp_path / "many.csv")
    assert (tmp_path / "many.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()


def test_csv_is_exact_and_quoted(run: Run, tmp_path: Path) -> None:
    report = export(run, tmp_path / "x.csv", steps=slice(0, 6, 5), mode="NONE")
    first, second = rows_of(tmp_path / "x.csv")
    assert (first["note"], second["note"]) == ("", 'a "quoted", text\nof two lines')
    assert (first["seed"], second["seed"]) == (str(2**63), str(2**63 + 5))
    assert (first["flag"], second["flag"]) == ("false", "true")
    assert first["NaN"] == "nan"
    assert report.left_out["big"] == "no scalar"


def test_long_csv(run: Run, tmp_path: Path) -> None:
    export(run, tmp_path / "x.csv", names=["loss", "note"], step=5, long=True)
    rows = rows_of(tmp_path / "x.csv")
    assert [(r["name"], r["mode"], r["value"], bool(r["text"])) for r in rows] == [
        ("loss", "EVAL", "nan", False),
        ("note", "NONE", "", True),
        ("loss", "TRAIN", str(1 / 6), False),
    ]


def test_parquet(run: Run, tmp_path: Path) -> None:
    export(run, tmp_path / "x.parquet", names=["loss", "seed"], steps=slice(0, 6))
    table = parquet.read_table(tmp_path / "x.parquet")
    assert table.column_names == ["step", "mode", "worker", "wall_time", "name", "value", "text"]
    loss = table.filter(pa.compute.equal(table["name"], "loss"))
    assert len(loss) == 8
    assert set(table["text"].to_pylist()) == {None, str(2**63), str(2**63 + 5)}


def test_several_workers_and_a_hidden_attempt(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    writers = [create_run(url, worker=worker, num_workers=2) for worker in range(2)]
    closing = []
    for worker, writer in enumerate(writers):
        for step in range(4):
            writer.log({"loss": worker + step / 10}, step=step)
        closing.append(threading.Thread(target=writer.close))
    for thread in closing:
        thread.start()
    for thread in closing:
        thread.join()
    with create_run(url, resume_from=2) as writer:
        writer.log({"loss": 9.0}, step=2)
    run = open_run(url)
    export(run, tmp_path / "now.csv")
    now = [(r["step"], r["worker"], r["loss"]) for r in rows_of(tmp_path / "now.csv")]
    assert now == [("0", "0", "0"), ("0", "1", "1"), ("1", "0", "0.1"), ("1", "1", "1.1"),
                   ("2", "0", "9")]  # fmt: skip
    export(run, tmp_path / "then.csv", attempt=0, worker=1)
    then = [(r["step"], r["worker"], r["loss"]) for r in rows_of(tmp_path / "then.csv")]
    assert then == [("0", "1", "1"), ("1", "1", "1.1"), ("2", "1", "1.2"), ("3", "1", "1.3")]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- what is refused -----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("out", "options", "code"),
    [
        ("x.txt", {}, "unknown_format"),
        ("x", {}, "unknown_format"),
        ("s3://bucket/x.csv", {}, "bad_argument"),
        ("nowhere/x.csv", {}, "bad_argument"),
        ("x.npz", {}, "bad_argument"),
        ("x.npy", {"step": 5}, "bad_argument"),
        ("x.npy", {"names": ["big"], "step": 5, "steps": slice(1)}, "bad_argument"),
        ("x.npz", {"step": 5, "long": True}, "bad_argument"),
        ("x.csv", {"cast": "bits"}, "bad_argument"),
        ("x.csv", {"names": ["big"]}, "no_scalar"),
        ("x.npy", {"names": ["ragged"]}, "shape_varies"),
        ("x.csv", {"names": ["nothing*"]}, "unknown_name"),
        ("x.csv", {"names": ["los"]}, "unknown_name"),
        ("x.npy", {"names": ["big"], "step": 3}, "never_saved"),
        ("x.npy", {"names": ["big"], "steps": slice(6, 9)}, "never_saved"),
        ("x.csv", {"steps": slice(100, None)}, "never_saved"),
        ("x.csv", {"names": ["loss"], "step": 100}, "never_saved"),
        ("x.npz", {"step": 100}, "never_saved"),
        ("x.npz", {"names": ["loss"], "step": 5}, "ambiguous"),
    ],
)
def test_what_is_refused(
    run: Run,
    here: Path,
    out: str,
    options: dict[str, Any],
    code: str,
) -> None:
    with pytest.raises(
        (ArgumentError, NameNotFoundError, StepNotFoundError, AmbiguousError)
    ) as caught:
        export(run, out, **options)
    assert caught.value.code == code
    assert list(here.iterdir()) == []


def test_nothing_is_replaced_unasked(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "x.npy"
    out.write_text("mine")
    with pytest.raises(ArgumentError) as caught:
        export(run, out, names=["big"], step=5)
    assert caught.value.code == "out_exists"
    assert out.read_text() == "mine"
    export(run, out, names=["big"], step=5, force=True)
    assert np.load(out)[0] == 5


def test_somebody_else_may_be_quicker(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "x.npy"

    def create_it(*_: object) -> None:
        out.write_text("x")

    with pytest.raises(ArgumentError) as caught:
        export(run, out, names=["big"], step=5, progress=create_it)
    assert caught.value.code == "out_exists"
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]
    assert out.read_text() == "x"


def test_a_failure_leaves_nothing(run: Run, tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError):
        export(run, tmp_path / "x.npy", names=["big"], step=5, progress=fail)
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_followed(run: Run, tmp_path: Path) -> None:
    (tmp_path / "link.npy").symlink_to(tmp_path / "x.npy")
    (tmp_path / "x.npy").write_text("old")
    export(run, tmp_path / "link.npy", names=["big"], step=5, force=True)
    assert (tmp_path / "link.npy").is_symlink()
    assert np.load(tmp_path / "x.npy")[0] == 5


def test_first_and_last_are_steps_that_all_have(run: Run, tmp_path: Path) -> None:
    names = ["acc", "big"]
    assert export(run, tmp_path / "a.npz", names=names, step="last").steps == [15]
    assert export(run, tmp_path / "b.npz", names=names, step="first").steps == [0]
    assert export(run, tmp_path / "c.npy", names=["acc"], step="last").steps == [19]


def test_the_command(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tensorstore_fmt.cli import main

    out = str(tmp_path / "x.csv")
    assert main(["export", run.url, out, "--names", "loss", "acc*"]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: 2 names, steps 0..19, ")
    assert main(["export", run.url, out]) == 1
    assert "--force" in capsys.readouterr().err
    assert main(["export", run.url, out, "--force", "--long", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"]["big"] == "no scalar"
    assert main(["export", run.url, str(tmp_path / "x.txt")]) == 2
    assert (
        main(["export", run.url, str(tmp_path / "x.npz"), "--step", "last", "--names", "b*"]) == 0
    )
    assert np.load(tmp_path / "x.npz")["big"][0] == 15
