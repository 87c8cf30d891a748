"""D5: a short run of `fuzz_format.py` in its own process; ``TSF_COUNT`` multiplies its time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from support.goals import COUNT, SEED, record

SECONDS = 120
TESTS = Path(__file__).resolve().parents[1]


def test_fuzz(tmp_path: Path) -> None:
    note, seconds = tmp_path / "note", SECONDS * COUNT
    places = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [
            sys.executable, str(TESTS / "robustness" / "fuzz_format.py"),
            "--seconds", str(seconds), "--seed", str(SEED), "--note", str(note),
        ],
        env={**os.environ, "PYTHONPATH": places},
        capture_output=True,
        text=True,
        timeout=seconds + 120,
        check=False,
    )  # fmt: skip
    last = note.read_text().strip()
    assert done.returncode in (0, 1), f"ended at input {last}: {done.stderr[-2000:]}"
    report = json.loads(done.stdout)
    inputs = report.pop("inputs")
    record("D5", inputs, **report)
    assert not report["failures"], "\n".join(report["failures"])
    assert inputs > 200
    assert report["two_readers"]["the same value"] > 100
    assert len(report["of"]) == 10  # every target had its turn
    assert report["max_rss_mib"] < 3000
