"""Build the optional kernel: hatchling does it at install, `python hatch_build.py` by hand.

Without a compiler, or without Python's headers, the package is installed as pure Python, and
NumPy does the kernel's work.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ModuleNotFoundError:  # the tests and `python hatch_build.py` need no hatchling
    BuildHookInterface = object

SOURCE = Path(__file__).resolve().parent / "tensorstore_fmt" / "format" / "_kernel.c"
NAME = "_kernel.abi3.so"

_FLAGS = ("-std=c11", "-O3", "-fopenmp-simd", "-fPIC", "-fvisibility=hidden", "-DNDEBUG")
_LINK = {
    "darwin": ("-bundle", "-undefined", "dynamic_lookup"),
}.get(sys.platform, ("-shared",))
_LIMIT_S = 120


class BuildError(Exception):
    """The kernel could not be built here."""


def build(folder: Path, *, source: Path = SOURCE, flags: Sequence[str] = ()) -> Path:
    """Compile the kernel into a folder.

    The compiler is that of the environment variable ``CC``, else the one Python was built with,
    else ``cc``.

    Parameters
    ----------
    folder
        Where it goes; a kernel that lies there is replaced in one step.
    source
        Another text than the kernel's own, if it is not that.
    flags
        More of the compiler's flags, after those of ``CFLAGS``.

    Raises
    ------
    BuildError
        With what the compiler said.
    """
    compiler = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    includes = {sysconfig.get_path(name) for name in ("include", "platinclude")}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        target = Path(scratch, NAME)
        command = [
            *shlex.split(compiler), *_FLAGS, *shlex.split(os.environ.get("CFLAGS", "")), *flags,
            *(f"-I{path}" for path in sorted(includes)),
            *_LINK, str(source), "-o", str(target), "-lm",
        ]  # fmt: skip
        try:
            done = subprocess.run(  # noqa: S603 - the compiler that the user names
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_LIMIT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BuildError(f"{shlex.join(command)}: {error}") from error
        if done.returncode != 0 or not target.exists():
            raise BuildError(f"{shlex.join(command)}: exit {done.returncode}\n{done.stderr}")
        # One that is in use stays as it is for those who use it.
        target.replace(folder / NAME)
    return folder / NAME


class KernelBuildHook(BuildHookInterface):
    """Adds the kernel to a wheel, or to the source tree if the install is editable."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build it, or say why not and leave the wheel pure."""
        editable = version == "editable"
        folder = SOURCE.parent if editable else Path(tempfile.mkdtemp())
        self._made = None if editable else folder
        try:
            kernel = build(folder)
        except BuildError as error:
            self.app.display_warning(f"the kernel was not built, NumPy does its work: {error}")
            return
        if editable:
            return
        build_data["force_include"][str(kernel)] = f"tensorstore_fmt/format/{NAME}"
        platform = sysconfig.get_platform().translate(str.maketrans("-.", "__"))
        build_data["tag"] = f"cp311-abi3-{platform}"
        build_data["pure_python"] = False

    def finalize(self, *_: object) -> None:
        """Remove what the wheel holds now."""
        if self._made is not None:
            (self._made / NAME).unlink(missing_ok=True)
            self._made.rmdir()


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{build(SOURCE.parent)}\n")
    except BuildError as error:
        sys.exit(str(error))
