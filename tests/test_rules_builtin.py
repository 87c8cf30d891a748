"""Each built-in rule: a run where it fires, one where it must not, and cutting into blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.rule_runs import make_run

import tensorstore_fmt as tsf
from tensorstore_fmt import rules
from tensorstore_fmt.rules.progress import Progress

RNG = np.random.default_rng(5)
NOISE = RNG.standard_normal((64, 8, 12)).astype(np.float32)
LABELS = RNG.integers(0, 4, (64, 50))


def noise(step: int) -> Any:
    return NOISE[step % 64]


def at(bad: int, good: Any, wrong: Any) -> Callable[[int], Any]:
    """Give `good` of a step, from step `bad` on `wrong`."""

    def make(step: int) -> Any:
        chosen = wrong if step >= bad else good
        return chosen(step) if callable(chosen) else chosen

    return make


def with_nan(step: int) -> Any:
    x = noise(step).copy()
    x[3, 4] = np.nan
    return x


def with_inf(step: int) -> Any:
    x = noise(step).copy()
    x[0, 0] = -np.inf
    return x


def labels(step: int) -> Any:
    return LABELS[step % 64]


def right(step: int) -> Any:
    """Scores whose greatest is the label."""
    return np.eye(4, dtype=np.float32)[labels(step)]


def mixed(step: int) -> Any:
    """Scores that take every sample of class 2 for class 1."""
    return np.eye(4, dtype=np.float32)[np.where(labels(step) == 2, 1, labels(step))]


def few(step: int) -> Any:
    """Labels of which hardly any is 3."""
    return np.where((labels(step) == 3) & (np.arange(50) > 1), 0, labels(step))


def relu(step: int) -> Any:
    return np.maximum(noise(step), 0)


def dead(step: int) -> Any:
    x = relu(step).copy()
    x[:, :9] = 0
    return x


def saturated(step: int) -> Any:
    x = noise(step).copy()
    x[:, :7] = 40
    return x


def falling(step: int) -> float:
    return 3 * 0.9**step + 0.01 * float(NOISE[step % 64, 0, 0])


def image(step: int) -> Any:
    return np.stack([noise(step)[:, :9].reshape(8, 3, 3)] * 3, axis=1)


def bright(step: int) -> Any:
    x = image(step).copy()
    x[:, 1] += 0.6
    return x


CASES: dict[str, tuple[rules.Rule, dict[str, Any], dict[str, Any], str]] = {
    "vanishing_gradient": (
        rules.VanishingGradient(),
        {"gradient__w": noise, "w": lambda s: noise(s) * 1e-12},
        {"gradient__w": at(7, noise, lambda s: noise(s) * 1e-9)},
        "gradient/w@7",
    ),
    "exploding_nan": (rules.ExplodingTensor(), {"w": noise}, {"w": at(6, noise, with_nan)}, "w@6"),
    "exploding_inf": (rules.ExplodingTensor(), {"w": noise}, {"w": at(6, noise, with_inf)}, "w@6"),
    "exploding_loss": (
        rules.ExplodingTensor(names="^loss$"),
        {"loss": falling},
        {"loss": at(4, falling, float("inf"))},
        "loss@4",
    ),
    "exploding_only_nan": (
        rules.ExplodingTensor(only_nan=True),
        {"w": with_inf},
        {"w": at(6, with_inf, with_nan)},
        "w@6",
    ),
    "all_zero": (
        rules.AllZero(),
        {"w": relu},
        {"w": at(9, relu, np.zeros((8, 12), np.float32))},
        "w@9",
    ),
    "all_zero_share": (rules.AllZero(share=0.7), {"w": relu}, {"w": at(9, relu, dead)}, "w@9"),
    "variance_above": (
        rules.TensorVariance(most=4.0),
        {"w": noise},
        {"w": at(5, noise, lambda s: 10 * noise(s))},
        "w@5",
    ),
    "variance_below": (
        rules.TensorVariance(least=1e-3),
        {"w": noise},
        {"w": at(5, noise, lambda s: noise(s) / 1000)},
        "w@5",
    ),
    "unchanged": (
        rules.UnchangedTensor(),
        {"w": noise, "b": lambda s: np.arange(3.0) + s},
        {"w": at(8, noise, lambda s: noise(8) * np.float32(1 + 1e-7 * s))},
        "w@10",
    ),
    "unchanged_needs_values": (  # a permutation has the same statistics
        rules.UnchangedTensor(num_steps=2),
        {"w": lambda s: np.roll(noise(0), s, axis=0)},
        {"w": at(8, lambda s: np.roll(noise(0), s, axis=0), noise(3))},
        "w@9",
    ),
    "update_too_large": (
        rules.WeightUpdateRatio(),
        {"w.weight": lambda s: noise(0) * (1 + 0.01 * s)},
        {"w.weight": at(8, lambda s: noise(0) * (1 + 0.01 * s), lambda s: noise(s) * 100)},
        "w.weight@8",
    ),
    "update_too_small": (
        rules.WeightUpdateRatio(),
        {"w.weight": lambda s: noise(0) * (1 + 0.01 * s), "frozen": noise},
        {"w.weight": at(8, lambda s: noise(0) * (1 + 0.01 * s), noise(0))},
        "w.weight@9",
    ),
    "poor_gains": (
        rules.PoorInitialisation(),
        {"1.weight": lambda s: noise(s) / 12**0.5, "2.weight": lambda s: noise(s)[:, :3] / 3**0.5},
        {"1.weight": lambda s: noise(s) / 12**0.5, "2.weight": noise},
        "1.weight@0",
    ),
    "poor_spread": (
        rules.PoorInitialisation(),
        {"relu__input__0": noise},
        {"relu__input__0": lambda s: noise(s) * 1e-5},
        "relu/input/0@0",
    ),
    "poor_flat_loss": (
        rules.PoorInitialisation(),
        {"loss": falling},
        {"loss": lambda s: 2.3026 + 1e-6 * s},
        "loss@4",
    ),
    "dead_relu": (
        rules.DeadRelu(),
        {"relu__output": relu, "other": dead},
        {"relu__output": at(6, relu, dead)},
        "relu/output@6",
    ),
    "saturated_tanh": (
        rules.SaturatedActivation(),
        {"tanh__input__0": noise, "sigmoid__input__0": noise, "relu__input__0": saturated},
        {"tanh__input__0": at(6, noise, saturated)},
        "tanh/input/0@6",
    ),
    "saturated_sigmoid": (
        rules.SaturatedActivation(),
        {"sigmoid__input__0": noise},
        {"sigmoid__input__0": at(6, noise, lambda s: -saturated(s))},
        "sigmoid/input/0@6",
    ),
    "loss_not_decreasing": (
        rules.LossNotDecreasing(num_steps=5),
        {"loss": falling},
        {"loss": at(10, falling, lambda s: falling(9))},
        "loss@18",
    ),
    "loss_rises": (
        rules.LossNotDecreasing(num_steps=3),
        {"loss": falling},
        {"loss": at(10, falling, lambda s: falling(9) * 2 ** (s - 9))},
        "loss@11",
    ),
    "overfit": (
        rules.Overfit(patience=2),
        {"loss": falling, "EVAL_loss": lambda s: falling(s) * 0.9 if s % 5 == 4 else None},
        {"loss": falling, "EVAL_loss": lambda s: 1.5 if s % 5 == 4 else None},
        "loss@19",
    ),
    "overtraining": (
        rules.Overtraining(patience_train=2, patience_eval=3),
        {"loss": falling, "EVAL_loss": lambda s: falling(s) if s % 2 else None},
        {
            "loss": at(6, falling, 0.5),
            "EVAL_loss": lambda s: falling(min(s, 6)) if s % 2 else None,
        },
        "loss@13",
    ),
    "class_imbalance": (
        rules.ClassImbalance(samples=400),
        {"labels": labels, "logits": right},
        {"labels": few, "logits": right},
        "logits@7",
    ),
    "class_mispredicted": (
        rules.ClassImbalance(samples=400),
        {"labels": labels, "predictions": labels},
        {"labels": labels, "predictions": mixed},
        "predictions@7",
    ),
    "confusion": (
        rules.Confusion(samples=100),
        {"labels": labels, "logits": right},
        {"labels": labels, "logits": mixed},
        "logits@1",
    ),
    "check_input": (
        rules.CheckInput(samples=64),
        {"input__0": image},
        {"input__0": bright},
        "input/0@7",
    ),
    "sequence_ratio": (
        rules.NlpSequenceRatio(),
        {"input_ids": labels},
        {"input_ids": at(5, labels, lambda s: np.where(np.arange(50) < 30, 0, 7))},
        "input_ids@5",
    ),
    "sequence_ratio_of_tokens": (
        rules.NlpSequenceRatio(tokens=("1", "7"), ratio=0.6),
        {"input_ids": labels},
        {"input_ids": at(5, labels, lambda s: np.arange(50) % 2 * 6 + 1)},
        "input_ids@5",
    ),
    "accuracy_drop": (
        rules.AccuracyDrop(mode="TRAIN"),
        {"accuracy": lambda s: 0.5 + 0.02 * s},
        {"accuracy": at(12, lambda s: 0.5 + 0.02 * s, 0.6)},
        "accuracy@12",
    ),
}


def fresh(rule: rules.Rule) -> rules.Rule:
    return type(rule)(**rule.settings)


@pytest.mark.parametrize("case", CASES)
def test_it_fires_where_it_should_and_nowhere_else(case: str) -> None:
    rule, good, bad, first = CASES[case]
    assert rules.evaluate(make_run(**good), [fresh(rule)], record=False).findings == []
    found = rules.evaluate(make_run(**bad), [fresh(rule)], record=False).findings
    assert found, "it does not fire"
    assert f"{found[0].series}@{found[0].step}" == first
    assert found[0].rule == rule.name
    assert str(found[0].step) in str(found[0])


@pytest.mark.parametrize("case", CASES)
def test_blocks_do_not_change_what_is_found(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps come one by one while a training runs, and all at once afterwards."""
    rule, good, bad, _ = CASES[case]
    for makers in (good, bad):
        url = make_run(**makers)
        at_once = rules.evaluate(url, [fresh(rule)], record=False).findings
        for size in (1, 3):
            monkeypatch.setattr(Progress, "_size", lambda *_, size=size: size)
            in_parts = rules.evaluate(url, [fresh(rule)], record=False).findings
            assert sorted(map(repr, in_parts)) == sorted(map(repr, at_once))
            monkeypatch.undo()


def test_every_rule_has_a_case_and_says_what_it_reads() -> None:
    tested = {case[0].name for case in CASES.values()} | {"similar_across_runs", "stalled_training"}
    assert tested == set(rules.BUILT_IN)
    for rule in rules.BUILT_IN.values():
        said = " ".join((rule.__doc__ or "").split())
        assert "Fires" in said or "fires" in said
        assert "Reads" in said or "reads" in said, rule.name


def test_similar_across_runs() -> None:
    same = make_run(**{"w.weight": lambda s: noise(s // 2)})
    other = make_run(**{"w.weight": at(4, lambda s: noise(s + 1), lambda s: noise(s // 2))})
    different = make_run(**{"w.weight": lambda s: noise(s + 1)})
    rolled = make_run(**{"w.weight": lambda s: np.roll(noise(s // 2), 1, axis=0)})
    rule = rules.SimilarAcrossRuns()
    found = rules.evaluate(same, [fresh(rule)], others=[other], record=False).findings
    assert [(f.series, f.step) for f in found] == [("w.weight", 4)]
    for each in (different, rolled):
        report = rules.evaluate(same, [fresh(rule)], others=[each], record=False)
        assert report.findings == []


def stamped(times: list[float]) -> str:
    url = make_run(range(0))
    with tsf.create_run(url, resume_from=0) as run:
        for step, seconds in enumerate(times):
            run.stamp(step, "TRAIN", mode_step=step, wall_time_us=int(seconds * 1e6))
            run.log({"loss": 1.0}, step=step, mode="TRAIN")
    return url


def test_stalled_training(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = rules.StalledTraining(threshold=100)
    assert rules.evaluate(stamped([0, 90, 180, 270]), [fresh(rule)], record=False).ok
    url = stamped([0, 90, 291, 380])
    for size in (1, 100):
        monkeypatch.setattr(Progress, "_size", lambda *_, size=size: size)
        (found,) = rules.evaluate(url, [fresh(rule)], record=False).findings
        assert (found.step, found.value) == (2, 201)
    assert list(fresh(rule).invoke_when_quiet(10_000)) == []  # nothing was seen yet


def test_a_stall_is_noticed_while_it_lasts() -> None:
    url = make_run(range(0))
    with tsf.create_run(url, resume_from=0) as run:
        for step in range(3):
            run.stamp(step, "TRAIN", mode_step=step, wall_time_us=1_000_000 * step)
            run.log({"loss": 1.0}, step=step, mode="TRAIN")
        run.flush()
        found = rules.evaluate(url, [rules.StalledTraining()], record=False).findings
        assert [f.step for f in found] == [1]  # the last complete one; 1970 is long ago


def test_a_rule_goes_on_after_the_condition_was_over() -> None:
    url = make_run(w=lambda s: with_nan(s) if s in (3, 4, 9) else noise(s))
    steps = [f.step for f in rules.evaluate(url, [rules.ExplodingTensor()], record=False).findings]
    assert steps == [3, 9]
    repeated = rules.evaluate(url, [rules.ExplodingTensor(repeat=True)], record=False)
    assert [f.step for f in repeated.findings] == [3, 4, 9]
