"""NumPy arrays, of numbers or of strings, as arrays that the writer owns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from tensorstore_fmt import dtypes
from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.format import layout

__all__ = [
    "HINTS",
    "KNOWN",
    "POOLED_NBYTES",
    "Empty",
    "Snapshot",
    "from_array",
    "from_masked",
    "from_strings",
    "plain_str",
    "refusal",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One tensor, out of its caller's reach.

    Attributes
    ----------
    dtype
        Stored name (spec, "dtypes").
    array
        C-contiguous, little-endian, writable, shared with nobody. Its elements are as the
        spec wants them (bool 0 or 1, int4 sign-extended …). For ``string`` an object array of
        `str`, rank 0 or 1, each of them free of lone surrogates.
    """

    dtype: str
    array: np.ndarray


Empty = Callable[[tuple[int, ...], np.dtype], np.ndarray]
"""Gives an uninitialised C-contiguous array of this shape and dtype."""

POOLED_NBYTES: Final = 64 * 1024
"""Arrays from this size on are copied to memory that was used before."""


# --- arrays -------------------------------------------------------------------

_Canonical = Callable[[np.ndarray, np.ndarray], object]
"""Copies elements of one byte to `out` in the form the spec gives them: (array, out)."""


def _masked(bits: int) -> _Canonical:
    mask = np.uint8((1 << bits) - 1)

    def copy(array: np.ndarray, out: np.ndarray) -> object:
        return np.bitwise_and(array.view(np.uint8), mask, out=out.view(np.uint8))

    return copy


def _sign_extended(bits: int) -> _Canonical:
    shift = np.int8(8 - bits)

    def copy(array: np.ndarray, out: np.ndarray) -> object:
        target = out.view(np.int8)
        np.left_shift(array.view(np.int8), shift, out=target)
        return np.right_shift(target, shift, out=target)

    return copy


def _zero_or_one(array: np.ndarray, out: np.ndarray) -> object:
    return np.not_equal(array.view(np.uint8), 0, out=out)


# In memory the unused bits of these may hold anything (a view of other bytes); stored, they
# may not. One pass, as a plain copy would be.
_CANONICAL: Final[dict[str, _Canonical]] = {
    "bool": _zero_or_one,
    "float6_e2m3fn": _masked(6),
    "float6_e3m2fn": _masked(6),
    "float4_e2m1fn": _masked(4),
    "int4": _sign_extended(4),
    "int2": _sign_extended(2),
    "uint4": _masked(4),
    "uint2": _masked(2),
}


def _known_dtypes() -> dict[np.dtype, tuple[str, np.dtype]]:
    """Map each storable NumPy dtype, of either byte order, to its name and stored dtype."""
    known = {}
    for name in dtypes.NAMES:
        if name != dtypes.STRING:
            stored = dtypes.numpy_dtype(name)
            known[stored.newbyteorder("<")] = (name, stored)
            known[stored.newbyteorder(">")] = (name, stored)
    return known


KNOWN: Final = _known_dtypes()
"""Name and stored dtype of every dtype of NumPy that can be stored."""

HINTS: Final = {
    "O": "give it numbers of one dtype, or str only",
    "M": "log it as numbers, for instance .astype('int64')",
    "m": "log it as numbers, for instance .astype('int64')",
    "V": "log each field under a name of its own",
    "S": "decode it to str, or log np.frombuffer(value, np.uint8)",
    "f": "log it as float64: .astype(np.float64)",
    "c": "log it as complex128: .astype(np.complex128)",
}


def refusal(name: str, value: object, problem: str, hint: str, **facts: object) -> ArgumentError:
    """Say of a value what is wrong with it, and what to do."""
    kind = type(value)
    where = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    type_name = f"{where}{kind.__qualname__}"
    message = f"{name!r} cannot be logged: {type_name} {problem}; {hint}"
    return ArgumentError(message, code=None, name=name, type=type_name, **facts)


def _check_shape(name: str, value: object, shape: tuple[int, ...]) -> None:
    if len(shape) > layout.MAX_RANK:
        problem = f"has {len(shape)} axes, the format takes {layout.MAX_RANK}"
        raise refusal(name, value, problem, "reshape it first", shape=shape)
    # NumPy allows such a length only in an array that has no elements.
    if 0 in shape and max(shape) > layout.MAX_AXIS:
        problem = f"has an axis longer than {layout.MAX_AXIS}"
        raise refusal(name, value, problem, "reshape it first", shape=shape)


def from_array(
    name: str,
    array: np.ndarray,
    *,
    value: object = None,
    is_ours: bool = False,
    empty: Empty | None = None,
    copy: Callable[[np.ndarray], object] | None = None,
) -> Snapshot:
    """Copy a NumPy array; `is_ours` says that nobody else holds it, so it need not be copied.

    `copy` copies it to another array, and is faster than NumPy.
    """
    value = array if value is None else value
    known = KNOWN.get(array.dtype)
    if known is None:
        return _from_other_array(name, array, value)
    stored_name, stored = known
    _check_shape(name, value, array.shape)
    if array.dtype.itemsize == 1:
        canonical = _CANONICAL.get(stored_name)
        if canonical is not None:
            out = np.empty(array.shape, stored)
            canonical(array, out)
            return Snapshot(dtype=stored_name, array=out)
    if is_ours and array.dtype == stored and array.flags.carray:
        return Snapshot(dtype=stored_name, array=array)
    # A conversion of byte order moves bits, never values: NaN payloads stay as they are.
    if empty is not None and array.nbytes >= POOLED_NBYTES:
        out = empty(array.shape, stored)
        if copy is None:
            np.copyto(out, array, casting="equiv")
        else:
            copy(out)
        return Snapshot(dtype=stored_name, array=out)
    return Snapshot(dtype=stored_name, array=array.astype(stored, order="C", subok=False))


def _from_other_array(name: str, array: np.ndarray, value: object) -> Snapshot:
    kind = array.dtype.kind
    if kind in "UT":
        return from_strings(name, array.tolist(), array.shape, value)
    if kind == "O":
        items = array.ravel().tolist()
        if items and all(isinstance(item, str) for item in items):
            return from_strings(name, array.tolist(), array.shape, value)
    hint = HINTS.get(kind, f"convert it to one of: {', '.join(dtypes.NAMES)}")
    problem = f"of dtype {array.dtype} has no place in the format"
    raise refusal(name, value, problem, hint, dtype=str(array.dtype))


def from_masked(name: str, array: np.ma.MaskedArray[Any, Any]) -> Snapshot:
    """Copy an array of which nothing is masked; refuses others."""
    if np.ma.is_masked(array):
        hint = "fill the masked elements first: .filled(value)"
        raise refusal(name, array, "has masked elements", hint)
    return from_array(name, array.data, value=array)


# --- strings ------------------------------------------------------------------


def plain_str(item: str) -> str:
    """Give a string without what a subclass makes of it."""
    # The value, not what a subclass (an Enum) shows as its text.
    return item if type(item) is str else str.__str__(item)


def from_strings(name: str, items: object, shape: tuple[int, ...], value: object) -> Snapshot:
    """Copy strings of a shape; refuses what is none, or cannot be stored."""
    if len(shape) > 1:
        hint = "strings are single or in one row: log .ravel(), or each row under its own name"
        raise refusal(name, value, f"has strings in {len(shape)} axes", hint, shape=shape)
    flat: list[object] = items if isinstance(items, list) else [items]
    strings = [plain_str(item) for item in flat if isinstance(item, str)]
    if len(strings) != len(flat):
        other = next(item for item in flat if not isinstance(item, str))
        problem = f"has an element that is no str: {type(other).__qualname__}"
        raise refusal(name, value, problem, "replace missing strings first, for instance by ''")
    joined = "".join(strings)
    try:
        nbytes = len(joined) if joined.isascii() else len(joined.encode())
    except UnicodeEncodeError:
        hint = "encode it with errors='surrogateescape' and log the bytes as uint8"
        raise refusal(name, value, "has a lone surrogate, which is not text", hint) from None
    if nbytes > layout.MAX_CHUNK_RAW_NBYTES - 8:  # one element needs two offsets beside it
        longest = max(len(string.encode()) for string in strings)
        if longest > layout.MAX_CHUNK_RAW_NBYTES - 8:
            problem = f"has a string of {longest} bytes, more than a chunk holds"
            raise refusal(name, value, problem, "log it as a uint8 array", nbytes=longest)
    array = np.empty(shape, object)
    array[...] = strings if shape else strings[0]
    return Snapshot(dtype=dtypes.STRING, array=array)
