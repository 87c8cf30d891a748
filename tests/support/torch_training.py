"""A small network with all that hooks meet, and a training of it that is the same each time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tensorstore_fmt as tsf

torch = pytest.importorskip("torch")

from torch.utils.checkpoint import checkpoint  # noqa: E402

EVERYTHING = (
    "losses",
    "weights",
    "biases",
    "gradients",
    "activations",
    "inputs",
    "output_gradients",
    "buffers",
    "optimizer",
)


class Net(torch.nn.Module):
    """A module called twice, one that works in place, batch norm, dropout, a dict as output."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(6, 6)
        self.relu = torch.nn.ReLU(inplace=True)
        self.norm = torch.nn.BatchNorm1d(6)
        self.drop = torch.nn.Dropout(0.5)
        self.head = torch.nn.Linear(6, 3)
        self.recompute: bool | None = None

    def block(self, x: Any) -> Any:
        return self.norm(self.relu(self.first(x)))

    def forward(self, x: Any, *, scale: Any = None) -> dict[str, Any]:
        if self.recompute is None:
            hidden = self.block(x)
        else:
            hidden = checkpoint(self.block, x, use_reentrant=self.recompute)
        hidden = self.drop(self.first(hidden))
        if scale is not None:
            hidden = hidden * scale
        return {"logits": self.head(hidden), "extra": (hidden, None)}


def batch(number: int) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(5, 6, generator=generator)
    return x, torch.randint(0, 3, (5,), generator=generator)


def build() -> tuple[Any, Any, Any]:
    torch.manual_seed(7)
    model = Net()
    return model, torch.optim.Adam(model.parameters(), lr=0.01), torch.nn.CrossEntropyLoss()


def train(
    parts: tuple[Any, Any, Any],
    steps: int = 4,
    *,
    called: Any = None,
    each: Callable[[int, float], object] = lambda step, loss: None,
) -> list[float]:
    """Train on a seeded stream of batches; give the losses, bit for bit."""
    model, optimizer, criterion = parts
    losses = []
    for step in range(steps):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = criterion((model if called is None else called)(x)["logits"], y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        each(step, losses[-1])
    return losses


def saved(path: Path) -> dict[str, list[int]]:
    with tsf.open_run(path) as run:
        return {name: run[name].steps.tolist() for name in run}
