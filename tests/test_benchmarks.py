"""The benchmarks run, quickly and untimed, so that they do not rot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
CASES = {
    "bench_codec.py": ["f32 weights", "noise"],
    "bench_reading.py": ["entries", "shapes", "live", "curve", "attention"],
    "bench_writing.py": ["scalars", "small", "stream_auto", "stream_none", "flushes"],
}


def test_every_benchmark_is_run() -> None:
    assert sorted(f.name for f in BENCHMARKS.glob("bench_*.py")) == sorted(CASES)


@pytest.mark.parametrize("script", CASES)
def test_quick(script: str, tmp_path: Path) -> None:
    cache = ["--cache", str(tmp_path)] if script == "bench_reading.py" else []
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--quick", *cache],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for case in CASES[script]:
        assert case in done.stdout
