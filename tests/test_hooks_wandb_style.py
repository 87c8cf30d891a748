"""`init`, `log` and `finish`, as users of Weights & Biases call them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tensorstore_fmt as tsf
from tensorstore_fmt import rules
from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.hooks import wandb_style as wandb


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    wandb.finish()


def test_logging() -> None:
    begun = wandb.init(project="digits", name="first", config={"lr": 0.1}, tags=["a"], entity="me")
    assert wandb.run is begun
    assert wandb.config is not None
    assert wandb.config.lr == wandb.config["lr"] == 0.1
    wandb.config.layers = 3
    wandb.log({"loss": 1.0}, commit=False)
    wandb.log({"accuracy": 0.5, "nested": {"x": np.arange(3)}})
    wandb.log({"loss": 0.5})
    wandb.log({"loss": 0.25}, step=10)
    wandb.log({"accuracy": 0.75})
    wandb.log({"loss": 0.5}, step=1)  # back again, which is not refused
    assert begun.summary["loss"] == 0.5
    wandb.finish()
    assert wandb.run is None
    with pytest.raises(tsf.StateError, match="init"):
        wandb.log({"loss": 0.0})
    with tsf.open_run("runs/digits/first") as run:
        assert run.is_closed
        assert dict(run.attrs) == {
            "project": "digits", "name": "first", "tags": ["a"], "hparams": {"lr": 0.1},
        }  # fmt: skip
        assert run["hparams"].read(step=0) == '{"lr": 0.1, "layers": 3}'
        assert run["loss"].steps.tolist() == [0, 1, 10]
        assert run["loss"].read().tolist() == [1.0, 0.5, 0.25]
        assert run["accuracy"].steps.tolist() == [0, 10]
        assert run["nested/x"].read(step=0).tolist() == [0, 1, 2]


def test_values_of_its_own() -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    table = wandb.Table(columns=["who", "score"], data=[["a", 1], ["b", 2.5]])
    with wandb.init(name="values") as run:
        run.log(
            {
                "h": wandb.Histogram([1.0, 2.0, 2.0], num_bins=2),
                "g": wandb.Histogram(np_histogram=([1, 2], [0, 1, 2])),
                "image": wandb.Image(pixels, caption="four"),
                "images": [wandb.Image(pixels), wandb.Image(pixels + 1)],
                "table": table,
            }
        )
    with tsf.open_run("runs/uncategorized/values") as found:
        assert found["h"].read(step=0).tolist() == [[1, 1.5, 1], [1.5, 2, 2]]
        assert found["g"].read(step=0).tolist() == [[0, 1, 1], [1, 2, 2]]
        assert np.array_equal(found["image"].read(step=0), pixels)
        assert found["image/caption"].read(step=0) == "four"
        assert np.array_equal(found["images/1"].read(step=0), pixels + 1)
        assert found["table/who"].read(step=0).tolist() == ["a", "b"]
        assert found["table/score"].read(step=0).tolist() == [1, 2.5]
    with pytest.raises(ArgumentError, match="columns"):
        table.add_data(1)


def test_going_on(tmp_path: Path) -> None:
    where: dict[str, Any] = {"dir": tmp_path, "project": "p", "id": "x"}
    with pytest.raises(tsf.NotARunError, match="must"):
        wandb.init(**where, resume="must")
    for _ in range(2):
        with wandb.init(**where, resume="allow") as run:
            for value in range(3):
                run.log({"loss": value + 10 * run.resumed})
    with pytest.raises(tsf.RunExistsError):
        wandb.init(**where)
    with wandb.init(**where, resume="must") as run:
        assert run.step == 6
        run.log({"loss": 99}, step=1)  # from a checkpoint before the end
    with tsf.open_run(tmp_path / "p" / "x") as opened:
        assert opened["loss"].read().tolist() == [0, 99, 2, 10, 11, 12]
        assert opened["loss"].read(step=1, attempt=0) == 1


def test_disabled(tmp_path: Path) -> None:
    with wandb.init(mode="disabled", config={"lr": 1}) as run:
        run.log({"loss": 1.0})
        run.alert("a", "b")
        assert run.step == 1
        assert run.config.lr == 1
    assert not list(tmp_path.iterdir())


def test_alerts() -> None:
    with wandb.init(name="alerts") as run:
        run.log({"loss": 1.0}, step=7)
        for _ in range(2):
            wandb.alert("Low accuracy", "it is 0.1", level=wandb.AlertLevel.WARN)
        wandb.alert("Low accuracy", "still", level="ERROR", wait_duration=0)
        with pytest.raises(ArgumentError, match="grave"):
            run.alert("a", "b", level="grave")
    with tsf.open_run("runs/uncategorized/alerts") as found:
        told = [(alert.rule, alert.step, alert.message) for alert in rules.alerts(found)]
    assert sorted(told) == [
        ("alert/error", 7, "Low accuracy: still"),
        ("alert/warn", 7, "Low accuracy: it is 0.1"),
    ]


def test_watching_a_module() -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    with wandb.init(name="watched") as run:
        wandb.watch(model, log="all", log_freq=2)
        for step in range(5):
            optimizer.zero_grad()
            weight = model.weight.detach().numpy().copy()
            model(torch.full((2, 3), float(step))).sum().backward()
            seen.append((weight, model.weight.grad.numpy().copy()))
            optimizer.step()
            model.eval()
            model(torch.zeros(1, 3))
            model.train()
            run.log({"loss": 1.0})
        wandb.unwatch()
        model(torch.zeros(1, 3)).sum().backward()
        assert not model._forward_pre_hooks
        with pytest.raises(ArgumentError, match="gradients"):
            run.watch(model, log="weights")  # type: ignore[arg-type]
    with tsf.open_run("runs/uncategorized/watched") as found:
        assert found.steps().tolist() == [0, 1, 2, 3, 4]
        for number, name in enumerate(["weight", "gradient/weight"]):
            assert found[name].steps.tolist() == [0, 2, 4]
            for step in (0, 2, 4):
                assert np.array_equal(found[name].read(step=step), seen[step][number])
