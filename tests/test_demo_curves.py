"""Trainings side by side: processes, their watchers, and what is drawn from the runs alone."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from threadpoolctl import threadpool_limits  # scikit-learn needs it

import tensorstore_fmt as tsf
from tensorstore_fmt import rules
from tensorstore_fmt.cli import main
from tensorstore_fmt.demo.curves import LEARNING_RATES, conductor, run_demo
from tensorstore_fmt.demo.curves.comparison import comparison, rules_log
from tensorstore_fmt.demo.curves.observed import Curve, Observed, Reader
from tensorstore_fmt.demo.curves.page import page
from tensorstore_fmt.demo.curves.pictures import draw_curves, draw_statistics
from tensorstore_fmt.demo.curves.processes import Process, Processes
from tensorstore_fmt.demo.curves.training import train
from tensorstore_fmt.demo.curves.viewer import Viewer
from tensorstore_fmt.demo.digits.dataset import load_digits
from tensorstore_fmt.errors import ArgumentError, RunExistsError
from tensorstore_fmt.format import layout
from tensorstore_fmt.testing.writers import create_test_run

REPOSITORY = Path(__file__).parent.parent
STEPS = 150
NAMES = ("lr-0.02", "lr-0.2", "lr-2")


@dataclass
class Played:
    """What the whole demo left behind."""

    folder: Path
    pictures: Path
    document: dict[str, Any]

    def url(self, name: str) -> str:
        return str(self.folder / name)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Played:
    """The demo, short, as a program sees it: once for all tests."""
    here = tmp_path_factory.mktemp("curves")
    script = textwrap.dedent(f"""
        import sys
        from tensorstore_fmt.demo.curves import conductor
        conductor.SHORTEST_S = 8.0
        sys.exit(conductor.run_demo("runs", steps={STEPS}, as_json=True))
    """)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=here, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return Played(here / "runs", here / "runs-pictures", json.loads(done.stdout))


@pytest.fixture(scope="module")
def readers(played: Played) -> Iterator[list[Reader]]:
    """The three runs, opened."""
    readers = [Reader(played.url(name)) for name in NAMES]
    for reader in readers:
        assert reader.refresh()
    yield readers
    for reader in readers:
        reader.close()


def test_the_bad_one_is_stopped_and_the_others_are_not(played: Played) -> None:
    rows = {row["name"]: row for row in played.document["runs"]}
    assert tuple(rows) == NAMES
    assert [row["learning_rate"] for row in rows.values()] == list(LEARNING_RATES)
    for name in NAMES[:2]:
        assert (rows[name]["state"], rows[name]["steps"], rows[name]["alerts"]) == (
            "finished", STEPS, 0,
        )  # fmt: skip
        assert rows[name]["best_accuracy"][1] > 0.85
        with tsf.open_run(played.url(name)) as run:
            assert run.is_closed
            assert "stopped" not in run
            assert rules.alerts(run) == []
            looked = rules.evaluations(run)
        assert max(each.last for each in looked) == STEPS - 1
        assert sum(e.steps for e in looked if e.rule == "loss_not_decreasing") == STEPS

    bad = rows["lr-2"]
    assert bad["state"] == "stopped"
    assert bad["steps"] < STEPS
    with tsf.open_run(played.url("lr-2")) as run:
        assert run.is_closed
        found = rules.alerts(run)
        looked = rules.evaluations(run)
        steps = run.steps(mode="TRAIN")
        reason = run["stopped"].read(step=bad["steps"] - 1)
        loss = run["loss"].read(mode="TRAIN")
    (first,) = [alert for alert in found if str(alert) == reason]
    assert (bad["stopped_by"], bad["fired_at"]) == (first.rule, first.step)
    assert first.step < bad["steps"] == steps[-1] + 1
    assert sum(each.findings for each in looked) == len(found) == bad["alerts"]
    # It is true what the rule said: the means of ten losses and of the ten before.
    if first.rule == "loss_not_decreasing":
        end = first.step + 1
        before, after = loss[end - 20 : end - 10].mean(), loss[end - 10 : end].mean()
        assert math.isclose(first.value, (before - after) / before, rel_tol=1e-12)
        assert after > 5 * before
    requests = [json.loads(path.read_text()) for path in (played.folder / "lr-2/stop").iterdir()]
    assert [each["rule"] for each in requests if "rule" in each] == [first.rule]


def test_what_is_said_is_what_is_in_the_runs(played: Played, readers: list[Reader]) -> None:
    observed = [reader.look() for reader in readers]
    for each, row in zip(observed, played.document["runs"], strict=True):
        with tsf.open_run(played.url(each.name)) as run:
            loss = run["loss"].read(mode="TRAIN")
            accuracy = run["accuracy"].read(mode="EVAL")
            np.testing.assert_array_equal(each.loss.values, loss)
            np.testing.assert_array_equal(each.test_accuracy.values, accuracy)
            np.testing.assert_array_equal(each.test_accuracy.steps, run.steps(mode="EVAL"))
        assert row["last_loss"] == loss[-1]
        assert row["best_loss"] == [int(np.nanargmin(loss)), np.nanmin(loss)]
        assert row["last_accuracy"] == accuracy[-1]
        assert row["steps"] == len(loss)
    text = (played.pictures / "report.html").read_text("utf-8")
    assert "http-equiv" not in text
    assert text.count("<svg") == 2
    for cells in (*comparison(observed), *rules_log(observed)):
        assert all(cell in text for cell in cells), cells


def test_curves_are_drawn_as_they_are(readers: list[Reader]) -> None:
    observed = [reader.look() for reader in readers]
    left, right = draw_curves(observed).axes
    drawn = {line.get_label(): line.get_xydata() for line in left.lines}
    assert left.get_yscale() == "log"
    for each in observed:
        np.testing.assert_array_equal(
            drawn[each.label], np.stack([each.loss.steps, each.loss.values], axis=1)
        )
    of_accuracy = [line.get_ydata() for line in right.lines]
    for each in observed:
        percent = 100 * each.test_accuracy.values
        assert any(np.array_equal(values, percent) for values in of_accuracy)


def test_statistics_are_drawn_without_a_tensor(readers: list[Reader]) -> None:
    runs = {reader.name: reader.run for reader in readers if reader.run is not None}
    observed = [reader.look() for reader in readers]
    figure = draw_statistics(runs, observed)
    for reader in readers:
        assert reader.meter is not None
        assert reader.meter.fetched_nbytes > 0
        assert reader.meter.chunk_nbytes == 0
    for axes in figure.axes:
        drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
        for each in observed:
            values = runs[each.name][axes.get_title()].read()
            with np.errstate(all="ignore"):
                norms = np.sqrt(np.square(values.astype(np.float64)).sum(axis=(1, 2)))
            norms[(norms == 0) | ~np.isfinite(norms)] = np.nan
            np.testing.assert_allclose(np.asarray(drawn[each.label]), norms, rtol=1e-5)
    # Now tensors were read, and the meter says so.
    assert all(reader.meter is not None and reader.meter.chunk_nbytes > 0 for reader in readers)


def test_what_was_read_is_little(played: Played) -> None:
    for row in played.document["traffic"]:
        shards = played.folder / row["name"] / layout.SHARDS_DIR
        stored = sum(path.stat().st_size for path in shards.iterdir())
        # One run is stopped, at step 22 at the earliest: then it holds 23 saves of 31 KB.
        assert stored > 500_000
        assert row["chunk_nbytes"] == 0
        assert 0 < row["fetched_nbytes"] < stored / 5
    assert played.document["looks"] >= 1


def test_pictures_are_not_blank(played: Played) -> None:
    from matplotlib import image

    for name in ("curves.png", "statistics.png"):
        pixels = image.imread(played.pictures / name)[..., :3]
        assert min(pixels.shape[:2]) > 400
        assert 0.02 < np.any(pixels < 0.95, axis=2).mean() < 0.98


def test_a_rate_that_is_too_large_diverges_and_no_other() -> None:
    """The same training without a process: what the rules find does not hang on when they look."""
    digits = load_digits(seed=3)
    for rate in LEARNING_RATES:
        url = f"memory://curves/{rate}"
        # One thread of BLAS, as in the demo: so small products are faster with it.
        with create_test_run(url) as run, np.errstate(all="ignore"), threadpool_limits(1):
            train(
                run, digits, learning_rate=rate, steps=60, save_every=30, seed=3,
                seconds=0.0, why_stop=lambda _: None,
            )  # fmt: skip
        made = [rules.make_rule(text) for text in conductor.RULES]
        report = rules.evaluate(url, made, record=False)
        assert bool(report.found["loss_not_decreasing"]) == (rate == LEARNING_RATES[-1])
        assert report.ok == (rate != LEARNING_RATES[-1])


def test_a_training_that_is_interrupted_closes_its_run(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    words = ["-m", "tensorstore_fmt.demo.curves.training", url, "--learning-rate", "0.1"]
    with subprocess.Popen(
        [sys.executable, *words, "--steps", "10000", "--seconds", "1000"],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    ) as process:
        reader = Reader(url)
        while not (reader.refresh() and reader.look().steps):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    reader.refresh()
    seen = reader.look()
    reader.close()
    assert (seen.state, seen.reason) == ("stopped", "interrupted (Ctrl-C)")
    assert comparison([seen])[0][-1] == "stopped: interrupted (Ctrl-C)"
    assert tsf.verify(url).ok


CHILD = """
import signal, sys, time
def end(number, frame):
    if sys.argv[1] == "stubborn":
        return
    with open(sys.argv[2], "a") as file:
        print(sys.argv[1], file=file)
    sys.exit(0)
signal.signal(signal.SIGINT, end)
print("ready", sys.stdin.read(), flush=True)
while True:
    time.sleep(0.05)
"""


def test_ctrl_c_ends_all_processes_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "child_of_the_demo.py").write_text(CHILD)
    log = tmp_path / "log"
    monkeypatch.setattr("tensorstore_fmt.demo.curves.processes._END_S", 0.5)
    printed: list[str] = []

    def start(name: str) -> Process:
        return Process(
            name, ["child_of_the_demo", name, str(log)], said=f"options of {name}",
            environment={"PYTHONPATH": str(tmp_path)}, on_line=printed.append,
        )  # fmt: skip

    with Processes() as processes:
        first = processes.add([start("first")])
        last = processes.add([start("last"), start("stubborn")])
        for process in (*first, *last):
            assert process.wait_until_spoken(timeout_s=60)
        assert [process.code for process in (*first, *last)] == [None] * 3
    assert sorted(printed) == [f"ready options of {n}" for n in ("first", "last", "stubborn")]
    assert log.read_text().split() == ["last", "first"]
    assert [process.code for process in (*first, *last)] == [0, 0, -signal.SIGKILL]


def test_the_page_grows_while_a_run_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tensorstore_fmt.demo.curves.viewer._DRAW_S", 0.0)
    url, later = str(tmp_path / "a<b"), str(tmp_path / "later")
    viewer = Viewer([url, later], tmp_path)
    run = tsf.create_run(url, attrs={"learning_rate": 0.5, "steps": 9})
    pages: list[str] = []

    def is_over() -> bool:
        """Save a step more at each look; the second run begins and ends when the first did."""
        pages.append((tmp_path / "report.html").read_text("utf-8"))
        step = len(pages) - 1
        if step < 2:
            run.log({"loss": 1.0 / (step + 1)}, step=step, mode="TRAIN")
            run.flush()
        elif step == 2:
            run.close()
            with tsf.create_run(later) as other:
                other.log({"loss": math.nan, "accuracy": 0.5}, step=0, mode="EVAL")
        return False

    viewer.follow(is_over=is_over)
    assert all('http-equiv="refresh"' in text for text in pages)
    assert "<td>not there yet</td>" in pages[0]
    assert [f"<td>{n} of 9</td>" in pages[n] for n in (1, 2)] == [True] * 2
    viewer.finish()
    viewer.close()
    last = (tmp_path / "report.html").read_text("utf-8")
    assert "http-equiv" not in last
    assert "a&lt;b" in last
    assert "a<b" not in last
    assert "learning rate 0.5" not in capsys.readouterr().err
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [row["best_loss"] for row in summary["runs"]] == [[1, 0.5], None]
    assert [row["state"] for row in summary["runs"]] == ["finished"] * 2


def test_runs_without_a_loss_are_drawn_as_well(tmp_path: Path) -> None:
    for number, value in enumerate((0.0, math.inf, -1.0)):
        with tsf.create_run(tmp_path / str(number)) as run:
            run.log({"loss": value, "gradient/w.weight": np.zeros((2, 2))}, step=7, mode="TRAIN")
    with tsf.create_run(tmp_path / "3") as run:
        run.log({"other": "text"}, step=0)
    viewer = Viewer([str(tmp_path / str(number)) for number in range(5)], tmp_path / ".")
    viewer.follow(is_over=lambda: True)
    viewer.finish()
    viewer.close()
    assert "broken off" in (tmp_path / "report.html").read_text("utf-8")


def test_a_page_without_runs_that_began() -> None:
    text = page([Observed(name="x", place="x")], curves="<svg>", is_live=False, looks=0)
    assert "No rule has fired" in text
    assert "tensorstore-fmt" not in text


def test_the_best_of_a_curve() -> None:
    curve = Curve(np.array([3, 5, 9]), np.array([np.nan, 2.0, np.inf]))
    assert curve.best(least=True) == (5, 2.0)
    assert curve.best(least=False) == (9, math.inf)
    assert Curve(np.array([3]), np.array([np.nan])).best(least=True) is None


@pytest.mark.parametrize(
    "arguments",
    [
        {"url": "memory://run"},
        {"url": "taken"},
        {"learning_rates": []},
        {"learning_rates": [0.1] * 2},
        {"learning_rates": [0.0]},
        {"learning_rates": [math.inf]},
        {"learning_rates": [0.01 * n for n in range(1, 10)]},
        {"steps": 0},
        {"save_every": 0},
        {"seed": -1},
        {"storage_options": {"session": object()}},
    ],
)
def test_wrong_arguments_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    with pytest.raises(ArgumentError):
        run_demo(**{"url": "run"} | arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_run_is_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with tsf.create_run("runs/lr-0.2") as run:
        run.log({"loss": 1.0}, step=0)
        with pytest.raises(RunExistsError):
            run_demo("runs")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_process_that_fails_ends_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real processes, but of another package: a viewer that goes on, a training that fails."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}:{tmp_path}", prepend=":")
    monkeypatch.setattr(conductor, "_MODULES", "other_demo")
    (tmp_path / "other_demo").mkdir()
    (tmp_path / "other_demo/viewer.py").write_text(
        "import sys, time\nprint('draws', *sys.argv[1:], flush=True)\ntime.sleep(1000)"
    )
    (tmp_path / "other_demo/training.py").write_text("raise SystemExit('no space left')")
    assert main(["demo", "curves", "./runs", "--learning-rates", "0.1"]) == 1
    out, err = capsys.readouterr()
    assert "no space left" in out
    assert "the training lr-0.1 ended with exit code 1" in err
    assert "FAILED" in out


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["demo", "curves", str(tmp_path / "file/runs")]) == 1
    assert "Not a directory" in capsys.readouterr().err


def test_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import tensorstore_fmt.demo.curves

    asked: list[dict[str, Any]] = []

    def played(url: str | None, **options: object) -> int:
        asked.append({"url": url, **options})
        return 0

    monkeypatch.setattr(tensorstore_fmt.demo.curves, "run_demo", played)
    assert main(["demo", "curves", "--learning-rates", "0.1,3", "--no-stop", "--quiet"]) == 0
    assert asked[0]["learning_rates"] == [0.1, 3.0]
    assert (asked[0]["url"], asked[0]["stop"], asked[0]["quiet"]) == (None, False, True)
    assert main(["demo", "curves", "./there"]) == 0
    assert asked[1]["learning_rates"] == LEARNING_RATES
    assert main(["demo", "curves", "--learning-rates", "0.1;3"]) == 2
    assert "is no list of numbers" in capsys.readouterr().err
