"""The training that the demo watches: a loop that logs to a run, and copies to compare with."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from tensorstore_fmt.demo.digits.dataset import CLASSES, Digits
from tensorstore_fmt.demo.digits.network import Adam, Array, Network, accuracy, cross_entropy

__all__ = ["BATCH", "COPIED", "HIDDEN", "SHORTEST_S", "LogsSteps", "Memory", "train"]

HIDDEN = (256, 128)
BATCH = 256

SHORTEST_S = 3.0
"""The loop takes at least this long; so small a network would be done before anyone could look."""

COPIED = "fc1.weight"
"""The name of which `Memory` keeps whole copies at many steps."""

_MOST_COPIES = 200  # 13 MB; a demo of a million steps must not fill the memory
# Chosen for the pictures: from small weights and in large steps, three hundred steps show what is
# learned rather than what was drawn at the start, and decay clears pixels that no digit touches.
_GAIN = 0.15
_LEARNING_RATE = 2e-3
_WEIGHT_DECAY = 0.5


class LogsSteps(Protocol):
    """What the training needs of a run."""

    def log(self, data: Mapping[str, object], *, step: int, mode: str | None = None) -> None:
        """Take the values of one step."""


@dataclass(slots=True, kw_only=True)
class Memory:
    """What the training process remembers, to check against what the run gives back.

    Attributes
    ----------
    loss, accuracy
        Of each step's batch, before the step's update.
    test_loss, test_accuracy
        Of the test digits, by saved step.
    copies
        ``fc1.weight`` by saved step: the first 200 of them.
    gradient_l2
        Norm of each gradient, by name, at the saved steps.
    last
        Everything logged at the last step in mode TRAIN.
    """

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    test_loss: dict[int, float] = field(default_factory=dict)
    test_accuracy: dict[int, float] = field(default_factory=dict)
    copies: dict[int, Array] = field(default_factory=dict)
    gradient_l2: dict[str, list[float]] = field(default_factory=dict)
    last: dict[str, object] = field(default_factory=dict)


def train(
    run: LogsSteps,
    digits: Digits,
    *,
    steps: int,
    save_every: int,
    seed: int,
    on_step: Callable[[int, float, float], None],
) -> Memory:
    """Train on `digits` for `steps` steps and log to `run` what happens.

    Every step logs ``loss`` and ``accuracy`` of its batch in mode TRAIN. Each `save_every`-th
    step, and the last, also logs weights, ``gradient/…`` and ``activation/…`` in the same call,
    and ``loss`` and ``accuracy`` of the test digits in mode EVAL. All values of a step belong
    to the same weights: those before its update.

    Parameters
    ----------
    on_step
        Called after each step with its number, loss and accuracy.

    Returns
    -------
    Memory
        Copies made here, which share no memory with what `run` was given.
    """
    sizes = (digits.train_images.shape[1], *HIDDEN, CLASSES)
    network = Network(sizes, seed=seed, gain=_GAIN)
    optimizer = Adam(learning_rate=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    random = np.random.default_rng(seed)
    memory = Memory()
    began = time.monotonic()
    for step in range(steps):
        batch = random.choice(len(digits.train_images), BATCH, replace=False)
        images, labels = digits.train_images[batch], digits.train_labels[batch]
        activations = network.forward(images)
        logits = activations[network.layers[-1]]
        loss, logits_gradient = cross_entropy(logits, labels)
        gradients = network.backward(images, activations, logits_gradient)

        values: dict[str, object] = {"loss": loss, "accuracy": accuracy(logits, labels)}
        memory.loss.append(loss)
        memory.accuracy.append(accuracy(logits, labels))
        is_saved = step % save_every == 0 or step == steps - 1
        if is_saved:
            values |= network.parameters
            values |= {f"gradient/{name}": value for name, value in gradients.items()}
            values |= {f"activation/{layer}": value for layer, value in activations.items()}
            _remember(memory, step, network, gradients)
        run.log(values, step=step, mode="TRAIN")
        if is_saved:
            test_logits = network.forward(digits.test_images)[network.layers[-1]]
            test_loss, _ = cross_entropy(test_logits, digits.test_labels)
            test_accuracy = accuracy(test_logits, digits.test_labels)
            memory.test_loss[step] = test_loss
            memory.test_accuracy[step] = test_accuracy
            run.log({"loss": test_loss, "accuracy": test_accuracy}, step=step, mode="EVAL")
        if step == steps - 1:
            memory.last = {
                name: value.copy() if isinstance(value, np.ndarray) else value
                for name, value in values.items()
            }
        # In place, at once: a run that did not copy what it was given would store this instead.
        optimizer.update(network.parameters, gradients)
        on_step(step, loss, memory.accuracy[-1])
        time.sleep(max(0.0, began + (step + 1) * SHORTEST_S / steps - time.monotonic()))
    return memory


def _remember(memory: Memory, step: int, network: Network, gradients: Mapping[str, Array]) -> None:
    if len(memory.copies) < _MOST_COPIES:
        memory.copies[step] = network.parameters[COPIED].copy()
    for name, value in gradients.items():
        norm = float(np.sqrt(np.sum(np.square(value, dtype=np.float64))))
        memory.gradient_l2.setdefault(f"gradient/{name}", []).append(norm)
