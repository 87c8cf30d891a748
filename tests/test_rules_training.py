"""Rules on real trainings through the hook: one with the fault, one without."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tensorstore_fmt as tsf
from tensorstore_fmt import rules
from tensorstore_fmt.hooks import Collection, Reductions

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

from sklearn.datasets import load_digits  # noqa: E402

from tensorstore_fmt.hooks.torch import attach  # noqa: E402

nn = torch.nn
DIGITS = load_digits()
X = torch.tensor((DIGITS.data - 4.9) / 6.0, dtype=torch.float32)
Y = torch.tensor(DIGITS.target)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """More of them only wait for each other, in networks so small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def mlp(activation: Any = nn.ReLU, depth: int = 2, width: int = 32) -> Any:
    layers: dict[str, Any] = {}
    n = 64
    for i in range(depth):
        layers[f"fc{i}"] = nn.Linear(n, width)
        layers[f"{activation.__name__.lower()}{i}"] = activation()
        n = width
    layers["head"] = nn.Linear(n, 10)
    return nn.Sequential(OrderedDict(layers))


def train(
    url: Path,
    model: Any,
    *,
    steps: int = 40,
    lr: float = 0.1,
    n_train: int = 1200,
    evaluate_every: int = 0,
    collections: Any = ("losses", "weights", "gradients", "activations", "inputs"),
    change: Callable[[Any, Any], tuple[Any, Any]] = lambda x, y: (x, y),
    each: Callable[[int, Any], None] = lambda step, model: None,
    batch: int = 64,
    **options: Any,
) -> str:
    """Train on digits, seeded; logs accuracy, labels and logits beside what the hook saves."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    criterion = nn.CrossEntropyLoss()
    with attach(
        model, url, optimizer=optimizer, loss=criterion, collections=collections, every=1,
        on_error="raise", **options,
    ) as hook:  # fmt: skip
        for step in range(steps):
            pick = torch.randint(0, n_train, (batch,), generator=generator)
            x, y = change(X[pick], Y[pick])
            optimizer.zero_grad()
            logits = model(x)
            criterion(logits, y).backward()
            hook.log({"labels": y, "logits": logits.detach()})
            optimizer.step()
            each(step, model)
            if evaluate_every and step % evaluate_every == evaluate_every - 1:
                model.eval()
                with torch.no_grad():
                    x, y = X[1200:1700], Y[1200:1700]
                    logits = model(x)
                    criterion(logits, y)
                    accuracy = (logits.argmax(1) == y).float().mean()
                    hook.log({"accuracy": accuracy, "labels": y, "logits": logits})
                model.train()
    return str(url)


def seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(1)
    return make()


def found(url: str, rule: rules.Rule) -> list[rules.Finding]:
    return rules.evaluate(url, [rule], record=False).findings


def scaled(model: Any, name: str, factor: float, shift: float = 0.0) -> Any:
    with torch.no_grad():
        parameter = dict(model.named_parameters())[name]
        parameter.mul_(factor).add_(shift)
    return model


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A training without a fault: what every rule must leave alone."""
    url = tmp_path_factory.mktemp("healthy") / "run"
    return train(url, seeded(mlp), steps=60, lr=0.25, evaluate_every=10)


@pytest.mark.parametrize(
    "rule",
    [
        rules.VanishingGradient(),
        rules.ExplodingTensor(),
        rules.AllZero(names=r"weight$|^gradient/"),
        rules.UnchangedTensor(names=r"weight$"),
        rules.TensorVariance(most=100),
        rules.WeightUpdateRatio(),
        rules.PoorInitialisation(),
        rules.DeadRelu(),
        rules.LossNotDecreasing(num_steps=15, mode="TRAIN"),
        rules.Overfit(ratio=1.0),
        rules.Overtraining(),
        rules.AccuracyDrop(),
        rules.ClassImbalance(mode="TRAIN", samples=3500, misprediction=0.9),
        rules.StalledTraining(),
        rules.CheckInput(),
    ],
    ids=lambda rule: rule.name,
)
def test_a_healthy_training(healthy: str, rule: rules.Rule) -> None:
    report = rules.evaluate(healthy, [rule], record=False)
    assert report.findings == []
    assert report.steps[rule.name] > 0


def test_vanishing_gradient(tmp_path: Path) -> None:
    """Twelve sigmoids one behind the other let nothing through."""
    url = train(
        tmp_path / "run", seeded(lambda: mlp(nn.Sigmoid, depth=12)), steps=5,
        collections=["gradients"], reductions=Reductions(raw="stats"),
    )  # fmt: skip
    names = {f.series for f in found(url, rules.VanishingGradient())}
    assert "gradient/fc0.weight" in names
    assert "gradient/head.weight" not in names


def test_exploding_tensor(tmp_path: Path) -> None:
    url = train(tmp_path / "run", seeded(mlp), lr=1e12, steps=10)
    first = min(found(url, rules.ExplodingTensor()), key=lambda f: f.step)
    assert 0 < first.step < 10


def test_all_zero_and_unchanged(tmp_path: Path) -> None:
    """A layer whose ReLUs are dead gets no gradient, and its weights stay."""
    model = scaled(seeded(mlp), "fc1.bias", 0, shift=-100)
    url = train(tmp_path / "run", model, steps=8)
    zero = {f.series for f in found(url, rules.AllZero())}
    assert {"gradient/fc1.weight", "relu1/output"} <= zero
    assert "gradient/head.bias" not in zero
    same = {f.series: f.step for f in found(url, rules.UnchangedTensor(names="weight$"))}
    assert same["fc1.weight"] == 2
    assert found(url, rules.WeightUpdateRatio(names="^fc1.weight$"))[0].step == 1
    (dead,) = found(url, rules.DeadRelu())
    assert (dead.series, dead.step, dead.value) == ("relu1/output", 0, 1.0)


def test_weights_that_change_too_much(tmp_path: Path) -> None:
    url = train(tmp_path / "run", seeded(mlp), lr=3e3, steps=3, collections=["weights"])
    (first, *_) = found(url, rules.WeightUpdateRatio())
    assert first.step == 1
    assert first.value > 10


def test_tensor_variance(tmp_path: Path) -> None:
    url = train(tmp_path / "run", scaled(seeded(mlp), "fc0.weight", 1000), steps=2)
    rule = rules.TensorVariance(names="output$", most=100)
    assert {f.series for f in found(url, rule)} >= {"fc0/output", "relu0/output"}


def test_poor_initialisation(tmp_path: Path) -> None:
    url = train(tmp_path / "a", scaled(seeded(mlp), "fc1.weight", 0.01), steps=5, lr=0.01)
    assert "fc1.weight" in {f.series for f in found(url, rules.PoorInitialisation())}
    model = seeded(mlp)
    for name in ("fc0.weight", "fc0.bias", "fc1.weight", "fc1.bias", "head.weight"):
        scaled(model, name, 1e-5)
    url = train(tmp_path / "b", model, steps=6, lr=1e-4, batch=600)
    names = {f.series for f in found(url, rules.PoorInitialisation())}
    assert names == {"relu0/input/0", "relu1/input/0"}


def test_saturated_activation(tmp_path: Path) -> None:
    url = train(tmp_path / "good", seeded(lambda: mlp(nn.Tanh)), steps=3)
    assert found(url, rules.SaturatedActivation()) == []
    model = scaled(seeded(lambda: mlp(nn.Tanh)), "fc0.weight", 1e4)
    url = train(tmp_path / "bad", model, steps=3)
    assert {f.series for f in found(url, rules.SaturatedActivation())} == {"tanh0/input/0"}


def test_loss_not_decreasing(tmp_path: Path) -> None:
    """A learning rate so small that nothing is learned."""
    url = train(tmp_path / "run", seeded(mlp), lr=1e-7, steps=20, batch=1200,
                collections=["losses"])  # fmt: skip
    (first, *_) = found(url, rules.LossNotDecreasing(num_steps=5, decrease=0.02))
    assert (first.series, first.step) == ("loss", 9)


def test_overfit_and_overtraining(tmp_path: Path) -> None:
    """Thirty digits, learned by heart."""
    url = train(
        tmp_path / "run", seeded(lambda: mlp(width=64)), n_train=30, steps=160, lr=0.5,
        evaluate_every=10, collections=["losses"],
    )  # fmt: skip
    (overfit, *_) = found(url, rules.Overfit(ratio=0.5, patience=2))
    assert overfit.series == "loss"
    assert overfit.mode == "EVAL"
    (over, *_) = found(url, rules.Overtraining(patience_train=3, patience_eval=5))
    assert over.step > overfit.step


def test_class_imbalance_and_confusion(tmp_path: Path) -> None:
    def rarely_nines(x: Any, y: Any) -> tuple[Any, Any]:
        keep = (y != 9) | (torch.arange(len(y)) == 0)
        return x[keep], y[keep]

    url = train(tmp_path / "run", seeded(mlp), change=rarely_nines, steps=120, evaluate_every=40,
                collections=["losses"])  # fmt: skip
    ratio = found(url, rules.ClassImbalance(mode="TRAIN"))
    assert any("class 9" in f.message and "samples" in f.message for f in ratio)
    wrong = found(url, rules.Confusion(mode="EVAL", samples=1500, diagonal=0.6, off_diagonal=1.0))
    assert any("class 9" in f.message for f in wrong)


def test_similar_across_runs(tmp_path: Path) -> None:
    first = train(tmp_path / "first", seeded(mlp), steps=5, collections=["weights"])
    same = train(tmp_path / "same", seeded(mlp), steps=5, collections=["weights"])
    faster = train(tmp_path / "faster", seeded(mlp), steps=5, lr=0.2, collections=["weights"])
    rule = rules.SimilarAcrossRuns()
    report = rules.evaluate(first, [rule], others=[same], record=False)
    assert {f.series for f in report.findings} == {"fc0.weight", "fc1.weight", "head.weight"}
    rule = rules.SimilarAcrossRuns(repeat=True)
    report = rules.evaluate(first, [rule], others=[faster], record=False)
    assert {f.step for f in report.findings} == {0}  # before the first update


def test_inputs_that_are_not_centred(tmp_path: Path) -> None:
    url = train(tmp_path / "run", seeded(mlp), change=lambda x, y: (x + 1, y), steps=10,
                collections=[Collection(name="in", include="^input/0$")])  # fmt: skip
    (found_,) = found(url, rules.CheckInput())
    assert found_.step == 7  # of 64 samples each
    assert 0.9 < found_.value < 1.1


def test_sequences_that_are_padding(tmp_path: Path) -> None:
    class Bag(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.EmbeddingBag(50, 8)
            self.head = nn.Linear(8, 2)

        def forward(self, input_ids: Any) -> Any:
            return self.head(self.words(input_ids))

    for padding, n in ((2, 0), (9, 1)):
        model = seeded(Bag)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        url = tmp_path / str(padding)
        ids = Collection(name="ids", include="^input/input_ids$")
        with attach(model, url, optimizer=optimizer, collections=[ids], every=1):
            for step in range(3):
                tokens = torch.randint(
                    1, 50, (4, 12), generator=torch.Generator().manual_seed(step)
                )
                tokens[:, 12 - padding :] = 0
                optimizer.zero_grad()
                model(input_ids=tokens).sum().backward()
                optimizer.step()
        assert len(found(str(url), rules.NlpSequenceRatio())) == n


def test_accuracy_drop(tmp_path: Path) -> None:
    """Pruning nearly all of a layer costs accuracy."""

    def prune(step: int, model: Any) -> None:
        if step == 49:
            scaled(model, "fc1.weight", 0)

    url = train(tmp_path / "run", seeded(mlp), steps=60, evaluate_every=10, each=prune,
                collections=["losses"])  # fmt: skip
    (found_,) = found(url, rules.AccuracyDrop())
    assert found_.mode == "EVAL"
    with tsf.open_run(url) as run:
        assert run["accuracy"].read(step=found_.step) < 0.5


# --- stopping ---------------------------------------------------------------------------


def test_a_rule_stops_the_training_it_watches(tmp_path: Path) -> None:
    """A learning rate that diverges; the optimizer is left between two steps."""
    model = seeded(mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e12)
    criterion = nn.CrossEntropyLoss()
    done = 0
    with attach(
        model, tmp_path / "run", optimizer=optimizer, loss=criterion, collections=["losses"],
        every=1, stoppable=True, flush_interval_s=0.02, on_error="raise",
    ) as hook:  # fmt: skip
        actions = [rules.StopTraining()]
        with rules.run_inside(hook, [rules.ExplodingTensor()], actions=actions) as inside:
            with pytest.raises(rules.TrainingStopped) as caught:
                for _ in range(1_000_000):
                    optimizer.zero_grad()
                    criterion(model(X[:64]), Y[:64]).backward()
                    optimizer.step()
                    done += 1
            assert "loss" in caught.value.reason
            assert caught.value.step == done
    assert inside.report.findings[0].step < done
    with tsf.open_run(tmp_path / "run") as run:
        assert run["loss"].steps[-1] == done - 1
        assert len(rules.alerts(run)) == 1
    model(X[:2])  # the hook is gone


@pytest.mark.parametrize("kind", ["accumulated", "told", "compiled"])
def test_where_a_training_stops(tmp_path: Path, kind: str) -> None:
    model = seeded(mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with attach(
        model, tmp_path / "run", optimizer=optimizer, collections=["losses"], stoppable=True,
        on_error="raise",
    ) as hook:  # fmt: skip
        called = torch.compile(model, backend="eager") if kind == "compiled" else model
        forwards = 0
        with pytest.raises(rules.TrainingStopped) as caught:
            for step in range(1_000_000):
                if kind == "told":
                    hook.set_step(step, "TRAIN")
                optimizer.zero_grad()
                for part in range(2 if kind == "accumulated" else 1):
                    called(X[part : part + 8]).sum().backward()
                    forwards += 1
                    if step == 3:
                        rules.request_stop(hook.run, "enough")
                optimizer.step()
                if kind == "told":
                    model.eval()
                    hook.set_step(step, "EVAL")
                    model.train()
        steps = caught.value.step
        assert forwards == steps * (2 if kind == "accumulated" else 1)
        assert steps > 3


def test_who_did_not_ask_for_it_is_not_stopped(tmp_path: Path) -> None:
    model = seeded(mlp)
    with attach(model, tmp_path / "run", on_error="raise") as hook:
        rules.request_stop(hook.run, "enough")
        for _ in range(20):
            model(X[:8]).sum().backward()
            np.testing.assert_equal(hook.failures, {})


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["all", "one"])
def test_two_ranks_stop_at_the_same_step(tmp_path: Path, workers: str) -> None:
    from support import torch_ranks

    url, out = tmp_path / "run", tmp_path / "out"
    torch_ranks.run_ranks(
        torch_ranks.ddp_until_stopped, str(tmp_path / "store"), str(url), workers, str(out)
    )
    said = [(tmp_path / f"out-{rank}").read_text("utf-8") for rank in (0, 1)]
    assert said[0] == said[1]
    done, stopped, reason = said[0].split()
    assert (done, reason) == (stopped, "enough")
    assert int(done) > 5
