"""Import: what others wrote, into a new run. Each format has one function.

They need none of the packages that wrote the files. Imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensorstore_fmt.interop.importing.arrays import import_npz, import_safetensors
    from tensorstore_fmt.interop.importing.report import ImportReport, Skipped
    from tensorstore_fmt.interop.importing.smdebug import import_smdebug
    from tensorstore_fmt.interop.importing.tensorboard import import_tensorboard

__all__ = [
    "ImportReport",
    "Skipped",
    "import_npz",
    "import_safetensors",
    "import_smdebug",
    "import_tensorboard",
]

_PLACES = {
    "ImportReport": "report",
    "Skipped": "report",
    "import_npz": "arrays",
    "import_safetensors": "arrays",
    "import_smdebug": "smdebug",
    "import_tensorboard": "tensorboard",
}


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value
