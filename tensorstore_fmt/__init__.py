"""Stream named tensors from a training run to a disk or a bucket; read slices of them.

>>> import tensorstore_fmt as tsf
>>> with tsf.create_run("memory://doc") as run:
...     for step in range(3):
...         run.log({"loss": 1 / (step + 1)}, step=step)
>>> tsf.open_run("memory://doc")["loss"].read(step=1)
array(0.5)

The names below are all that is public. They are imported when first used, so that the
import of this package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from tensorstore_fmt._version import __version__

if TYPE_CHECKING:
    from tensorstore_fmt.errors import (
        AmbiguousError,
        ArgumentError,
        ChecksumError,
        ClosedError,
        FormatError,
        LimitError,
        MissingFileError,
        NameNotFoundError,
        NotARunError,
        NotThereError,
        RunExistsError,
        SelectionError,
        StateError,
        StepDroppedError,
        StepNotFoundError,
        StepNotYetWrittenError,
        StorageFailedError,
        TensorStoreError,
        TruncatedError,
        UnsupportedError,
    )
    from tensorstore_fmt.reading.run import Run, open_run
    from tensorstore_fmt.reading.tensor import Tensor
    from tensorstore_fmt.upkeep import compact, recover, verify
    from tensorstore_fmt.writing.report import CloseReport
    from tensorstore_fmt.writing.run import RunWriter, create_run
    from tensorstore_fmt.writing.staging import Part

__all__ = [
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

_PLACES = {
    "CloseReport": "writing.report",
    "Part": "writing.staging",
    "Run": "reading.run",
    "RunWriter": "writing.run",
    "Tensor": "reading.tensor",
    "compact": "upkeep",
    "create_run": "writing.run",
    "open_run": "reading.run",
    "recover": "upkeep",
    "verify": "upkeep",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_PLACES.get(name, 'errors')}")
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
