"""The benchmark suite runs, quickly and untimed, so that it does not rot."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
NUMBERS = range(1, 17)
NEED_TORCH = {14}


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder for the data, shared by all workers of one test run."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "benchmarks"


def suite(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """Run the suite's command; the peers' environments are not looked for."""
    return subprocess.run(
        [
            sys.executable,
            str(BENCHMARKS / "run.py"),
            "--environments",
            str(cache / "none"),
            *arguments,
        ],
        env={**os.environ, "TSF_BENCH_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS)
def test_quick(number: int, cache: Path, tmp_path: Path) -> None:
    if number in NEED_TORCH and importlib.util.find_spec("torch") is None:
        pytest.skip("needs torch")
    run = ("--quick", "--cases", str(number), "--out", str(tmp_path))
    done = suite(*run, cache=cache)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["failed"] == {}
    assert {case["number"] for case in results["cases"].values()} == {number}
    report = (tmp_path / "report.md").read_text()
    for name, case in results["cases"].items():
        own = [c for c in case["trials"] if c.startswith("ours")]
        assert own, name
        assert all(value >= 0 for c in own for value in case["trials"][c][0].values()), name
        assert case["verdicts"], name
        assert name in report
        assert (tmp_path / "plots" / f"{name}.png").stat().st_size > 1000


def test_it_goes_on_where_it_stopped(cache: Path, tmp_path: Path) -> None:
    run = ("--quick", "--cases", "2", "--contestants", "ours-bare", "npy", "--out", str(tmp_path))
    first = suite(*run, cache=cache)
    assert first.returncode == 0, first.stderr
    trials = (tmp_path / "trials.jsonl").read_text().splitlines()
    kept = trials[:1]
    (tmp_path / "trials.jsonl").write_text(f"{kept[0]}\n")
    assert suite(*run, cache=cache).returncode == 0
    again = (tmp_path / "trials.jsonl").read_text().splitlines()
    assert again[:1] == kept
    assert len(again) == len(trials) == 2
    assert suite(*run, cache=cache).returncode == 0
    assert (tmp_path / "trials.jsonl").read_text().splitlines() == again


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(("--cases", "99"), "stream-raw"), (("--cases", "1", "--contestants", "nobody"), "npz")],
)
def test_what_is_not_there_is_named(arguments: tuple[str, ...], named: str, cache: Path) -> None:
    done = suite(*arguments, cache=cache)
    assert done.returncode == 1
    assert arguments[-1] in done.stderr
    assert named in done.stderr


def test_every_number_has_a_case(cache: Path) -> None:
    done = suite("--list", cache=cache)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("     ")]
    assert {int(line.split()[0]) for line in lines} == set(NUMBERS)
