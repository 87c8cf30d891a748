"""Import of smdebug's runs: real ones bit for bit, damaged ones with a report."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support.event_files import (
    TF,
    blob,
    event,
    record,
    smdebug_collections,
    smdebug_step,
    smdebug_value,
)

import tensorstore_fmt as tsf
from tensorstore_fmt.cli import main
from tensorstore_fmt.interop.importing import ImportReport, import_smdebug
from tensorstore_fmt.testing.servers import S3Server

DATA = Path(__file__).parent / "data" / "smdebug"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A run of one worker: steps 0, 10 and 20."""
    root = tmp_path / "source"
    for step in (0, 10, 20):
        values = {"a": full(step), "b": full(step + 1), "c": full(step + 2)}
        smdebug_step(root, step, dict(values))
    smdebug_collections(root, {})
    return root


def full(value: float) -> np.ndarray:
    return np.full((3, 4), value, np.float32)


def take(source: Path, tmp_path: Path, **options: Any) -> tuple[ImportReport, tsf.Run]:
    report = import_smdebug(source, tmp_path / "run", **options)
    assert tsf.verify(tmp_path / "run").ok
    return report, tsf.open_run(tmp_path / "run")


def codes(report: ImportReport) -> list[tuple[str, str, int | None]]:
    return [(s.code, s.file.rpartition("/")[2], s.offset) for s in report.skipped]


# --- real ones -----------------------------------------------------------------------------
def test_all_dtypes_of_two_workers_are_bit_exact(tmp_path: Path) -> None:
    report, run = take(DATA / "core", tmp_path)
    assert (report.ok, report.is_finished, report.workers) == (
        True,
        True,
        ["worker_0", "worker_1"],
    )
    expected = np.load(DATA / "expected_core.npz")
    for key in expected.files:
        step, worker, name = key.split("/", 2)
        name = name.replace(
            "smdebug/reductions/abs_mean/conv1/weight", "reductions/abs_mean/conv1/weight:0"
        )
        found = run[name].read(step=int(step[4:]), worker=int(worker[-1]))
        if expected[key].dtype.kind == "U":
            assert found.tolist() == expected[key].tolist()
        else:
            assert found.dtype == expected[key].dtype
            assert found.shape == expected[key].shape
            assert found.tobytes() == expected[key].tobytes()
    assert len(expected.files) == 144
    # Also two shapes at each step, which smdebug keeps in the index.
    assert report.values == 144 + 8
    assert run["shapes/shape_only"].read(step=3, worker=1).tolist() == [7, 9]
    assert run.is_closed


def test_a_run_of_the_torch_hook(tmp_path: Path) -> None:
    report, run = take(DATA / "torch", tmp_path)
    assert report.ok
    assert run.steps("TRAIN").tolist() == [0, 2, 4]
    assert run.steps("EVAL").tolist() == [6, 7]
    assert [run.mode_step(step) for step in run.steps()] == [0, 2, 4, 0, 1]
    assert run.wall_time(0) == pytest.approx(1795393604.778792, abs=1e-6)
    assert run["Net_fc.weight"].dtype == np.float32
    for step in run.steps():
        weight = run["Net_fc.weight"].read(step=step)
        assert run["reductions/mean/Net_fc.weight"].read(step=step) == pytest.approx(weight.mean())
        norm = run["reductions/abs_l2/Net_fc.weight"].read(step=step)
        assert norm == pytest.approx(np.linalg.norm(weight))
        relu = np.maximum(run["relu_input_0"].read(step=step), 0)
        assert np.array_equal(relu, run["relu_output_0"].read(step=step))
    collections = json.loads(run["smdebug/collections"].read(step=0))
    assert "CrossEntropyLoss_output_0" in collections["losses"]["tensor_names"]
    # The hook saved lr several times in a step; smdebug, too, shows the last one.
    replaced = [s for s in report.skipped if s.code == "replaced"]
    assert len(replaced) == report.skipped_count == 3
    assert not any(s.is_damage for s in replaced)
    assert json.loads(run["import/report"].read(step=7))["values"] == report.values == 143


def test_every_record_of_the_torch_hook_is_there(tmp_path: Path) -> None:
    _, run = take(DATA / "torch", tmp_path)
    for path in (DATA / "torch" / "index").rglob("*.json"):
        step = int(path.name.partition("_")[0])
        index = json.loads(path.read_text())
        data = (DATA / "torch" / index["meta"]["event_file_name"]).read_bytes()
        for row in index["tensor_payload"]:
            name = row["tensorname"].removeprefix("smdebug/")
            stored = np.asarray(run[name].read(step=step, mode=index["meta"]["mode"])).tobytes()
            assert stored in data[row["start_idx"] : row["start_idx"] + row["length"]]


# --- what there can be ---------------------------------------------------------------------
@pytest.mark.parametrize("name", sorted(TF))
def test_dtypes(tmp_path: Path, name: str) -> None:
    dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
    bits = np.random.default_rng(0).integers(0, 256, 64 * dtype.itemsize, np.uint8)
    value = (bits & 1 if name == "bool" else bits).view(dtype).reshape(4, 16)
    smdebug_step(tmp_path / "source", 5, {"x": value})
    report, run = take(tmp_path / "source", tmp_path)
    found = run["x"].read(step=5)
    assert report.ok
    assert (found.dtype, found.shape, found.tobytes()) == (dtype, (4, 16), value.tobytes())


def test_modes_workers_and_counts(tmp_path: Path) -> None:
    root = tmp_path / "source"
    for worker in ("worker_10", "worker_2"):
        for step, mode, count in ((0, "TRAIN", 0), (1, "EVAL", 0), (7, "PREDICT", 3)):
            at = 1e9 + step
            value = full(step + len(worker))
            smdebug_step(
                root, step, {"x": value}, worker=worker, mode=mode, mode_step=count, wall_time=at
            )
        smdebug_step(root, 9, {"x": full(9)}, worker=worker, mode="GLOBAL", mode_step=9)
        smdebug_collections(root, {}, worker=worker, num_workers=2)
    report, run = take(root, tmp_path)
    assert report.ok
    assert report.is_finished is False
    assert run.attrs["smdebug"]["workers"] == ["worker_2", "worker_10"]
    assert [run.steps(m).tolist() for m in ("TRAIN", "EVAL", "PREDICT", "NONE")] == [
        [0],
        [1],
        [7],
        [9],
    ]
    assert run.mode_step(7) == 3
    assert run.wall_time(7) == 1e9 + 7
    assert (run["x"].read(step=7, worker=0) == 7 + len("worker_2")).all()
    assert (run["x"].read(step=7, worker=1) == 7 + len("worker_10")).all()


def test_raw_values_beside_their_shape_are_there(tmp_path: Path) -> None:
    """With smdebug, asking for the shape as well made the values unreadable."""
    smdebug_step(tmp_path / "source", 0, {"w": full(1)}, shapes={"w": (3, 4)})
    _, run = take(tmp_path / "source", tmp_path)
    assert (run["w"].read(step=0) == 1).all()
    assert run["shapes/w"].read(step=0).tolist() == [3, 4]


def test_reductions_find_their_tensor(tmp_path: Path) -> None:
    root = tmp_path / "source"
    one = np.array([1.0], np.float32)
    values = {"smdebug/reductions/mean/a/w": one, "smdebug/reductions/abs_max/b/w": one}
    smdebug_step(root, 0, dict(values))
    smdebug_collections(root, {"weights": {"tensor_names": ["a/w:0", "b/w"]}})
    _, run = take(root, tmp_path)
    names = run.names("reductions/*")
    assert names == ["reductions/abs_max/b/w", "reductions/mean/a/w:0"]
    assert run[names[0]].shape == ()


def test_strings_and_empty_tensors(tmp_path: Path) -> None:
    root = tmp_path / "source"
    smdebug_step(root, 0, {"words": ["a", "", "grün"], "none": np.empty((0, 4), np.float32)})
    report, run = take(root, tmp_path)
    assert report.ok
    assert run["words"].read(step=0).tolist() == ["a", "", "grün"]
    assert run["none"].read(step=0).shape == (0, 4)


def test_any_url(source: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(f"{source}/", "/imports/source/", recursive=True)
    report = import_smdebug("memory://imports/source", "memory://imports/run")
    assert report.ok
    assert tsf.open_run("memory://imports/run")["a"].read().shape == (3, 3, 4)


def test_a_bucket(source: Path, s3: S3Server) -> None:
    for path in source.rglob("*"):
        if path.is_file():
            key = f"import-smdebug/{path.relative_to(source)}"
            s3.ask("PUT", f"/{s3.bucket}/{key}", path.read_bytes())
    at, options = s3.url("import-smdebug"), s3.storage_options
    report = import_smdebug(at, f"{at}-run", source_options=options, storage_options=options)
    assert report.ok
    assert report.values == 9
    assert tsf.open_run(f"{at}-run", storage_options=options)["c"].steps.tolist() == [0, 10, 20]


# --- damage --------------------------------------------------------------------------------
def test_a_flipped_byte_of_a_length(source: Path, tmp_path: Path) -> None:
    path = source / "events/000000000010/000000000010_worker_0.tfevents"
    data = bytearray(path.read_bytes())
    second = len(data) // 3
    data[second] ^= 1
    path.write_bytes(data)
    report, run = take(source, tmp_path)
    assert codes(report) == [("checksum", path.name, second)]
    assert "'b'" in report.skipped[0].reason
    assert not report.ok
    assert run["a"].steps.tolist() == [0, 10, 20]
    assert run["b"].steps.tolist() == [0, 20]
    assert (run["c"].read(step=10) == 12).all()


def test_every_cut_gives_what_is_before_it(source: Path) -> None:
    path = source / "events/000000000010/000000000010_worker_0.tfevents"
    whole = path.read_bytes()
    size = len(whole) // 3
    for cut in (0, 1, 11, 12, 40, size - 1, size, size + 5, 2 * size, 3 * size - 1):
        path.write_bytes(whole[:cut])
        place = f"memory://cut/{cut}"
        report = import_smdebug(source, place)
        run = tsf.open_run(place)
        kept = [name for name in "abc" if 10 in run[name].steps]
        assert kept == list("abc")[: cut // size]
        assert report.damage_count == 3 - len(kept)


def test_every_flip_is_noticed_or_harmless(tmp_path: Path) -> None:
    """A payload has no checksum, so bytes of the tensor itself may change; nothing else."""
    path = smdebug_step(tmp_path / "source", 3, {"a": full(1), "b": full(2)})
    whole = path.read_bytes()
    first = len(whole) // 2
    for place in range(0, first, 2):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        url = f"memory://flip/{place}"
        report = import_smdebug(tmp_path / "source", url)
        run = tsf.open_run(url)
        assert (run["b"].read(step=3) == 2).all()
        names = [name for name in run.names() if "/" not in name]
        if report.ok:
            assert names == ["a", "b"]
            assert run["a"].steps.tolist() == [3]
            assert run["a"].shape == (3, 4)
        else:
            assert names == ["b"]


def test_a_missing_file(source: Path, tmp_path: Path) -> None:
    (source / "events/000000000010/000000000010_worker_0.tfevents").unlink()
    report, run = take(source, tmp_path)
    assert codes(report) == [("missing_file", "000000000010_worker_0.tfevents", None)]
    assert run["a"].steps.tolist() == [0, 20]


def test_values_without_an_index(source: Path, tmp_path: Path) -> None:
    (source / "index/000000000/000000000010_worker_0.json").unlink()
    report, run = take(source, tmp_path)
    assert codes(report) == [("missing_file", "000000000010_worker_0.json", None)]
    assert (run["b"].read(step=10) == 11).all()


def test_an_index_that_is_no_json(source: Path) -> None:
    texts = ("{", "[]", "{}", "[" * 100_000, '{"meta": {"mode": "TRAIN", "mode_step": "x"}}')
    for number, text in enumerate(texts):
        (source / "index/000000000/000000000010_worker_0.json").write_text(text)
        place = f"memory://index/{number}"
        report = import_smdebug(source, place)
        assert [s.file for s in report.skipped] == ["index/000000000/000000000010_worker_0.json"]
        assert (tsf.open_run(place)["b"].read(step=10) == 11).all()


def test_an_index_cannot_lead_out_of_the_folder(source: Path, tmp_path: Path) -> None:
    path = source / "index/000000000/000000000010_worker_0.json"
    secret = tmp_path / "secret.tfevents"
    secret.write_bytes(record(event(smdebug_value("secret", full(1), mode_step=10), step=10)))
    for place in ("../secret.tfevents", str(secret)):
        document = json.loads(path.read_text())
        document["meta"]["event_file_name"] = place
        path.write_text(json.dumps(document))
        url = f"memory://leading/{len(place)}"
        report = import_smdebug(source, url)
        assert not report.ok
        assert "secret" not in tsf.open_run(url)


def test_a_killed_writer(source: Path, tmp_path: Path) -> None:
    step = source / "events/000000000030"
    step.mkdir()
    (step / "000000000030_worker_0.tfevents.tmp").write_bytes(b"begun")
    report, run = take(source, tmp_path)
    assert codes(report) == [("unfinished", "000000000030_worker_0.tfevents.tmp", None)]
    assert run["a"].steps.tolist() == [0, 10, 20]


def test_missing_workers_are_said(tmp_path: Path) -> None:
    root = tmp_path / "source"
    smdebug_step(root, 0, {"a": full(1)})
    smdebug_collections(root, {}, num_workers=3)
    report, run = take(root, tmp_path)
    assert report.missing_workers == run.attrs["smdebug"]["missing_workers"] == 2
    assert codes(report) == [("missing_workers", "collections", None)]


def test_hostile_tensors(tmp_path: Path) -> None:
    """Sizes that are not there are refused before anything is allocated."""
    root = tmp_path / "source"
    path = smdebug_step(root, 0, {"good": full(1)})
    huge = blob(2, blob(2, b"\x08" + b"\xff" * 6 + b"\x01"))
    tensors = [
        b"\x08\x01" + huge + blob(4, b"1234"),
        b"\x08\x01" + huge + blob(5, b"1234"),
        b"\x08\x01" + blob(2, blob(2, b"\x08" + b"\xff" * 9 + b"\x01")) + blob(4, b"1234"),
        b"\x08\x63" + blob(4, b"1234"),
        b"\x08\x01" + b"".join([blob(2, blob(2, b"\x08\x01") * 99)]) + blob(4, b"1234"),
        b"\x0b\x0c",
    ]
    (root / "index/000000000/000000000000_worker_0.json").unlink()
    data = path.read_bytes()
    for tensor in tensors:
        data += record(event(blob(1, "bad") + blob(8, tensor), step=0))
    path.write_bytes(data + record(b"") + record(b"\xff" * 20))
    report, run = take(root, tmp_path)
    assert report.damage_count == len(tensors) + 2 + 1  # and the missing index
    assert [name for name in run.names() if "/" not in name] == ["good"]


def test_random_damage_never_raises(tmp_path: Path) -> None:
    """Whatever the bytes of any of the files are: a report, and a run that is in order."""
    rng = np.random.default_rng(0)
    for case in range(60):
        source = tmp_path / str(case)
        shutil.copytree(DATA / "core", source)
        files = sorted(f for f in source.rglob("*") if f.is_file() and f.stat().st_size)
        for path in rng.choice(np.array(files, object), 3):
            data = bytearray(path.read_bytes())
            at, length = int(rng.integers(len(data))), int(rng.integers(1, 20))
            noise = rng.integers(0, 256, length, np.uint8).tobytes()
            match rng.integers(3):
                case 0:
                    data[at : at + length] = noise
                case 1:
                    data[at:at] = noise
                case _:
                    del data[at:]
            path.write_bytes(data)
        url = f"memory://random-damage/{case}"
        report = import_smdebug(source, url)
        assert report.damage_count == len([s for s in report.skipped if s.is_damage])
        assert case % 20 or tsf.verify(url).ok  # it takes a process of its own
        assert len(tsf.open_run(url).names()) > 1
        shutil.rmtree(source)


def test_a_storage_that_fails_is_no_damage(source: Path, tmp_path: Path) -> None:
    """It raises, and the run that was begun says that it is not complete."""
    done: list[str] = []

    def stop(_done: int, _total: int, path: str) -> None:
        done.append(path)
        if len(done) == 2:
            raise OSError("the network is gone")

    with pytest.raises(OSError, match="network") as caught:
        import_smdebug(source, tmp_path / "run", progress=stop)
    assert "delete it" in caught.value.__notes__[0]
    kept = tsf.open_run(tmp_path / "run")["import/report"]
    said = json.loads(kept.read(step=int(kept.steps[-1])))
    assert (said["ok"], said["skipped"][-1]["code"]) == (False, "aborted")


# --- the rest ------------------------------------------------------------------------------
def test_what_is_no_run_of_smdebug(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(tsf.ArgumentError) as caught:
        import_smdebug(tmp_path / "other", tmp_path / "run")
    assert caught.value.code == "unknown_format"
    assert not (tmp_path / "run").exists()


def test_a_run_that_exists_is_left_alone(source: Path, tmp_path: Path) -> None:
    with tsf.create_run(tmp_path / "run") as run:
        run.log({"x": 1.0}, step=0)
    with pytest.raises(tsf.RunExistsError):
        import_smdebug(source, tmp_path / "run")
    assert tsf.open_run(tmp_path / "run").names() == ["x"]


def test_memory_is_bounded(tmp_path: Path) -> None:
    """120 MB in files of 12 MB need far less than that (the queue of the writer holds 128)."""
    root = tmp_path / "source"
    noise = np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32)
    for step in range(10):
        smdebug_step(root, step, {f"w{i}": noise + i for i in range(12)})
    script = (
        "import sys\n"
        "from support.memory import peak_kib\n"
        "from tensorstore_fmt.interop.importing import import_smdebug, target\n"
        "target._QUEUE_NBYTES = 16 * 2**20\n"
        "import tensorstore_fmt as tsf, numpy, pyarrow\n"
        "tsf.create_run(sys.argv[2] + '0').close()\n"
        "before = peak_kib()\n"
        "assert import_smdebug(sys.argv[1], sys.argv[2]).values == 120\n"
        "print(peak_kib() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(root), str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 90 * 1024  # KiB
    assert sum(f.stat().st_size for f in root.rglob("*.tfevents")) > 120e6


def test_the_verb(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    assert main(["import", "smdebug", str(source), run]) == 0
    assert "9 values of 3 names" in capsys.readouterr().out
    shutil.rmtree(run)
    (source / "events/000000000010/000000000010_worker_0.tfevents").unlink()
    assert main(["import", "smdebug", str(source), run, "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["ok"], said["values"], said["skipped"][0]["code"]) == (False, 6, "missing_file")
    assert main(["import", "smdebug", str(source), run]) == 1  # there is a run already
    assert main(["import", "nothing", str(source), run]) == 2
    assert main(["import", "smdebug", str(tmp_path), run]) == 2
