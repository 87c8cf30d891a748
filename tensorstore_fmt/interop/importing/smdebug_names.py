"""Names: what smdebug called a value, and what it is called in a run.

======================================== =================================
smdebug                                  here
======================================== =================================
``fc.weight``                            ``fc.weight``
``scalar/lr``                            ``scalar/lr``
``smdebug/reductions/abs_mean/fc/w``     ``reductions/abs_mean/fc/w``, or
                                         ``reductions/abs_mean/fc/w:0`` if
                                         the tensor is called ``fc/w:0``
only the shape of ``fc.weight``          ``shapes/fc.weight``, int64
the collections, as JSON                 ``smdebug/collections``
======================================== =================================

smdebug stored scalars and some reductions as arrays of shape (1,); here their shape is ().

The importer writes them, the facade reads them; nothing else knows of them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

__all__ = [
    "COLLECTIONS_NAME",
    "REDUCTIONS",
    "from_smdebug",
    "is_scalar",
    "reduction_name",
    "reduction_of",
    "shape_name",
    "shaped",
]

COLLECTIONS_NAME: Final = "smdebug/collections"

REDUCTIONS: Final = ("min", "max", "mean", "std", "variance", "sum", "prod", "l1", "l2")
"""What smdebug reduces tensors to; of the absolute values with ``abs_`` before it."""

_THEIRS: Final = "smdebug/reductions/"
_OURS: Final = "reductions/"
_SHAPES: Final = "shapes/"
_SCALARS: Final = "scalar/"
_SUFFIX: Final = ":0"


def from_smdebug(tag: str, known: Collection[str]) -> str:
    """Give the name in a run of a value that smdebug called `tag`.

    Parameters
    ----------
    known
        Names of tensors. smdebug cut ``:0`` off the names of tensors it reduced.
    """
    if not tag.startswith(_THEIRS):
        return tag
    reduction, _, tensor = tag.removeprefix(_THEIRS).partition("/")
    if tensor not in known and tensor + _SUFFIX in known:
        tensor += _SUFFIX
    return f"{_OURS}{reduction}/{tensor}"


def is_scalar(name: str) -> bool:
    """Say whether what has this name in a run is one number at each step."""
    return name.startswith(_SCALARS) or reduction_of(name) is not None


def reduction_name(reduction: str, tensor: str, *, is_abs: bool = False) -> str:
    """Give the name in a run of a reduction of a tensor."""
    return f"{_OURS}{'abs_' if is_abs else ''}{reduction}/{tensor}"


def reduction_of(name: str) -> tuple[str, bool, str] | None:
    """Give reduction, whether of absolute values, and tensor, if the name is of such."""
    if not name.startswith(_OURS):
        return None
    reduction, mark, tensor = name.removeprefix(_OURS).partition("/")
    is_abs = reduction.startswith("abs_")
    reduction = reduction.removeprefix("abs_")
    return (reduction, is_abs, tensor) if mark and tensor and reduction in REDUCTIONS else None


def shape_name(tensor: str) -> str:
    """Give the name in a run of the shapes of a tensor."""
    return _SHAPES + tensor


def shaped(name: str) -> str | None:
    """Give the tensor whose shapes have this name, if they do."""
    return name.removeprefix(_SHAPES) if name.startswith(_SHAPES) else None
