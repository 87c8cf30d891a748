"""What CI checks beside behaviour: format, lint, types, the public names."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PUBLIC = [
    "AmbiguousError",
    "ArgumentError",
    "ChecksumError",
    "CloseReport",
    "ClosedError",
    "FormatError",
    "LimitError",
    "MissingFileError",
    "NameNotFoundError",
    "NotARunError",
    "NotThereError",
    "Part",
    "Run",
    "RunExistsError",
    "RunWriter",
    "SelectionError",
    "StateError",
    "StepDroppedError",
    "StepNotFoundError",
    "StepNotYetWrittenError",
    "StorageFailedError",
    "Tensor",
    "TensorStoreError",
    "TruncatedError",
    "UnsupportedError",
    "__version__",
    "compact",
    "create_run",
    "open_run",
    "recover",
    "verify",
]


def run_tool(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.fail(f"{' '.join(arguments)}\n{done.stdout}{done.stderr}", pytrace=False)


def test_format() -> None:
    run_tool("ruff", "format", "--check", "--quiet", ".")


def test_lint() -> None:
    run_tool("ruff", "check", "--quiet", ".")


def test_types() -> None:
    run_tool("mypy")


def test_public_names() -> None:
    import tensorstore_fmt as tsf

    assert list(tsf.__all__) == PUBLIC, "a public name is a decision: say so in CHANGELOG.md"
    assert sorted(tsf.__all__) == PUBLIC
    for name in PUBLIC:
        assert hasattr(tsf, name)


def test_version_has_one_source() -> None:
    from tensorstore_fmt import _version

    try:
        installed = importlib.metadata.version("tensorstore-fmt")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("runs from a source tree that is not installed")
    assert installed == _version.__version__
    assert f"\n## {_version.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_ci_runs_the_line_of_the_readme() -> None:
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    markers = [number for number, line in enumerate(lines) if line == "<!-- test line -->"]
    assert len(markers) == 1
    fence, line, end = lines[markers[0] + 1 : markers[0] + 4]
    assert (fence, end) == ("```sh", "```")
    assert line.endswith(".venv/bin/python -m pytest")
