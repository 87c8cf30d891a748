"""Rules at work: what they read, live runs, many steps, the command line, actions."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import textwrap
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.rule_runs import counted, make_run, memory

import tensorstore_fmt as tsf
from tensorstore_fmt import rules
from tensorstore_fmt.cli import main
from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.testing.servers import S3Server
from tensorstore_fmt.testing.writers import create_test_run

RNG = np.random.default_rng(3)


# --- what is read ---------------------------------------------------


def test_statistics_rules_read_no_chunk() -> None:
    """A thousand series: one round of requests a block, and each page of the index once."""
    url = memory()
    weight = RNG.standard_normal((1000, 20, 20)).astype(np.float32)
    with create_test_run(url) as run:
        for step in range(20):
            run.log({f"gradient/{i}": weight[i] for i in range(1000)}, step=step, mode="TRAIN")
            if step % 8 == 7:
                run.flush()
    run, counting = counted(url)
    counting.reset()
    made = [rules.VanishingGradient(), rules.ExplodingTensor(), rules.AllZero()]
    with run:
        report = rules.evaluate(run, made, record=False)
    assert report.ok
    assert report.steps == {rule.name: 20 for rule in made}
    assert not [o for o in counting.requests if o.path.startswith("shards/")]
    ranges = [(o.path, o.start, o.stop) for o in counting.requests if o.op == "range"]
    assert len(ranges) == len(set(ranges))
    assert counting.rounds <= 4, counting.operations
    assert counting.nbytes < weight[0].nbytes * 1000  # of 20 steps: they take 20 times as much


def test_values_are_read_once_for_all_rules() -> None:
    url = memory()
    weight = RNG.standard_normal((6, 100, 100)).astype(np.float32)
    with create_test_run(url) as run:
        for step in range(6):
            run.log({"a.weight": weight[step]}, step=step)
    run, counting = counted(url)
    counting.reset()
    made = [
        rules.WeightUpdateRatio(),
        rules.WeightUpdateRatio(large=5),
        rules.CheckInput(names="w"),
    ]
    with run:
        assert rules.evaluate(run, made, record=False).ok
    chunks = [(o.path, o.start, o.stop) for o in counting.requests if "shards/" in o.path]
    assert len(chunks) == len(set(chunks))
    assert sum(stop - start for _, start, stop in chunks) <= weight.nbytes


@pytest.mark.parametrize(
    "rule",
    [
        rules.UnchangedTensor(),
        rules.DeadRelu(names="w"),
        rules.SaturatedActivation(tanh="w"),
        rules.SimilarAcrossRuns(names="w"),
    ],
    ids=lambda rule: rule.name,
)
def test_values_that_statistics_settle_are_not_read(rule: rules.Rule) -> None:
    def make() -> str:
        noise = np.random.default_rng(uuid.uuid4().int)
        return make_run(range(5), w=lambda s: noise.random((40, 50), np.float32))

    run, counting = counted(make())
    with run, tsf.open_run(make()) as other:
        assert rules.evaluate(run, [rule], others=[other], record=False).ok
    assert not [o for o in counting.requests if o.path.startswith("shards/")]


def test_frozen_weights_are_hardly_read() -> None:
    """The index shows that steps share their bytes: of one chunk, and of several.

    Threads that encode the first two steps at once may store a chunk twice, and then it is read.
    """
    small, large = RNG.random((50, 50), np.float32), RNG.random((400, 500), np.float32)
    url = memory()
    with create_test_run(url) as run:
        for step in range(8):
            run.log({"small": small, "large": large, "free": small + step}, step=step)
    run, counting = counted(url)
    with run:
        findings = rules.evaluate(run, [rules.UnchangedTensor()], record=False).findings
    assert {(f.series, f.step) for f in findings} == {("small", 2), ("large", 2)}
    chunks = [o for o in counting.requests if o.path.startswith("shards/")]
    assert sum(o.stop - o.start for o in chunks) <= 2 * (small.nbytes + large.nbytes)


def test_many_steps_are_read_in_few_rounds() -> None:
    n = 100_000
    url = memory()
    losses = 1 + 0.5 * RNG.random(n)
    losses[77_777] = np.nan
    with create_test_run(url) as run:
        for step, loss in enumerate(losses.tolist()):
            run.log({"loss": loss}, step=step, mode="TRAIN")
    run, counting = counted(url)
    counting.reset()
    made = [rules.ExplodingTensor(), rules.LossNotDecreasing(num_steps=20_000, increase=1.0)]
    with run:
        report = rules.evaluate(run, made, record=False)
    assert [f.step for f in report.of("exploding_tensor")] == [77_777]
    assert report.steps == {"exploding_tensor": n, "loss_not_decreasing": n}
    assert counting.rounds <= 6, counting.operations


# --- live runs ---------------------------------------------------


def test_steps_come_once_and_when_they_are_complete() -> None:
    url = memory()
    seen: list[int] = []

    class Seeing(rules.Rule):
        def needs(self) -> Any:
            return [rules.Needs(names="loss")]

        def invoke_at_step(self, step: int, view: rules.View) -> None:
            seen.append(step)
            assert view.stats("loss")["mean"] == step

    with create_test_run(url) as writer:
        writer.log({"loss": 0.0}, step=0)
        writer.flush()
        with tsf.open_run(url) as run, rules.Runner(run, [Seeing()], on_error="raise") as runner:
            runner.evaluate_new()
            assert seen == []  # somebody may still add to step 0
            for step in range(1, 6):
                writer.log({"loss": float(step)}, step=step)
                writer.flush()
                runner.evaluate_new()  # not refreshed: nothing is new
                assert seen == list(range(step - 1))
                run.refresh()
                runner.evaluate_new()
                runner.evaluate_new()
                assert seen == list(range(step))
            writer.close()
            run.refresh()
            runner.evaluate_new()
            assert seen == list(range(6))


WRITER = """
import sys, time
import tensorstore_fmt as tsf
with tsf.create_run(sys.argv[1], flush_interval_s=0.05) as run:
    for step in range(60):
        run.log({"loss": float("nan") if step == 40 else 1.0}, step=step, mode="TRAIN")
        time.sleep(0.01)
"""


def test_a_run_is_watched_while_another_process_writes_it(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    process = subprocess.Popen([sys.executable, "-c", WRITER, url])
    try:
        while not (tmp_path / "run" / "run.json").exists() or not list(
            (tmp_path / "run" / "index").glob("*.seg")
        ):
            assert process.poll() is None
        found: list[rules.Finding] = []
        with tsf.open_run(url) as run:
            with rules.Runner(run, [rules.ExplodingTensor()], found=found.append) as runner:
                runner.follow(timeout_s=60)
            assert [f.step for f in found] == [40]
            assert runner.report.steps["exploding_tensor"] == 60
            assert [f.step for f in rules.alerts(run)] == [40]
            looked = rules.evaluations(run)
            assert sum(each.steps for each in looked) == 60
            assert [e.first for e in looked[1:]] == [e.last + 1 for e in looked[:-1]]
    finally:
        assert process.wait(60) == 0


def test_rules_inside_the_training_process(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    seen = threading.Event()
    writer = tsf.create_run(url, flush_interval_s=0.02)
    act = rules.Callback(lambda finding: seen.set())
    with rules.run_inside(writer, [rules.ExplodingTensor()], actions=[act]) as inside, writer:
        step = 0
        while not seen.is_set():  # the training learns of it while it goes on
            writer.log({"loss": float("inf") if step == 3 else 1.0}, step=step)
            step += 1
            assert step < 1_000_000
    assert [f.step for f in inside.report.findings] == [3]
    assert inside.report.steps["exploding_tensor"] == step
    with tsf.open_run(url) as run:
        assert len(rules.alerts(run)) == 1


def test_rules_inside_are_on_worker_0_only(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    with (
        tsf.create_run(url, worker=0, num_workers=2),
        tsf.create_run(url, worker=1, num_workers=2) as writer,
        rules.run_inside(writer, [rules.ExplodingTensor()]) as inside,
    ):
        writer.log({"w": np.nan}, step=0)
    assert inside.report.ok
    assert not (tmp_path / "run" / "rules").exists()


def test_on_an_object_store(s3: S3Server) -> None:
    url = s3.url(f"rules/{uuid.uuid4()}")
    options = s3.storage_options
    with create_test_run(url, storage_options=options) as run:
        for step in range(5):
            run.log({"w": np.nan if step == 3 else 1.0}, step=step)
    report = rules.evaluate(url, [rules.ExplodingTensor()], storage_options=options)
    assert [f.step for f in report.findings] == [3]
    with tsf.open_run(url, storage_options=options) as run:
        assert [f.step for f in rules.alerts(run)] == [3]
        assert run.names() == ["w"]
    path = rules.request_stop(url, "enough", storage_options=options)
    assert path.startswith("stop/000000-")


# --- actions ---------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """Keeps what is posted; answers 500 to ``/broken`` and nothing to ``/slow``."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[Any] = []
        self.release = threading.Event()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/slow":
            self.server.release.wait(30)
        elif self.path == "/ok":
            self.server.bodies.append((self.headers["Content-Type"], json.loads(body)))
        self.send_response(500 if self.path == "/broken" else 204)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.release.set()
        server.shutdown()
        thread.join()


def bad_run(n: int = 3) -> str:
    return make_run(range(2 * n), w=lambda s: np.nan if s % 2 else 1.0)


def test_a_webhook_is_posted_as_json(server: Server) -> None:
    hook = rules.Webhook(server.url("ok"), headers={"X-Key": "secret"})
    url = bad_run()
    rules.evaluate(url, [rules.ExplodingTensor()], actions=[hook], record=False)
    assert (hook.delivered, hook.failures) == (3, 0)
    kind, body = server.bodies[0]
    assert kind == "application/json"
    with tsf.open_run(url) as run:
        assert body["run_id"] == run.run_id
    assert (body["rule"], body["step"], body["series"]) == ("exploding_tensor", 1, "w")
    assert [body["step"] for _, body in server.bodies] == [1, 3, 5]


@pytest.mark.parametrize("path", ["broken", "slow"])
def test_a_webhook_that_fails_stops_nobody(
    server: Server, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    hook = rules.Webhook(server.url(path), timeout_s=0.1)
    report = rules.evaluate(bad_run(), [rules.ExplodingTensor()], actions=[hook], record=False)
    assert len(report.findings) == 3
    assert hook.delivered == 0
    assert hook.failures >= 1
    assert "webhook" in caplog.text


def test_a_webhook_is_no_file() -> None:
    for url in ("file:///etc/passwd", "ftp://x/y", "x"):
        with pytest.raises(ArgumentError):
            rules.Webhook(url)


def test_a_log_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "alerts.jsonl"
    for _ in range(2):
        log = rules.AlertLog(path)
        rules.evaluate(bad_run(), [rules.ExplodingTensor()], actions=[log], record=False)
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [row["step"] for row in rows] == [1, 3, 5] * 2
    assert {row["series"] for row in rows} == {"w"}


def test_actions_that_fail_do_not_stop_the_rules(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(finding: rules.Finding) -> None:
        raise KeyError("mine")

    actions = [rules.Callback(fail), rules.AlertLog(tmp_path / "no" / "such.jsonl")]
    with tsf.open_run(bad_run()) as run:
        runner = rules.Runner(run, [rules.ExplodingTensor()], actions=actions, record=False)
        with runner:
            assert runner.evaluate_new() == 3
        assert runner.action_failures == {"Callback": 3, "AlertLog": 3}
    assert "mine" in caplog.text


def test_nobody_asks_a_closed_run_to_stop(tmp_path: Path) -> None:
    url = make_run(url=str(tmp_path / "run"), w=lambda s: np.nan)
    stop = rules.StopTraining()
    rules.evaluate(url, [rules.ExplodingTensor()], actions=[stop])
    assert not stop.requested
    assert not (tmp_path / "run" / "stop").exists()


# --- the command line ---------------------------------------------------


def test_watch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = make_run(url=str(tmp_path / "run"), w=lambda s: np.nan if s > 3 else 1.0)
    log = tmp_path / "log.jsonl"
    code = main(["watch", url, "--rule", "exploding_tensor", "--log", str(log)])
    out, err = capsys.readouterr()
    assert code == 1
    assert out == "step 4 [TRAIN] exploding_tensor: w: NaN or infinite elements: 1\n"
    assert "20 steps, 1 found" in err
    assert json.loads(log.read_text("utf-8"))["step"] == 4
    assert main(["watch", url, "--rule", "all_zero", "--once", "--no-record"]) == 0
    capsys.readouterr()
    assert main(["watch", url, "--alerts"]) == 1
    assert capsys.readouterr().out == out
    assert main(["watch", url, "--alerts", "--json"]) == 1
    (alert,) = json.loads(capsys.readouterr().out)["alerts"]
    assert (alert["step"], alert["value"], alert["worker"]) == (4, 1.0, 0)
    assert main(["info", url, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["companions"], facts["alerts"]) == (1, 1)
    assert main(["info", url]) == 0
    assert "alerts" in capsys.readouterr().out


def test_watch_as_json_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = make_run(url=str(tmp_path / "run"), w=lambda s: np.inf if s > 3 else 1.0)
    other = make_run(w=lambda s: np.inf)
    words = ["watch", url, "--json", "--once", "--rule", "exploding_tensor:repeat=yes"]
    assert main([*words, "--rule", "similar_across_runs:names=^w$", "--other", other]) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["alert"]["step"] for row in rows[:-1]] == [*range(4, 20), 4]
    summary = {row["rule"]: row for row in rows[-1]["summary"]}
    assert summary["exploding_tensor"]["found"] == 16
    assert summary["exploding_tensor"]["parameters"]["repeat"] is True


def test_watch_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = make_run(url=str(tmp_path / "run"), w=float)
    for words in (
        [url],
        [],
        [url, "--rule", "explode"],
        [url, "--rule", "overfit:patience=many"],
        [url, "--rule", "all_zero", "--webhook", "file:///x"],
    ):
        assert main(["watch", *words]) == 2, words
    assert main(["watch", str(tmp_path / "nothing"), "--rule", "all_zero"]) == 1
    capsys.readouterr()
    assert main(["watch", url, "--rule", "all_zero", "--json", "--rule", "x"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "unknown_rule"


def test_watch_lists_the_rules(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", "--list"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in rules.BUILT_IN)
    assert main(["watch", "--list", "--json"]) == 0
    rows = {row["rule"]: row for row in json.loads(capsys.readouterr().out)["rules"]}
    assert rows["overfit"]["parameters"]["patience"] == {"type": "int", "default": 1}


def test_a_rule_of_the_users_own_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_rules.py").write_text(
        textwrap.dedent("""
            from tensorstore_fmt.rules import Needs, Rule
            class Own(Rule):
                limit: int = 3
                def needs(self):
                    return [Needs(names="w")]
                def invoke_at_step(self, step, view):
                    return 1 / (self.limit - step) < 0
        """)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    url = make_run(w=float)
    assert main(["watch", url, "--once", "--rule", "own_rules:Own:limit=4"]) == 1
    assert "own: 20 steps, 0 found, FAILED: ZeroDivisionError" in capsys.readouterr().err
    assert main(["watch", url, "--once", "--rule", "own_rules:Own:limit=100"]) == 0


def test_watch_ends_after_its_time(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    with tsf.create_run(url) as run:
        run.log({"w": 1.0}, step=0)
        assert main(["watch", url, "--rule", "all_zero", "--timeout", "0.2"]) == 0
