"""What smdebug's scripts ask of trials and tensors; on an imported run and on runs of our own.

Values expected of the imported run were observed with smdebug 1.0.34 on the same files.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

import tensorstore_fmt as tsf
from tensorstore_fmt.interop.importing import import_smdebug
from tensorstore_fmt.interop.smdebug import Collection, create_trial, modes
from tensorstore_fmt.interop.smdebug import exceptions as ex
from tensorstore_fmt.interop.smdebug.configs import reduce
from tensorstore_fmt.interop.smdebug.trials import Trial
from tensorstore_fmt.storage import open_storage
from tensorstore_fmt.testing.servers import S3Server
from tensorstore_fmt.testing.storage import CountingStorage

DATA = Path(__file__).parent / "data" / "smdebug"


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    url = tmp_path_factory.mktemp("imported") / "torch"
    import_smdebug(DATA / "torch", url)
    return create_trial(url, name="job")


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    url = tmp_path_factory.mktemp("imported") / "core"
    import_smdebug(DATA / "core", url)
    return create_trial(url)


# --- an imported run -----------------------------------------------------------------------
def test_the_trial(imported: Trial) -> None:
    assert imported.name == "job"
    assert imported.steps() == [0, 2, 4, 6, 7]
    assert imported.steps(mode=modes.TRAIN) == [0, 2, 4]
    assert imported.steps(mode=modes.EVAL) == [0, 1]
    assert imported.modes() == [modes.TRAIN, modes.EVAL]
    assert (imported.mode(6), imported.mode_step(6)) == (modes.EVAL, 0)
    assert imported.global_step(modes.EVAL, 1) == 7
    assert imported.workers() == ["worker_0"]
    assert imported.loaded_all_steps
    assert imported.training_ended()


def test_names(imported: Trial) -> None:
    names = imported.tensor_names()
    assert len(names) == 21
    assert names == sorted(names)
    assert not [name for name in names if "reductions" in name or name.startswith("smdebug")]
    biases = ["Net_conv1.bias", "Net_fc.bias", "gradient/Net_conv1.bias", "gradient/Net_fc.bias"]
    assert imported.tensor_names(regex=".*bias") == biases
    assert imported.tensor_names(regex="^(?!gradient).*bias") == biases[:2]
    assert imported.tensor_names(regex="bias$") == biases
    assert imported.tensor_names(regex=["^Net_fc", "labels"]) == [
        "Net_fc.bias", "Net_fc.weight", "labels"]  # fmt: skip
    of_eval = imported.tensor_names(step=0, mode=modes.EVAL)
    assert len(of_eval) == 17
    assert not [name for name in of_eval if name.startswith("gradient")]
    assert imported.tensor_names(mode=modes.EVAL) == of_eval
    assert imported.tensor_names(step=0, mode=modes.TRAIN, regex=".*bias") == biases
    assert imported.tensor_names(step=1) == imported.tensor_names(step=99) == []
    with pytest.raises(ValueError, match="not both"):
        imported.tensor_names(regex="a", collection="losses")


def test_collections(imported: Trial) -> None:
    assert list(imported.collections()) == [
        "all", "gradients", "losses", "biases", "default", "weights"]  # fmt: skip
    weights = imported.collection("weights")
    assert weights is not None
    assert weights.reduction_config is not None
    assert weights.save_config is not None
    assert weights.reduction_config.reductions == ["mean"]
    assert weights.reduction_config.abs_norms == ["l2"]
    assert weights.save_config.get_save_config(modes.TRAIN).save_interval == 2
    assert imported.tensor_names(collection="losses") == ["CrossEntropyLoss_output_0"]
    assert imported.tensor_names(collection=weights) == ["Net_conv1.weight", "Net_fc.weight"]
    assert imported.tensor_names(collection="no such") == []
    assert imported.collection("no such") is None
    stranger = Collection("mine", tensor_names=["labels", "never saved"])
    assert imported.tensor_names(collection=stranger) == ["labels"]
    assert imported.inputs(0) == []


def test_values(imported: Trial) -> None:
    weight = imported.tensor("Net_fc.weight")
    assert weight.steps() == [0, 2, 4, 6, 7]
    assert weight.steps(mode=modes.EVAL) == [0, 1]
    assert weight.value(0).shape == weight.shape(0) == (10, 144)
    assert np.array_equal(weight.value(7), weight.value(1, mode=modes.EVAL))
    assert np.array_equal(weight.value(0, worker="worker_0"), weight.value(0))
    assert np.array_equal(weight.value(0, index=np.s_[2:4, ::5]), weight.value(0)[2:4, ::5])
    values = weight.values(mode=modes.EVAL)
    assert list(values) == [0, 1]
    assert np.array_equal(values[1], weight.value(7))
    assert imported.tensor("scalar/lr").value(0).tolist() == [0.1]
    loss = imported.tensor("CrossEntropyLoss_output_0").value(1, mode=modes.EVAL)
    assert loss == np.float32(2.317739)
    assert (weight.prev_steps(6, 2), weight.prev_steps(6, 20)) == ([4, 6], [0, 2, 4, 6])
    assert weight.prev_steps(4, 2, mode=modes.TRAIN) == [2, 4]
    assert weight.prev_steps(5) == [0, 2, 4]
    assert weight.workers(0) == ["worker_0"]


def test_reductions(imported: Trial) -> None:
    weight = imported.tensor("Net_fc.weight")
    stored = weight.reduction_values(0)
    assert set(stored) == {("mean", False), ("l2", True)}
    assert stored["mean", False] == pytest.approx(-0.00055632, abs=5e-9)
    assert weight.reduction_value(0, "mean") == stored["mean", False]
    assert weight.reduction_value(0, "max", abs=True) == np.abs(weight.value(0)).max()
    assert weight.reduction_value(0, "l1") == pytest.approx(np.abs(weight.value(0)).sum())
    with pytest.raises(ValueError, match="median"):
        weight.reduction_value(0, "median")


def test_what_is_not_there(imported: Trial) -> None:
    weight = imported.tensor("Net_fc.weight")
    for step, mode in ((1, modes.GLOBAL), (99, modes.GLOBAL), (1, modes.TRAIN)):
        with pytest.raises(ex.StepUnavailable) as gone:
            weight.value(step, mode=mode)
        assert (gone.value.step, gone.value.mode) == (step, mode)
    with pytest.raises(ex.TensorUnavailable) as unknown:
        imported.tensor("Net_fc.weigth")
    assert unknown.value.tname == "Net_fc.weigth"
    assert "Net_fc.weight" in str(unknown.value)
    with pytest.raises(ex.TensorUnavailableForStep) as missing:
        imported.tensor("gradient/Net_fc.weight").value(0, mode=modes.EVAL)
    assert not missing.value.has_reductions
    with pytest.raises(ex.TensorUnavailableForStep):
        weight.workers(1)
    with pytest.raises(ex.StepUnavailable):
        weight.reduction_values(1)
    with pytest.raises(ex.TensorUnavailableForStep):
        imported.tensor("gradient/Net_fc.weight").shape(6)
    with pytest.raises(ex.InvalidWorker):
        weight.value(0, worker="worker_9")
    with pytest.raises(ex.StepUnavailable):
        imported.wait_for_steps([0, 1])
    with pytest.raises(ex.NoMoreData) as ended:
        imported.wait_for_steps([99])
    assert ended.value.last_step == 7


def test_errors_are_also_ours_and_pickle(imported: Trial) -> None:
    with pytest.raises(tsf.StepNotFoundError) as caught:
        imported.tensor("labels").value(1)
    again = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(again, ex.StepUnavailable)
    assert (str(again), again.step, again.facts) == (str(caught.value), 1, {"step": 1})
    with pytest.raises(tsf.NameNotFoundError):
        imported.tensor("nothing")


def test_workers_of_an_imported_run(core: Trial) -> None:
    expected = np.load(DATA / "expected_core.npz")
    assert core.workers() == ["worker_0", "worker_1"]
    weight = core.tensor("conv1/weight:0")
    for worker in core.workers():
        assert np.array_equal(
            weight.value(2, worker=worker), expected[f"step2/{worker}/conv1/weight:0"]
        )
    # Without a worker it is the first.
    assert np.array_equal(weight.value(2), weight.value(2, worker="worker_0"))
    assert weight.workers(2) == ["worker_0", "worker_1"]
    assert core.tensor("tokens").value(0).dtype.kind == "U"
    assert core.tensor("tokens").value(0).tolist() == expected["step0/worker_0/tokens"].tolist()
    # smdebug cuts ":0" off the name of a reduction, and never finds its tensor again.
    assert ("mean", True) in weight.reduction_values(2)
    assert weight.reduction_value(2, "mean", abs=True) == np.float32(0.5 / 3)


def test_only_the_shape(core: Trial) -> None:
    only = core.tensor("shape_only")
    assert only.shape(1) == only.shape(1, worker="worker_1") == (7, 9)
    assert only.steps() == [0, 1, 2, 3]
    with pytest.raises(ex.TensorUnavailableForStep):
        only.value(1)


def test_only_reductions() -> None:
    with tsf.create_run("memory://only-reductions") as run:
        run.log({"reductions/abs_max/w": 3.0, "x": 1.0}, step=0)
    trial = create_trial("memory://only-reductions")
    assert trial.tensor_names() == ["w", "x"]
    assert trial.tensor("w").reduction_value(0, "max", abs=True) == 3
    with pytest.raises(ex.ShapeUnavailableForStep):
        trial.tensor("w").shape(0)
    for call in (
        trial.tensor("w").value,
        lambda step: trial.tensor("w").reduction_value(step, "l1"),
    ):
        with pytest.raises(ex.TensorUnavailableForStep) as caught:
            call(0)
        assert caught.value.has_reductions


# --- runs of our own -----------------------------------------------------------------------
def test_built_in_collections() -> None:
    with tsf.create_run("memory://own") as run:
        names = ["fc.weight", "fc.bias", "gradient/fc.weight", "loss", "aux/loss", "Loss_output_0"]
        run.log(dict.fromkeys(names, 1.0), step=0)
    trial = create_trial("memory://own")
    assert trial.tensor_names(collection="weights") == ["fc.weight"]
    assert trial.tensor_names(collection="biases") == ["fc.bias"]
    assert trial.tensor_names(collection="gradients") == ["gradient/fc.weight"]
    assert trial.tensor_names(collection="losses") == ["Loss_output_0", "aux/loss", "loss"]
    assert trial.tensor_names(collection="all") == sorted(names)


@pytest.mark.parametrize(
    "value",
    [
        np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32),
        np.arange(-6, 6, dtype=np.int16).reshape(3, 4),
        np.array([1.5, np.nan, 2]),
        np.array([1.5, np.inf, -3]),
        np.array([np.inf, -np.inf, 0.0]),
    ],
)
def test_reductions_of_values_and_of_statistics_are_numpys(value: np.ndarray) -> None:
    place = f"memory://reductions/{abs(hash(value.tobytes()))}"
    with tsf.create_run(place, stats={"s": "only"}) as run:
        run.log({"x": value, "s": value}, step=0)
    trial = create_trial(place)
    functions = {
        "min": np.min, "max": np.max, "mean": np.mean, "std": np.std, "variance": np.var,
        "sum": np.sum, "prod": np.prod, "l1": lambda x: np.sum(np.abs(x)),
        "l2": lambda x: np.sqrt(np.sum(np.square(x.astype(np.float64)))),
    }  # fmt: skip
    with np.errstate(invalid="ignore"):
        for name, function in functions.items():
            for is_abs in (False, True):
                wide = value.astype(np.float64)
                expected = function(np.abs(wide) if is_abs else wide)
                found = trial.tensor("x").reduction_value(0, name, abs=is_abs)
                assert found == pytest.approx(expected, rel=1e-4, nan_ok=True)
                try:
                    found = trial.tensor("s").reduction_value(0, name, abs=is_abs)
                except ex.TensorUnavailableForStep:
                    assert name in ("prod", "min", "std", "variance")
                else:
                    assert found == pytest.approx(expected, rel=1e-6, nan_ok=True)


def test_reductions_of_the_torch_hook() -> None:
    with tsf.create_run("memory://hook-names") as run:
        run.log({"fc.weight/mean": 0.5, "fc.weight/var": 2.0, "fc.weight/absmax": 7.0}, step=0)
        run.log({"fc.weight": np.zeros(3)}, step=1)
    tensor = create_trial("memory://hook-names").tensor("fc.weight")
    assert tensor.reduction_value(0, "mean") == 0.5
    assert tensor.reduction_value(0, "variance") == 2
    assert tensor.reduction_value(0, "max", abs=True) == 7


def test_reductions_do_not_overflow() -> None:
    small = np.array([-128, 127, 5], np.int8)
    assert reduce(small, "max", is_abs=True) == reduce(small, "min", is_abs=True) + 123 == 128
    assert reduce(small, "l1") == 260
    assert reduce(np.array([65535, 65534], np.uint16), "l2") == np.hypot(65535, 65534)


def test_bfloat16_and_booleans() -> None:
    import ml_dtypes

    values = {"b": np.array([True, False, True]), "h": np.full(9, 0.1, ml_dtypes.bfloat16)}
    with tsf.create_run("memory://half") as run:
        run.log(values, step=0)
    trial = create_trial("memory://half")
    assert trial.tensor("b").reduction_value(0, "sum") == 2
    assert trial.tensor("h").reduction_value(0, "sum") == pytest.approx(0.9, rel=1e-2)
    assert reduce(values["h"], "sum").dtype == np.float32


def test_a_step_in_two_modes_is_ambiguous() -> None:
    with tsf.create_run("memory://both") as run:
        run.log({"x": 1.0}, step=0, mode="TRAIN")
        run.log({"x": 2.0}, step=0, mode="EVAL")
    tensor = create_trial("memory://both").tensor("x")
    assert tensor.value(0, mode=modes.TRAIN) == 1
    assert tensor.value(0, mode=modes.EVAL) == 2
    with pytest.raises(tsf.AmbiguousError):
        tensor.value(0)


def test_shapes_that_vary() -> None:
    with tsf.create_run("memory://varying") as run:
        for step in range(4):
            run.log({"x": np.full((step + 1, 2), step, np.int32)}, step=step)
    tensor = create_trial("memory://varying").tensor("x")
    assert [tensor.shape(step) for step in tensor.steps()] == [(1, 2), (2, 2), (3, 2), (4, 2)]
    values = tensor.values()
    assert [value.shape for value in values.values()] == [(1, 2), (2, 2), (3, 2), (4, 2)]
    assert all((value == step).all() for step, value in values.items())


def test_damage_is_no_absence(tmp_path: Path) -> None:
    with tsf.create_run(tmp_path / "run", compression="none") as run:
        run.log({"x": np.random.default_rng(0).random((400, 400))}, step=0)
    (shard,) = (tmp_path / "run" / "shards").iterdir()
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(tsf.FormatError):
        create_trial(tmp_path / "run").tensor("x").value(0)


def test_a_bucket_is_listed_once(s3: S3Server) -> None:
    """smdebug listed all files of the run before each value; here nothing is listed after that."""
    url, options = s3.url("smdebug-trial"), s3.storage_options
    names = [f"t{i}" for i in range(20)]
    with tsf.create_run(url, storage_options=options, compression="none") as run:
        for step in range(3):
            run.log({name: np.full((64, 64), step, np.float32) for name in names}, step=step)
    trial = create_trial(url, storage_options=options)
    assert trial.steps() == [0, 1, 2]
    before = len(s3.requests())
    for name in names:
        assert (trial.tensor(name).value(2) == 2).all()
    asked = s3.requests()[before:]
    assert not [request for request in asked if "list-type" in request]
    assert len(asked) <= len(names) + 2


# --- values step by step ---------------------------------------------------------------------
def test_values_in_any_order_are_those_of_their_steps(tmp_path: Path) -> None:
    """Steps behind the one that is asked for are read along; nobody must notice."""
    rng = np.random.default_rng(0)
    names = [f"t{i}" for i in range(40)]  # more than are followed at once
    steps = [step for step in range(90) if step % 7]
    values = {name: rng.random((90, 3, 5)).astype(np.float32) for name in names}
    with tsf.create_run(tmp_path / "run") as run:
        for step in steps:
            run.log({name: values[name][step] for name in names}, step=step, mode="TRAIN")
    trial = create_trial(tmp_path / "run")
    orders = [steps, steps[::-1], [8, 8, 9, 9, 10, 3, 4, 5, 80, 81, 82, 83, 89]]
    for order in orders:
        for step in order:
            for name in names[:: 1 if order is steps else 9]:
                found = trial.tensor(name).value(step)
                assert np.array_equal(found, values[name][step]), (name, step)
                found[:] = -1  # the caller's own
    with pytest.raises(ex.StepUnavailable):
        trial.tensor("t0").value(7)


def test_a_script_that_goes_step_by_step_reads_few_times(tmp_path: Path) -> None:
    with tsf.create_run(tmp_path / "run", compression="none") as run:
        for step in range(50):
            run.log({"x": np.arange(step, 1024 + step).astype(np.float32)}, step=step)
    counting = CountingStorage(open_storage(tmp_path / "run", writable=False))
    trial = create_trial(tmp_path / "run")
    trial._session.storage = counting
    x = trial.tensor("x")
    for step in x.steps():
        assert x.value(step)[4] == step + 4
    assert 1 <= sum(o.path.startswith("shards/") for o in counting.requests) <= 3


def test_what_is_hidden_meanwhile_is_not_shown(tmp_path: Path) -> None:
    with tsf.create_run(tmp_path / "run") as run:
        for step in range(20):
            run.log({"x": np.full(100, step)}, step=step)
    writer = tsf.create_run(tmp_path / "run", resume_from=10)
    writer.log({"x": np.full(100, -10)}, step=10)
    writer.flush()
    trial = create_trial(tmp_path / "run")
    x = trial.tensor("x")
    assert [int(x.value(step)[0]) for step in range(10)] == list(range(10))
    for step in range(10, 20):
        writer.log({"x": np.full(100, -step)}, step=step)
    writer.close()
    trial.refresh_data()
    assert [int(x.value(step)[0]) for step in range(20)] == [*range(10), *range(-10, -20, -1)]


def test_damage_behind_a_step_is_met_at_its_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with tsf.create_run(tmp_path / "run", compression="none") as run:
        for step in range(6):
            run.log({"x": rng.random(5000)}, step=step)
            run.flush()
    (shard,) = (tmp_path / "run" / "shards").iterdir()
    data = bytearray(shard.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    shard.write_bytes(data)
    x = create_trial(tmp_path / "run").tensor("x")
    assert all(x.value(step).shape == (5000,) for step in range(4))
    with pytest.raises(tsf.FormatError):
        x.value(4)
    assert x.value(5).shape == (5000,)
