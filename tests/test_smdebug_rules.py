"""Rules written for smdebug, on runs of our own and imported ones."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tensorstore_fmt as tsf
from tensorstore_fmt.interop.importing import import_smdebug
from tensorstore_fmt.interop.smdebug import create_trial, modes
from tensorstore_fmt.interop.smdebug.exceptions import (
    NoMoreData,
    RuleEvaluationConditionMet,
    StepUnavailable,
    TensorUnavailable,
    TensorUnavailableForStep,
)
from tensorstore_fmt.interop.smdebug.rules.rule import Rule
from tensorstore_fmt.interop.smdebug.rules.rule_invoker import invoke_rule
from tensorstore_fmt.interop.smdebug.trials import Trial

DATA = Path(__file__).parent / "data" / "smdebug"


class CustomGradientRule(Rule):
    """As smdebug's documentation has it: without the argument that its code came to need."""

    def __init__(self, base_trial: Trial, threshold: float = 10.0) -> None:
        super().__init__(base_trial)
        self.threshold = float(threshold)
        self.seen: list[int] = []

    def set_required_tensors(self, step: int) -> None:
        for name in self.base_trial.tensor_names(collection="gradients", step=step):
            self.req_tensors.add(name=name, steps=[step])

    def invoke_at_step(self, step: int) -> bool:
        self.seen.append(step)
        for tensor in self.req_tensors.get():
            if tensor.reduction_value(step, "mean", abs=True) > self.threshold:
                return True
        return False


class Each(Rule):
    """Takes a function for `invoke_at_step`."""

    def __init__(self, trial: Trial, look: Any, needs: Any = None, **options: Any) -> None:
        super().__init__(trial, **options)
        self.look = look
        self.needs = needs

    def set_required_tensors(self, step: int) -> None:
        if self.needs is not None:
            self.needs(self, step)

    def invoke_at_step(self, step: int) -> bool:
        return self.look(self, step)


def write(url: Any, steps: int = 10, **values: Any) -> Any:
    with tsf.create_run(url) as run:
        for step in range(0, 2 * steps, 2):
            run.log({name: make(step) for name, make in values.items()}, step=step, mode="TRAIN")
    return url


def invoke_all(rule: Rule) -> None:
    """Invoke a rule until the run ends."""
    with pytest.raises(NoMoreData):
        invoke_rule(rule)


def gradient(step: int) -> np.ndarray:
    return np.full((3, 4), 0.1 if step < 12 else 20.0, np.float32)


def test_a_documented_rule_fires_where_it_should() -> None:
    url = write("memory://rules/gradient", **{"gradient/w": gradient, "w": gradient})
    rule = CustomGradientRule(create_trial(url))
    with pytest.raises(RuleEvaluationConditionMet) as caught:
        invoke_rule(rule, raise_eval_cond=True)
    assert (caught.value.step, caught.value.rule_name) == (12, "CustomGradientRule")
    assert rule.seen == [0, 2, 4, 6, 8, 10, 12]
    assert rule.report["RuleTriggered"] == 1
    quiet = CustomGradientRule(create_trial(url), threshold=100)
    with pytest.raises(NoMoreData):
        invoke_rule(quiet, raise_eval_cond=True)
    assert quiet.seen == list(range(0, 20, 2))
    assert quiet.report["RuleTriggered"] == 0


def test_it_goes_on_behind_what_fired() -> None:
    url = write("memory://rules/goes-on", **{"gradient/w": gradient})
    rule = CustomGradientRule(create_trial(url))
    invoke_all(rule)
    assert rule.seen == list(range(0, 20, 2))
    assert rule.report["Violations"] == 4
    part = CustomGradientRule(create_trial(url))
    invoke_rule(part, start_step=3, end_step=8)
    assert part.seen == [4, 6]


def test_an_imported_run(tmp_path: Path) -> None:
    import_smdebug(DATA / "torch", tmp_path / "run")
    trial = create_trial(tmp_path / "run")
    rule = CustomGradientRule(trial, threshold=0.05)
    invoke_all(rule)
    assert rule.seen == trial.steps()
    fires = {
        step
        for step in trial.steps(mode=modes.TRAIN)
        for name in trial.tensor_names(collection="gradients", step=step)
        if np.abs(trial.tensor(name).value(step)).mean() > 0.05
    }
    assert rule.report["Violations"] == len(fires) > 0


def test_invoke_and_what_is_not_there() -> None:
    url = write("memory://rules/invoke", x=float)
    trial = create_trial(url)
    rule = Each(trial, lambda _rule, step: step == 4)
    rule.invoke(2)
    with pytest.raises(RuleEvaluationConditionMet):
        rule.invoke(4)
    with pytest.raises(StepUnavailable):
        rule.invoke(3)
    with pytest.raises(NoMoreData):
        rule.invoke(99)

    def needs(name: str, at: int = 0) -> Any:
        return lambda rule, step: rule.req_tensors.add(name, steps=[step + at])

    for needed, missing in (
        (needs("nothing"), TensorUnavailable),
        (needs("x", 1), StepUnavailable),
    ):
        with pytest.raises(missing):
            Each(trial, lambda *_: True, needed).invoke(2)


def test_a_tensor_that_is_missing_at_some_steps() -> None:
    with tsf.create_run("memory://rules/gaps") as run:
        for step in range(6):
            run.log({"x": 1.0} | ({"y": 1.0} if step % 3 == 0 else {}), step=step)
    seen: list[int] = []
    rule = Each(
        create_trial("memory://rules/gaps"),
        lambda _rule, step: seen.append(step),
        lambda rule, step: rule.req_tensors.add("y", steps=[step]),
    )
    with pytest.raises(TensorUnavailableForStep):
        rule.invoke(1)
    invoke_all(rule)
    assert seen == [0, 3]


def test_required_tensors() -> None:
    url = write("memory://rules/required", **{f"layer{i}/w": float for i in range(3)}, other=float)
    found: list[Any] = []

    def needs(rule: Rule, step: int) -> None:
        rule.req_tensors.add("layer.*", steps=[0, step], should_match_regex=True)
        rule.req_tensors.add(["other"], steps=[step])

    def look(rule: Rule, step: int) -> bool:
        names = rule.req_tensors.get_names()
        found.append((names, rule.req_tensors.get_tensor_steps("layer1/w")))
        values = [t.value(step) for t in rule.req_tensors.get()]
        assert all(value == step for value in values)
        return False

    Each(create_trial(url), look, needs).invoke(6)
    assert found == [(["layer0/w", "layer1/w", "layer2/w", "other"], [0, 6])]


def test_required_tensors_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One round of requests for all that a step, and those behind it, need; then nothing."""
    from tensorstore_fmt.interop.smdebug import ahead
    from tensorstore_fmt.reading import reader, tensor

    url = write("memory://rules/once", steps=3, a=gradient, b=gradient)
    reads: list[int] = []

    def counting(session: Any, asks: Any) -> Any:
        reads.append(len(asks))
        return reader.read(session, asks)

    monkeypatch.setattr(ahead, "read", counting)
    monkeypatch.setattr(tensor, "read", counting)

    def needs(rule: Rule, step: int) -> None:
        rule.req_tensors.add(".*", steps=[step], should_match_regex=True)

    def look(rule: Rule, step: int) -> bool:
        values = [t.value(step) for t in rule.req_tensors.get() for _ in range(3)]
        assert len(values) == 6
        assert all(np.array_equal(value, gradient(step)) for value in values)
        return False

    invoke_all(Each(create_trial(url), look, needs))
    assert reads == [2]


def all_of_it(rule: Rule, step: int) -> None:
    rule.req_tensors.add(".*", steps=[step], should_match_regex=True)


def test_values_read_ahead_are_those_of_their_steps(tmp_path: Path) -> None:
    """Also with shapes that vary, several workers, windows of steps, more than is read at once."""
    n = 150
    for worker in (0, 1):
        with tsf.create_run(tmp_path / "run", worker=worker, num_workers=2) as run:
            for step in range(n):
                values = {"same": np.full((8, 8), step + worker / 2)}
                if worker == 0:
                    values |= {"grows": np.full(step % 7 + 1, step), "alone": np.float32(step)}
                run.log(values, step=step, mode="TRAIN")
    seen: list[int] = []

    def needs(rule: Rule, step: int) -> None:
        for name in ("same", "grows", "alone"):
            rule.req_tensors.add(name, steps=range(max(step - 2, 0), step + 1))

    def look(rule: Rule, step: int) -> bool:
        for tensor in rule.req_tensors.get():
            for each in rule.req_tensors.get_tensor_steps(tensor.name):
                assert (tensor.value(each) == each).all()
                value = tensor.value(each)
                value[...] = -1  # the caller's own
        same = rule.base_trial.tensor("same")
        assert (same.value(step, worker="worker_1") == step + 0.5).all()
        seen.append(step)
        return False

    invoke_all(Each(create_trial(tmp_path / "run"), look, needs))
    assert seen == list(range(n))


def test_damage_of_a_later_step_is_met_there(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with tsf.create_run(tmp_path / "run", compression="none") as run:
        for step in range(4):
            run.log({"x": rng.random((300, 300))}, step=step)
            run.flush()
    (shard,) = (tmp_path / "run" / "shards").iterdir()
    data = bytearray(shard.read_bytes())
    data[len(data) * 5 // 8] ^= 1
    shard.write_bytes(data)
    seen: list[int] = []

    def look(rule: Rule, step: int) -> bool:
        rule.req_tensors.get()[0].value(step)
        seen.append(step)
        return False

    with pytest.raises(tsf.FormatError):
        invoke_rule(Each(create_trial(tmp_path / "run"), look, all_of_it))
    assert seen == [0, 1]


def test_a_rule_never_sees_what_comes_meanwhile(tmp_path: Path) -> None:
    seen: list[tuple[int, list[int], bool]] = []
    with tsf.create_run(tmp_path / "run") as run:
        run.log({"x": 0.0}, step=0)
        run.flush()
        trial = create_trial(tmp_path / "run")

        def look(rule: Rule, step: int) -> bool:
            run.log({"x": 1.0, "new": 1.0}, step=step + 1)
            run.flush()
            trial = rule.base_trial
            seen.append((step, trial.steps(), trial.has_tensor("new")))
            return False

        rule = Each(trial, look)
        for step in range(3):
            rule.invoke(step)
    assert seen == [(0, [0], False), (1, [0, 1], True), (2, [0, 1, 2], True)]


def test_two_trials(tmp_path: Path) -> None:
    """The other one is waited for, and its values are its own."""
    base = create_trial(write(tmp_path / "a", x=float))
    other_run = tsf.create_run(tmp_path / "b")
    other_run.log({"x": 0.0}, step=0)
    other_run.flush()
    other = create_trial(tmp_path / "b")

    def needs(rule: Rule, step: int) -> None:
        rule.req_tensors.add("x", steps=[step])
        rule.req_tensors.add("x", steps=[step], trial=rule.other_trials[0])  # type: ignore[index]

    def look(rule: Rule, step: int) -> bool:
        (mine,), (theirs,) = rule.req_tensors.get(), rule.req_tensors.get(other)
        return bool(mine.value(step) != theirs.value(step))

    def work() -> None:
        for step in range(2, 20, 2):
            time.sleep(0.02)
            other_run.log({"x": step if step < 14 else -1.0}, step=step)
            other_run.flush()
        other_run.close()

    thread = threading.Thread(target=work)
    thread.start()
    rule = Each(base, look, needs, other_trials=[other])
    with pytest.raises(RuleEvaluationConditionMet) as caught:
        invoke_rule(rule, raise_eval_cond=True)
    thread.join()
    assert caught.value.step == 14


def test_following_a_live_run(tmp_path: Path) -> None:
    run = tsf.create_run(tmp_path / "run")

    def work() -> None:
        for step in range(20):
            run.log({"loss": 1 / (step + 1) if step < 15 else float("nan")}, step=step)
            if step % 4 == 3:
                run.flush()
                time.sleep(0.05)
        run.close()

    thread = threading.Thread(target=work)
    thread.start()
    seen: list[int] = []

    def look(rule: Rule, step: int) -> bool:
        seen.append(step)
        return bool(np.isnan(rule.base_trial.tensor("loss").value(step)))

    fired: list[int] = []
    rule = Each(create_trial(tmp_path / "run"), look, actions=[lambda _r, step: fired.append(step)])
    invoke_all(rule)
    thread.join()
    assert seen == list(range(20))
    assert fired == [15, 16, 17, 18, 19]


def test_the_end_of_a_rule() -> None:
    def look(rule: Rule, step: int) -> bool:
        if step == 6:
            raise RuleEvaluationConditionMet(rule.rule_name, step, end_of_rule=True)
        return False

    rule = Each(create_trial(write("memory://rules/end", x=float)), look)
    invoke_rule(rule)
    assert rule.report["Datapoints"] == 4


def test_actions_of_sagemaker_are_said_to_be_left_out() -> None:
    trial = create_trial(write("memory://rules/actions", x=float))
    with pytest.warns(UserWarning, match="stoptraining"):
        rule = Each(trial, lambda *_: True, action_str='[{"name": "stoptraining"}]')
    with pytest.raises(RuleEvaluationConditionMet):
        rule.invoke(0)
