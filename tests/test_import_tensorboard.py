"""Import of TensorBoard's event files: real ones, and what else there can be in one."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from support.event_files import blob, double, event, integer, record, single, tensor_proto, varint

import tensorstore_fmt as tsf
from tensorstore_fmt.interop.importing import ImportReport, import_tensorboard

DATA = Path(__file__).parent / "data" / "tensorboard"
"""Made by tensorboardX 2.6.5 (old) and TensorBoard 2.21 (new), with what they were given."""


def written(tmp_path: Path, *payloads: bytes, name: str = "events.out.tfevents.1") -> Path:
    path = tmp_path / "logs" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(record(payload) for payload in payloads))
    return tmp_path / "logs"


def take(source: Path, tmp_path: Path) -> tuple[ImportReport, tsf.Run]:
    report = import_tensorboard(source, tmp_path / "run")
    assert tsf.verify(tmp_path / "run").ok
    return report, tsf.open_run(tmp_path / "run")


def scalar(tag: str, value: float, step: int, wall_time: float = 1.7e9) -> bytes:
    return event(blob(1, tag) + single(2, value), step=step, wall_time=wall_time)


# --- real ones -----------------------------------------------------------------------------
def test_files_of_tensorboardx(tmp_path: Path) -> None:
    report, run = take(DATA / "old", tmp_path)
    expected = np.load(DATA / "old_expected.npz")
    assert report.ok
    assert report.unchecked == 0
    steps = np.arange(0, 10, 2)
    assert run["loss"].modes == ("TRAIN", "EVAL")
    train = run["loss"].read(mode="TRAIN")
    assert np.array_equal(train, (1 / (steps + 1)).astype(np.float32))
    assert np.array_equal(run["loss"].read(mode="EVAL"), (2 / (steps + 1)).astype(np.float32))
    assert run.wall_time(4, mode="TRAIN") == 1.7e9 + 4
    for step in steps:
        values = expected[f"h{step}"].astype(np.float64)
        table = run["weights"].read(step=step)
        inside = (values[:, None] > table[:, 0]) & (values[:, None] <= table[:, 1])
        assert np.array_equal(inside.sum(0)[1:], table[1:, 2])
        assert run["weights/num"].read(step=step) == 100
        assert run["weights/min"].read(step=step) == values.min()
        assert run["weights/sum_squares"].read(step=step) == pytest.approx((values**2).sum())
    assert run["note/text_summary"].read(step=4).tolist() == ["grün\nzwei"]
    pixels = imread(io.BytesIO(run["pic"].read(step=4).tobytes()))
    assert np.array_equal(np.rint(pixels * 255), expected["img"].transpose(1, 2, 0))


def test_files_of_tensorboard_2(tmp_path: Path) -> None:
    report, run = take(DATA / "new", tmp_path)
    expected = np.load(DATA / "new_expected.npz")
    assert report.ok
    assert np.array_equal(run["acc"].read(), np.array([0, 0.5, 1], np.float32))
    for name in expected.files:
        if name.startswith("t_"):
            found = run[f"t/{name[2:]}"].read(step=5)
            assert (found.dtype, found.tobytes()) == (
                expected[name].dtype,
                expected[name].tobytes(),
            )
    for step in (0, 5, 10):
        counts, edges = np.histogram(expected[f"h{step}"], 7)
        table = run["hist"].read(step=step)
        assert np.array_equal(table[:, 2], counts)
        assert np.allclose(table[:, 0], edges[:-1])
        assert np.allclose(table[:, 1], edges[1:])
    assert run["words"].read(step=5).tolist() == ["a", "b"]


# --- what there can be ---------------------------------------------------------------------
def test_elements_one_by_one(tmp_path: Path) -> None:
    """Small tensors, as TensorFlow writes them: packed, or with the last element left out."""
    doubles = struct.pack("<3d", 1, 2, 3)
    shape = blob(2, blob(2, integer(1, 3)))
    cases = {
        "float": (b"\x08\x01" + shape + blob(5, struct.pack("<2f", 1, 2)), [1, 2, 2], "float32"),
        "double": (b"\x08\x02" + shape + blob(6, doubles), [1, 2, 3], "float64"),
        "unpacked": (b"\x08\x02" + shape + b"".join(double(6, x) for x in (4, 5, 6)), [4, 5, 6],
                     "float64"),
        "int": (b"\x08\x03" + shape + blob(7, varint(-1) + varint(300) + varint(7)), [-1, 300, 7],
                "int32"),
        "int64": (b"\x08\x09" + shape + integer(10, -(2**40)), [-(2**40)] * 3, "int64"),
        "bool": (b"\x08\x0a" + shape + blob(11, b"\x01\x00\x01"), [True, False, True], "bool"),
        "half": (b"\x08\x13" + shape + blob(13, varint(0x3C00)), [1, 1, 1], "float16"),
        "bfloat": (b"\x08\x0e" + shape + blob(13, varint(0x3F80)), [1, 1, 1], "bfloat16"),
        "uint64": (b"\x08\x17" + shape + blob(17, varint(2**64 - 1)), [2**64 - 1] * 3, "uint64"),
        "complex": (b"\x08\x08" + shape + blob(9, struct.pack("<2f", 1, 2)), [1 + 2j] * 3,
                    "complex64"),
        "none": (b"\x08\x01" + shape, [0, 0, 0], "float32"),
    }  # fmt: skip
    payloads = [event(blob(1, tag) + blob(8, c[0]), step=1) for tag, c in cases.items()]
    report, run = take(written(tmp_path, *payloads), tmp_path)
    assert report.ok
    for tag, (_, values, dtype) in cases.items():
        found = run[tag].read(step=1)
        assert (found.dtype.name, found.tolist()) == (dtype, values), tag


def test_folders_become_names_or_modes(tmp_path: Path) -> None:
    for folder, value in (("a/train", 1), ("a/validation", 2), ("b", 3), (".", 4)):
        name = f"{folder}/events.out.tfevents.1"
        source = written(tmp_path, scalar("loss", value, 7), name=name)
    _, run = take(source, tmp_path)
    assert [n for n in run.names() if n != "import/report"] == ["a/loss", "b/loss", "loss"]
    assert run["a/loss"].read(step=7, mode="EVAL") == 2
    assert run["loss"].read(step=7) == 4


def test_one_file(tmp_path: Path) -> None:
    written(tmp_path, scalar("x", 1, 0), name="events.out.tfevents.2")
    written(tmp_path, scalar("y", 1, 0))
    _, run = take(tmp_path / "logs" / "events.out.tfevents.1", tmp_path)
    assert "y" in run
    assert "x" not in run


def test_a_restarted_job_replaces_what_it_repeats(tmp_path: Path) -> None:
    written(tmp_path, *(scalar("x", step, step) for step in range(6)))
    source = written(
        tmp_path, *(scalar("x", 10 * step, step) for step in (4, 5, 6)), name="x.tfevents.2"
    )
    written(tmp_path, *(scalar("x", step, step) for step in range(6)), name="a.tfevents.1")
    _, run = take(source, tmp_path)
    assert run["x"].read().tolist() == [0, 1, 2, 3, 40, 50, 60]
    assert run.steps().tolist() == list(range(7))


def test_images_of_today_and_bytes(tmp_path: Path) -> None:
    def tensor(strings: list[bytes]) -> bytes:
        shape = blob(2, blob(2, integer(1, len(strings))))
        return b"\x08\x07" + shape + b"".join(blob(8, item) for item in strings)

    plugin = blob(9, blob(1, blob(1, "images")))
    first = blob(1, "pic") + blob(8, tensor([b"6", b"8", b"PNG1", b"PNG2"])) + plugin
    later = blob(1, "pic") + blob(8, tensor([b"6", b"8", b"PNG3"]))
    other = blob(1, "raw") + blob(8, tensor([b"\xff\xfe"]))
    source = written(tmp_path, event(first, step=0), event(later, step=1), event(other, step=0))
    report, run = take(source, tmp_path)
    assert report.ok
    assert run["pic/1"].read(step=0).tobytes() == b"PNG2"
    assert run["pic"].read(step=1).tobytes() == b"PNG3"
    assert run["raw"].read(step=0).tobytes() == b"\xff\xfe"


def test_what_has_no_place_is_said(tmp_path: Path) -> None:
    graph = double(1, 1.7e9) + blob(4, b"graph")
    empty = event(blob(1, "hparams") + blob(9, blob(1, blob(1, "hparams"))), step=0)
    version = double(1, 1.7e9) + blob(3, "brain.Event:2")
    source = written(tmp_path, version, graph, empty, scalar("x", 1, 0), scalar("y", 1, -1))
    report, run = take(source, tmp_path)
    assert [(s.code, s.is_damage) for s in report.skipped] == [
        ("no_place", False),
        ("no_place", False),
        ("limit", True),
    ]
    assert [n for n in run.names() if n != "import/report"] == ["x"]


def test_every_cut_and_flip(tmp_path: Path) -> None:
    payloads = [scalar("x", step, step) for step in range(3)]
    source = written(tmp_path, *payloads)
    path = source / "events.out.tfevents.1"
    whole = path.read_bytes()
    size = len(whole) // 3
    for cut in range(0, len(whole), 7):
        path.write_bytes(whole[:cut])
        place = f"memory://tb-cut/{cut}"
        report = import_tensorboard(source, place)
        run = tsf.open_run(place)
        assert report.values == cut // size
        assert report.ok == (cut % size == 0)
        if cut >= size:
            assert run["x"].read().tolist() == list(range(cut // size))
    for at in range(0, len(whole), 5):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        place = f"memory://tb-flip/{at}"
        report = import_tensorboard(source, place)
        assert report.damage_count == 1
        steps = tsf.open_run(place)["x"].steps.tolist() if report.values else []
        assert at // size not in steps
        assert set(range(at // size)) <= set(steps)


def test_the_packed_form_of_tensors_is_the_same(tmp_path: Path) -> None:
    value = np.arange(12, dtype=np.float64).reshape(3, 4)
    source = written(tmp_path, event(blob(1, "w") + blob(8, tensor_proto(value)), step=2))
    _, run = take(source, tmp_path)
    assert np.array_equal(run["w"].read(step=2), value)
