"""The dtypes a run can hold (spec, "dtypes") and how they stand in memory."""

from __future__ import annotations

from typing import Final

import ml_dtypes
import numpy as np

from tensorstore_fmt.errors import ArgumentError, UnsupportedError

__all__ = [
    "NAMES",
    "STRING",
    "dtype_name",
    "is_complex",
    "is_float",
    "is_integer",
    "itemsize",
    "numpy_dtype",
    "word_nbytes",
]

STRING: Final = "string"

_PLAIN: Final = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float32", "float64", "complex64", "complex128",
)  # fmt: skip
_ML: Final = (
    "bfloat16",
    "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz",
    "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
    "float6_e2m3fn", "float6_e3m2fn", "float4_e2m1fn",
    "int4", "int2", "uint4", "uint2",
)  # fmt: skip

# Little-endian whatever the machine: stored bytes are used as they lie.
_BY_NAME: Final[dict[str, np.dtype]] = {
    name: np.dtype(name).newbyteorder("<") for name in _PLAIN
} | {name: np.dtype(getattr(ml_dtypes, name)) for name in _ML}
_BY_DTYPE: Final = {np.dtype(d.newbyteorder("=")): name for name, d in _BY_NAME.items()}

NAMES: Final[tuple[str, ...]] = (*_PLAIN, *_ML, STRING)
"""All dtype names of format 1.0, in the order of the spec."""


def numpy_dtype(name: str) -> np.dtype:
    """Give the NumPy dtype (little-endian) of a stored dtype; `object` stands for strings.

    Raises
    ------
    UnsupportedError
        Code ``unknown_dtype``: the spec's version 1.0 does not have it.
    """
    if name == STRING:
        return np.dtype(object)
    try:
        return _BY_NAME[name]
    except KeyError:
        raise UnsupportedError(
            f"dtype {name!r} is not known to this version; a newer tensorstore_fmt may read it",
            code="unknown_dtype",
            dtype=name,
        ) from None


def dtype_name(dtype: np.dtype) -> str:
    """Give the stored name of a NumPy dtype, whatever its byte order.

    Raises
    ------
    ArgumentError
        The dtype cannot be stored (object, datetime, structured, long double …).
    """
    try:
        return _BY_DTYPE[dtype.newbyteorder("=")]
    except (KeyError, TypeError):
        pass
    if dtype.kind in "UT":
        return STRING
    raise ArgumentError(
        f"dtype {dtype} cannot be stored; use one of: {', '.join(NAMES)}",
        dtype=str(dtype),
    )


def itemsize(name: str) -> int:
    """Give the bytes of one element; 0 for strings."""
    return 0 if name == STRING else numpy_dtype(name).itemsize


def word_nbytes(name: str) -> int:
    """Give the bytes of one word of the planes codec: half an element if complex."""
    size = itemsize(name)
    return size // 2 if is_complex(name) else size


def is_complex(name: str) -> bool:
    """Say whether elements have a real and an imaginary part."""
    return name.startswith("complex")


def is_float(name: str) -> bool:
    """Say whether elements are real floating-point numbers."""
    return "float" in name


def is_integer(name: str) -> bool:
    """Say whether elements are integers (bool is none)."""
    return name.startswith(("int", "uint"))
