"""Values that rules seldom meet: empty, of other shapes, half there; and ends that come early."""

from __future__ import annotations

import http.server
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.rule_runs import counted, make_run, memory

import tensorstore_fmt as tsf
from tensorstore_fmt import rules
from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.rules import actions
from tensorstore_fmt.testing.writers import create_test_run


def found(url: str, rule: rules.Rule) -> list[tuple[str, int]]:
    report = rules.evaluate(url, [rule], record=False)
    assert report.failures == {}
    return [(f.series, f.step) for f in report.findings]


# --- shapes ---------------------------------------------------
def test_units_of_vectors_and_of_nothing() -> None:
    """Of a vector each element is a unit; nothing has no units."""
    vector = np.arange(100.0) - 89  # ten are above 0
    url = make_run(
        range(2), relu=lambda step: None, a__relu__output=lambda step: np.maximum(vector, 0),
        b__relu__output=lambda step: np.empty((0, 4)), c__relu__output=lambda step: vector + 90,
    )  # fmt: skip
    assert found(url, rules.DeadRelu()) == [("a/relu/output", 0)]
    assert found(url, rules.DeadRelu(layer=0.91)) == []


def test_inputs_that_have_no_samples_or_other_channels() -> None:
    """Sums begin anew where the number of channels is another one."""
    url = make_run(
        range(4), scalar=lambda step: 5.0, empty=lambda step: np.empty((0, 3)),
        images=lambda step: np.full((300, 3 if step < 2 else 1, 2, 2), float(step == 1)),
    )  # fmt: skip
    assert found(url, rules.CheckInput(names="scalar|empty")) == []
    assert found(url, rules.CheckInput(names="images")) == [("images", 1)]
    assert found(url, rules.CheckInput(names="images", threshold=0.6)) == []


def test_the_same_elements_in_another_shape_have_changed() -> None:
    """The index alone cannot tell, as their statistics are the same."""
    value = np.arange(400.0, dtype=np.float32)
    url = make_run(range(6), w=lambda step: value.reshape((20, 20) if step % 2 else 400))
    assert found(url, rules.UnchangedTensor()) == []
    same = make_run(range(6), w=lambda step: value[: 400 if step else 300])
    assert found(same, rules.UnchangedTensor()) == [("w", 3)]


def test_weights_of_which_only_statistics_are_there() -> None:
    """Nobody knows their fan-in; whether they stay is seen from the statistics."""
    rng = np.random.default_rng(0)
    weights = {"a.weight": rng.standard_normal((30, 30)), "b.weight": np.ones((30, 30))}
    url = memory()
    with create_test_run(url) as run:
        for name in weights:
            run.set_stats(name, "only")
        for step in range(4):
            run.log(weights, step=step, mode="TRAIN")
    assert found(url, rules.PoorInitialisation()) == []
    assert found(url, rules.UnchangedTensor()) == [("a.weight", 2), ("b.weight", 2)]


def test_parts_that_stay_as_they_are() -> None:
    """Of what several workers hold, the index does not show whether it is the same."""
    whole = np.random.default_rng(0).standard_normal((40, 50))
    url = memory()
    writers = [create_test_run(url, worker=worker, num_workers=2) for worker in (0, 1)]
    for step in range(5):
        for worker, writer in enumerate(writers):
            mine = whole[20 * worker : 20 * worker + 20] + (0 if step else 1)
            part = tsf.Part(value=mine, global_shape=(40, 50), origin=(20 * worker, 0))
            writer.log({"w": part}, step=step)
    for writer in writers:
        writer.close()
    report = rules.evaluate(url, [rules.UnchangedTensor()], record=False)
    assert [(f.series, f.step, f.worker) for f in report.findings] == [("w", 3, None)]


def test_predictions_without_labels() -> None:
    """Those of a mode belong to the labels of this mode."""
    wrong = np.eye(4)[np.zeros(600, int)]
    url = make_run(
        range(3), logits=lambda step: wrong, EVAL_logits=lambda step: wrong,
        labels=lambda step: np.arange(600) % 4,
    )  # fmt: skip
    report = rules.evaluate(url, [rules.Confusion()], record=False)
    assert report.failures == {}
    assert {f.mode for f in report.findings} == {"TRAIN"}


def test_nothing_begins_where_nothing_is() -> None:
    rule = rules.AllZero()
    assert rule.begins("key", np.empty(0, np.bool_)).size == 0
    assert rule.begins("key", np.ones(1, np.bool_)).tolist() == [0]


# --- time -------------------------------------------------------
def test_a_stall_is_reported_once_although_it_ends() -> None:
    """First by the clock, while it lasts; then the next step shows it again."""
    rule = rules.StalledTraining()
    url = memory()
    with create_test_run(url) as writer:
        for step, seconds in enumerate((0, 1, 5000)):
            writer.stamp(step, "TRAIN", mode_step=step, wall_time_us=1_000_000 * seconds)
            writer.log({"x": 1.0}, step=step, mode="TRAIN")
            writer.flush()
            if step < 2:
                continue
            with tsf.open_run(url) as run, rules.Runner(run, [rule], record=False) as runner:
                runner.evaluate_new()  # steps 0 and 1
                assert [f.step for f in rule.invoke_when_quiet(4000.0)] == [1]
                writer.close()
                run.refresh()
                runner.evaluate_new()
                assert runner.report.steps["stalled_training"] == 3
                assert runner.report.ok


def test_a_rule_that_failed_sees_no_other_block() -> None:
    class Failing(rules.Rule):
        def needs(self) -> Any:
            return [rules.Needs(names="x")]

        def invoke_at_step(self, step: int, view: rules.View) -> bool:
            raise ValueError("made to fail")

    url = memory()
    with create_test_run(url) as writer:
        writer.log({"x": 1.0}, step=0, mode="TRAIN")
        writer.log({"x": 1.0}, step=1, mode="EVAL")
    with tsf.open_run(url) as run:
        runner = rules.Runner(run, [Failing(), rules.AllZero()], record=False)
        with runner:
            runner.follow(poll_s=0.001)
        assert list(runner.report.failures) == ["failing"]
        assert runner.report.steps["failing"] == 1
        assert runner.report.steps["all_zero"] == 2


# --- places and ends ----------------------------------------------
def test_rules_and_requests_on_a_storage_in_another_one() -> None:
    """What is written beside a run goes to the storage inside of the double."""
    url = make_run(range(4), x=lambda step: np.nan if step == 2 else 1.0)
    run, _ = counted(url)
    with run:
        rules.evaluate(run, [rules.ExplodingTensor()])
        assert rules.request_stop(run, "enough").startswith("stop/")
        assert [f.step for f in rules.alerts(run)] == [2]


def test_companions_without_alerts() -> None:
    url = make_run(range(4), x=lambda step: 1.0)
    with tsf.open_run(url) as run:
        rules.evaluate(url, [rules.ExplodingTensor()])
        assert rules.alerts(run) == []
        assert [each.steps for each in rules.evaluations(run)] == [4]


def test_a_rule_that_fails_while_nothing_comes() -> None:
    """Its companion run tells of the failure, and of no step."""

    class Impatient(rules.Rule):
        def invoke_when_quiet(self, now: float) -> Any:
            raise ValueError("made to fail")

    url = memory()
    with create_test_run(url) as writer:
        writer.log({"x": 1.0}, step=0)
        writer.flush()
        with tsf.open_run(url) as run:
            with rules.Runner(run, [Impatient()]) as runner:
                runner.look_at_clock()
                runner.look_at_clock()  # not within a second
            assert str(runner.report.failures["impatient"]) == "made to fail"
            assert rules.evaluations(run) == []
            assert rules.alerts(run) == []


def test_a_run_that_nobody_has_begun_cannot_be_stopped(tmp_path: Path) -> None:
    tsf.create_run(tmp_path / "run").close()
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file() and path.name != "run.json":
            path.unlink()
    with pytest.raises(ArgumentError, match="attempt"):
        rules.request_stop(tmp_path / "run", "enough")


def test_a_store_that_goes_on_failing_is_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = make_run(range(1), url=str(tmp_path / "run"), w=float)
    (tmp_path / "run" / "stop").write_text("in the way")
    looks = 0
    with rules.StopWatcher(url, attempt=0, poll_s=0.002) as watcher:
        look = watcher._look

        def counted_look() -> None:
            nonlocal looks
            looks += 1
            look()

        watcher._look = counted_look  # type: ignore[method-assign]
        while looks < 5:
            assert not watcher.should_stop(0)
    assert caplog.text.count("cannot look for requests") == 1


def test_a_webhook_that_is_too_slow_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    class Slow(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            release.wait(60)

        def log_message(self, *args: Any) -> None:
            pass

    monkeypatch.setattr(actions, "_WAITING", 1)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            hook = rules.Webhook(f"http://127.0.0.1:{server.server_address[1]}/", timeout_s=0.2)
            hook.close()  # nothing was to be sent
            url = make_run(range(20), x=lambda step: np.nan)
            rule = rules.ExplodingTensor(repeat=True)
            report = rules.evaluate(url, [rule], actions=[hook], record=False)
            assert len(report.findings) == 20
            assert hook.delivered == 0
            assert hook.failures >= 18
        finally:
            release.set()
            server.shutdown()
            thread.join()
