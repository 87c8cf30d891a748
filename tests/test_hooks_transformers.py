"""The callback for Hugging Face's Trainer, in real trainings of a tiny model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tensorstore_fmt as tsf
from tensorstore_fmt.hooks import Collection
from tensorstore_fmt.rules import request_stop

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tensorstore_fmt.hooks.transformers import RunCallback  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    # The library's own, on machines without an accelerator and with newer PyTorch.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def model() -> Any:
    torch.manual_seed(3)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=8,
        )
    )


def data(number: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(5)
    words = rng.integers(0, 20, (number, 6))
    return [{"input_ids": row, "labels": int(row[0] > 9)} for row in words]


def trainer(folder: Path, callback: Any, **options: Any) -> Any:
    given: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_steps": 3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 1,
        **options,
    }
    return transformers.Trainer(
        model=model(),
        args=transformers.TrainingArguments(output_dir=str(folder / "out"), **given),
        train_dataset=data(32),
        eval_dataset=data(20),
        callbacks=[callback],
    )


def history(trained: Any, name: str) -> dict[int, float]:
    return {row["step"]: row[name] for row in trained.state.log_history if name in row}


def series(run: Any, name: str, mode: str) -> dict[int, float]:
    tensor = run[name].select(mode=mode)
    return {step: tensor.read(step=step).item() for step in tensor.steps.tolist()}


def test_logs_are_saved(tmp_path: Path) -> None:
    trained = trainer(tmp_path, RunCallback(tmp_path / "run"))
    trained.train()
    with tsf.open_run(tmp_path / "run") as run:
        assert run.is_closed
        assert run.attrs["hparams"]["max_steps"] == 6
        assert run.attrs["hparams"]["model"]["hidden_size"] == 8
        for name in ("loss", "grad_norm", "learning_rate"):
            assert series(run, name, "TRAIN") == history(trained, name)
        assert series(run, "loss", "EVAL") == history(trained, "eval_loss")
        assert sorted(history(trained, "eval_loss")) == [3, 6]


def test_evaluating_after_the_training_hides_nothing(tmp_path: Path) -> None:
    trained = trainer(tmp_path, RunCallback(tmp_path / "run"), eval_strategy="no")
    trained.train()
    metrics = trained.evaluate()
    predicted = trained.predict(data(4))
    with tsf.open_run(tmp_path / "run") as run:
        assert series(run, "loss", "EVAL") == {6: metrics["eval_loss"]}
        assert sorted(series(run, "loss", "TRAIN")) == [1, 2, 3, 4, 5, 6]
        assert series(run, "loss", "PREDICT") == {6: predicted.metrics["test_loss"]}
        assert run.is_closed


def test_tensors_of_steps_and_evaluations(tmp_path: Path) -> None:
    """Step k is the k-th update, also where gradients of two batches are accumulated."""
    callback = RunCallback(
        tmp_path / "run",
        collections=[
            "weights",
            "gradients",
            "losses",
            Collection(name="io", modules=["classifier"]),
        ],
        every=2,
        on_error="raise",
    )
    seen: dict[int, Any] = {}

    class Watch(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            head = kwargs["model"].classifier
            both = head.weight.detach(), head.weight.grad
            seen[state.global_step + 1] = [each.numpy().copy() for each in both]

    trained = trainer(tmp_path, callback, gradient_accumulation_steps=2, max_grad_norm=0.01)
    trained.add_callback(Watch())
    trained.train()
    assert callback.hook is None
    with tsf.open_run(tmp_path / "run") as run:
        weights = run["classifier.weight"]
        assert weights.modes == ("TRAIN",)
        assert weights.steps.tolist() == [2, 4, 6]
        for step in (2, 4, 6):
            assert np.array_equal(weights.read(step=step), seen[step][0])
            assert np.array_equal(run["gradient/classifier.weight"].read(step=step), seen[step][1])
        outputs = run["classifier/output"]
        assert outputs.select(mode="TRAIN").steps.tolist() == [2, 4, 6]
        assert outputs.select(mode="EVAL").steps.tolist() == [3, 6]  # after these updates
        assert "classifier@1/output" in run  # the second batch of a step, …
        assert run["classifier@1/output"].modes == ("TRAIN",)  # … not of an evaluation
        assert series(run, "trainer/loss", "TRAIN") == history(trained, "loss")


def test_a_request_stops_the_trainer(tmp_path: Path) -> None:
    class Ask(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                request_stop(tmp_path / "run", "enough")

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watcher = callback._opened.watcher
            while state.global_step == 2 and not watcher.stop_requested:
                time.sleep(0.01)

    callback = RunCallback(tmp_path / "run")
    trained = trainer(tmp_path, callback, max_steps=500, eval_strategy="no", save_strategy="no")
    trained.add_callback(Ask())
    trained.train()
    assert 3 <= trained.state.global_step < 500
    with tsf.open_run(tmp_path / "run") as run:
        assert run.is_closed
        assert run["loss"].select(mode="TRAIN").steps[-1] == trained.state.global_step


def test_going_on_from_a_checkpoint(tmp_path: Path) -> None:
    """The job died after step 5; its last checkpoint is that of step 3."""

    class Die(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    where = tmp_path / "run"
    callback = RunCallback(where, collections=["weights"], every=1)
    first = trainer(tmp_path, callback)
    first.add_callback(Die())
    with pytest.raises(KeyboardInterrupt):
        first.train()
    callback._run.flush()  # a second later it had done so itself
    second = trainer(tmp_path, RunCallback(where, collections=["weights"], every=1))
    second.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    with tsf.open_run(where) as run:
        assert run.attempts == [0, 1]
        before, after = history(first, "loss"), history(second, "loss")
        assert sorted(before) == [1, 2, 3, 4]
        assert series(run, "loss", "TRAIN") == after  # its state holds what came before, too
        assert sorted(after) == [1, 2, 3, 4, 5, 6]
        assert sorted(series(run, "loss", "EVAL")) == [3, 6]
        weights = run["classifier.weight"]
        assert weights.steps.tolist() == [1, 2, 3, 4, 5, 6]
        assert np.array_equal(weights.read(step=4), weights.read(step=4, attempt=0))
        assert run["loss"].read(step=4, mode="TRAIN", attempt=0) == before[4]
        with pytest.raises(tsf.NotThereError):
            weights.read(step=3, attempt=1)


def test_a_finished_run_is_not_written_over(tmp_path: Path) -> None:
    tsf.create_run(tmp_path / "run").close()
    with pytest.raises(tsf.RunExistsError):
        trainer(tmp_path, RunCallback(tmp_path / "run")).train()
