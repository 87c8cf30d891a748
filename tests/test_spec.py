"""The committed vectors are what their generator makes, and there are some."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

VECTORS = Path(__file__).resolve().parent.parent / "spec" / "vectors"


@pytest.mark.parametrize("kind", ["valid", "invalid"])
def test_there_are_vectors(kind: str) -> None:
    assert any((VECTORS / kind).glob("*.json"))


def test_vectors_come_from_their_generator() -> None:
    done = subprocess.run(
        [sys.executable, VECTORS / "generate.py", "--check"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.fail(f"{done.stdout}{done.stderr}", pytrace=False)
