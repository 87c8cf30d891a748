"""What this installation is made of: ``info --build``."""

from __future__ import annotations

import platform

import numpy as np

from tensorstore_fmt._version import __version__
from tensorstore_fmt.cli.output import Output
from tensorstore_fmt.format import kernel

__all__ = ["show_build"]


def show_build(output: Output) -> int:
    """Say which versions are in use, and whether the compiled kernel is or why not."""
    found = kernel.describe()
    facts = {
        "version": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "kernel": found,
    }
    if output.is_json:
        output.json(facts)
        return 0
    if found["uses"] == "compiled":
        said = f"compiled, version {found['version']}, by {found['compiler']}"
    else:
        said = f"NumPy does its work: {found['why']}"
    for label, text in (facts | {"kernel": said}).items():
        output.line(f"{label:7}  {text}")
    return 0
