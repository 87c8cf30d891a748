"""The examples of the page about hooks run, each with what its framework's user has already."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tensorstore_fmt as tsf

PAGE = Path(tsf.__file__).parent / "hooks" / "README.md"
EXAMPLES = dict(
    re.findall(
        r"^## ([^\n]+)\n\n```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
)

TORCH = """
import torch
torch.manual_seed(0)
model = torch.nn.Linear(4, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
def train(model, optimizer):
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
"""
TRANSFORMERS = """
import torch
from transformers import Trainer, TrainingArguments
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(4, 2)
    def forward(self, x, labels):
        logits = self.head(x)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}
model = Model()
data = [{"x": torch.ones(4), "labels": number % 2} for number in range(8)]
args = TrainingArguments("out", max_steps=10, logging_steps=1, report_to=[], use_cpu=True)
"""
LIGHTNING = """
import torch
from lightning import LightningModule, Trainer
class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(4, 2)
    def training_step(self, batch):
        loss = self.head(batch).pow(2).mean()
        self.log("loss", loss)
        return loss
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
module = Module()
loader = torch.utils.data.DataLoader(torch.ones(8, 4), batch_size=4)
options = {"max_epochs": 1, "log_every_n_steps": 1, "accelerator": "cpu"}
"""
KERAS = """
import keras, numpy as np
x, y = np.ones((20, 4)), np.ones((20, 2))
model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(2)])
model.compile(optimizer="sgd", loss="mse")
"""
ALL = {  # what it needs, what is there before, where the run is, names in it
    "PyTorch": ("torch", TORCH, "torch", {"weight", "gradient/bias"}),
    "Hugging Face Transformers": (
        "transformers", TRANSFORMERS, "trainer", {"loss", "gradient/head.weight"},
    ),
    "Lightning": ("lightning", LIGHTNING, "lightning", {"loss", "gradient/head.weight"}),
    "Accelerate": ("accelerate", "from accelerate import Accelerator", "accelerate", {"loss"}),
    "Keras 3": ("keras", KERAS, "keras", {"loss"}),
    "Instead of TensorBoard's SummaryWriter": ("numpy", "", "written", {"loss"}),
    "As with Weights & Biases": ("numpy", "", "digits/first", {"loss"}),
    "Scripts for smdebug": (
        "torch", TORCH, "smdebug", {"Linear_weight", "gradient/Linear_weight"},
    ),
}  # fmt: skip


def test_all_examples_are_tried_and_short() -> None:
    assert set(EXAMPLES) == set(ALL)
    for name, example in EXAMPLES.items():
        lines = [line for line in example.splitlines() if line]
        assert len(lines) <= 5, name


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_examples_run(name: str, tmp_path: Path) -> None:
    needed, before, where, names = ALL[name]
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"no {needed} here")
    backend = "torch" if importlib.util.find_spec("torch") else "jax"
    done = subprocess.run(
        [sys.executable, "-c", before + "\n" + EXAMPLES[name]],
        cwd=tmp_path,
        env={
            **os.environ,
            "KERAS_BACKEND": backend,
            "PYTHONPATH": os.pathsep.join([str(PAGE.parents[2]), *filter(None, sys.path)]),
        },
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with tsf.open_run(tmp_path / "runs" / where) as run:
        assert run.is_closed
        assert names <= set(run.names())
