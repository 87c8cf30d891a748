"""The PyTorch hook does no harm: training is the same whatever fails, and costs little more."""

from __future__ import annotations

import gc
import io
import pickle
import subprocess
import sys
import threading
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tensorstore_fmt as tsf
from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.hooks import Reduction, Reductions, SaveConfig

torch = pytest.importorskip("torch")

from support.torch_training import EVERYTHING, batch, build, saved, train  # noqa: E402

from tensorstore_fmt.hooks import torch_values  # noqa: E402
from tensorstore_fmt.hooks.guard import Guard  # noqa: E402
from tensorstore_fmt.hooks.torch import attach  # noqa: E402
from tensorstore_fmt.hooks.torch_staging import Staging  # noqa: E402


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
