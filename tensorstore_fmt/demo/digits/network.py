"""A small multilayer perceptron in plain NumPy: forward, backward and Adam written out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

__all__ = ["Adam", "Array", "Network", "accuracy", "cross_entropy"]

Array = npt.NDArray[np.floating]


class Network:
    """Fully connected layers with ReLU between them, logits at the end.

    Parameters
    ----------
    sizes
        Width of the input, of each hidden layer and of the output.
    seed
        Of the initial weights (He's normal distribution times `gain`; biases start at zero).
    gain
        Below 1, weights start smaller than they should for deep networks, and soon show what
        was learned rather than what was drawn.
    dtype
        Of parameters, activations and gradients; float64 is for checking gradients.

    Attributes
    ----------
    parameters
        ``fc1.weight`` of shape (inputs, outputs), ``fc1.bias`` of shape (outputs,), and so on.
        An optimizer changes the arrays in place. Column j of a weight is what enters unit j.
    layers
        ``fc1``, ``fc2`` and so on, in the order of the forward pass.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        seed: int,
        gain: float = 1.0,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        random = np.random.default_rng(seed)
        self.layers: list[str] = []
        self.parameters: dict[str, Array] = {}
        for number, (inputs, outputs) in enumerate(pairwise(sizes), 1):
            layer = f"fc{number}"
            weight = random.standard_normal((inputs, outputs)) * (gain * np.sqrt(2.0 / inputs))
            self.layers.append(layer)
            self.parameters[f"{layer}.weight"] = weight.astype(dtype)
            self.parameters[f"{layer}.bias"] = np.zeros(outputs, dtype=dtype)

    def forward(self, images: Array) -> dict[str, Array]:
        """Compute what each layer gives out, by layer; the last one's are the logits.

        Parameters
        ----------
        images
            Shape (batch, inputs).

        Returns
        -------
        dict
            Shape (batch, outputs of the layer); hidden layers after ReLU.
        """
        activations: dict[str, Array] = {}
        value = images
        for layer in self.layers:
            value = value @ self.parameters[f"{layer}.weight"]
            value += self.parameters[f"{layer}.bias"]
            if layer != self.layers[-1]:
                np.maximum(value, 0, out=value)
            activations[layer] = value
        return activations

    def backward(
        self, images: Array, activations: Mapping[str, Array], logits_gradient: Array
    ) -> dict[str, Array]:
        """Compute the gradient of the loss for each parameter, by its name.

        Parameters
        ----------
        images, activations
            What `forward` was given and gave.
        logits_gradient
            The gradient of the loss for the logits, from `cross_entropy`.
        """
        gradients: dict[str, Array] = {}
        upstream = logits_gradient
        for position in reversed(range(len(self.layers))):
            layer = self.layers[position]
            inputs = images if position == 0 else activations[self.layers[position - 1]]
            gradients[f"{layer}.weight"] = inputs.T @ upstream
            gradients[f"{layer}.bias"] = upstream.sum(axis=0)
            if position > 0:
                # A ReLU passes the gradient where it passed the value.
                upstream = (upstream @ self.parameters[f"{layer}.weight"].T) * (inputs > 0)
        return gradients


def cross_entropy(logits: Array, labels: npt.NDArray[np.int64]) -> tuple[float, Array]:
    """Compute the mean cross-entropy of softmax(`logits`), and its gradient for the logits."""
    rows = np.arange(len(labels))
    # The largest logit becomes zero, so that exp cannot overflow.
    shifted = logits - logits.max(axis=1, keepdims=True)
    exponentials = np.exp(shifted)
    sums = exponentials.sum(axis=1, keepdims=True)
    loss = float(np.mean(np.log(sums[:, 0]) - shifted[rows, labels]))
    gradient = exponentials / sums
    gradient[rows, labels] -= 1
    gradient /= len(labels)
    return loss, gradient


def accuracy(logits: Array, labels: npt.NDArray[np.int64]) -> float:
    """Compute the share of rows whose largest logit is that of their label."""
    return float(np.mean(np.argmax(logits, axis=1) == labels))


class Adam:
    """Adam (Kingma and Ba, 2015), with decoupled weight decay (Loshchilov and Hutter, 2019).

    Parameters
    ----------
    learning_rate, beta1, beta2, epsilon
        As in the paper.
    weight_decay
        Share of each weight, times the learning rate, that one step takes away; biases keep
        theirs. 0 is plain Adam.
    """

    def __init__(
        self,
        *,
        learning_rate: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.learning_rate = learning_rate
        self.beta1 = beta1
        self.beta2 = beta2
        self.epsilon = epsilon
        self.weight_decay = weight_decay
        self.updates = 0
        self.first: dict[str, Array] = {}
        self.second: dict[str, Array] = {}

    def update(self, parameters: Mapping[str, Array], gradients: Mapping[str, Array]) -> None:
        """Move `parameters` one step against `gradients`, in place."""
        self.updates += 1
        for name, gradient in gradients.items():
            parameter = parameters[name]
            first = self.first.setdefault(name, np.zeros_like(gradient))
            second = self.second.setdefault(name, np.zeros_like(gradient))
            first += (1 - self.beta1) * (gradient - first)
            second += (1 - self.beta2) * (gradient * gradient - second)
            # Both averages start at zero; the divisions take that bias out again.
            mean = first / (1 - self.beta1**self.updates)
            spread = np.sqrt(second / (1 - self.beta2**self.updates)) + self.epsilon
            if name.endswith(".weight"):
                parameter *= 1 - self.learning_rate * self.weight_decay
            parameter -= self.learning_rate * mean / spread
