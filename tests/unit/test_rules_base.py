"""Rules as such: parameters, registry, what a rule sees, what becomes of a failure."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from support.rule_runs import make_run, memory

import tensorstore_fmt as tsf
from tensorstore_fmt import rules
from tensorstore_fmt.errors import ArgumentError, NotThereError, StepNotFoundError
from tensorstore_fmt.rules import (
    Finding,
    Needs,
    Rule,
    Series,
    View,
    block,
    find_rule,
    make_rule,
)
from tensorstore_fmt.rules.rule import Outcome
from tensorstore_fmt.testing.servers import serve_http
from tensorstore_fmt.testing.writers import create_test_run


class Large(Rule):
    """Fires where the largest element is above a limit."""

    names: str = rules.parameter(".", is_pattern=True)
    limit: float = rules.parameter(least=0)
    count: int = 1
    words: tuple[str, ...] = ()
    mode: str | None = rules.parameter(None, choices=("TRAIN", "EVAL"))

    def needs(self) -> Sequence[Needs]:
        return [Needs(names=self.names, mode=self.mode)]

    def invoke_at_step(self, step: int, view: View) -> Outcome:
        return any(view.stats(series)["max"] > self.limit for series in view.series())


class Looking(Rule):
    """Calls a function with the view."""

    names: str = "."
    values: bool = False

    def __init__(self, look: Any, **values: Any) -> None:
        super().__init__(**values)
        self.look = look

    def needs(self) -> Sequence[Needs]:
        return [Needs(names=self.names, values=self.values, index=np.s_[0] if self.values else ())]

    def invoke_at_step(self, step: int, view: View) -> Outcome:
        assert step == view.step
        return self.look(view)


# --- parameters ------------------------------------------------------------------------


def test_parameters_are_typed() -> None:
    rule = Large(limit=3, words=["a", "b"])
    assert (rule.limit, rule.count, rule.words, rule.mode) == (3.0, 1, ("a", "b"), None)
    assert isinstance(rule.limit, float)
    assert repr(rule) == "Large(limit=3.0, words=('a', 'b'))"
    assert rule.name == "large"
    assert rules.LossNotDecreasing.name == "loss_not_decreasing"


@pytest.mark.parametrize(
    ("values", "parameter"),
    [
        ({}, "limit"),
        ({"limit": 1.0, "limt": 2}, "limt"),
        ({"limit": "1"}, "limit"),
        ({"limit": True}, "limit"),
        ({"limit": -1.0}, "limit"),
        ({"limit": float("nan")}, "limit"),
        ({"limit": 1.0, "count": 1.5}, "count"),
        ({"limit": 1.0, "count": True}, "count"),
        ({"limit": 1.0, "count": None}, "count"),
        ({"limit": 1.0, "words": "ab"}, "words"),
        ({"limit": 1.0, "words": (1,)}, "words"),
        ({"limit": 1.0, "names": "("}, "names"),
        ({"limit": 1.0, "mode": "train"}, "mode"),
        ({"limit": 1.0, "repeat": 1}, "repeat"),
    ],
)
def test_wrong_parameters_are_named(values: dict[str, Any], parameter: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        Large(**values)
    assert caught.value.code == "rule_parameter"
    assert caught.value.facts["parameter"] == parameter
    assert caught.value.facts["rule"] == "large"


def test_parameters_of_no_known_type_are_refused() -> None:
    with pytest.raises(TypeError, match="ClassVar"):

        class Odd(Rule):
            table: dict[str, int] = {}  # noqa: RUF012 - what is refused

    class Fine(Rule):
        table: ClassVar[dict[str, int]] = {}

    assert list(Fine.parameters) == ["repeat"]


def test_built_in_rules_want_what_makes_sense() -> None:
    for make in (
        rules.TensorVariance,
        lambda: rules.NlpSequenceRatio(tokens=("x",)),
        lambda: rules.UnchangedTensor(num_steps=1),
        lambda: rules.DeadRelu(layer=1.5),
    ):
        with pytest.raises(ArgumentError) as caught:
            make()
        assert caught.value.code == "rule_parameter"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("exploding_tensor", {}),
        ("exploding_tensor:only_nan=yes", {"only_nan": True}),
        ("overfit:ratio=0.5,patience=3", {"ratio": 0.5, "patience": 3}),
        (
            "exploding_tensor:names=^(a|b){1,2}:x$,repeat=true",
            {"names": "^(a|b){1,2}:x$", "repeat": True},
        ),
        ("nlp_sequence_ratio:tokens=1|7", {"tokens": ("1", "7")}),
        ("accuracy_drop:mode=none", {"mode": None}),
        ("tensor_variance:most=4,least=none", {"most": 4.0, "least": None}),
        ("tensorstore_fmt.rules:Overfit:ratio=2", {"ratio": 2.0}),
    ],
)
def test_rules_from_texts(text: str, expected: dict[str, Any]) -> None:
    rule = make_rule(text)
    for name, value in expected.items():
        assert getattr(rule, name) == value


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("vanishing", "unknown_rule"),
        ("", "unknown_rule"),
        ("no.such.module:Rule", "unknown_rule"),
        ("tensorstore_fmt.rules:Nothing", "unknown_rule"),
        ("tensorstore_fmt.rules:Finding", "unknown_rule"),
        ("overfit:ratio", "rule_parameter"),
        ("overfit:ration=1", "rule_parameter"),
        ("overfit:ratio=much", "rule_parameter"),
        ("exploding_tensor:only_nan=perhaps", "rule_parameter"),
    ],
)
def test_texts_that_are_no_rule(text: str, code: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        make_rule(text)
    assert caught.value.code == code


def test_rules_of_other_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is installed names its rules by an entry point."""
    place = tmp_path / "their_rules-1.dist-info"
    place.mkdir()
    (place / "METADATA").write_text("Metadata-Version: 2.1\nName: their-rules\nVersion: 1\n")
    (place / "entry_points.txt").write_text(
        "[tensorstore_fmt.rules]\nlarge = their_rules:Large\nwrong = their_rules:nothing\n"
    )
    module = types.ModuleType("their_rules")
    module.Large = Large  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "their_rules", module)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_rule("large") is Large
    assert "large" in rules.rule_names()
    with pytest.raises(ArgumentError):
        find_rule("wrong")


# --- what a rule sees ----------------------------------------------------------------------


def test_a_rule_never_sees_later_steps() -> None:
    """Neither by statistics nor by values, although the run has them."""
    url = make_run(range(0, 20, 2), w=lambda s: np.full((3, 4), s, "f4"), loss=float)
    seen = []

    def look(view: View) -> bool:
        seen.append(view.step)
        assert view.stats("w")["max"] == view.step
        assert view.steps("w").tolist() == list(range(0, view.step + 1, 2))
        history = view.history("w")
        assert history["max"].tolist() == history.step.tolist() == view.steps("w").tolist()
        assert view.read("w").tolist() == [view.step] * 4
        assert view.read("w", step=0, index=np.s_[1, 2]) == 0
        with pytest.raises(ArgumentError) as caught:
            view.read("w", step=view.step + 2)
        assert caught.value.code == "later_step"
        return view.step == 6

    (found,) = rules.evaluate(url, [Looking(look, values=True)], record=False).findings
    assert (found.step, found.mode, found.rule) == (6, "TRAIN", "looking")
    assert seen == list(range(0, 20, 2))


def test_what_is_not_there_for_a_rule() -> None:
    url = make_run(w=float, v=lambda s: 1.0 if s % 2 else None)

    def look(view: View) -> bool:
        assert [s.name for s in view.series()] == (["v", "w"] if view.step % 2 else ["w"])
        assert [s.name for s in view.series("^v")] == (["v"] if view.step % 2 else [])
        with pytest.raises(NotThereError):
            view.stats("x")
        if view.step % 2 == 0:
            with pytest.raises(NotThereError):
                view.stats("v")
            with pytest.raises(StepNotFoundError):
                view.read("v")
        return False

    report = rules.evaluate(url, [Looking(look)], record=False)
    assert report.steps["looking"] == 20


def test_each_mode_is_looked_at_by_itself() -> None:
    url = make_run(range(6), loss=float, EVAL_loss=lambda s: -1.0 if s % 3 == 0 else None)
    seen: list[tuple[int, str]] = []

    def look(view: View) -> None:
        seen.append((view.step, view.mode))
        value = view.stats(Series("loss", view.mode))["mean"]
        assert value == (-1.0 if view.mode == "EVAL" else view.step)

    rules.evaluate(url, [Looking(look)], record=False)
    assert sorted(seen) == sorted([(s, "TRAIN") for s in range(6)] + [(0, "EVAL"), (3, "EVAL")])


def test_a_rule_that_joins_modes_gets_them_in_order() -> None:
    class Joined(Looking):
        joins_modes: ClassVar[bool] = True

    url = make_run(range(6), loss=float, EVAL_loss=lambda s: -1.0 if s % 3 == 0 else None)
    seen: list[tuple[int, str]] = []
    rules.evaluate(url, [Joined(lambda view: seen.append((view.step, view.mode)))], record=False)
    assert seen == [
        (0, "TRAIN"), (0, "EVAL"), (1, "TRAIN"), (2, "TRAIN"), (3, "TRAIN"), (3, "EVAL"),
        (4, "TRAIN"), (5, "TRAIN"),
    ]  # fmt: skip


def test_values_without_statistics_and_texts() -> None:
    url = memory()
    noise = np.random.default_rng(0).random((64, 64), np.float32)
    with create_test_run(url, stats=False) as run:
        for step in range(3):
            run.log({"big": noise + np.float32(step), "words": [str(step), "x"]}, step=step)
    seen = []

    def look(view: View) -> None:
        seen.append((int(view.read("big").min()), view.read("words")))
        with pytest.raises(NotThereError):
            view.stats("big")

    rules.evaluate(url, [Looking(look, values=True)], record=False)
    assert seen == [(0, "0"), (1, "1"), (2, "2")]


def test_workers_are_told_apart_and_parts_are_put_together() -> None:
    url = memory()
    writers = [
        create_test_run(url, worker=w, num_workers=2, new_id=iter(range(10 * w + 1, 99)).__next__)
        for w in (0, 1)
    ]
    for step in range(4):
        for w, run in enumerate(writers):
            part = tsf.Part(
                value=np.full((2, 50), step + w, "f4"), global_shape=(4, 50), origin=(2 * w, 0)
            )
            run.log({"whole": part, "own": np.full(99, 10 * w, "f4")}, step=step)
    for run in writers:
        run.close()
    seen: dict[tuple[str, int | None], float] = {}

    def look(view: View) -> None:
        for series in view.series():
            seen[series.name, series.worker] = view.stats(series)["max"]
            assert np.max(view.read(series)) == seen[series.name, series.worker]

    rules.evaluate(url, [Looking(look, names="whole|own")], record=False)
    assert seen == {("whole", None): 4.0, ("own", 0): 0.0, ("own", 1): 10.0}
    found = rules.evaluate(url, [rules.ExplodingTensor(), rules.AllZero()], record=False).findings
    assert {(f.series, f.worker) for f in found} == {("own", 0)}


def test_outcomes() -> None:
    url = make_run(range(3), w=float)
    one = Finding(rule="looking", step=1, message="here")
    for outcome, n in (
        (None, 0), (False, 0), (True, 3), (np.bool_(True), 3), (one, 3), ([], 0), ([one, one], 6),
    ):  # fmt: skip
        report = rules.evaluate(url, [Looking(lambda _, o=outcome: o)], record=False)
        assert report.found["looking"] == n == len(report.findings)


# --- what becomes of failures ------------------------------------------------------------------


def test_a_rule_that_fails_ends_alone(caplog: pytest.LogCaptureFixture) -> None:
    url = make_run(range(5), w=lambda s: np.nan if s == 4 else 1.0)

    def look(view: View) -> bool:
        if view.step == 2:
            raise ZeroDivisionError("mine")
        return True

    both = [Looking(look), rules.ExplodingTensor()]
    report = rules.evaluate(url, both, on_error="warn")
    assert isinstance(report.failures["looking"], ZeroDivisionError)
    assert report.found == {"looking": 2, "exploding_tensor": 1}
    assert not report.ok
    assert "looking" in caplog.text
    with tsf.open_run(url) as run:
        (companion,) = rules.companions(run)
        assert "ZeroDivisionError: mine" in [
            each["failure/looking"].read(step=0) for each in rules.companions(run)
        ]
        assert companion is not None
    with pytest.raises(ZeroDivisionError):
        rules.evaluate(url, [Looking(look)], record=False)


def test_wrong_arguments_of_runners() -> None:
    url = make_run(range(2), w=float)
    for wrong in ([], [rules.Overfit]):
        with pytest.raises(ArgumentError):
            rules.evaluate(url, wrong)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError):
        rules.evaluate(url, [rules.Overfit()], on_error="ignore")
    with pytest.raises(ArgumentError):
        Needs(names="(")
    with pytest.raises(ArgumentError):
        Needs(names="x", mode="NIGHT")


def test_a_rule_without_code_says_so() -> None:
    class Empty(Rule):
        pass

    with pytest.raises(NotImplementedError):
        rules.evaluate(make_run(range(2), w=float), [Empty()], record=False)


def test_alerts_are_bounded() -> None:
    url = make_run(range(50), w=lambda s: np.nan)
    with (
        tsf.open_run(url) as run,
        rules.Runner(run, [rules.ExplodingTensor(repeat=True)], most_alerts=7) as runner,
    ):
        assert runner.evaluate_new() == 50
        assert runner.evaluate_new() == 0
        assert len(runner.report.findings) == 7
    with tsf.open_run(url) as run:
        assert [f.step for f in rules.alerts(run)] == list(range(7))
        (evaluation,) = rules.evaluations(run)
        assert (evaluation.first, evaluation.last, evaluation.steps, evaluation.findings) == (
            0, 49, 50, 50,
        )  # fmt: skip


# --- companion runs ------------------------------------------------------------------------------


def test_what_was_found_stays_in_the_run(tmp_path: Path) -> None:
    url = make_run(
        url=str(tmp_path / "run"), gradient__ä=lambda s: 0.0 if s > 3 else 1.0, loss=lambda s: 1.0
    )
    before = sorted(p.name for p in (tmp_path / "run").iterdir())
    checked = str(tsf.verify(url))
    found = rules.evaluate(url, [rules.VanishingGradient(), rules.AllZero()]).findings
    assert len(found) == 2
    rules.evaluate(url, [rules.VanishingGradient()])  # somebody else looks, too
    with tsf.open_run(url) as run:
        assert run.names() == ["gradient/ä", "loss"]
        assert run.is_closed
        assert sorted(map(repr, rules.alerts(run))) == sorted(map(repr, found))
        assert len(list(rules.companions(run))) == 2
        for companion in rules.companions(run):
            assert companion.is_closed
            assert companion.attrs["companion_of"] == run.run_id
        names = {each.rule for each in rules.evaluations(run)}
        assert names == {"vanishing_gradient", "all_zero"}
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == sorted([*before, "rules"])
    assert str(tsf.verify(url)) == checked
    assert tsf.verify(url).ok
    tsf.compact(url)
    tsf.recover(url)
    with tsf.open_run(url) as run:
        assert len(rules.alerts(run)) == 2


def test_what_a_stranger_puts_beside_a_run_is_only_data(tmp_path: Path) -> None:
    place = tmp_path / "run"
    url = make_run(url=str(place), w=lambda s: np.nan)
    rules.evaluate(url, [rules.ExplodingTensor()])
    (place / "rules" / "README.txt").write_text("nothing")
    (place / "rules" / "../../evil.json").resolve().write_text("{}")
    (place / "rules" / "0123456789abcdef.json").write_text("no JSON")  # announced, not there
    with tsf.open_run(url) as run:
        assert len(rules.alerts(run)) == 1


def test_a_later_attempt_is_evaluated_anew() -> None:
    url = make_run(range(10), w=lambda s: np.nan if s == 7 else 1.0)
    with tsf.open_run(url) as run, rules.Runner(run, [rules.ExplodingTensor()]) as runner:
        assert runner.evaluate_new() == 1
        with create_test_run(url, resume_from=6, new_id=iter(range(50, 99)).__next__) as writer:
            for step in range(6, 12):
                writer.log({"w": np.nan if step in (7, 9) else 1.0}, step=step, mode="TRAIN")
        run.refresh()
        assert runner.evaluate_new() == 2
        assert [f.step for f in runner.report.findings] == [7, 7, 9]
        assert runner.report.steps["exploding_tensor"] == 16


# --- limits ------------------------------------------------------------------------------------


def test_few_values_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many a rule asks for: they come in groups, and old ones are forgotten."""
    values = np.random.default_rng(0).random((9, 30, 30), np.float32)
    url = make_run(range(9), w=lambda s: values[s], words=lambda s: ["a" * 500, str(s)])
    monkeypatch.setattr(block, "MOST_VALUE_NBYTES", 2 * values[0].nbytes)

    class Reading(rules.Rule):
        def needs(self) -> Sequence[Needs]:
            return [Needs(names="w", values=True)]

        def invoke_on(self, part: rules.Block) -> list[Finding]:
            for series, steps in part.saved("^w$"):
                for times in range(2):
                    items = [(series, step, np.s_[times]) for step in steps.tolist()]
                    for step, value in zip(steps.tolist(), part.read(items), strict=True):
                        np.testing.assert_array_equal(value, values[step][times])
                for step, value in zip(
                    steps.tolist(),
                    part.read([(series, step, ()) for step in steps.tolist()]),
                    strict=True,
                ):
                    np.testing.assert_array_equal(value, values[step])
                    assert part._values_nbytes <= 2 * values[0].nbytes
            return []

    report = rules.evaluate(url, [Reading()], record=False)
    assert report.steps["reading"] == 9


def test_a_rule_reads_other_runs_up_to_its_step() -> None:
    first, second = (make_run(range(6), w=lambda s, n=n: np.full(3, s + n)) for n in (0, 10))
    shorter = make_run(range(2), w=lambda s: np.full(3, -1))

    def look(view: View) -> None:
        theirs, fewer = view.others("w")
        assert theirs.tolist() == [view.step + 10] * 3
        assert (fewer is None) == (view.step >= 2)

    report = rules.evaluate(first, [Looking(look)], others=[second, shorter], record=False)
    assert report.steps["looking"] == 6


def test_labels_that_do_not_fit() -> None:
    for labels, predictions in (
        (np.zeros(3, np.int64), np.zeros((4, 2), np.float32)),
        (np.array([-1, 0]), np.zeros(2, np.int64)),
        (np.array([10**6]), np.zeros(1, np.int64)),
    ):
        url = make_run(range(1), labels=lambda s, x=labels: x, logits=lambda s, x=predictions: x)
        with pytest.raises(ValueError, match=r"classes|labels"):
            rules.evaluate(url, [rules.Confusion()], record=False)


def test_a_run_that_cannot_be_written_to(tmp_path: Path) -> None:
    place = tmp_path / "run"
    url = make_run(range(2), url=str(place), w=float)
    (place / "rules").write_text("in the way")
    with pytest.raises(OSError, match="rules") as caught:
        rules.evaluate(url, [rules.AllZero()])
    assert "record=False" in caught.value.__notes__[0]
    assert rules.evaluate(url, [rules.AllZero(share=0.5)], record=False).found == {"all_zero": 1}


def test_a_failure_of_rules_inside_stays_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "run"
    with tsf.create_run(place) as run:
        (place / "rules").write_text("in the way")
        with rules.run_inside(run, [rules.AllZero()]) as inside:
            for step in range(3):
                run.log({"w": 1.0}, step=step)
        assert isinstance(inside.failure, OSError)
    assert "the rules ended" in caplog.text


def test_over_plain_http_there_are_no_alerts_to_list(tmp_path: Path) -> None:
    url = make_run(range(2), url=str(tmp_path / "run"), w=lambda s: np.nan)
    rules.evaluate(url, [rules.ExplodingTensor()])
    tsf.compact(url)
    with serve_http(tmp_path) as server, tsf.open_run(f"{server.url}/run") as run:
        assert rules.alerts(run) == []
        assert rules.evaluate(run, [rules.ExplodingTensor()], record=False).found
