"""The callback for Keras, in real trainings of a tiny model, with each backend in a process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import keras_trainings

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("backend", ["torch", "jax"])
@pytest.mark.parametrize("training", keras_trainings.ALL)
def test_trainings(training: str, backend: str, tmp_path: Path) -> None:
    for needed in ("keras", backend):  # not imported: that would choose a backend here
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"no {needed} here")
    done = subprocess.run(
        [sys.executable, "-m", "support.keras_trainings", training, str(tmp_path)],
        env={
            **os.environ,
            "KERAS_BACKEND": backend,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        },
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("as it should be\n")
