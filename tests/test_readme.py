"""The examples of README.md run, in their order, and its links lead somewhere.

Python examples that are marked need torch: they run where it is installed.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
HAS_TORCH = importlib.util.find_spec("torch") is not None

_BLOCK = re.compile(
    r"^(?P<mark><!-- (?:run|torch) -->\n)?```(?P<kind>python|console)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_LINK = re.compile(r"\[[^\]]*\]\((?!https?:|#)([^)#\s]+)(?:#[^)]*)?\)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """An example: Python, or a shell session whose lines begin with ``$``."""

    kind: str
    text: str
    line: int
    is_marked: bool


def blocks(text: str) -> list[Block]:
    return [
        Block(
            kind=match["kind"],
            text=match["text"],
            line=text.count("\n", 0, match.start("text")),
            is_marked=match["mark"] is not None,
        )
        for match in _BLOCK.finditer(text)
    ]


def run_console(text: str, cwd: Path) -> None:
    for line in text.splitlines():
        if not line.startswith("$ "):
            continue  # what the command prints
        program, *arguments = shlex.split(line[2:])
        assert program == "tensorstore-fmt", f"only our own command is run: {line}"
        done = subprocess.run(
            [sys.executable, "-m", "tensorstore_fmt", *arguments],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        assert done.stdout.strip(), f"{line} printed nothing"


def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examples = blocks(README.read_text("utf-8"))
    assert {example.kind for example in examples} == {"python", "console"}
    namespace: dict[str, object] = {"__name__": "readme"}
    for example in examples:
        if example.kind == "python":
            if example.is_marked and not HAS_TORCH:
                continue
            # Blank lines first, so that a traceback has the README's line numbers.
            source = "\n" * example.line + example.text
            exec(compile(source, str(README), "exec"), namespace)
        elif example.is_marked:
            run_console(example.text, tmp_path)


def test_each_console_example_is_marked_or_run_elsewhere() -> None:
    for example in blocks(README.read_text("utf-8")):
        assert example.kind == "python" or example.is_marked, f"line {example.line}"


@pytest.mark.parametrize(
    "path",
    sorted(
        path.relative_to(ROOT).as_posix()
        for path in [*ROOT.glob("*.md"), *ROOT.glob("spec/**/*.md"), *ROOT.glob("benchmarks/*.md")]
    ),
)
def test_links_lead_somewhere(path: str) -> None:
    text = (ROOT / path).read_text("utf-8")
    broken = [
        target
        for target in _LINK.findall(text)
        if not (ROOT / path).parent.joinpath(target).exists()
    ]
    assert not broken
