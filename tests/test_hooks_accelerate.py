"""The tracker for Accelerate, in real trainings of a tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tensorstore_fmt as tsf
from tensorstore_fmt.hooks.late_run import LateRun

torch = pytest.importorskip("torch")
accelerate = pytest.importorskip("accelerate")

from tensorstore_fmt.hooks.accelerate import RunTracker  # noqa: E402
from tensorstore_fmt.hooks.torch import attach  # noqa: E402

pytestmark = [
    # The library's own: what newer PyTorch deprecates.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def train(tracker: Any, steps: range, *, hooked: bool = False) -> list[float]:
    accelerator = accelerate.Accelerator(cpu=True, log_with=tracker)
    accelerator.init_trackers("project", config={"lr": 0.1, "layers": [4, 2], "none": None})
    torch.manual_seed(1)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    hook = None
    if hooked:
        run = accelerator.get_tracker("tensorstore_fmt").open(steps.start)
        hook = attach(model, run, optimizer=optimizer.optimizer, every=1)
    losses = []
    for step in steps:
        if hook is not None:
            hook.set_step(step)
        optimizer.zero_grad()
        loss = model(torch.full((3, 4), float(step % 3))).pow(2).mean()
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())
        accelerator.log({"loss": losses[-1], "nested": {"tensor": loss}}, step=step)
    accelerator.log({"accuracy": 0.5}, step=step, log_kwargs={"tensorstore_fmt": {"mode": "EVAL"}})
    if hook is not None:
        hook.remove()
    accelerator.end_training()
    return losses


def test_a_training(tmp_path: Path) -> None:
    losses = train(RunTracker(tmp_path / "run"), range(5), hooked=True)
    with tsf.open_run(tmp_path / "run") as run:
        assert run.is_closed
        assert run.attrs["hparams"] == {"lr": 0.1, "layers": [4, 2], "none": None}
        assert run["loss"].read().tolist() == losses
        assert np.array_equal(run["nested/tensor"].read(), np.float32(losses))
        assert run["accuracy"].select(mode="EVAL").steps.tolist() == [4]
        assert run["gradient/weight"].steps.tolist() == [0, 1, 2, 3, 4]
        assert (run["gradient/weight"].read(step=3) == 0).all()  # its input was 0


def test_going_on(tmp_path: Path) -> None:
    first = train(RunTracker(tmp_path / "run"), range(5))
    with pytest.raises(tsf.RunExistsError):
        train(RunTracker(tmp_path / "run"), range(3, 6))
    second = train(RunTracker(tmp_path / "run", resume=True), range(3, 6))
    with tsf.open_run(tmp_path / "run") as run:
        assert run.attempts == [0, 1]
        assert run["loss"].read().tolist() == first[:3] + second
        assert run["loss"].read(step=4, attempt=0) == first[4]


def test_a_run_that_was_not_finished_is_gone_on_in(tmp_path: Path) -> None:
    run = LateRun(tmp_path / "run")
    for step in range(4):
        run.log({"loss": float(step)}, step)
    run.flush()  # and then the process died
    other = LateRun(tmp_path / "run")
    other.set_hparams({"lr": 0.2})
    other.log({"loss": 20.0}, 2)
    other.log({"loss": 30.0}, 3)
    other.close()
    other.log({"late": 1.0}, 3)  # opens again
    other.close()
    with tsf.open_run(tmp_path / "run") as opened:
        assert opened["loss"].read().tolist() == [0.0, 1.0, 20.0, 30.0]
        assert opened["loss"].read(step=3, attempt=0) == 3.0
        assert opened["late"].read(step=3) == 1.0
        assert opened["hparams"].read(step=2) == '{"lr": 0.2}'
    run.close()


def test_a_value_that_cannot_be_stored_costs_no_other(tmp_path: Path) -> None:
    run = LateRun(tmp_path / "run")
    with pytest.warns(RuntimeWarning, match="'what'"):
        run.log({"loss": 1.0, "what": object(), "nothing": None}, 0)
    run.close()
    assert run.failures == {"'what'": 1}
    with tsf.open_run(tmp_path / "run") as opened:
        assert opened.names() == ["loss"]
