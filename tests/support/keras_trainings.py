"""Trainings with Keras, each in a process of its own: the backend is chosen at the import."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import tensorstore_fmt as tsf
from tensorstore_fmt.rules import request_stop

ALL = ("values_and_weights", "going_on", "stopping")

Seen = list[dict[str, Any]]


def _model() -> Any:
    import keras

    keras.utils.set_random_seed(4)
    model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(2, name="head")])
    model.compile(optimizer=keras.optimizers.Adam(0.1), loss="mse")
    return model


def _data() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    return rng.random((20, 4), np.float32), rng.random((20, 2), np.float32)


def _watch(seen: Seen) -> Any:
    """Give a callback that notes what there was after each step."""
    import keras

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            kernel = keras.ops.convert_to_numpy(self.model.weights[0].value).copy()
            seen.append({"loss": logs["loss"], "kernel": kernel})

    return Watch()


def _fit(model: Any, *callbacks: Any, epochs: int = 2, **options: Any) -> Any:
    x, y = _data()
    return model.fit(
        x, y, batch_size=4, epochs=epochs, validation_data=(x[:6], y[:6]), verbose=0,
        callbacks=list(callbacks), **options,
    )  # fmt: skip


def _series(run: Any, name: str, mode: str) -> dict[int, float]:
    tensor = run[name].select(mode=mode)
    return {step: tensor.read(step=step).item() for step in tensor.steps.tolist()}


def values_and_weights(folder: Path) -> None:
    from tensorstore_fmt.hooks.keras import RunCallback

    seen: Seen = []
    model = _model()
    callback = RunCallback(folder / "run", every=2, weights="kernel")
    told = _fit(model, callback, _watch(seen)).history
    x, y = _data()
    evaluated = model.evaluate(x, y, verbose=0, callbacks=[callback], return_dict=True)
    with tsf.open_run(folder / "run") as run:
        assert run.is_closed
        assert abs(run.attrs["hparams"]["optimizer"]["learning_rate"] - 0.1) < 1e-6
        losses = _series(run, "loss", "TRAIN")
        assert sorted(losses) == [2, 4, 5, 6, 8, 10]  # two epochs of five
        assert [losses[5], losses[10]] == told["loss"]
        assert all(losses[k] == seen[k - 1]["loss"] for k in (2, 4, 6, 8))
        assert _series(run, "loss", "EVAL") == {5: told["val_loss"][0], 10: evaluated["loss"]}
        (name,) = [name for name in run if name.endswith("head/kernel")]
        assert run[name].steps.tolist() == [2, 4, 6, 8, 10]
        for k in (2, 6, 10):
            assert np.array_equal(run[name].read(step=k), seen[k - 1]["kernel"])


def going_on(folder: Path) -> None:
    """The job died in its second epoch; the backup is that of the first."""
    import keras

    from tensorstore_fmt.hooks.keras import RunCallback

    class Die(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if len(seen) == 8:
                raise KeyboardInterrupt

    seen: Seen = []
    first = RunCallback(folder / "run", every=1)
    with contextlib.suppress(KeyboardInterrupt):
        _fit(
            _model(), first, _watch(seen), Die(),
            keras.callbacks.BackupAndRestore(folder / "backup"),
        )  # fmt: skip
    first._run.flush()  # a second later it had done so itself
    again: Seen = []
    _fit(
        _model(), RunCallback(folder / "run", every=1), _watch(again),
        keras.callbacks.BackupAndRestore(folder / "backup"),
    )  # fmt: skip
    assert (len(seen), len(again)) == (8, 5)
    with tsf.open_run(folder / "run") as run:
        assert run.attempts == [0, 1]
        losses = _series(run, "loss", "TRAIN")
        assert [losses[k] for k in range(1, 6)] == [each["loss"] for each in seen[:5]]
        assert [losses[k] for k in range(6, 11)] == [each["loss"] for each in again]
        assert sorted(_series(run, "loss", "EVAL")) == [5, 10]
        assert run["loss"].read(step=7, mode="TRAIN", attempt=0) == seen[6]["loss"]


def stopping(folder: Path) -> None:
    import keras

    from tensorstore_fmt.hooks.keras import RunCallback

    class Ask(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            if not asked:
                asked.append(request_stop(folder / "run", "enough"))
                while not callback._watcher.stop_requested:
                    time.sleep(0.01)

    asked: list[str] = []
    callback = RunCallback(folder / "run", every=1)
    told = _fit(_model(), callback, Ask(), epochs=1000).history
    assert len(told["loss"]) < 1000


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
    print("as it should be")  # noqa: T201 - the test reads it
