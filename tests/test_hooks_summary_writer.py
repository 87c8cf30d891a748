"""The writer with TensorBoard's methods: what it stores, and that the methods are the real ones."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tensorstore_fmt as tsf
from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.hooks.summary_writer import SummaryWriter

RNG = np.random.default_rng(6)


def test_scalars(tmp_path: Path) -> None:
    with SummaryWriter(tmp_path / "run") as writer:
        assert writer.get_logdir() == writer.log_dir == str(tmp_path / "run")
        for step in range(0, 30, 10):
            writer.add_scalar("loss/train", np.float32(step) / 2, step)
            writer.add_scalars("both", {"a": step, "b": -step}, global_step=step, walltime=1.0)
        for value in (5, 6):
            writer.add_scalar("unnumbered", np.array([value]))
        writer.add_text("note", "a line", 10)
        with pytest.raises(ArgumentError, match="add_tensor"):
            writer.add_scalar("matrix", np.zeros((2, 2)))
    with tsf.open_run(tmp_path / "run") as run:
        assert run.is_closed
        assert run["loss/train"].steps.tolist() == [0, 10, 20]
        assert run["loss/train"].read().tolist() == [0, 5, 10]
        assert run["loss/train"].dtype == np.float32
        assert run["both/b"].read().tolist() == [0, -10, -20]
        assert run["unnumbered"].steps.tolist() == [0, 1]
        assert run["unnumbered"].read().tolist() == [5, 6]
        assert run["note"].read(step=10) == "a line"


@pytest.mark.parametrize(
    ("axes", "shape"), [("CHW", (3, 4, 5)), ("HWC", (4, 5, 3)), ("HW", (4, 5)), ("WHC", (5, 4, 3))]
)
def test_images(axes: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    image = RNG.integers(0, 255, shape, np.uint8)
    with SummaryWriter(tmp_path / "run") as writer:
        writer.add_image("one", image, 3, dataformats=axes)
        writer.add_images("several", image[None], 3, dataformats="N" + axes)
        with pytest.raises(ArgumentError, match="dataformats"):
            writer.add_image("wrong", image, 3, dataformats="CHWN")
    with tsf.open_run(tmp_path / "run") as run:
        one = run["one"].read(step=3)
        assert one.shape == (4, 5, 1 if axes == "HW" else 3)
        for h in range(4):
            for w in range(5):
                at = tuple({"H": h, "W": w, "C": slice(None)}[axis] for axis in axes)
                assert np.array_equal(one[h, w], np.atleast_1d(image[at]))
        assert np.array_equal(run["several"].read(step=3), one[None])


def test_tensors_embeddings_and_the_like(tmp_path: Path) -> None:
    points = RNG.random((4, 8), np.float32)
    curve = {"labels": np.array([0, 1, 1]), "predictions": np.array([0.2, 0.6, 0.4])}
    with SummaryWriter(tmp_path / "run") as writer:
        writer.add_tensor("weights", points, 2)
        writer.add_embedding(points, metadata=[1, "b", "c", "d"], global_step=2, tag="latent")
        writer.add_embedding(points, [["x", 1]] * 4, global_step=3, metadata_header=["who", "n"])
        writer.add_pr_curve("curve", **curve, global_step=2)
        writer.add_audio("sound", points[0], 2, sample_rate=8000)
        writer.add_video("film", points.reshape(1, 2, 1, 4, 4), 2)
        writer.add_mesh("mesh", points[None, :, :3], global_step=2)
        writer.add_image_with_boxes(
            "boxed", points, [[0, 0, 2, 2]], 2, dataformats="HW", labels="a"
        )
        with pytest.warns(RuntimeWarning, match="add_graph"):
            writer.add_graph(None)
        writer.add_graph(None)  # says it once
    with tsf.open_run(tmp_path / "run") as run:
        for name in ("weights", "latent", "default"):
            assert np.array_equal(run[name].read(step=3 if name == "default" else 2), points)
        assert run["latent/metadata"].read(step=2).tolist() == ["1", "b", "c", "d"]
        assert run["default/metadata/n"].read(step=3).tolist() == ["1"] * 4
        assert np.array_equal(run["curve/predictions"].read(step=2), curve["predictions"])
        assert run["sound/sample_rate"].read(step=2) == 8000
        assert "mesh/colors" not in run
        assert run["boxed/boxes"].read(step=2).tolist() == [[0, 0, 2, 2]]
        assert run["boxed/labels"].read(step=2).tolist() == ["a"]


def test_histograms(tmp_path: Path) -> None:
    values = np.concatenate([RNG.standard_normal(1000), [np.nan, np.inf, -np.inf, 0.0]])
    with SummaryWriter(tmp_path / "run") as writer:
        writer.add_histogram("default", values, 1)
        writer.add_histogram("ten", values, 1, bins=10)
        writer.add_histogram("few", values, 1, max_bins=5)
        writer.add_histogram("nothing", np.zeros(0), 1)
        writer.add_histogram_raw("raw", 0, 3, 2, 4, 10, [1, 3], [1, 1], 1)
    finite = values[np.isfinite(values)]
    with tsf.open_run(tmp_path / "run") as run:
        rows = run["default"].read(step=1)
        assert rows[:, 2].sum() == 1003
        assert np.array_equal(rows[1:, 0], rows[:-1, 1])
        assert rows[[0, -1], 2].min() >= 1
        for left, right, count in rows[1:-1]:
            assert ((finite >= left) & (finite < right)).sum() == count
        counts, ends = np.histogram(finite, 10)
        ten = run["ten"].read(step=1)
        assert np.array_equal(ten[:, 2], counts)
        assert np.array_equal(ten[:, 1], ends[1:])
        assert run["few"].read(step=1).shape == (5, 3)
        assert run["nothing"].read(step=1)[:, 2].sum() == 0
        assert run["raw"].read(step=1).tolist() == [[0, 1, 1], [1, 3, 1]]
        assert run["raw/sum"].read(step=1) == 4


def test_hyperparameters(tmp_path: Path) -> None:
    with SummaryWriter(tmp_path / "run") as writer:
        writer.add_hparams({"lr": 0.1, "name": "x"}, {"hparam/accuracy": 0.9})
        writer.add_hparams({"lr": 0.2}, {"hparam/accuracy": 0.8})
    with tsf.open_run(tmp_path / "run") as run:
        assert run.attrs["hparams"] == {"lr": 0.1, "name": "x"}
        assert run["hparam/accuracy"].read().tolist() == [0.9, 0.8]
        assert run["hparams"].read(step=1) == '{"lr": 0.2, "name": "x"}'


def test_purging_goes_on_in_the_run(tmp_path: Path) -> None:
    for first, purge in ((0, None), (3, 3)):
        with SummaryWriter(tmp_path / "run", purge_step=purge) as writer:
            for step in range(first, 5):
                writer.add_scalar("loss", float(step + 10 * first), step)
    writer.add_scalar("late", 1.0, 0)  # opens it again
    writer.close()
    with tsf.open_run(tmp_path / "run") as run:
        assert run["loss"].read().tolist() == [0, 1, 2, 33, 34]
        assert run["loss"].read(step=4, attempt=0) == 4
        assert run["late"].read(step=0) == 1
    with SummaryWriter(tmp_path / "run") as writer, pytest.raises(tsf.RunExistsError):
        writer.add_scalar("loss", 1.0, 0)


def test_a_folder_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with SummaryWriter(comment="_lr1") as writer:
        writer.add_scalar("loss", 1.0, 0)
    (found,) = (tmp_path / "runs").iterdir()
    assert found.name.endswith("_lr1")
    assert tsf.open_run(found)["loss"].read().tolist() == [1]


def test_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    with SummaryWriter(tmp_path / "run") as writer:
        writer.add_figure("one", Figure(figsize=(2, 1), dpi=10), 0)
        writer.add_figure("two", [Figure(figsize=(1, 1), dpi=10, facecolor="black")] * 2, 0)
    with tsf.open_run(tmp_path / "run") as run:
        assert run["one"].read(step=0).shape == (10, 20, 3)
        assert (run["two/1"].read(step=0) == 0).all()


def methods(of: Any) -> dict[str, Any]:
    found = inspect.getmembers(of, inspect.isfunction)
    return {name: each for name, each in found if name == "__init__" or not name.startswith("_")}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_methods_are_those_of_tensorboard() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("tensorboard")
    from torch.utils import tensorboard

    real, ours = methods(tensorboard.SummaryWriter), methods(SummaryWriter)
    assert set(real) <= set(ours)
    for name, method in real.items():
        told = [(p.name, p.default) for p in inspect.signature(method).parameters.values()]
        given = [(p.name, p.default) for p in inspect.signature(ours[name]).parameters.values()]
        assert given[: len(told)] == told, name
