"""The PyTorch hook: what it saves, at which step, and that training does not notice it."""

from __future__ import annotations

import gc
import io
import pickle
import subprocess
import sys
import threading
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tensorstore_fmt as tsf
from tensorstore_fmt.errors import ArgumentError, StepNotFoundError
from tensorstore_fmt.hooks import Collection, Reduction, Reductions, SaveConfig

torch = pytest.importorskip("torch")

from torch.utils.checkpoint import checkpoint  # noqa: E402

from tensorstore_fmt.hooks import torch_values  # noqa: E402
from tensorstore_fmt.hooks.guard import Guard  # noqa: E402
from tensorstore_fmt.hooks.torch import attach  # noqa: E402
from tensorstore_fmt.hooks.torch_staging import Staging  # noqa: E402

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


@pytest.fixture
def url(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "run"
    gc.collect()


def test_training_does_not_notice(url: Path) -> None:
    plain = train(build())
    after_plain = torch.rand(3)
    parts = build()
    with attach(
        parts[0], url, optimizer=parts[1], loss=parts[2], collections=EVERYTHING, every=1,
        on_error="raise",
    ):  # fmt: skip
        hooked = train(parts)
    assert hooked == plain
    assert torch.equal(torch.rand(3), after_plain)


def test_values_and_steps_are_exact(url: Path) -> None:
    """What is saved at a step is what that step had, also where it is changed in place later."""
    parts = build()
    model, optimizer, criterion = parts
    seen: dict[tuple[str, int], np.ndarray] = {}

    def each(step: int, loss: float) -> None:
        hook.log({"mine": loss})

    with attach(
        model, url, optimizer=optimizer, loss=criterion, collections=EVERYTHING, every=2,
        on_error="raise",
    ) as hook:  # fmt: skip
        weights = [model.head.weight.detach().numpy().copy()]
        losses = train(
            parts,
            5,
            each=lambda step, loss: (
                each(step, loss),
                weights.append(model.head.weight.detach().numpy().copy()),
                seen.update({("grad", step): model.head.weight.grad.numpy().copy()}),
            ),
        )
    with tsf.open_run(url) as run:
        assert run["mine"].steps.tolist() == [0, 1, 2, 3, 4]
        assert run["mine"].read().tolist() == losses
        assert run["loss"].steps.tolist() == [0, 2, 4]
        assert np.array_equal(run["loss"].read(), np.float32(losses[::2]))
        for step in (0, 2, 4):
            assert np.array_equal(run["head.weight"].read(step=step), weights[step])
            gradient = run["gradient/head.weight"].read(step=step)
            assert np.array_equal(gradient, seen["grad", step])
            before = run["relu/input/0"].read(step=step)
            assert (before < 0).any()  # not yet changed in place
            assert np.array_equal(run["relu/output"].read(step=step), np.maximum(before, 0))
            assert np.array_equal(run["first/output"].read(step=step), before)
            assert np.array_equal(run["first/input/0"].read(step=step), batch(step)[0].numpy())
            logits = run["head/output"].read(step=step)
            chance = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            chance[np.arange(5), batch(step)[1].numpy()] -= 1
            np.testing.assert_allclose(
                run["gradient/head/output"].read(step=step), chance / 5, atol=1e-6
            )
        with pytest.raises(StepNotFoundError):
            run["head.weight"].read(step=1)


def test_names(url: Path) -> None:
    parts = build()
    collections = (*EVERYTHING, Collection(name="model", modules=[""]))
    with attach(parts[0], url, optimizer=parts[1], loss=parts[2], collections=collections, every=1):
        train(parts, 1)
    names = set(saved(url))
    assert {"first/output", "first@1/output", "first@1/input/0", "gradient/first@1/output"} <= names
    assert {"output/logits", "output/extra/0", "norm.running_mean"} <= names
    assert {
        "optimizer/first.weight/exp_avg",
        "optimizer/head.bias/step",
        "gradient/head.bias",
    } <= names
    assert "output/extra/1" not in names  # None


def test_keyword_inputs(url: Path) -> None:
    model, *_ = build()
    with attach(
        model, url, collections=[Collection(name="io", modules=[model], inputs=True)], every=1
    ):
        model(batch(0)[0], scale=torch.tensor(2.0))
    with tsf.open_run(url) as run:
        assert run["input/scale"].read(step=0) == 2
        assert np.array_equal(run["input/0"].read(step=0), batch(0)[0].numpy())


def test_accumulated_gradients_are_one_step(url: Path) -> None:
    model, optimizer, criterion = build()
    with attach(model, url, optimizer=optimizer, loss=criterion, every=1, on_error="raise") as hook:
        for step in range(2):
            optimizer.zero_grad()
            for micro in range(3):
                x, y = batch(3 * step + micro)
                criterion(model(x)["logits"], y).backward()
                assert hook.step == step
            whole = model.head.weight.grad.clone()
            optimizer.step()
    with tsf.open_run(url) as run:
        assert run["gradient/head.weight"].steps.tolist() == [0, 1]
        assert np.array_equal(run["gradient/head.weight"].read(step=1), whole.numpy())
        assert run["loss"].steps.tolist() == [0, 1]


def test_modes_count_their_own_steps(url: Path) -> None:
    parts = build()
    model, _, criterion = parts
    save = SaveConfig(every=2, modes={"EVAL": SaveConfig(every=1), "PREDICT": None})
    with attach(
        model, url, optimizer=parts[1], loss=criterion, collections=["losses"], save=save
    ) as hook:
        train(parts, 3)
        model.eval()
        for number in range(2):
            criterion(model(batch(number)[0])["logits"], batch(number)[1])
        with hook.mode("PREDICT"):
            criterion(model(batch(0)[0])["logits"], batch(0)[1])
        model.train()
        train(parts, 2)
    with tsf.open_run(url) as run:
        assert run.steps(mode="TRAIN").tolist() == [0, 2, 7]
        assert run.steps(mode="EVAL").tolist() == [3, 4]
        assert run.steps(mode="PREDICT").size == 0


@pytest.mark.parametrize("is_keyword", [False, True])
def test_gradients_that_a_closure_computes_are_of_its_step(
    url: Path,
    is_keyword: bool,
) -> None:
    model, optimizer, criterion = build()
    seen = []

    def closure() -> Any:
        optimizer.zero_grad()
        loss = criterion(model(x)["logits"], y)
        loss.backward()
        seen.append(model.head.weight.grad.clone())
        return loss

    with attach(
        model, url, optimizer=optimizer, collections=["gradients"], every=1, on_error="raise"
    ):
        for step in range(3):
            x, y = batch(step)
            result = optimizer.step(closure=closure) if is_keyword else optimizer.step(closure)
            assert result > 0
    with tsf.open_run(url) as run:
        assert run["gradient/head.weight"].steps.tolist() == [0, 1, 2]
        for step in range(3):
            saved_one = run["gradient/head.weight"].read(step=step)
            assert np.array_equal(saved_one, seen[step].numpy())


def test_steps_told_by_the_caller(url: Path) -> None:
    parts = build()
    with attach(parts[0], url, optimizer=parts[1], collections=["weights"], every=50) as hook:
        for number in (0, 50, 75, 100):
            hook.set_step(number)
            train(parts, 1)
    assert saved(url)["head.weight"] == [0, 50, 100]


def test_without_an_optimizer_each_forward_is_a_step(url: Path) -> None:
    parts = build()
    with attach(parts[0], url, collections=["weights", "gradients"], every=1, on_error="raise"):
        train(parts, 3)
    with tsf.open_run(url) as run:
        assert run["gradient/first.weight"].steps.tolist() == [0, 1, 2]
        assert run["first.weight"].steps.tolist() == [0, 1, 2]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_saves_the_same(url: Path, tmp_path: Path, *, reentrant: bool) -> None:
    found = []
    for recompute in (None, reentrant):
        parts = build()
        parts[0].recompute = recompute
        place = tmp_path / str(recompute)
        with attach(
            parts[0], place, optimizer=parts[1], collections=EVERYTHING, every=1, on_error="raise"
        ):
            model, optimizer, criterion = parts
            for step in range(2):
                x, y = batch(step)
                optimizer.zero_grad()
                criterion(model(x.requires_grad_())["logits"], y).backward()
                optimizer.step()
        with tsf.open_run(place) as run:
            found.append({name: run[name].read(step=1) for name in run})
    plain, recomputed = found
    assert set(plain) == set(recomputed)
    for name, value in plain.items():
        if not name.startswith("norm.running") and "num_batches" not in name:  # updated twice
            np.testing.assert_allclose(recomputed[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_bfloat16_under_autocast(url: Path) -> None:
    model, optimizer, criterion = build()
    with attach(
        model, url, optimizer=optimizer, collections=["activations", "gradients"], every=1,
        on_error="raise",
    ):  # fmt: skip
        x, y = batch(0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = criterion(model(x)["logits"], y)
        loss.backward()
        optimizer.step()
    with tsf.open_run(url) as run:
        assert str(run["head/output"].dtype) == "bfloat16"
        assert run["gradient/head.weight"].dtype == np.float32


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # what torch's compiler warns of is its own
def test_compiled_models(url: Path, tmp_path: Path) -> None:
    """Hooks run between compiled parts; what is saved is what the plain model saves."""
    found = []
    for is_compiled in (False, True):
        parts = build()
        torch._dynamo.reset()
        called = torch.compile(parts[0], backend="aot_eager") if is_compiled else parts[0]
        parts[0].drop.p = 0.0
        place = tmp_path / str(is_compiled)
        with attach(
            called, place, optimizer=parts[1], loss=parts[2], collections=EVERYTHING, every=1,
            on_error="raise",
        ):  # fmt: skip
            train(parts, 2, called=called)
        with tsf.open_run(place) as run:
            found.append({name: run[name].read(step=1) for name in run})
    plain, compiled = found
    assert set(plain) == set(compiled)
    for name, value in plain.items():
        np.testing.assert_allclose(compiled[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_what_is_one_graph_has_hooks_around_it(url: Path, tmp_path: Path) -> None:
    """Within ``fullgraph=True`` nothing else may run: its call would raise."""
    model, optimizer, _ = build()
    model.drop.p = 0.0
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    collections = ["weights", "gradients", Collection(name="whole", modules=[""], inputs=True)]
    with (
        pytest.warns(RuntimeWarning, match="fullgraph"),
        attach(
            compiled, url, optimizer=optimizer, collections=collections, every=1, stoppable=True,
            on_error="raise",
        ),
    ):  # fmt: skip
        train((model, optimizer, torch.nn.CrossEntropyLoss()), 2, called=compiled)
    with tsf.open_run(url) as run:
        assert run.steps(mode="TRAIN").tolist() == [0, 1]
        assert np.array_equal(run["input/0"].read(step=1), batch(1)[0].numpy())
        assert run["output/logits"].read(step=1).shape == (5, 3)
        assert run["gradient/head.weight"].steps.tolist() == [0, 1]
    with attach(compiled, tmp_path / "plain", optimizer=optimizer, collections=["weights"]):
        compiled(batch(0)[0])  # nothing that it cannot do, and no warning


def test_a_step_that_a_scaler_skips(url: Path) -> None:
    """Its gradients are infinite, and no optimizer sees them."""
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    with attach(
        model, url, optimizer=optimizer, collections=["gradients", "inputs"], every=1,
        on_error="raise",
    ) as hook:  # fmt: skip
        for step in range(4):
            optimizer.zero_grad()
            assert hook.step == max(step - 1, 0)
            x = torch.full((3, 4), np.inf if step == 1 else float(step))
            scaler.scale(model(x).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            hook.end_step()
    with tsf.open_run(url) as run:
        assert run["input/0"].steps.tolist() == [0, 1, 2, 3]
        gradient = run["gradient/weight"]
        assert gradient.steps.tolist() == [0, 2, 3]
        assert [gradient.read(step=step)[0, 0] for step in (0, 2, 3)] == [0, 6, 9]  # unscaled


def test_reductions(url: Path) -> None:
    parts = build()
    collection = Collection(
        name="activations",
        reductions=Reductions(
            raw=True,
            reductions=[
                "min", "max", "mean", "median", "std", "var", "sum", "prod", "l1", "l2", "absmax",
                "absmean", Reduction(name="mean", axis=0), Reduction(name="l2", axis=(0, -1)),
                Reduction(name="first", function=lambda x: x[0]),
            ],
            quantiles=[0.25, 0.5],
        ),
    )  # fmt: skip
    with pytest.raises(ArgumentError):
        Reduction(name="center")
    with attach(parts[0], url, collections=[collection], every=1, on_error="raise"):
        parts[0](batch(0)[0])
    with tsf.open_run(url) as run:
        x = run["head/output"].read(step=0)

        def of(name: str) -> Any:
            return run[f"head/output/{name}"].read(step=0)

        for name, function in {
            "min": np.min, "max": np.max, "std": np.std, "var": np.var, "sum": np.sum,
            "prod": np.prod, "l1": lambda x: np.abs(x).sum(), "absmax": lambda x: np.abs(x).max(),
            "absmean": lambda x: np.abs(x).mean(), "median": lambda x: np.sort(x.ravel())[7],
        }.items():  # fmt: skip
            np.testing.assert_allclose(of(name), function(x), rtol=1e-5, err_msg=name)
        np.testing.assert_array_equal(of("first"), x[0])
        np.testing.assert_allclose(of("quantiles"), np.quantile(x, [0.25, 0.5]), rtol=1e-5)


def test_functions_of_two_tensors(url: Path) -> None:
    """The mean of activation × gradient over batch and place, as iterative pruning ranks by."""
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten())
    rank = Reduction(
        name="rank",
        function=lambda activation, gradient: (activation * gradient).mean((0, 2, 3)),
        other=lambda name: f"gradient/{name}",
    )
    collections = [
        Collection(
            name="ranks",
            modules=["1"],
            reductions=Reductions(raw=False, reductions=[rank]),
        ),
        Collection(name="check", include="^(gradient/)?1/output$"),
    ]
    with attach(model, url, collections=collections, every=1, on_error="raise"):
        model(torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))).pow(
            2
        ).sum().backward()
    with tsf.open_run(url) as run:
        activation = run["1/output"].read(step=0)
        gradient = run["gradient/1/output"].read(step=0)
        np.testing.assert_allclose(
            run["1/output/rank"].read(step=0), (activation * gradient).mean((0, 2, 3)), rtol=1e-5
        )


def test_reduction_without_raw_saves_no_raw(url: Path) -> None:
    parts = build()
    form = Reductions(raw=False, reductions=["mean"])
    with attach(
        parts[0], url, optimizer=parts[1], collections=["weights"], reductions=form, every=1
    ):
        train(parts, 1)
    assert {name for name in saved(url) if name.startswith("head")} == {"head.weight/mean"}


def test_statistics_without_the_data(url: Path) -> None:
    """What is asked for as statistics only costs no chunk, and rules find it all the same."""
    model = torch.nn.Sequential(torch.nn.Linear(40, 50), torch.nn.ReLU())
    collections = [Collection(name="activations", reductions=Reductions(raw="stats"))]
    with attach(model, url, collections=collections, every=1, on_error="raise"):
        outputs = [model(torch.randn(30, 40)).detach() for _ in range(3)]
    with tsf.open_run(url) as run:
        stats = run["1/output"].stats()
        np.testing.assert_allclose(stats["max"], [x.max() for x in outputs])
        with pytest.raises(tsf.NotThereError):
            run["1/output"].read(step=0)
    assert not list(url.glob("shards/*"))


def test_keeps_no_graph_alive(url: Path) -> None:
    model, optimizer, criterion = build()
    with attach(model, url, optimizer=optimizer, collections=EVERYTHING, every=1, on_error="raise"):
        x, y = batch(0)
        output = model(x)["logits"]
        loss = criterion(output, y)
        gone = weakref.ref(output)
        loss.backward()
        del output, loss
        gc.collect()
        assert gone() is None


def test_frozen_and_unused_parameters(url: Path) -> None:
    parts = build()
    model = parts[0]
    model.first.weight.requires_grad_(False)
    model.unused = torch.nn.Linear(2, 2)
    with attach(model, url, optimizer=parts[1], every=1, on_error="raise"):
        train(parts, 2)
    names = saved(url)
    assert "first.weight" in names
    assert "gradient/first.weight" not in names
    assert "unused.weight" in names


@pytest.mark.slow
@pytest.mark.parametrize("place", ["call", "log"])
def test_a_failure_of_every_single_call_leaves_the_training_as_it_is(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of everything PyTorch calls, or of every value that is logged, the k-th fails, for all k."""
    target, name = (Guard, "call") if place == "call" else (tsf.RunWriter, "log")
    real = getattr(target, name)
    count, failing = 0, frozenset[int]()
    lost: list[set[tuple[int, str]]] = []  # steps and names of calls of log that failed for good

    def fail(*_args: object, **_kwargs: object) -> None:
        raise MemoryError("made to fail")

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        values = {(kwargs["step"], each) for each in args[0]} if place == "log" else set()
        # What failed together is tried again, one by one.
        lost[:] = [each for each in lost if not values & each]
        if count not in failing:
            real(self, *args, **kwargs)
        elif place == "call":
            real(self, args[0], fail)
        else:
            lost.append(values)
            fail()

    monkeypatch.setattr(target, name, counted)
    plain = train(build(), 2)
    after = torch.rand(3)
    writer = tsf.create_run(f"memory://hooks/{uuid.uuid4()}")  # one for all: they are many

    def run(*fails: int) -> int:
        nonlocal count, failing
        parts = build()
        count, failing = 0, frozenset(fails)
        lost.clear()
        with attach(
            parts[0], writer, optimizer=parts[1], loss=parts[2], collections=EVERYTHING, every=1
        ) as hook:
            assert train(parts, 2) == plain
        assert torch.equal(torch.rand(3), after)
        return sum(hook.failures.values())

    assert run() == 0
    calls = count
    assert calls > (100 if place == "call" else 30)
    for fails in (*((k,) for k in range(1, calls + 1)), range(1, 10 * calls)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            failed = run(*fails)
        assert all("made to fail" in str(each.message) for each in caught)
        assert failed == (min(len(fails), count) if place == "call" else len(lost))
        assert bool(caught) == bool(failed)
    assert failed > 30  # where all fail
    writer.close()


def test_a_failing_function_of_the_user(url: Path) -> None:
    plain = train(build())
    parts = build()
    bad = Reduction(name="bad", function=lambda x: x.no_such_thing)
    form = Reductions(reductions=[bad, "mean"])
    with (
        pytest.warns(RuntimeWarning, match="no_such_thing"),
        attach(parts[0], url, optimizer=parts[1], reductions=form, every=1) as hook,
    ):
        assert train(parts) == plain
    assert hook.failures["head.weight/bad"] == 4
    assert saved(url)["head.weight"] == saved(url)["head.weight/mean"] == [0, 1, 2, 3]


def test_copies_of_a_model_save_nothing(url: Path) -> None:
    """An average of weights is a copy; models are saved whole, too, and loaded elsewhere."""
    model, optimizer, criterion = build()
    file = io.BytesIO()
    with attach(
        model, url, optimizer=optimizer, loss=criterion, collections=EVERYTHING, every=1,
        stoppable=True, on_error="raise",
    ):  # fmt: skip
        train((model, optimizer, criterion), 1)
        average = torch.optim.swa_utils.AveragedModel(model)
        torch.save(model, file)
        assert b"tensorstore_fmt" not in file.getvalue()
        file.seek(0)
        copies = [average, torch.load(file, weights_only=False), pickle.loads(pickle.dumps(model))]
        for each in copies:
            output = each(batch(0)[0])["logits"]
            assert torch.equal(output, each(batch(0)[0])["logits"]) is False  # dropout: it ran
            output.sum().backward()
    with tsf.open_run(url) as run:
        assert run.steps().tolist() == [0]
        assert "first@2/output" not in run  # each forward calls it twice


def test_removed_hooks_save_nothing(url: Path) -> None:
    parts = build()
    run = tsf.create_run(url)
    hook = attach(parts[0], run, optimizer=parts[1], every=1)
    train(parts, 2)
    hook.remove()
    assert not parts[0]._forward_hooks
    assert not parts[0]._forward_pre_hooks
    train(parts, 2)
    run.close()
    assert saved(url)["head.weight"] == [0, 1]


def test_small_parameters_are_logged_together(url: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[set[str]] = []
    log = tsf.RunWriter.log

    def counted(run: Any, data: dict[str, Any], **where: Any) -> None:
        calls.append(set(data))
        if "gradient/head.bias" in data:
            raise ValueError("this one")
        log(run, data, **where)

    monkeypatch.setattr(tsf.RunWriter, "log", counted)
    parts = build()
    with (
        pytest.warns(RuntimeWarning, match="gradient/head.bias"),
        attach(
            parts[0],
            url,
            optimizer=parts[1],
            every=1,
            collections=["weights", "biases", "gradients"],
        ) as hook,
    ):
        train(parts, 1)
    names = {name for name, _ in parts[0].named_parameters()}
    every = names | {f"gradient/{name}" for name in names}
    assert calls[0] == every  # then each for itself, as one of them fails
    assert sorted(calls[1:], key=min) == sorted(({name} for name in every), key=min)
    assert hook.failures == {"gradient/head.bias": 1}
    assert set(saved(url)) == every - {"gradient/head.bias"}


def test_encoders_wait_while_a_step_is_logged(url: Path) -> None:
    """They would use the same memory; without an optimizer nothing says where a step ends."""
    parts = build()
    model = parts[0]
    held: list[bool] = []

    def look(*_: object) -> None:
        held.append(run._pool._is_held)

    with tsf.create_run(url) as run:
        with attach(model, run, optimizer=parts[1], every=2):
            model.register_forward_hook(look)
            for _ in range(4):
                run.flush()  # nothing older is left
                train(parts, 1)
                look()
            model(batch(0)[0])
        assert not run._pool._is_held
        assert held == [True, False, False, False, True, False, False, False, True]
        held.clear()
        with attach(model, run, every=1, start_step=8):
            model(batch(0)[0])
        assert held == [False]


def test_importing_the_hook_does_not_import_the_compiler() -> None:
    """It takes as long as all else; who attaches pays for it."""
    code = "import tensorstore_fmt.hooks.torch, sys; print('torch._dynamo' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"


def test_two_models_in_one_run(url: Path) -> None:
    one, two = build(), build()
    with (
        tsf.create_run(url) as run,
        attach(one[0], run, optimizer=one[1], prefix="actor/", every=1),
        attach(two[0], run, optimizer=two[1], prefix="critic/", every=1),
    ):
        train(one, 2)
        train(two, 1)
    names = saved(url)
    assert names["actor/head.weight"] == [0, 1]
    assert names["critic/gradient/head.weight"] == [0]


@pytest.mark.parametrize(
    "settings",
    [
        {"every": 1, "save": SaveConfig()},
        {"collections": ["weight"]},
        {"collections": ["weights", "weights"]},
        {"collections": [{"name": "x"}]},
        {"workers": "some"},
        {"every": -1},
        {"start_step": -1},
        {"on_error": "ignore"},
        {"no_such_option": 1},
    ],
)
def test_wrong_settings_attach_nothing(url: Path, settings: dict[str, Any]) -> None:
    model, optimizer, _ = build()
    with pytest.raises((ArgumentError, TypeError)):
        attach(model, url, optimizer=optimizer, **settings)
    assert not model._forward_hooks
    with pytest.raises(ArgumentError, match="Module"):
        attach("model", url)  # type: ignore[arg-type]


def test_walk_takes_nested_values_apart() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    found = dict(torch_values.walk({"x": [a, None, "text"], "y": (b, {"z": a})}, "o"))
    assert list(found) == ["o/x/0", "o/y/0", "o/y/1/z"]


def test_save_config() -> None:
    config = SaveConfig(every=5, start=5, end=16, steps=[2, 40])
    assert [n for n in range(60) if config.wants(n, "TRAIN")] == [2, 5, 10, 15, 40]
    assert not any(SaveConfig(end=0).wants(n, None) for n in range(10))
    per_mode = SaveConfig(every=10, modes={"EVAL": SaveConfig(every=2), "PREDICT": None})
    assert per_mode.wants(10, "TRAIN")
    assert not per_mode.wants(2, "TRAIN")
    assert per_mode.wants(2, "EVAL")
    assert not per_mode.wants(0, "PREDICT")
    for bad in ({"every": -1}, {"end": 1.5}, {"modes": {"TEST": None}}):
        with pytest.raises(ArgumentError):
            SaveConfig(**bad)  # type: ignore[arg-type]


def test_staging_logs_what_was_there_when_it_was_put() -> None:
    """The way of tensors from a device, with those of the CPU sent along it."""
    logged: list[tuple[int, float, int]] = []
    release = threading.Event()

    def log(values: dict[str, Any], step: int, _mode: str | None) -> None:
        release.wait(30)
        logged.append((step, float(values["x"][0]), values["part"].origin[0]))

    guard = Guard("warn")
    nbytes = 2 * 1000 * 4
    staging = Staging(log, guard, devices=frozenset({"cpu"}), most_bytes=3 * nbytes)
    x = torch.zeros(1000)
    assert staging.takes({"a": 1.0, "x": x})
    assert not staging.takes({"a": 1.0})
    threading.Timer(0.2, release.set).start()
    for step in range(10):
        x.fill_(step)
        part = tsf.Part(value=x, global_shape=(2000,), origin=(step,))
        staging.put({"x": x, "part": part}, step, "TRAIN")
    x.fill_(-1)
    assert staging.stalls >= 1
    staging.close()
    assert logged == [(step, float(step), step) for step in range(10)]
    assert not guard.failures


def test_staging_goes_on_after_a_failure() -> None:
    logged: list[int] = []
    release = threading.Event()

    def log(_values: dict[str, Any], step: int, _mode: str | None) -> None:
        release.wait(30)
        if step == 1:
            raise ValueError("made to fail")
        logged.append(step)

    guard = Guard("warn")
    staging = Staging(log, guard, devices=frozenset({"cpu"}), most_bytes=800)
    for step in range(3):
        staging.put({"x": torch.zeros(4)}, step, None)
    threading.Timer(0.1, release.set).start()
    with pytest.warns(RuntimeWarning, match="made to fail"):
        staging.close()
    assert logged == [0, 2]
    assert sum(guard.failures.values()) == 1


@pytest.mark.hardware
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_tensors_of_a_gpu(url: Path) -> None:
    """In-place changes right after the hook do not reach what is saved."""
    model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(inplace=True)).cuda()
    seen = []
    with attach(model, url, collections=["activations"], every=1, on_error="raise"):
        for step in range(20):
            x = torch.full((256, 512), float(step), device="cuda")
            output = model(x)
            seen.append(output.detach().cpu().numpy())
            with torch.no_grad():
                output.mul_(0)
    with tsf.open_run(url) as run:
        for step, expected in enumerate(seen):
            np.testing.assert_array_equal(run["1/output"].read(step=step), expected)
