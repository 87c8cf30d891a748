"""The hook for scripts written for smdebug; what smdebug's own got wrong is right here."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import tensorstore_fmt as tsf
import tensorstore_fmt.interop.smdebug.pytorch as smd
from tensorstore_fmt.interop.smdebug import create_trial, modes
from tensorstore_fmt.interop.smdebug.exceptions import (
    InvalidCollectionConfiguration,
    SMDebugValueError,
    TensorUnavailableForStep,
)
from tensorstore_fmt.interop.smdebug.trials import Trial


def trial_of(url: str | Path) -> Trial:
    trial = create_trial(url)
    assert trial.loaded_all_steps
    return trial


# --- what smdebug got wrong ----------------------------------------------------------------
def test_a_tensor_belongs_to_the_step_at_which_it_was_saved() -> None:
    with smd.Hook("memory://hook/tensor", save_config=smd.SaveConfig(save_interval=3)) as hook:
        hook.set_mode(modes.TRAIN)
        for step in range(9):
            assert hook.step() == step
            hook.save_tensor("x", np.full(3, step))
    values = trial_of("memory://hook/tensor").tensor("x").values(mode=modes.TRAIN)
    assert {step: value.tolist() for step, value in values.items()} == {
        0: [0, 0, 0],
        3: [3, 3, 3],
        6: [6, 6, 6],
    }


def test_a_scalar_is_saved_at_every_step() -> None:
    with smd.Hook("memory://hook/scalar", save_config=smd.SaveConfig(save_interval=3)) as hook:
        for step in range(9):
            hook.step()
            hook.save_scalar("lr", step / 10, sm_metric=True)
    trial = trial_of("memory://hook/scalar")
    assert trial.steps() == list(range(9))
    values = trial.tensor("scalar/lr").values()
    assert {s: v.tolist() for s, v in values.items()} == {s: [s / 10] for s in range(9)}
    assert trial.tensor_names(collection="sm_metrics") == ["scalar/lr"]


def test_raw_values_beside_their_shape() -> None:
    config = smd.ReductionConfig(save_raw_tensor=True, save_shape=True)
    value = np.arange(6.0).reshape(2, 3)
    with smd.Hook("memory://hook/shape", reduction_config=config) as hook:
        hook.save_tensor("x", value)
    tensor = trial_of("memory://hook/shape").tensor("x")
    assert np.array_equal(tensor.value(0), value)
    assert tensor.shape(0) == (2, 3)


def test_reductions_of_integers() -> None:
    config = smd.ReductionConfig(["mean", "prod"], ["max"], ["l1"], ["l2"])
    labels = np.array([1, -2, 3])
    hook = smd.Hook("memory://hook/integers", reduction_config=config, save_all=True)
    with hook:
        hook.save_tensor("labels", labels)
        hook.save_tensor("words", ["a", "b"])
        hook.save_tensor("empty", np.empty(0))
    trial = trial_of("memory://hook/integers")
    assert trial.tensor("labels").reduction_values(0) == {
        ("mean", False): pytest.approx(2 / 3),
        ("prod", False): -6,
        ("max", True): 3,
        ("l1", False): 6,
        ("l2", True): pytest.approx(np.sqrt(14)),
    }
    with pytest.raises(TensorUnavailableForStep) as caught:
        trial.tensor("labels").value(0)
    assert caught.value.has_reductions


def test_a_new_collection_in_the_middle() -> None:
    with smd.Hook("memory://hook/new", save_config=smd.SaveConfig(save_interval=1)) as hook:
        for step in range(4):
            hook.step()
            if step >= 2:
                hook.save_tensor("late", np.ones(2), collections_to_write=["new", "other"])
            hook.save_scalar("x", step)
    trial = trial_of("memory://hook/new")
    assert trial.tensor_names(collection="new") == ["late"]
    assert trial.tensor("late").steps() == [2, 3]


def test_a_finished_run_is_refused_by_name(tmp_path: Path) -> None:
    with smd.Hook(tmp_path / "run") as hook:
        hook.save_scalar("x", 1)
    with pytest.raises(tsf.RunExistsError):
        smd.Hook(tmp_path / "run")
    with smd.Hook(tmp_path / "run", resume_from=1) as hook:
        hook.save_scalar("x", 2)
    values = trial_of(tmp_path / "run").tensor("scalar/x").values()
    assert {step: value.tolist() for step, value in values.items()} == {0: [1], 1: [2]}


def test_all_dtypes_come_back() -> None:
    values = {
        name: np.arange(6).astype(name).reshape(2, 3)
        for name in ("int8", "int16", "uint16", "uint32", "uint64", "complex64", "float16", "bool")
    }
    for name in ("bfloat16", "float8_e5m2", "float8_e4m3fn"):
        values[name] = np.arange(6).astype(getattr(ml_dtypes, name)).reshape(2, 3)
    with smd.Hook("memory://hook/dtypes") as hook:
        for name, value in values.items():
            hook.save_tensor(name, value)
    trial = trial_of("memory://hook/dtypes")
    for name, value in values.items():
        found = trial.tensor(name).value(0)
        assert (found.dtype, found.tobytes()) == (value.dtype, value.tobytes())


def test_nothing_that_cannot_be_saved_reaches_training() -> None:
    with smd.Hook("memory://hook/bad") as hook:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            hook.save_tensor("bad", object())
            hook.save_tensor("bad", object())
            hook.save_scalar("two", [1, 2])
            hook.save_scalar("x" * 2000, 1)
        said = [str(warning.message) for warning in caught]
        assert len(said) == 3  # each name once
        assert all("was not saved" in text for text in said)
        hook.save_scalar("good", 1)
    assert trial_of("memory://hook/bad").tensor_names() == ["scalar/good"]


# --- steps and modes -----------------------------------------------------------------------
def test_modes_count_their_own_steps() -> None:
    config = smd.SaveConfig(
        {modes.TRAIN: smd.SaveConfigMode(save_interval=2), modes.EVAL: smd.SaveConfigMode(1)}
    )
    with smd.Hook("memory://hook/modes", save_config=config) as hook:
        for _ in range(2):
            hook.set_mode(modes.TRAIN)
            for _ in range(3):
                hook.step()
                hook.save_tensor("x", float(hook.step_num))
            hook.set_mode(modes.EVAL)
            hook.save_tensor("x", float(hook.step_num))
            hook.save_tensor("y", 1.0)
    trial = trial_of("memory://hook/modes")
    assert trial.steps(mode=modes.TRAIN) == [0, 2, 4]
    assert trial.steps(mode=modes.EVAL) == [0, 1]
    assert trial.steps() == [0, 2, 3, 5, 7]
    assert trial.tensor("y").steps(mode=modes.EVAL) == [0, 1]
    train = trial.tensor("x").values(mode=modes.TRAIN)
    assert {step: float(value) for step, value in train.items()} == {0: 0, 2: 2, 4: 5}


def test_a_step_becomes_visible_at_once(tmp_path: Path) -> None:
    """All of it, or nothing: else a rule would miss what comes later in the step."""
    hook = smd.Hook(tmp_path / "run", save_config=smd.SaveConfig(1))
    hook.save_scalar("a", 1)
    hook.save_scalar("b", 1)
    trial = create_trial(tmp_path / "run")
    assert hook._run is not None
    hook._run.flush()
    assert trial.steps() == []
    hook.step()
    hook._run.flush()
    assert trial.tensor_names() == ["scalar/a", "scalar/b"]
    assert trial.steps() == [0]
    hook.close()
    assert hook.close() is not None


def test_what_is_saved_last_is_not_lost(tmp_path: Path) -> None:
    script = (
        "import sys, numpy\n"
        "import tensorstore_fmt.interop.smdebug.pytorch as smd\n"
        "hook = smd.Hook(sys.argv[1])\n"
        "hook.save_tensor('x', numpy.ones(3))\n"
        "assert smd.get_hook() is hook\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], check=True)
    assert trial_of(tmp_path / "run").tensor("x").value(0).tolist() == [1, 1, 1]


# --- collections ---------------------------------------------------------------------------
def test_collections_choose_when_and_how() -> None:
    hook = smd.Hook(
        "memory://hook/collections",
        include_regex="relu",
        include_collections=["weights"],
        save_config=smd.SaveConfig(save_interval=4),
    )
    hook.get_collection("weights").save_config = smd.SaveConfig(save_interval=2)
    hook.get_collection("weights").reduction_config = smd.ReductionConfig(["max"])
    mine = smd.Collection("mine", "custom.*", save_config=smd.SaveConfig(save_steps=[3]))
    hook.add_collection(mine)
    with hook:
        for step in range(6):
            hook.step()
            for name in ("fc.weight", "relu_1", "custom_a", "other"):
                # In a collection of no pattern, so that only those that fit the name decide.
                hook.save_tensor(name, np.array([1.0, step]), collections_to_write=[])
    trial = trial_of("memory://hook/collections")
    assert trial.tensor("relu_1").steps() == [0, 4]
    assert trial.tensor("custom_a").steps() == [0, 3]  # and at each 500th
    weight = trial.tensor("fc.weight")
    assert weight.steps() == [0, 2, 4]
    assert weight.reduction_values(4) == {("max", False): 4}
    assert trial.tensor_names() == ["custom_a", "fc.weight", "relu_1"]
    kept = trial.collection("mine")
    assert kept == mine
    with pytest.raises(InvalidCollectionConfiguration):
        smd.Collection("bad", "(")


def test_only_one_worker_or_all_of_them(tmp_path: Path) -> None:
    for rank in (0, 1):
        with smd.Hook(tmp_path / "one", worker=rank, num_workers=2) as hook:
            hook.save_scalar("x", rank)
    assert trial_of(tmp_path / "one").workers() == ["worker_0"]
    for rank in (0, 1):
        with smd.Hook(tmp_path / "all", worker=rank, num_workers=2, include_workers="all") as hook:
            hook.save_scalar("x", rank)
    trial = trial_of(tmp_path / "all")
    assert trial.workers() == ["worker_0", "worker_1"]
    assert trial.tensor("scalar/x").value(0, worker="worker_1").tolist() == [1]


def test_the_hook_of_a_script(tmp_path: Path) -> None:
    smd.del_hook()
    assert smd.get_hook() is None
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"LocalPath": "memory://hook/script"}))
    made = smd.get_hook(str(path), create_if_not_exists=True)
    assert made is not None
    assert smd.get_hook(create_if_not_exists=True) is made
    with smd.Hook("memory://hook/another") as another:
        assert smd.get_hook() is another
    smd.set_hook(made)
    assert smd.get_hook() is made
    made.close()


def test_a_dry_run_saves_nothing(tmp_path: Path) -> None:
    with smd.Hook(tmp_path / "run", dry_run=True) as hook:
        hook.save_tensor("x", np.ones(3))
        assert hook.get_collection("default").tensor_names == {"x"}
    assert not (tmp_path / "run").exists()


def test_what_the_hook_does_not_do_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="export_tensorboard"):
        hook = smd.Hook(tmp_path / "run", True)
    with pytest.raises(SMDebugValueError):
        hook.register_module(object())
    with pytest.raises(SMDebugValueError):
        hook.set_mode("TRAIN")  # type: ignore[arg-type]
    with pytest.raises(SMDebugValueError):
        smd.Hook(tmp_path / "run2", include_workers="some")  # type: ignore[arg-type]
    hook.close()


# --- configs -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "config",
    [
        smd.SaveConfig(),
        smd.SaveConfig(10, 5, 100, [1, 2]),
        smd.SaveConfig({modes.TRAIN: smd.SaveConfigMode(7), modes.EVAL: {"end_step": 0}}),
    ],
)
def test_save_configs_go_through_json(config: smd.SaveConfig) -> None:
    assert smd.SaveConfig.from_json(config.to_json()) == config
    assert smd.SaveConfig.parse(config) is config


def test_save_config_decides() -> None:
    every = smd.SaveConfigMode(save_interval=3, start_step=4, end_step=10, save_steps=[1, 11])
    assert [step for step in range(14) if every.should_save_step(step)] == [1, 6, 9, 11]
    nothing = smd.SaveConfig(save_interval=1, end_step=0)
    assert not any(nothing.should_save_step(modes.TRAIN, step) for step in range(5))
    assert smd.SaveConfig().get_save_config(modes.EVAL).save_interval == 500
    partly = smd.SaveConfig({modes.TRAIN: smd.SaveConfigMode(7)})
    partly.merge_default_save_config(smd.SaveConfig(3))
    assert partly.get_save_config(modes.TRAIN).save_interval == 7
    assert partly.get_save_config(modes.EVAL).save_interval == 3
    for bad in ({"save_interval": 0}, {"every": 3}):
        with pytest.raises(SMDebugValueError):
            smd.SaveConfig.from_dict(bad)
    with pytest.raises(SMDebugValueError):
        smd.SaveConfig({"TRAIN": smd.SaveConfigMode()})  # type: ignore[dict-item]


def test_reduction_configs_go_through_json() -> None:
    config = smd.ReductionConfig(["min", "std"], ["max"], ["l1"], ["l2"], save_raw_tensor=True)
    said = json.loads(config.to_json())
    assert said["reductions"] == "min,std,abs_max,l1_norm,abs_l2_norm"
    assert smd.ReductionConfig.from_json(config.to_json()) == config
    assert smd.ReductionConfig.from_json("{}") == smd.ReductionConfig()
    for bad in ({"reductions": "median"}, {"unknown": 1}):
        with pytest.raises(ValueError, match=r"median|unknown"):
            smd.ReductionConfig.from_dict(bad)
    with pytest.raises(ValueError, match="l3"):
        smd.ReductionConfig(norms=["l3"])


def test_collections_go_through_json() -> None:
    plain = smd.Collection("c")
    full = smd.Collection("d", ["a", "b"], ["x"], smd.ReductionConfig(["min"]), smd.SaveConfig(9))
    for collection in (plain, full):
        assert smd.Collection.from_json(collection.to_json()) == collection
    full.include("more")
    full.add_tensor_name("y")
    assert full.has_tensor("some more")
    assert full.tensor_names == {"x", "y"}


def test_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with smd.Hook("memory://hook/torch") as hook:
            hook.save_tensor("x", torch.ones(3, dtype=torch.bfloat16, requires_grad=True))
            hook.save_scalar("loss", torch.tensor(0.5))
    trial = trial_of("memory://hook/torch")
    assert trial.tensor("x").value(0).tolist() == [1, 1, 1]
    assert trial.tensor("scalar/loss").value(0).tolist() == [0.5]


def test_a_configuration_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = {
        "LocalPath": str(tmp_path / "run"),
        "HookParameters": {"save_interval": "4", "eval.save_interval": "1", "save_all": "false"},
        "CollectionConfigurations": [
            {
                "CollectionName": "relu",
                "CollectionParameters": {
                    "include_regex": "relu_.*,act",
                    "save_steps": "1, 3",
                    "reductions": "max",
                },
            },
            {"CollectionName": "weights"},
        ],
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(document))
    monkeypatch.setenv("SMDEBUG_CONFIG_FILE_PATH", str(path))
    with smd.Hook.create_from_json_file() as hook:
        for mode in (modes.TRAIN, modes.EVAL):
            hook.set_mode(mode)
            for step in range(6):
                hook.step()
                for name in ("relu_1", "fc.weight", "other"):
                    hook.save_tensor(name, np.array([1.0, step]), collections_to_write=[])
    trial = trial_of(tmp_path / "run")
    assert trial.tensor_names() == ["fc.weight", "relu_1"]
    assert trial.tensor("fc.weight").steps(mode=modes.TRAIN) == [0, 4]
    assert trial.tensor("fc.weight").steps(mode=modes.EVAL) == [0, 1, 2, 3, 4, 5]
    assert trial.tensor("relu_1").steps(mode=modes.TRAIN) == [0, 1, 3]  # and each 500th
    assert trial.tensor("relu_1").reduction_values(3) == {("max", False): 3}
    for text in ("{", "[]", "{}", '{"LocalPath": "x", "HookParameters": {"save_interval": "a"}}'):
        path.write_text(text)
        with pytest.raises(SMDebugValueError):
            smd.Hook.create_from_json_file(str(path))
    monkeypatch.delenv("SMDEBUG_CONFIG_FILE_PATH")
    with pytest.raises(SMDebugValueError):
        smd.Hook.create_from_json_file()
