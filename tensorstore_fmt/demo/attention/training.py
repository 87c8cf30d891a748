"""The fine-tuning: MiniLM learns which sentences follow each other, and a hook saves its attention.

Names and shapes in the run, all of mode EVAL and of the same probes at each saved step::

    encoder.layer.3.attention.self.scores/output   (pairs, heads, tokens, tokens)
    encoder.layer.3.attention.self.query/output    (pairs, tokens, heads x width of a head)
    encoder.layer.3.attention.self.key/output      the same
    tokens       the text of all tokens, one pair after the other; at step 0
    follows      whether the second sentence follows the first, 0 or 1; at step 0
    probability  what the model says of that
    loss         of the probes; in mode TRAIN of each step's batch
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

import tensorstore_fmt as tsf
from tensorstore_fmt.demo.attention.model import (
    HEAD,
    HEADS,
    LAYERS,
    PairModel,
    load_pair_model,
    model_folder,
)
from tensorstore_fmt.demo.attention.slices import Shape
from tensorstore_fmt.demo.attention.text import Pair, Text, load_text
from tensorstore_fmt.demo.attention.tokens import TOKENS, PairTokenizer
from tensorstore_fmt.hooks import Collection, SaveConfig
from tensorstore_fmt.hooks.torch import TorchHook, attach

__all__ = ["BATCH", "CHUNKS", "LOOK_NBYTES", "PROBES", "SHAPE", "Losses", "train"]

BATCH: Final = 16
PROBES: Final = 32

CHUNKS: Final[Mapping[str, tuple[int | None, ...]]] = {
    "*.scores/output": (1, 1, None, None),
    "*.query/output": (1, None, HEAD),
    "*.key/output": (1, None, HEAD),
}
"""One pair and one head each: that is what is looked at."""

SHAPE: Final = Shape(layers=LAYERS, heads=HEADS, head_width=HEAD, pairs=PROBES, tokens=TOKENS)

LOOK_NBYTES: Final = 4 * LAYERS * PROBES * HEADS * TOKENS * (TOKENS + 2 * HEAD)
"""Of what is saved at one step."""

_LEARNING_RATE = 5e-5
_NEW_LEARNING_RATE = 1e-2  # of what makes a logit of a cosine


@dataclass(frozen=True, slots=True)
class Losses:
    """Of each step's batch, and of the probes by saved step."""

    train: list[float]
    probes: dict[int, float]


def train(
    run: tsf.RunWriter,
    *,
    steps: int,
    save_every: int,
    seed: int,
    on_step: Callable[[int, float, float], None],
) -> Losses:
    """Fine-tune for `steps` steps; save what the probes do each `save_every`-th, and at the end.

    Parameters
    ----------
    on_step
        Called after each step with its number, its loss, and that of the probes when last looked.
    """
    text = load_text(probes=PROBES, seed=seed)
    model, tokenizer = load_pair_model(), PairTokenizer(model_folder())
    model.embeddings.requires_grad_(requires_grad=False)  # half of all weights, and no attention
    optimizer = torch.optim.AdamW(
        [
            {"params": model.encoder.parameters(), "lr": _LEARNING_RATE},
            {"params": [model.scale, model.border], "lr": _NEW_LEARNING_RATE},
        ]
    )
    chance, losses = random.Random(seed), Losses([], {})
    with attach(model, run, collections=_collections(), on_error="raise") as hook:
        for step in range(steps + 1):
            if step % save_every == 0 or step == steps:
                losses.probes[step] = _look(model, hook, text, tokenizer, step)
            if step == steps:
                break
            pairs = text.draw(chance, BATCH)
            hook.set_step(step, "TRAIN")
            logits = model(tokenizer.batch(pairs))
            loss = binary_cross_entropy_with_logits(logits, _targets(pairs))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.train.append(loss.item())
            hook.log({"loss": losses.train[-1]})
            on_step(step, losses.train[-1], list(losses.probes.values())[-1])
    return losses


def _look(
    model: PairModel, hook: TorchHook, text: Text, tokenizer: PairTokenizer, step: int
) -> float:
    """Let the model judge the probes, which the hook sees; give the loss."""
    hook.set_step(step, "EVAL")
    with torch.no_grad():
        logits = model(tokenizer.batch(text.probes))
    targets = _targets(text.probes)
    loss = float(binary_cross_entropy_with_logits(logits, targets))
    seen: dict[str, object] = {"loss": loss, "probability": logits.sigmoid()}
    if step == 0:
        seen["tokens"] = tokenizer.words(text.probes)
        seen["follows"] = targets.to(torch.int8)
    hook.log(seen)
    return loss


def _targets(pairs: Sequence[Pair]) -> torch.Tensor:
    return torch.tensor([float(pair.follows) for pair in pairs])


def _collections() -> list[Collection]:
    """Choose what is saved: of each look at the probes, never of the training's own batches."""
    save = SaveConfig(every=0, modes={"EVAL": SaveConfig(every=1)})
    return [
        Collection(
            name=part,
            modules=[f"encoder.layer.{layer}.attention.self.{part}" for layer in range(LAYERS)],
            save=save,
        )
        for part in ("scores", "query", "key")
    ]
