"""The hook for scripts written for smdebug, on modules of PyTorch."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tensorstore_fmt as tsf
import tensorstore_fmt.interop.smdebug.pytorch as smd
from tensorstore_fmt.interop.importing import import_smdebug
from tensorstore_fmt.interop.smdebug import create_trial, modes
from tensorstore_fmt.interop.smdebug.exceptions import SMDebugValueError
from tensorstore_fmt.interop.smdebug.trials import Trial

torch = pytest.importorskip("torch")

from torch.utils.checkpoint import checkpoint  # noqa: E402

DATA = Path(__file__).parent / "data" / "smdebug"


def memory() -> str:
    return f"memory://modules/{uuid.uuid4()}"


class Net(torch.nn.Module):
    """That of the fixture ``torch``, which smdebug's own hook wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 4, 3)
        self.relu = torch.nn.ReLU(inplace=True)
        self.fc = torch.nn.Linear(144, 10)
        self.recomputes = False

    def features(self, x: Any) -> Any:
        return self.relu(self.conv1(x)).flatten(1)

    def forward(self, x: Any) -> Any:
        hidden = (
            checkpoint(self.features, x, use_reentrant=False)
            if self.recomputes
            else self.features(x)
        )
        return self.fc(hidden)


def build() -> tuple[Any, Any, Any]:
    torch.manual_seed(5)
    net = Net()
    return net, torch.optim.SGD(net.parameters(), lr=0.1), torch.nn.CrossEntropyLoss()


def batch(step: int) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 1, 8, 8, generator=generator)
    return x, torch.randint(0, 10, (16,), generator=generator)


def train(
    hook: Any, parts: tuple[Any, Any, Any], each: Callable[[int, Any, Any], None] | None = None
) -> list[float]:
    """Train for six steps, evaluate for two; as a script for smdebug does it."""
    net, optimizer, criterion = parts
    losses = []
    if hook is not None:
        hook.set_mode(modes.TRAIN)
    for step in range(8):
        if step == 6 and hook is not None:
            hook.set_mode(modes.EVAL)
        x, y = batch(step)
        optimizer.zero_grad()
        output = net(x)
        loss = criterion(output, y)
        if step < 6:
            loss.backward()
        if hook is not None:
            hook.save_tensor("labels", y, collections_to_write="labels")
            hook.save_scalar("lr", 0.1 * step)
        if each is not None:
            each(step, output, loss)
        if step < 6:
            optimizer.step()
        losses.append(loss.item())
    return losses


def every(**options: Any) -> Any:
    return smd.Hook(memory(), save_all=True, save_config=smd.SaveConfig(1), **options)


def closed(hook: Any) -> Trial:
    hook.close()
    return create_trial(hook.out_dir)


def test_the_same_script_gives_the_same_trial(tmp_path: Path) -> None:
    """Names, steps, modes, shapes, reductions, collections: those of smdebug's own hook."""
    import_smdebug(DATA / "torch", tmp_path / "imported")
    theirs = create_trial(tmp_path / "imported")
    reduced = smd.ReductionConfig(["mean"], abs_norms=["l2"], save_raw_tensor=True)
    hook = smd.Hook(
        tmp_path / "run",
        save_all=True,
        include_collections=["weights", "gradients", "biases"],
        save_config=smd.SaveConfig(
            {modes.TRAIN: smd.SaveConfigMode(2), modes.EVAL: smd.SaveConfigMode(1)}
        ),
    )
    for name in ("weights", "gradients"):
        hook.get_collection(name).reduction_config = reduced
    parts = build()
    hook.register_module(parts[0])
    hook.register_loss(parts[2])
    train(hook, parts)
    ours = closed(hook)
    assert ours.tensor_names() == theirs.tensor_names()
    for name in theirs.tensor_names():
        mine, its = ours.tensor(name), theirs.tensor(name)
        if name == "labels":  # smdebug saved them one saved step late, …
            assert (mine.steps(), its.steps()) == ([0, 2, 4, 6, 7], [2, 4, 6, 7])
            continue
        if name == "scalar/lr":  # … and lost those of steps at which it saved no tensor
            assert (mine.steps(), its.steps()) == (list(range(8)), [0, 2, 4, 6, 7])
            continue
        for mode in (modes.GLOBAL, modes.TRAIN, modes.EVAL):
            assert mine.steps(mode) == its.steps(mode), name
        for step in its.steps():
            assert mine.shape(step) == its.shape(step), name
            assert mine.value(step).dtype == its.value(step).dtype, name
            assert mine.reduction_values(step).keys() == its.reduction_values(step).keys(), name
    for name, collection in theirs.collections().items():
        assert collection.tensor_names <= ours.collections()[name].tensor_names, name
    assert np.array_equal(ours.tensor("labels").value(4), batch(4)[1].numpy())


def test_values_are_those_of_their_step() -> None:
    seen: dict[int, Any] = {}
    parts = build()
    net = parts[0]

    def each(step: int, output: Any, loss: Any) -> None:
        gradient = None if net.fc.weight.grad is None else net.fc.weight.grad.numpy().copy()
        weight = net.fc.weight.detach().numpy().copy()
        seen[step] = (weight, gradient, output.detach().numpy().copy(), loss.item())

    hook = every()
    hook.register_hook(net)
    hook.register_loss(parts[2])
    train(hook, parts, each)
    trial = closed(hook)
    for step, (weight, gradient, output, loss) in seen.items():

        def of(name: str, step: int = step) -> Any:
            return trial.tensor(name).value(step)

        assert np.array_equal(of("Net_fc.weight"), weight)
        assert np.array_equal(of("Net_output_0"), output)
        assert np.array_equal(of("Net_input_0"), batch(step)[0].numpy())
        assert np.array_equal(of("CrossEntropyLoss_input_0"), output)
        assert np.array_equal(of("CrossEntropyLoss_input_1"), batch(step)[1].numpy())
        assert of("CrossEntropyLoss_output_0") == np.float32(loss)
        before = of("relu_input_0")
        assert (before < 0).any()  # as it was, before ReLU changed it in place
        assert np.array_equal(of("relu_output_0"), np.maximum(before, 0))
        if step < 6:
            assert np.array_equal(of("gradient/Net_fc.weight"), gradient)
    assert trial.tensor("gradient/Net_fc.weight").steps() == [0, 1, 2, 3, 4, 5]
    assert trial.steps(mode=modes.EVAL) == [0, 1]


def test_training_does_not_notice() -> None:
    plain = train(None, build())
    after = torch.rand(3)
    parts = build()
    hook = every(reduction_config=smd.ReductionConfig(["mean"], save_raw_tensor=True))
    hook.register_module(parts[0])
    hook.register_loss(parts[2])
    assert train(hook, parts) == plain
    assert torch.equal(torch.rand(3), after)
    hook.close()
    for module in (*parts[0].modules(), parts[2]):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert train(None, parts)
    assert closed(hook).steps() == list(range(8))


def test_whatever_fails_leaves_the_training_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its calls once, and all of them."""
    plain = train(None, build())
    real = smd.Hook.save_if_due
    calls, failing = 0, frozenset[int]()

    def save(self: Any, *args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls in failing:
            raise KeyError("made to fail")
        real(self, *args)

    monkeypatch.setattr(smd.Hook, "save_if_due", save)

    def run(*fails: int) -> int:
        nonlocal calls, failing
        calls, failing = 0, frozenset(fails)
        parts = build()
        hook = every()
        hook.register_module(parts[0])
        hook.register_loss(parts[2])
        net, optimizer, criterion = parts
        losses = []
        for step in range(2):
            x, y = batch(step)
            optimizer.zero_grad()
            loss = criterion(net(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses == plain[:2]
        hook.close()
        return sum(hook.failures.values())

    assert run() == 0
    total = calls
    assert total == 2 * (4 + 8 + 3 + 4)  # parameters, of modules, of the loss, gradients
    for fails in (*((k,) for k in range(1, total + 1)), range(1, total + 1)):
        with pytest.warns(RuntimeWarning, match="made to fail"):
            assert run(*fails) == len(fails)


# --- what smdebug got wrong ----------------------------------------------------------------
class Model(torch.nn.Module):
    """Keywords go in, a dict comes out, one layer is called twice and one parameter is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)
        self.layer.bias.requires_grad_(False)

    def forward(self, *, x: Any, scale: Any = None) -> dict[str, Any]:
        hidden = self.layer(self.layer(x))
        return {"logits": hidden if scale is None else hidden * scale, "all": (hidden, None)}


def test_keywords_dicts_and_second_calls() -> None:
    torch.manual_seed(0)
    model = Model()
    hook = every()
    hook.register_module(model)
    x = torch.randn(3, 4)
    for _ in range(2):
        model(x=x, scale=torch.tensor(2.0))["logits"].sum().backward()
    trial = closed(hook)
    assert trial.tensor_names() == [
        "Model_input_scale", "Model_input_x", "Model_layer.bias", "Model_layer.weight",
        "Model_output_all_0", "Model_output_logits", "gradient/Model_layer.weight",
        "layer_input_0", "layer_input_1", "layer_output_0", "layer_output_1",
    ]  # fmt: skip
    assert all(trial.tensor(name).steps() == [0, 1] for name in trial.tensor_names())
    first, second = (trial.tensor(f"layer_output_{i}").value(1) for i in (0, 1))
    assert np.array_equal(trial.tensor("layer_input_1").value(1), first)
    assert np.array_equal(trial.tensor("Model_output_logits").value(1), 2 * second)


def test_a_module_is_registered_once_and_for_all_in_it() -> None:
    net, *_ = build()
    hook = every()
    for module in (net, net, net.fc):
        hook.register_module(module)
    net(batch(0)[0])
    trial = closed(hook)
    assert trial.steps() == [0]
    assert "fc_output_1" not in trial.tensor_names()


def test_reductions_of_whatever_goes_through() -> None:
    """smdebug's died of labels, which are integers, and of bfloat16."""
    net, _, criterion = build()
    hook = every(reduction_config=smd.ReductionConfig(["mean"]))
    hook.register_module(net.to(torch.bfloat16))
    hook.register_loss(criterion)
    x, y = batch(0)
    criterion(net(x.to(torch.bfloat16)).float(), y).backward()
    trial = closed(hook)
    assert hook.failures == {}
    labels = trial.tensor("CrossEntropyLoss_input_1")
    assert labels.reduction_value(0, "mean") == np.float32(y.float().mean())
    weight = net.fc.weight.detach().float().numpy()
    found = trial.tensor("Net_fc.weight").reduction_value(0, "mean")
    assert found == pytest.approx(weight.mean(), rel=1e-3, abs=1e-6)


def test_collections_of_modules() -> None:
    net, _, criterion = build()
    hook = smd.Hook(memory(), save_config=smd.SaveConfig(1))
    mine = smd.Collection("mine", save_config=smd.SaveConfig(2))
    mine.add_module_tensors(net.relu, inputs=True)
    mine.add_module_tensors(net, outputs=True)
    hook.add_collection(mine)
    hook.register_module(net)
    for step in range(4):
        criterion(net(batch(step)[0]), batch(step)[1]).backward()
    trial = closed(hook)
    assert trial.tensor_names() == ["Net_output_0", "relu_input_0", "relu_output_0"]
    assert trial.tensor("relu_input_0").steps() == [0, 2]
    assert trial.tensor_names(collection="mine") == trial.tensor_names()


def test_gradients_of_an_evaluation_are_in_no_collection_of_gradients() -> None:
    net, _, criterion = build()
    hook = smd.Hook(memory(), include_collections=["gradients"], save_config=smd.SaveConfig(1))
    hook.register_module(net)
    for mode in (modes.TRAIN, modes.EVAL):
        hook.set_mode(mode)
        criterion(net(batch(0)[0]), batch(0)[1]).backward()
    assert closed(hook).tensor("gradient/Net_fc.bias").steps() == [0]


def test_losses_that_are_functions() -> None:
    net, *_ = build()
    hook = smd.Hook(memory(), save_config=smd.SaveConfig(1))
    hook.register_module(net)
    values = []
    for step in range(2):
        x, y = batch(step)
        output = net(x)
        for smoothing in (0.0, 0.1):
            loss = torch.nn.functional.cross_entropy(output, y, label_smoothing=smoothing)
            hook.record_tensor_value("nll_loss", loss)
            values.append(loss.item())
    trial = closed(hook)
    assert trial.tensor_names(collection="losses") == ["nll_loss_output_0", "nll_loss_output_1"]
    for i in (0, 1):
        found = trial.tensor(f"nll_loss_output_{i}").values()
        assert [float(value) for value in found.values()] == np.float32(values[i::2]).tolist()


def test_a_value_before_the_forward_belongs_to_its_step() -> None:
    net, *_ = build()
    hook = every()
    hook.register_module(net)
    for mode in (modes.TRAIN, modes.EVAL):
        hook.set_mode(mode)
        hook.save_scalar("epoch", 1)
        net(batch(0)[0])
        net(batch(1)[0])
    trial = closed(hook)
    assert trial.tensor("scalar/epoch").steps() == [0, 2]
    assert trial.tensor("Net_output_0").steps(mode=modes.EVAL) == [0, 1]


def test_checkpointing_saves_each_thing_once() -> None:
    parts = build()
    parts[0].recomputes = True
    hook = every()
    hook.register_module(parts[0])
    train(hook, parts)
    trial = closed(hook)
    assert trial.steps() == list(range(8))
    assert "conv1_output_1" not in trial.tensor_names()


def test_wrapped_and_copied_modules() -> None:
    net, *_ = build()
    hook = every()
    hook.register_module(torch.compile(net, backend="eager"))
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    torch.load(file, weights_only=False)(batch(0)[0])
    assert hook.step_num == -1
    net(batch(0)[0])
    assert "Net_fc.weight" in closed(hook).tensor_names()


@pytest.mark.slow
def test_a_module_that_is_one_graph() -> None:
    net, *_ = build()
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    hook = every()
    with pytest.warns(RuntimeWarning, match="fullgraph"):
        hook.register_module(compiled)
    compiled(batch(0)[0]).sum().backward()
    names = closed(hook).tensor_names()
    assert {"Net_input_0", "Net_output_0", "Net_fc.weight", "gradient/Net_fc.weight"} <= {*names}
    assert "fc_output_0" not in names


def test_what_is_no_module_is_refused() -> None:
    hook = every()
    for register in (hook.register_module, hook.register_loss):
        with pytest.raises(SMDebugValueError, match="Module"):
            register("net")
    with pytest.warns(RuntimeWarning, match="was not saved"):
        hook.save_tensor("x", object())
    hook.close()


def test_only_rank_0_saves_unless_all_are_asked(tmp_path: Path) -> None:
    for rank in (0, 1):
        net, *_ = build()
        hook = smd.Hook(tmp_path / "run", save_all=True, worker=rank, num_workers=2)
        hook.register_module(net)
        net(batch(0)[0])
        hook.close()
    assert create_trial(tmp_path / "run").workers() == ["worker_0"]


SCRIPT = """
import sys
import torch
import {package}.pytorch as smd
from {package} import modes
from {package}.pytorch import get_hook, ReductionConfig, SaveConfig

def train(net, criterion, optimizer, steps):
    hook = get_hook()
    for step in range(steps):
        optimizer.zero_grad()
        loss = criterion(net(torch.ones(4, 3)), torch.zeros(4, 2))
        loss.backward()
        optimizer.step()
        hook.save_scalar("loss_scalar", loss.item(), sm_metric=True)

def make(net, criterion):
    hook = smd.Hook(
        out_dir=sys.argv[1],
        save_config=SaveConfig(save_interval=2),
        include_collections=["weights", "gradients", "losses"],
        reduction_config=ReductionConfig(reductions=["min"], save_raw_tensor=True),
    )
    hook.register_module(net)
    hook.register_loss(criterion)

torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(3, 2))
criterion = torch.nn.MSELoss()
make(net, criterion)
get_hook().set_mode(modes.TRAIN)
train(net, criterion, torch.optim.SGD(net.parameters(), lr=0.1), 5)
"""


def test_a_script_with_one_import_changed(tmp_path: Path) -> None:
    """It never closes its hook: the end of the program does."""
    subprocess.run(
        [
            sys.executable, "-c", SCRIPT.format(package="tensorstore_fmt.interop.smdebug"),
            str(tmp_path / "run"),
        ],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        timeout=120,
    )  # fmt: skip
    trial = create_trial(tmp_path / "run")
    assert trial.loaded_all_steps
    assert trial.tensor_names() == [
        "MSELoss_output_0", "Sequential_0.weight", "gradient/Sequential_0.bias",
        "gradient/Sequential_0.weight", "scalar/loss_scalar",
    ]  # fmt: skip
    assert trial.tensor("MSELoss_output_0").steps(mode=modes.TRAIN) == [0, 2, 4]
    assert trial.tensor("scalar/loss_scalar").steps() == [0, 1, 2, 3, 4]
    weight = trial.tensor("Sequential_0.weight")
    assert weight.reduction_value(4, "min") == weight.value(4).min()
    with tsf.open_run(tmp_path / "run") as run:
        assert run.is_closed
