"""One of the trainings, a process of its own: it logs to its run, and stops if it is asked to.

``python -m tensorstore_fmt.demo.curves.training URL --learning-rate 0.2``
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

import tensorstore_fmt as tsf
from tensorstore_fmt.demo.digits.dataset import CLASSES, Digits, load_digits
from tensorstore_fmt.demo.digits.network import Array, Network, accuracy, cross_entropy
from tensorstore_fmt.demo.digits.observation import OPTIONS_VARIABLE
from tensorstore_fmt.demo.places import is_remote
from tensorstore_fmt.errors import TensorStoreError
from tensorstore_fmt.rules import StopWatcher

__all__ = ["STOPPED", "Momentum", "main", "train"]

STOPPED = "stopped"
"""Name under which a training that ended early says why, at its last step."""

_HIDDEN = (256, 128)
_BATCH = 256
_MOMENTUM = 0.9
_WARM_UP_SHARE = 3  # of the steps one third: the rate grows until then
_INTERRUPTED = "interrupted (Ctrl-C)"


class Momentum:
    """Gradient descent with momentum (Polyak, 1964)."""

    def __init__(self) -> None:
        self._velocity: dict[str, Array] = {}

    def update(
        self, parameters: Mapping[str, Array], gradients: Mapping[str, Array], *, rate: float
    ) -> None:
        """Move `parameters` one step against `gradients`, in place."""
        for name, gradient in gradients.items():
            velocity = self._velocity.setdefault(name, np.zeros_like(gradient))
            velocity *= _MOMENTUM
            velocity += gradient
            parameters[name][...] -= rate * velocity


def train(
    run: tsf.RunWriter,
    digits: Digits,
    *,
    learning_rate: float,
    steps: int,
    save_every: int,
    seed: int,
    seconds: float,
    why_stop: Callable[[int], str | None],
) -> None:
    """Train on `digits` and log to `run` what happens.

    Every step logs ``loss`` and ``learning_rate`` in mode TRAIN. Each `save_every`-th step, and
    the last, also logs weights and ``gradient/…``, and ``loss`` and ``accuracy`` of the test
    digits in mode EVAL.

    Parameters
    ----------
    learning_rate
        Reached after a third of the steps; it grows evenly until then.
    seconds
        How long this takes at least; so small a network would be done before anyone could look.
    why_stop
        Asked before each step; what it says ends the training, and is logged as ``stopped``.
    """
    network = Network((digits.train_images.shape[1], *_HIDDEN, CLASSES), seed=seed)
    optimizer = Momentum()
    random = np.random.default_rng(seed)
    warm_up = max(1, steps // _WARM_UP_SHARE)
    began = time.monotonic()
    for step in range(steps):
        reason = why_stop(step)
        if reason is not None:
            run.log({STOPPED: reason}, step=max(step - 1, 0), mode="TRAIN")
            return
        batch = random.choice(len(digits.train_images), _BATCH, replace=False)
        images, labels = digits.train_images[batch], digits.train_labels[batch]
        activations = network.forward(images)
        loss, logits_gradient = cross_entropy(activations[network.layers[-1]], labels)
        gradients = network.backward(images, activations, logits_gradient)

        rate = learning_rate * min(1.0, (step + 1) / warm_up)
        values: dict[str, object] = {"loss": loss, "learning_rate": rate}
        if step % save_every == 0 or step == steps - 1:
            values |= network.parameters
            values |= {f"gradient/{name}": value for name, value in gradients.items()}
            run.log(_tested(network, digits), step=step, mode="EVAL")
        run.log(values, step=step, mode="TRAIN")
        optimizer.update(network.parameters, gradients, rate=rate)
        time.sleep(max(0.0, began + (step + 1) * seconds / steps - time.monotonic()))


def _tested(network: Network, digits: Digits) -> dict[str, float]:
    logits = network.forward(digits.test_images)[network.layers[-1]]
    loss, _ = cross_entropy(logits, digits.test_labels)
    return {"loss": loss, "accuracy": accuracy(logits, digits.test_labels)}


def _train_into(options: argparse.Namespace) -> int:
    storage_options = json.loads(os.environ.get(OPTIONS_VARIABLE, "null"))
    digits = load_digits(seed=options.seed)
    sizes = "-".join(map(str, (digits.train_images.shape[1], *_HIDDEN, CLASSES)))
    attrs = {
        "made_by": "tensorstore-fmt demo curves",
        "network": sizes,
        "optimizer": f"gradient descent, momentum {_MOMENTUM}",
        "learning_rate": options.learning_rate,
        "steps": options.steps,
        "seed": options.seed,
    }
    signals: list[int] = []
    # The run is closed in any case, so that a second Ctrl-C meets no half-closed one.
    signal.signal(signal.SIGINT, lambda number, _: signals.append(number))
    remote = is_remote(options.url)
    with tsf.create_run(
        options.url,
        attrs=attrs,
        storage_options=storage_options,
        # Somebody looks on; an object store answers in tens of milliseconds.
        flush_interval_s=1.0 if remote else 0.25,
    ) as run:
        with StopWatcher(run, poll_s=1.0 if remote else 0.25) as watcher:

            def why_stop(step: int) -> str | None:
                if signals:
                    return _INTERRUPTED
                return watcher.reason if watcher.should_stop(step) else None

            # A rate that is too large overflows; that is what is to be seen.
            with np.errstate(all="ignore"):
                train(
                    run,
                    digits,
                    learning_rate=options.learning_rate,
                    steps=options.steps,
                    save_every=options.save_every,
                    seed=options.seed,
                    seconds=options.seconds,
                    why_stop=why_stop,
                )
        written = run.close()
    if written.dropped:
        print(f"{written.dropped} tensors could not be stored and were dropped", file=sys.stderr)
    return int(written.dropped > 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train once; give 0, or 1 if the run could not be made or lost something."""
    parser = argparse.ArgumentParser(
        prog="python -m tensorstore_fmt.demo.curves.training",
        description="Train a small network on digits, and log it to a run.",
        epilog=f"Storage options are read as JSON from the environment: {OPTIONS_VARIABLE}.",
    )
    parser.add_argument("url", help="folder or URL of the run")
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.0, help="that it takes at least")
    try:
        return _train_into(parser.parse_args(arguments))
    except (TensorStoreError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
