"""The optional compiled kernel: loaded if it is there, and what to say if it is not.

`_kernel.c` does the work of `planes` and of `statistics` several times as fast as NumPy. It
is built at install where there is a compiler; without it everything works the same. Both
give the same bytes, and statistics that agree as far as the spec fixes them.
``TENSORSTORE_FMT_KERNEL=0`` in the environment, read at import, leaves it unused.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any, Final, Protocol, cast

import numpy as np
from numpy.typing import NDArray

__all__ = ["SWITCH", "Kernel", "active", "describe"]

SWITCH: Final = "TENSORSTORE_FMT_KERNEL"
"""Name of the environment variable that turns the kernel off."""

_VERSION: Final = 1
_MODULE: Final = "tensorstore_fmt.format._kernel"
_REINSTALL: Final = "with a C compiler and Python's headers, install the package again"


class Kernel(Protocol):
    """What the compiled module offers; any buffer of the right size will do."""

    VERSION: int
    COMPILER: str

    def split(self, raw: NDArray[Any], planes: Sequence[NDArray[Any]], rotated: bool, /) -> None:  # noqa: FBT001 - positional in C
        """See `planes.split`."""

    def join(
        self,
        planes: Sequence[NDArray[Any] | memoryview],
        out: NDArray[Any],
        rotated: bool,  # noqa: FBT001 - positional in C
        /,
    ) -> None:
        """See `planes.join`."""

    def statistics(
        self,
        data: NDArray[Any],
        kind: str,
        values: NDArray[np.float64],
        out: NDArray[np.float64],
        /,
    ) -> None:
        """Write the ten statistics of each of ``out.size // 10`` rows of `data` to `out`.

        `kind` is a letter of the module `struct`, or E for bfloat16; B stands for any dtype
        of one byte, and `values` for what the 256 bytes mean.
        """


def _load() -> tuple[Kernel | None, str]:
    """Give the kernel, or none and the reason."""
    if os.environ.get(SWITCH) == "0":
        return None, f"turned off with {SWITCH}=0"
    try:
        found = cast("Kernel", importlib.import_module(_MODULE))
    except ModuleNotFoundError:
        return None, f"not built at install; {_REINSTALL}"
    except ImportError as error:  # built for another machine, most likely
        return None, f"cannot be loaded ({error}); {_REINSTALL}"
    if found.VERSION != _VERSION:
        return None, f"is version {found.VERSION}, version {_VERSION} is needed; {_REINSTALL}"
    return found, ""


active: Kernel | None
"""The kernel in use, if any."""

active, _reason = _load()


def describe() -> dict[str, str | int | None]:
    """Say what is in use: uses ("compiled" or "numpy"), version, compiler, or why not."""
    if active is None:
        return {"uses": "numpy", "version": None, "compiler": None, "why": _reason}
    return {
        "uses": "compiled",
        "version": active.VERSION,
        "compiler": active.COMPILER,
        "why": None,
    }
