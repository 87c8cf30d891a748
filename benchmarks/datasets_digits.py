"""The quick data: a perceptron in NumPy, trained on scikit-learn's digits, in a few seconds.

The kinds are those of the full set. What a perceptron has not is computed from what it has:
attention is the softmax of its hidden states' products, half precision is rounded.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from datasets import SEED, Store
from tensorstore_fmt.demo.digits.dataset import load_digits
from tensorstore_fmt.demo.digits.network import Adam, Network, cross_entropy

__all__ = ["fill"]

_SOURCE = "perceptron on scikit-learn's digits, in NumPy"
_LAYER = "fc2.weight"
_STEPS = 24
_KEPT_EVERY = 8
Array = np.ndarray[Any, Any]


def fill(store: Store) -> None:
    """Make every kind and both streams."""
    digits = load_digits(seed=SEED)
    kept, losses, network = _train(digits.train_images, digits.train_labels)
    for name, short in (("weights", "w"), ("gradients", "g"), ("adam_m", "m"), ("adam_v", "v")):
        store.add(f"{name}_f32", np.stack([at[short] for at in kept]), _SOURCE)
    last = kept[-1]
    store.add("gradients_bf16", _bfloat16(np.stack([at["g"] for at in kept])), _SOURCE)
    wide = last["w"][None]
    store.add("transformer_weights_f32", wide, _SOURCE)
    store.add("transformer_weights_f16", wide.astype(np.float16), _SOURCE)
    store.add("transformer_weights_bf16", _bfloat16(wide), _SOURCE)
    activations = network.forward(digits.train_images)
    relu = activations["fc2"]
    store.add("relu_f32", relu[None], _SOURCE)
    store.add("mask_bool", np.stack([relu > 0, activations["fc1"] > 0]), _SOURCE)
    hidden = activations["fc1"] @ network.parameters[_LAYER]
    store.add("hidden_f32", hidden[None], _SOURCE)
    store.add("hidden_bf16", _bfloat16(hidden[None]), _SOURCE)
    store.add("gelu_f32", _gelu(hidden)[None], _SOURCE)
    store.add("attention_f32", _attention(hidden, 64), _SOURCE)
    store.add("attention_f16", _attention(hidden, 57).astype(np.float16), _SOURCE)
    pixels = (digits.train_images * 16).astype(np.int64)
    store.add("tokens_i64", pixels, _SOURCE)
    store.add("tokens_i32", pixels.astype(np.int32), _SOURCE)
    store.add("images_u8", pixels.astype(np.uint8).reshape(-1, 8, 8), "scikit-learn's digits")
    store.add("losses_f32", losses, _SOURCE)
    rows = digits.train_images.astype(np.float64)
    _, _, vectors = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    store.add("features_f64", rows @ vectors.T, "scikit-learn's digits, principal components")
    noise = np.random.default_rng(SEED).integers(0, 2**32, (2, 1 << 17), np.uint32)
    store.add("noise_f32", noise.view(np.float32), "PCG64's bits")
    pieces = [
        (step, f"{_LAYER}/{short}", at[short])
        for step, at in enumerate(kept)
        for short in ("w", "g", "m", "v")
    ]
    store.add_stream("f32", pieces, _SOURCE)
    store.add_stream("bf16", [(step, name, _bfloat16(x)) for step, name, x in pieces], _SOURCE)


def _train(images: Array, labels: Array) -> tuple[list[dict[str, Array]], Array, Network]:
    """Train, and keep a layer's weight, gradient and moments at some steps."""
    network = Network((64, 576, 576, 10), seed=SEED)
    adam = Adam()
    random = np.random.default_rng(SEED)
    losses = np.empty((_STEPS, len(images)), np.float32)
    kept = []
    for step in range(1, _STEPS + 1):
        whole = network.forward(images)["fc3"]
        shifted = whole - whole.max(axis=1, keepdims=True)
        logs = np.log(np.exp(shifted).sum(axis=1))
        losses[step - 1] = logs - shifted[np.arange(len(labels)), labels]
        batch = random.choice(len(images), 128, replace=False)
        outputs = network.forward(images[batch])
        _, upstream = cross_entropy(outputs["fc3"], labels[batch])
        gradients = network.backward(images[batch], outputs, upstream)
        adam.update(network.parameters, gradients)
        if step % _KEPT_EVERY == 0:
            arrays = network.parameters[_LAYER], gradients[_LAYER]
            arrays += adam.first[_LAYER], adam.second[_LAYER]
            kept.append({short: x.copy() for short, x in zip("wgmv", arrays, strict=True)})
    return kept, losses, network


def _attention(hidden: Array, tokens: int) -> Array:
    """Softmax of the products of 12 slices of the hidden states, for some groups of rows."""
    count, width = 8, hidden.shape[1] // 12
    states = hidden[: count * tokens, : 12 * width].reshape(count, tokens, 12, width)
    states = states.transpose(0, 2, 1, 3)
    scores = states @ states.transpose(0, 1, 3, 2) / math.sqrt(width)
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares: Array = powers / powers.sum(axis=-1, keepdims=True)
    return shares[:, None]


def _gelu(values: Array) -> Array:
    inner = math.sqrt(2 / math.pi) * (values + 0.044715 * values**3)
    return np.asarray(values * (1 + np.tanh(inner)) / 2, np.float32)


def _bfloat16(values: Array) -> Array:
    """Round finite float32 to the nearest bfloat16, ties to even; give its bits."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
