"""Both implementations of planes and statistics: the compiled kernel and NumPy."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tensorstore_fmt.format import kernel

ROOT = Path(__file__).resolve().parent.parent.parent

# A kernel that was built with other flags, for instance with sanitizers.
GIVEN = "TENSORSTORE_FMT_TEST_KERNEL"


def builder() -> ModuleType:
    """Give the module that builds kernels; it lies beside pyproject.toml."""
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(path: Path) -> Any:
    """Give the kernel that lies at a path, wherever that is."""
    loader = importlib.machinery.ExtensionFileLoader("_kernel", str(path))
    spec = importlib.util.spec_from_loader("_kernel", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def builds_at_all(module: ModuleType, folder: Path) -> bool:
    """Say whether there is a compiler and Python's headers."""
    trivial = folder / "trivial.c"
    trivial.write_text("#include <Python.h>\n")
    try:
        module.build(folder, source=trivial)
    except module.BuildError:
        return False
    return True


@functools.cache
def compiled() -> Any:
    """Give a kernel made of the source as it is now; skip the test where there is no compiler."""
    if given := os.environ.get(GIVEN):
        return load(Path(given))
    module = builder()
    folder = Path(tempfile.mkdtemp())
    try:
        return load(module.build(folder))
    except module.BuildError as error:
        if builds_at_all(module, folder):
            raise
        pytest.skip(f"the kernel cannot be built here: {str(error).splitlines()[0]}")
    finally:
        shutil.rmtree(folder)  # what is loaded stays loaded


@contextmanager
def using(which: Any) -> Iterator[None]:
    """Let the package use this kernel, or NumPy if it is none."""
    before, kernel.active = kernel.active, which
    try:
        yield
    finally:
        kernel.active = before


# Of a module, so that tests of Hypothesis may use it too.
@pytest.fixture(scope="module", params=["numpy", "compiled"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test with NumPy and with the kernel."""
    with using(compiled() if request.param == "compiled" else None):
        yield request.param
