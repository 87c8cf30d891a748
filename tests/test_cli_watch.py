"""``watch`` on a run that is not there yet, and on one whose writer died."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.rule_runs import make_run

import tensorstore_fmt as tsf
from tensorstore_fmt import rules
from tensorstore_fmt.cli import main
from tensorstore_fmt.format import layout
from tensorstore_fmt.reading.session import Session
from tensorstore_fmt.rules.presence import lost_writers
from tensorstore_fmt.storage import open_storage
from tensorstore_fmt.testing.servers import serve_s3
from tensorstore_fmt.testing.storage import CountingStorage

DIES = """
import os, sys
import tensorstore_fmt as tsf
run = tsf.create_run(sys.argv[1])
run.log({"w": 1.0}, step=0)
run.log({"w": 0.0}, step=1)
run.log({"w": 1.0}, step=2)
run.flush()
os._exit(9)
"""
ALL_ZERO = ["--rule", "all_zero", "--no-record"]
WATCH = [sys.executable, "-m", "tensorstore_fmt", "watch"]


def die(url: str) -> str:
    """Make a run whose writer ends without closing it."""
    assert subprocess.run([sys.executable, "-c", DIES, url], check=False).returncode == 9
    return url


@pytest.fixture
def dead(tmp_path: Path) -> str:
    """A local run whose writer died."""
    return die(str(tmp_path / "dead"))


def test_a_run_that_is_yet_to_come(tmp_path: Path) -> None:
    url = str(tmp_path / "later")
    words = [*WATCH, url, *ALL_ZERO, "--wait", "100"]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        told = process.stderr.readline()  # it waits now
        make_run(range(3), url=url, w=float)
        out, err = process.communicate(timeout=100)
    assert "later does not exist" in told
    assert "waiting up to 100 s" in told
    assert out == "step 0 [TRAIN] all_zero: w: 1 of it is zero\n"
    assert "waiting" not in err
    assert process.returncode == 1


def test_a_run_that_never_comes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = str(tmp_path / "never")
    assert main(["watch", url, *ALL_ZERO, "--wait", "0.3"]) == 1
    err = capsys.readouterr().err
    assert "waiting up to 0.3 s" in err
    assert "waited 0.3 s for it" in err
    # Without the option a wrong path is said at once.
    assert main(["watch", url, *ALL_ZERO, "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["code"] == "not_a_run"
    assert "waiting" not in err


def test_mistakes_are_said_before_waiting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = str(tmp_path / "never")
    for words in (
        ["--rule", "no_such_rule"],
        ["--rule", "all_zero", "--poll", "-1"],
        ["--rule", "all_zero", "--idle-timeout", "nan"],
        ["--rule", "all_zero", "--timeout", "inf"],
    ):
        assert main(["watch", url, "--wait", "1000", *words]) == 2, words
    assert "waiting" not in capsys.readouterr().err
    assert main(["watch", url, "--wait", "-1", *ALL_ZERO]) == 2


def test_a_dead_writer_is_noticed(dead: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", dead, "--rule", "all_zero:repeat=yes", "--no-record"]) == 1
    out, err = capsys.readouterr()
    assert out == "step 1 all_zero: w: 1 of it is zero\n"
    assert "died and did not close the run" in err
    assert f"tensorstore-fmt recover {dead}" in err
    # A run without a finding, too, is no success.
    assert main(["watch", dead, "--rule", "exploding_tensor", "--no-record", "--json"]) == 1
    row = json.loads(capsys.readouterr().out)
    assert row["ended"] == "writer_died"
    assert row["summary"][0]["found"] == 0
    # What the message advises helps.
    assert main(["recover", dead]) == 0
    capsys.readouterr()
    assert main(["watch", dead, "--rule", "exploding_tensor", "--no-record", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ended"] == "closed"


def test_a_dead_writer_may_be_waited_for(dead: str) -> None:
    words = [*WATCH, dead, "--rule", "all_zero:repeat=yes", "--no-record", "--idle-timeout", "100"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "step 1 all_zero: w: 1 of it is zero\n"
        with tsf.create_run(dead, resume_from=2) as run:
            run.log({"w": 0.0}, step=2)
        rest, _ = process.communicate(timeout=100)
    assert rest == "step 2 all_zero: w: 1 of it is zero\n"


def test_a_living_writer_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = str(tmp_path / "run")
    with tsf.create_run(url) as run:
        run.log({"w": 1.0}, step=0)
        with tsf.open_run(url) as reader:
            assert lost_writers(reader) == []
        assert main(["watch", url, *ALL_ZERO, "--timeout", "1.5", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["ended"] == "timeout"
        assert main(["watch", url, *ALL_ZERO, "--idle-timeout", "0.5", "--json"]) == 1
        out, err = capsys.readouterr()
        assert json.loads(out)["ended"] == "idle"
        assert "its writer may be alive" in err
    assert main(["watch", url, *ALL_ZERO, "--idle-timeout", "0"]) == 0


def test_one_of_two_writers_lives(dead: str) -> None:
    with pytest.warns(UserWarning, match="already has a writer"):
        second = tsf.create_run(dead, attempt=0)
    with second:
        second.log({"w": 2.0}, step=3)
        second.flush()
        with tsf.open_run(dead) as reader:
            assert lost_writers(reader) == []
            second.close()
            reader.refresh()
            (lost,) = lost_writers(reader)
    assert (Path(dead) / layout.LOCKS_DIR / f"{lost}.lock").exists()


def test_a_run_to_compare_with_is_waited_for(dead: str, tmp_path: Path) -> None:
    """The run is closed; the one beside it never will be."""
    url = make_run(range(3), url=str(tmp_path / "run"), w=float)
    with tsf.open_run(url) as run, tsf.open_run(dead) as other:
        rule = rules.SimilarAcrossRuns(names="^w$")
        with rules.Runner(run, [rule], others=[other], record=False) as runner:
            assert runner.follow(poll_s=0.01) == "writer_died"


def test_a_double_of_a_storage_says_the_same(dead: str) -> None:
    storage = CountingStorage(open_storage(dead, writable=False))
    with tsf.Run(Session(dead, None, storage=storage)) as run:
        assert len(lost_writers(run)) == 1


def test_a_bucket_has_no_locks(capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody can tell there: silence has to."""
    with serve_s3() as server:
        url, options = server.url("run"), server.storage_options
        with tsf.create_run(url, storage_options=options) as run:
            run.log({"w": 0.0}, step=0)
            run.log({"w": 0.0}, step=1)
            run.flush()
            words = [*ALL_ZERO, "--storage-options", json.dumps(options), "--json"]
            code = main(["watch", url, *words, "--idle-timeout", "1", "--poll", "0.1"])
            assert code == 1
            alert, summary = map(json.loads, capsys.readouterr().out.splitlines())
            assert alert["alert"]["step"] == 0
            assert summary["ended"] == "idle"
            with tsf.open_run(url, storage_options=options) as reader:
                assert lost_writers(reader) == []


def test_options_may_come_from_a_pipe() -> None:
    """So that no secret is in the list of processes; it can be read only once."""
    with serve_s3() as server:
        url, options = server.url("run"), server.storage_options
        with tsf.create_run(url, storage_options=options) as run:
            run.log({"w": 1.0}, step=0)
        done = subprocess.run(
            [*WATCH, url, *ALL_ZERO, "--other", url, "--storage-options", "@/dev/stdin"],
            input=json.dumps(options), text=True, capture_output=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
