"""The logger and the callback for Lightning, in real trainings of a tiny module."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tensorstore_fmt as tsf
from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.hooks import Collection
from tensorstore_fmt.rules import request_stop

torch = pytest.importorskip("torch")
lightning = pytest.importorskip("lightning")

from tensorstore_fmt.hooks.lightning import RunCallback, RunLogger  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    # The library's own: advice on loaders, and what newer PyTorch deprecates.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Module(lightning.LightningModule):
    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.head = torch.nn.Linear(4, 2)
        self.losses: dict[int, float] = {}
        self.gradients: list[Any] = []
        self.weights: list[Any] = []

    def training_step(self, batch: Any, number: int) -> Any:
        self.weights.append(self.head.weight.detach().numpy().copy())
        loss = torch.nn.functional.cross_entropy(self.head(batch[0]), batch[1])
        self.log("train_loss", loss)
        self.losses[len(self.losses)] = loss.item()
        return loss

    def validation_step(self, batch: Any, number: int) -> None:
        self.log("val_loss", torch.nn.functional.cross_entropy(self.head(batch[0]), batch[1]))

    def test_step(self, batch: Any, number: int) -> None:
        self.log("test_loss", torch.nn.functional.cross_entropy(self.head(batch[0]), batch[1]))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.gradients.append(self.head.weight.grad.numpy().copy())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def loader(number: int) -> Any:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(number, 4, generator=generator)
    dataset = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
    return torch.utils.data.DataLoader(dataset, batch_size=4)


def fit(folder: Path, module: Any, *, ckpt: Path | None = None, **options: Any) -> Any:
    given: dict[str, Any] = {
        "max_epochs": 2,
        "log_every_n_steps": 1,
        "accelerator": "cpu",
        "default_root_dir": folder,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        **options,
    }
    trainer = lightning.Trainer(**given)
    trainer.fit(module, loader(16), loader(12), ckpt_path=ckpt)
    return trainer


def module() -> Any:
    torch.manual_seed(0)
    return Module()


def scalars(run: Any, name: str) -> dict[int, float]:
    return {step: run[name].read(step=step).item() for step in run[name].steps.tolist()}


def test_metrics_and_hyperparameters(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path / "run")
    trained = module()
    trainer = fit(tmp_path, trained, logger=logger, enable_checkpointing=True)
    trainer.test(trained, loader(4), verbose=False)
    assert Path(trainer.checkpoint_callback.dirpath).is_relative_to(tmp_path / "lightning_logs")
    with tsf.open_run(tmp_path / "run") as run:
        assert run.is_closed
        assert run.attrs["hparams"] == {"lr": 0.1}
        assert scalars(run, "train_loss") == trained.losses  # the test has hidden nothing
        assert len(scalars(run, "test_loss")) == 1
        assert sorted(scalars(run, "val_loss")) == [3, 7]
        assert scalars(run, "epoch")[7] == 1


def test_tensors_have_the_steps_of_the_metrics(tmp_path: Path) -> None:
    """Lightning computes gradients in a closure, within the optimizer's step."""
    trained = module()
    callback = RunCallback(
        ["weights", "gradients", "optimizer", Collection(name="io", modules=["head"])], every=2
    )
    fit(tmp_path, trained, logger=RunLogger(tmp_path / "run"), callbacks=[callback])
    assert callback.hook is None
    with tsf.open_run(tmp_path / "run") as run:
        assert run["head.weight"].steps.tolist() == [0, 2, 4, 6]
        for step in (0, 2, 4, 6):
            assert np.array_equal(run["head.weight"].read(step=step), trained.weights[step])
            gradient = run["gradient/head.weight"].read(step=step)
            assert np.array_equal(gradient, trained.gradients[step])
            assert run["optimizer/head.weight/step"].read(step=step) == step + 1
        assert run["head/output"].select(mode="TRAIN").steps.tolist() == [0, 2, 4, 6]
        assert run["head/output"].select(mode="EVAL").steps.tolist() == [3, 7]
        assert "head@1/output" not in run  # only the first batch of a validation
        assert sorted(scalars(run, "train_loss")) == list(range(8))


def test_accumulated_and_clipped_gradients(tmp_path: Path) -> None:
    trained = module()
    callback = RunCallback(["gradients"], every=1, run=tmp_path / "run")
    fit(
        tmp_path, trained, logger=False, callbacks=[callback], accumulate_grad_batches=2,
        gradient_clip_val=1e-3,
    )  # fmt: skip
    with tsf.open_run(tmp_path / "run") as run:
        assert run.is_closed
        gradient = run["gradient/head.weight"]
        assert gradient.steps.tolist() == [0, 1, 2, 3]
        for step in range(4):
            whole = trained.gradients[step]
            clipped = gradient.read(step=step)  # as the optimizer gets it
            assert np.abs(clipped).max() < 1e-3 < np.abs(whole).max()
            np.testing.assert_allclose(
                clipped / np.abs(clipped).max(), whole / np.abs(whole).max(), rtol=1e-4
            )


def test_a_request_stops_the_trainer(tmp_path: Path) -> None:
    class Ask(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, pl: Any, batch: Any, number: int) -> None:
            if trainer.global_step == 2:
                request_stop(tmp_path / "run", "enough")
                while not callback._opened.watcher.stop_requested:
                    time.sleep(0.01)

    callback = RunCallback([])
    trainer = fit(
        tmp_path, module(), logger=RunLogger(tmp_path / "run"), callbacks=[callback, Ask()],
        max_epochs=500,
    )  # fmt: skip
    assert trainer.should_stop
    assert 3 <= trainer.global_step < 2000
    with tsf.open_run(tmp_path / "run") as run:
        assert run["train_loss"].steps[-1] == trainer.global_step - 1


def test_going_on_from_a_checkpoint(tmp_path: Path) -> None:
    """The job died in step 6; its last checkpoint is that of step 3, the first epoch's end."""

    class Die(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, pl: Any, batch: Any, number: int) -> None:
            if trainer.global_step == 6:
                raise RuntimeError("out of memory")

    where = tmp_path / "run"
    saver = lightning.pytorch.callbacks.ModelCheckpoint(dirpath=tmp_path / "saved", save_last=True)
    options: dict[str, Any] = {"enable_checkpointing": True}
    before = module()
    logger = RunLogger(where)
    with pytest.raises(RuntimeError, match="memory"):
        fit(
            tmp_path, before, logger=logger, max_epochs=3,
            callbacks=[RunCallback(["weights"], every=1), saver, Die()], **options,
        )  # fmt: skip
    after = module()
    fit(
        tmp_path, after, logger=RunLogger(where), max_epochs=3,
        callbacks=[RunCallback(["weights"], every=1)], ckpt=tmp_path / "saved" / "last.ckpt",
    )  # fmt: skip
    with tsf.open_run(where) as run:
        assert run.attempts == [0, 1]
        assert run.is_closed
        assert sorted(scalars(run, "train_loss")) == list(range(12))
        again = [after.losses[i] for i in range(8)]
        assert (
            list(scalars(run, "train_loss").values())
            == [before.losses[i] for i in range(4)] + again
        )
        assert sorted(scalars(run, "val_loss")) == [3, 7, 11]
        assert run["head.weight"].steps.tolist() == list(range(12))
        assert np.array_equal(run["head.weight"].read(step=5, attempt=0), before.weights[5])
        assert run["train_loss"].read(step=5, attempt=0) == np.float32(before.losses[5])


def test_without_a_logger_the_callback_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="RunLogger"):
        fit(tmp_path, module(), logger=False, callbacks=[RunCallback()])
