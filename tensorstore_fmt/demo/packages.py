"""The packages that a demo needs beside those the library itself needs."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

__all__ = ["are_there"]


def are_there(modules: Sequence[str], *, extra: str) -> bool:
    """Say whether `modules` can be imported; if not, say on stderr what to install.

    Parameters
    ----------
    extra
        The extra of this library that brings them.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        *others, last = missing
        names = f"{', '.join(others)} and {last}" if others else last
        print(
            f"the demo needs {names}: pip install 'tensorstore-fmt[{extra}]'",
            file=sys.stderr,
        )
    return not missing
