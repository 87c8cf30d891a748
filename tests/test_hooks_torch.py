"""The PyTorch hook: what it saves, at which step."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tensorstore_fmt as tsf
from tensorstore_fmt.errors import ArgumentError, StepNotFoundError
from tensorstore_fmt.hooks import Collection, Reduction, Reductions, SaveConfig

torch = pytest.importorskip("torch")

from support.torch_training import EVERYTHING, batch, build, saved, train  # noqa: E402

from tensorstore_fmt.hooks.torch import attach  # noqa: E402


@pytest.fixture
def url(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "run"
    gc.collect()


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
