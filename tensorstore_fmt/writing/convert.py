"""Snapshots: what a caller logs, as an array that the writer owns.

`snapshot` makes exactly one copy, in the caller's thread, and nothing else: after it
returns the caller may change or free what it passed. No framework is imported here;
one that the caller did not import cannot have made the value.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from tensorstore_fmt import dtypes
from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.format import layout
from tensorstore_fmt.writing.snapshots import (
    HINTS,
    KNOWN,
    Empty,
    Snapshot,
    from_array,
    from_masked,
    from_strings,
    plain_str,
    refusal,
)
from tensorstore_fmt.writing.torch_snapshots import from_torch, is_torch

__all__ = ["check_mode", "check_name", "check_step", "outline", "snapshot"]

# --- Python values ------------------------------------------------------------

_FLOAT64: Final = dtypes.numpy_dtype("float64")
_COMPLEX128: Final = dtypes.numpy_dtype("complex128")
_BOOL: Final = dtypes.numpy_dtype("bool")
_INT64: Final = dtypes.numpy_dtype("int64")
_UINT64: Final = dtypes.numpy_dtype("uint64")


def _from_int(name: str, value: int) -> Snapshot:
    if -(2**63) <= value < 2**63:
        return Snapshot(dtype="int64", array=np.array(value, _INT64))
    if 0 <= value < 2**64:
        return Snapshot(dtype="uint64", array=np.array(value, _UINT64))
    raise refusal(name, value, "does not fit 64 bits", "log it as float, or as str")


def _from_sequence(name: str, value: Sequence[object]) -> Snapshot:
    if len(value) > 0 and isinstance(value[0], str):
        return from_strings(name, list(value), (len(value),), value)
    try:
        array = np.asarray(value)
    except MemoryError:
        raise
    except Exception as error:
        problem = f"does not make one array ({error})"
        hint = "log parts of different shapes or kinds under names of their own"
        raise refusal(name, value, problem, hint) from error
    if array.dtype.kind == "U":  # NumPy turns numbers beside strings into text
        hint = "strings are single or in one row, without numbers among them"
        raise refusal(name, value, "mixes strings and numbers, or nests strings", hint)
    if array.dtype == _FLOAT64 and array.size > 0:
        _check_large_integers(name, value, array)
    # NumPy has just made it, unless a subclass handed out an array of its own.
    return from_array(name, array, value=value, is_ours=type(value) in (list, tuple, range))


def _check_large_integers(name: str, value: Sequence[object], array: np.ndarray) -> None:
    """Refuse integers that NumPy rounded to floats on the way (``[2**63, -1]``)."""
    large = np.flatnonzero(np.abs(array.ravel()) >= 2**53)
    if large.size == 0:
        return
    items = np.asarray(value, dtype=object).ravel()
    for index, rounded in zip(large.tolist(), array.ravel()[large].tolist(), strict=True):
        item = items[index]
        if isinstance(item, int | np.integer) and int(item) != rounded:
            hint = "log them with a dtype: np.array(value, dtype=…)"
            raise refusal(name, value, f"has an integer that float64 rounds: {item}", hint)


# --- everything else -----------------------------------------------------------


def _from_protocol(name: str, value: object) -> Snapshot:
    """Take what shows its elements through a protocol: ``__array__``, a buffer, DLPack.

    JAX comes here: its ``__array__`` knows bfloat16, NumPy's DLPack does not.
    """
    foreign: Any = value
    problems = []
    if _has(value, "__array__", "__array_interface__", "__buffer__") or _is_buffer(value):
        try:
            return from_array(name, np.asarray(foreign), value=value)
        except (ArgumentError, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - a stranger's __array__ raises what it likes
            problems.append(error)
    if _has(value, "__dlpack__"):
        try:
            return from_array(name, _from_dlpack(foreign), value=value)
        except (ArgumentError, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - the same for __dlpack__
            problems.append(error)
    problem = "cannot be read" + "".join(f" ({error})" for error in problems)
    hint = "copy it to a NumPy array first (outside jit, from all devices to the host)"
    raise refusal(name, value, problem, hint) from problems[-1]


def _has(value: object, *attributes: str) -> bool:
    # On the type: an object that answers every attribute (a mock, a proxy) is no array.
    return any(hasattr(type(value), attribute) for attribute in attributes)


def _is_buffer(value: object) -> bool:
    try:
        memoryview(value)  # type: ignore[arg-type] # asking whether it is one is the point
    except (TypeError, ValueError, BufferError):
        return False
    return True


def _from_dlpack(value: Any) -> np.ndarray:  # noqa: ANN401 - any exporter of DLPack
    try:
        return np.from_dlpack(value)
    except (RuntimeError, BufferError, ValueError):
        # From a device; asking the exporter for the copy to the host needs NumPy 2.1.
        if np.lib.NumpyVersion(np.__version__) < "2.1.0":
            raise
        return np.from_dlpack(value, device="cpu")


def snapshot(name: str, value: object, *, empty: Empty | None = None) -> Snapshot:
    """Copy what a caller logs into an array that the writer owns.

    Parameters
    ----------
    name
        Name of the tensor; for messages only.
    value
        bool, int, float, complex, str; a NumPy scalar or array, also of ml_dtypes; a list or
        tuple of numbers that makes one array, or of str; a torch tensor on any device; a JAX
        array; anything with ``__array__``, a buffer, or ``__dlpack__``. An int becomes int64,
        or uint64 if it fits only there; an empty list is float64, as in NumPy.
    empty
        Gives memory for large copies, as `numpy.empty` does; memory that was used before
        is several times as fast to fill as new memory.

    Returns
    -------
    Snapshot
        One copy, owned by the caller of this function; elements keep all their bits.

    Raises
    ------
    ArgumentError
        The value has no place in the format; the message says what to log instead.
    """
    kind = type(value)
    if kind is np.ndarray:
        return from_array(name, value, empty=empty)  # type: ignore[arg-type] # `is` does not narrow
    if isinstance(value, np.generic) and not isinstance(value, np.str_):
        return from_array(name, np.asarray(value), value=value, is_ours=True)
    if isinstance(value, float):
        return Snapshot(dtype="float64", array=np.array(value, _FLOAT64))
    if isinstance(value, bool):
        return Snapshot(dtype="bool", array=np.array(value, _BOOL))
    if isinstance(value, int):
        return _from_int(name, value)
    return _from_object(name, value, empty)


def outline(value: object) -> Snapshot | None:
    """Give dtype and shape of an array or tensor without copying it; its elements mean nothing.

    None: it has to be copied to know them.
    """
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if isinstance(dtype, np.dtype):
        name, stored = KNOWN.get(dtype, ("", dtype))
    else:
        name = str(dtype).rpartition(".")[2]  # torch.float32
        stored = dtypes.numpy_dtype(name) if name in dtypes.NAMES else np.dtype(bool)
    if name not in dtypes.NAMES or name == dtypes.STRING or shape is None:
        return None
    return Snapshot(dtype=name, array=np.broadcast_to(np.zeros((), stored), tuple(shape)))


def _from_object(name: str, value: object, empty: Empty | None) -> Snapshot:
    if is_torch(value):
        return from_torch(name, value, empty)
    if isinstance(value, str):
        return from_strings(name, value, (), value)
    if isinstance(value, complex):
        return Snapshot(dtype="complex128", array=np.array(value, _COMPLEX128))
    if isinstance(value, np.ma.MaskedArray):
        return from_masked(name, value)
    if isinstance(value, np.ndarray):
        return from_array(name, value)
    if isinstance(value, bytes):
        raise refusal(name, value, "is no tensor", HINTS["S"])
    if _has(value, "__array__", "__array_interface__", "__dlpack__") or _is_buffer(value):
        return _from_protocol(name, value)
    if isinstance(value, Sequence):
        return _from_sequence(name, value)
    if value is None:
        raise refusal(name, value, "is no value", "leave the name out of this call")
    if isinstance(value, dict):
        hint = "log its items under names of their own, for instance 'outer/inner'"
        raise refusal(name, value, "is no tensor", hint)
    hint = "log a number, a str, or something that NumPy makes an array of"
    raise refusal(name, value, "is no tensor", hint)


# --- the other arguments of `log` ----------------------------------------------


def check_name(name: object) -> str:
    """Give the name of a tensor as a plain `str`.

    Raises
    ------
    ArgumentError
        It is no `str`, empty, longer than 1,024 bytes of UTF-8, or has a lone surrogate.
    """
    if not isinstance(name, str):
        raise ArgumentError(
            f"the name of a tensor is a str, not {type(name).__qualname__}: {name!r}",
            argument="name",
            type=type(name).__qualname__,
        )
    plain = plain_str(name)
    try:
        nbytes = len(plain) if plain.isascii() else len(plain.encode())
    except UnicodeEncodeError:
        raise ArgumentError(
            f"the name {plain!r} has a lone surrogate, which is not text", argument="name"
        ) from None
    if not 1 <= nbytes <= layout.MAX_NAME_NBYTES:
        raise ArgumentError(
            f"the name of a tensor has 1 to {layout.MAX_NAME_NBYTES} bytes of UTF-8, "
            f"not {nbytes}: {plain[:80]!r}",
            argument="name",
            nbytes=nbytes,
        )
    return plain


def check_step(step: object) -> int:
    """Give a step as an `int`; anything that stands for an integer will do, but no bool.

    Raises
    ------
    ArgumentError
        It is no integer, negative, or greater than the format can hold.
    """
    if type(step) is int:
        number = step
    else:
        is_bool = isinstance(step, bool) or str(getattr(step, "dtype", "")).endswith("bool")
        try:
            number = operator.index(step)  # type: ignore[arg-type] # the except is the check
        except Exception as error:
            raise _not_a_step(step) from error
        if is_bool:
            raise _not_a_step(step)
    if not 0 <= number <= layout.MAX_STEP:
        raise ArgumentError(
            f"a step lies between 0 and {layout.MAX_STEP}, not at {number}",
            argument="step",
            step=number,
        )
    return number


def _not_a_step(step: object) -> ArgumentError:
    kind = type(step).__qualname__
    return ArgumentError(f"a step is an integer, not {kind}: {step!r}", argument="step", type=kind)


_MODE_NUMBERS: Final = {mode: number for number, mode in enumerate(layout.MODES)}


def check_mode(mode: object) -> int:
    """Give the number of a mode: None, or TRAIN, EVAL, PREDICT in any case.

    Raises
    ------
    ArgumentError
        It is something else.
    """
    if mode is None or type(mode) is str:
        number = _MODE_NUMBERS.get(mode)
        if number is not None:
            return number
    if isinstance(mode, str):
        number = _MODE_NUMBERS.get(plain_str(mode).upper())
        if number is not None:
            return number
    known = ", ".join(repr(known) for known in layout.MODES)
    raise ArgumentError(f"a mode is one of {known}, not {mode!r}", argument="mode")
