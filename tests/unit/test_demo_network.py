"""The network of the demo ``digits``: its gradients, its optimizer, and that it learns."""

from __future__ import annotations

import numpy as np
import pytest

from tensorstore_fmt.demo.digits.network import Adam, Array, Network, accuracy, cross_entropy
from tensorstore_fmt.demo.digits.observation import Observation, check_gradients

SIZES = (7, 6, 5, 4)


@pytest.fixture
def images() -> Array:
    return np.random.default_rng(1).standard_normal((9, SIZES[0]))


LABELS = np.array([0, 1, 2, 3, 0, 1, 2, 3, 3])


def loss_of(network: Network, images: Array) -> float:
    return cross_entropy(network.forward(images)[network.layers[-1]], LABELS)[0]


@pytest.mark.parametrize(
    "name", [f"fc{i}.{part}" for i in (1, 2, 3) for part in ("weight", "bias")]
)
def test_backward_is_what_finite_differences_say(name: str, images: Array) -> None:
    network = Network(SIZES, seed=0, dtype=np.float64)
    activations = network.forward(images)
    _, logits_gradient = cross_entropy(activations["fc3"], LABELS)
    gradient = network.backward(images, activations, logits_gradient)[name]

    parameter = network.parameters[name]
    expected = np.empty_like(parameter)
    step = 1e-6
    for index in np.ndindex(parameter.shape):
        value = parameter[index]
        parameter[index] = value + step
        above = loss_of(network, images)
        parameter[index] = value - step
        below = loss_of(network, images)
        parameter[index] = value
        expected[index] = (above - below) / (2 * step)
    assert gradient.shape == parameter.shape
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-9)


def test_cross_entropy_of_equal_logits_is_the_logarithm_of_their_number() -> None:
    loss, gradient = cross_entropy(np.full((2, 4), 1000.0), np.array([0, 3]))
    assert loss == pytest.approx(np.log(4))
    np.testing.assert_allclose(
        gradient, [[-0.375, 0.125, 0.125, 0.125], [0.125, 0.125, 0.125, -0.375]]
    )


def test_accuracy_counts_the_largest_logits() -> None:
    logits = np.array([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert accuracy(logits, np.array([1, 0, 0, 1])) == 0.75


def test_adam_does_two_steps_as_by_hand() -> None:
    optimizer = Adam(learning_rate=0.1, beta1=0.5, beta2=0.75, epsilon=0.0)
    parameters: dict[str, Array] = {"a.weight": np.array([1.0, -2.0])}

    # Step 1: the corrected means are the gradient g and its square, so each moves by 0.1 sign(g).
    optimizer.update(parameters, {"a.weight": np.array([4.0, -2.0])})
    np.testing.assert_allclose(parameters["a.weight"], [0.9, -1.9], rtol=1e-15)

    # Step 2 with g = (0, -2): m = (0.5*2 + 0, 0.5*-1 + 0.5*-2) = (1, -1.5), over 1 - 0.5**2 = 0.75;
    # v = (0.75*4 + 0, 0.75*1 + 0.25*4) = (3, 1.75), over 1 - 0.75**2 = 0.4375.
    optimizer.update(parameters, {"a.weight": np.array([0.0, -2.0])})
    moved = 0.1 * np.array([1 / 0.75, -1.5 / 0.75]) / np.sqrt([3 / 0.4375, 1.75 / 0.4375])
    np.testing.assert_allclose(parameters["a.weight"], np.array([0.9, -1.9]) - moved, rtol=1e-15)


def test_weight_decay_shrinks_weights_and_leaves_biases() -> None:
    optimizer = Adam(learning_rate=0.1, weight_decay=0.5)
    parameters: dict[str, Array] = {"a.weight": np.array([2.0]), "a.bias": np.array([2.0])}
    optimizer.update(parameters, {name: np.zeros(1) for name in parameters})
    np.testing.assert_allclose(parameters["a.weight"], [1.9])
    np.testing.assert_allclose(parameters["a.bias"], [2.0])


def test_the_loss_falls(images: Array) -> None:
    network = Network(SIZES, seed=0)
    inputs = images.astype(np.float32)
    optimizer = Adam(learning_rate=0.02)
    before = loss_of(network, inputs)
    for _ in range(100):
        activations = network.forward(inputs)
        _, logits_gradient = cross_entropy(activations["fc3"], LABELS)
        optimizer.update(network.parameters, network.backward(inputs, activations, logits_gradient))
    assert loss_of(network, inputs) < 0.1 * before
    assert all(value.dtype == np.float32 for value in network.parameters.values())


def columns(*, l2: list[float], nan: list[int]) -> dict[str, np.ndarray]:
    zeros = np.zeros(len(l2))
    return {
        "step": np.arange(0, 10 * len(l2), 10),
        "l2": np.array(l2),
        "nan": np.array(nan, dtype=np.float64),
        "posinf": zeros,
        "neginf": zeros,
    }


def test_check_passes_healthy_gradients() -> None:
    statistics = {
        "gradient/a": columns(l2=[1.0, 0.5], nan=[0, 0]),
        "gradient/b": columns(l2=[0.25, 2.0], nan=[0, 0]),
    }
    assert check_gradients(statistics) == (0.25, "b", 0, ())


def test_check_finds_nan_and_vanishing_gradients() -> None:
    statistics = {
        "gradient/a": columns(l2=[1.0, np.nan], nan=[0, 3]),
        "gradient/b": columns(l2=[1.0, 1e-12], nan=[0, 0]),
        "gradient/c": columns(l2=[np.nan], nan=[1]),
    }
    smallest_l2, smallest_name, not_finite, problems = check_gradients(statistics)
    assert (smallest_l2, smallest_name, not_finite) == (1e-12, "b", 4)
    assert len(problems) == 3
    assert "gradient/a" in problems[0]
    assert problems[0].endswith("step 10")
    assert "vanishes" in problems[1]


def test_check_of_nothing_finds_nothing() -> None:
    assert check_gradients({"gradient/a": columns(l2=[], nan=[])})[2:] == (0, ())


def test_observation_survives_its_journey() -> None:
    seen = Observation(
        step=120,
        loss=0.213,
        accuracy=0.941,
        smallest_l2=float("inf"),
        smallest_name="none",
        not_finite=0,
        problems=("gradient/a vanishes",),
        is_closed=False,
    )
    assert Observation.from_json(seen.to_json()) == seen
    assert Observation.from_json("Traceback (most recent call last):") is None
    assert Observation.from_json("[]") is None
    assert "FAILED: gradient/a vanishes" in str(seen)
