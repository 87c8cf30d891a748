"""Snapshots: what a caller logs, as an array that the writer owns.

`snapshot` makes exactly one copy, in the caller's thread, and nothing else: after it
returns the caller may change or free what it passed. No framework is imported here;
one that the caller did not import cannot have made the value.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from tensorstore_fmt import dtypes
from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.format import layout

__all__ = ["Snapshot", "check_mode", "check_name", "check_step", "snapshot"]


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

_POOLED_NBYTES: Final = 64 * 1024


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


_KNOWN: Final = _known_dtypes()

_HINTS: Final = {
    "O": "give it numbers of one dtype, or str only",
    "M": "log it as numbers, for instance .astype('int64')",
    "m": "log it as numbers, for instance .astype('int64')",
    "V": "log each field under a name of its own",
    "S": "decode it to str, or log np.frombuffer(value, np.uint8)",
    "f": "log it as float64: .astype(np.float64)",
    "c": "log it as complex128: .astype(np.complex128)",
}


def _refusal(name: str, value: object, problem: str, hint: str, **facts: object) -> ArgumentError:
    kind = type(value)
    where = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    type_name = f"{where}{kind.__qualname__}"
    message = f"{name!r} cannot be logged: {type_name} {problem}; {hint}"
    return ArgumentError(message, code=None, name=name, type=type_name, **facts)


def _check_shape(name: str, value: object, shape: tuple[int, ...]) -> None:
    if len(shape) > layout.MAX_RANK:
        problem = f"has {len(shape)} axes, the format takes {layout.MAX_RANK}"
        raise _refusal(name, value, problem, "reshape it first", shape=shape)
    # NumPy allows such a length only in an array that has no elements.
    if 0 in shape and max(shape) > layout.MAX_AXIS:
        problem = f"has an axis longer than {layout.MAX_AXIS}"
        raise _refusal(name, value, problem, "reshape it first", shape=shape)


def _from_array(
    name: str,
    array: np.ndarray,
    *,
    value: object = None,
    is_ours: bool = False,
    empty: Empty | None = None,
) -> Snapshot:
    """Copy a NumPy array; `is_ours` says that nobody else holds it, so it need not be copied."""
    value = array if value is None else value
    known = _KNOWN.get(array.dtype)
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
    if empty is not None and array.nbytes >= _POOLED_NBYTES:
        out = empty(array.shape, stored)
        np.copyto(out, array, casting="equiv")
        return Snapshot(dtype=stored_name, array=out)
    return Snapshot(dtype=stored_name, array=array.astype(stored, order="C", subok=False))


def _from_other_array(name: str, array: np.ndarray, value: object) -> Snapshot:
    kind = array.dtype.kind
    if kind in "UT":
        return _from_strings(name, array.tolist(), array.shape, value)
    if kind == "O":
        items = array.ravel().tolist()
        if items and all(isinstance(item, str) for item in items):
            return _from_strings(name, array.tolist(), array.shape, value)
    hint = _HINTS.get(kind, f"convert it to one of: {', '.join(dtypes.NAMES)}")
    problem = f"of dtype {array.dtype} has no place in the format"
    raise _refusal(name, value, problem, hint, dtype=str(array.dtype))


def _from_masked(name: str, array: np.ma.MaskedArray[Any, Any]) -> Snapshot:
    if np.ma.is_masked(array):
        hint = "fill the masked elements first: .filled(value)"
        raise _refusal(name, array, "has masked elements", hint)
    return _from_array(name, array.data, value=array)


# --- strings ------------------------------------------------------------------


def _plain_str(item: str) -> str:
    # The value, not what a subclass (an Enum) shows as its text.
    return item if type(item) is str else str.__str__(item)


def _from_strings(name: str, items: object, shape: tuple[int, ...], value: object) -> Snapshot:
    if len(shape) > 1:
        hint = "strings are single or in one row: log .ravel(), or each row under its own name"
        raise _refusal(name, value, f"has strings in {len(shape)} axes", hint, shape=shape)
    flat: list[object] = items if isinstance(items, list) else [items]
    strings = [_plain_str(item) for item in flat if isinstance(item, str)]
    if len(strings) != len(flat):
        other = next(item for item in flat if not isinstance(item, str))
        problem = f"has an element that is no str: {type(other).__qualname__}"
        raise _refusal(name, value, problem, "replace missing strings first, for instance by ''")
    joined = "".join(strings)
    try:
        nbytes = len(joined) if joined.isascii() else len(joined.encode())
    except UnicodeEncodeError:
        hint = "encode it with errors='surrogateescape' and log the bytes as uint8"
        raise _refusal(name, value, "has a lone surrogate, which is not text", hint) from None
    if nbytes > layout.MAX_CHUNK_RAW_NBYTES - 8:  # one element needs two offsets beside it
        longest = max(len(string.encode()) for string in strings)
        if longest > layout.MAX_CHUNK_RAW_NBYTES - 8:
            problem = f"has a string of {longest} bytes, more than a chunk holds"
            raise _refusal(name, value, problem, "log it as a uint8 array", nbytes=longest)
    array = np.empty(shape, object)
    array[...] = strings if shape else strings[0]
    return Snapshot(dtype=dtypes.STRING, array=array)


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
    raise _refusal(name, value, "does not fit 64 bits", "log it as float, or as str")


def _from_sequence(name: str, value: Sequence[object]) -> Snapshot:
    if len(value) > 0 and isinstance(value[0], str):
        return _from_strings(name, list(value), (len(value),), value)
    try:
        array = np.asarray(value)
    except MemoryError:
        raise
    except Exception as error:
        problem = f"does not make one array ({error})"
        hint = "log parts of different shapes or kinds under names of their own"
        raise _refusal(name, value, problem, hint) from error
    if array.dtype.kind == "U":  # NumPy turns numbers beside strings into text
        hint = "strings are single or in one row, without numbers among them"
        raise _refusal(name, value, "mixes strings and numbers, or nests strings", hint)
    if array.dtype == _FLOAT64 and array.size > 0:
        _check_large_integers(name, value, array)
    # NumPy has just made it, unless a subclass handed out an array of its own.
    return _from_array(name, array, value=value, is_ours=type(value) in (list, tuple, range))


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
            raise _refusal(name, value, f"has an integer that float64 rounds: {item}", hint)


# --- torch --------------------------------------------------------------------

_TORCH_PLAIN: Final = frozenset(
    f"torch.{name}" for name in dtypes.NAMES[: dtypes.NAMES.index("bfloat16")]
)
# NumPy does not know these: the bits go over as integers of the same size.
_TORCH_BITS: Final = {
    "torch.bfloat16": ("int16", "bfloat16"),
    "torch.float8_e4m3fn": ("uint8", "float8_e4m3fn"),
    "torch.float8_e4m3fnuz": ("uint8", "float8_e4m3fnuz"),
    "torch.float8_e5m2": ("uint8", "float8_e5m2"),
    "torch.float8_e5m2fnuz": ("uint8", "float8_e5m2fnuz"),
    "torch.float8_e8m0fnu": ("uint8", "float8_e8m0fnu"),
}
_TORCH_HINTS: Final = {
    "torch.complex32": "log value.to(torch.complex64)",
    "torch.float4_e2m1fn_x2": "two elements share a byte: log value.view(torch.uint8)",
}


def _is_torch(value: object) -> bool:
    tensor_type = getattr(sys.modules.get("torch"), "Tensor", None)
    return tensor_type is not None and isinstance(value, tensor_type)


def _check_torch(name: str, value: Any) -> None:  # noqa: ANN401 - torch may not be installed here
    """Refuse tensors that have no elements to copy, or more than one way to read them."""
    dtype = str(value.dtype)
    # A DTensor would give this rank's piece where the caller reads the whole.
    if type(value).__name__ == "DTensor":
        hint = "log value.to_local() as a part, or value.full_tensor()"
        raise _refusal(name, value, "is spread over several processes", hint, dtype=dtype)
    if value.is_quantized:
        hint = "log value.int_repr(), or value.dequantize()"
        raise _refusal(name, value, f"is quantized ({dtype})", hint, dtype=dtype)
    if value.is_nested:
        hint = "log value.values() and value.offsets(), or each of value.unbind()"
        raise _refusal(name, value, "is nested", hint, dtype=dtype)
    if str(value.layout) != "torch.strided":
        hint = "log value.to_dense(), or its indices and values under names of their own"
        raise _refusal(name, value, f"has the layout {value.layout}", hint, dtype=dtype)
    if value.device.type == "meta":
        raise _refusal(name, value, "is on the meta device", "it has no elements", dtype=dtype)
    if dtype not in _TORCH_PLAIN and dtype not in _TORCH_BITS:
        hint = _TORCH_HINTS.get(dtype, "convert it first, for instance .float()")
        raise _refusal(name, value, f"has the dtype {dtype}", hint, dtype=dtype)


def _from_torch(name: str, value: object, empty: Empty | None) -> Snapshot:
    _check_torch(name, value)
    torch: Any = sys.modules["torch"]
    tensor: Any = value
    tensor = tensor.detach()
    is_ours = False
    if tensor.device.type != "cpu":
        # Not .cpu(): that keeps the order of the axes in memory, and C order would be a second
        # copy. A failure of the device is not the caller's argument: it passes through.
        tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor)
        is_ours = True
    if tensor.is_conj() or tensor.is_neg():  # bits that say "conjugate me", "negate me" later
        tensor = tensor.resolve_conj().resolve_neg()
        is_ours = True
    bits, stored = _TORCH_BITS.get(str(tensor.dtype), (None, None))
    try:
        if bits is None or stored is None:
            array = tensor.numpy()
        else:
            array = tensor.view(getattr(torch, bits)).numpy().view(dtypes.numpy_dtype(stored))
    except MemoryError:
        raise
    except Exception as error:
        problem = f"cannot be read ({error})"
        raise _refusal(name, value, problem, "log a plain torch.Tensor") from error
    return _from_array(name, array, value=value, is_ours=is_ours, empty=empty)


# --- everything else -----------------------------------------------------------


def _from_protocol(name: str, value: object) -> Snapshot:
    """Take what shows its elements through a protocol: ``__array__``, a buffer, DLPack.

    JAX comes here: its ``__array__`` knows bfloat16, NumPy's DLPack does not.
    """
    foreign: Any = value
    problems = []
    if _has(value, "__array__", "__array_interface__", "__buffer__") or _is_buffer(value):
        try:
            return _from_array(name, np.asarray(foreign), value=value)
        except (ArgumentError, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - a stranger's __array__ raises what it likes
            problems.append(error)
    if _has(value, "__dlpack__"):
        try:
            return _from_array(name, _from_dlpack(foreign), value=value)
        except (ArgumentError, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - the same for __dlpack__
            problems.append(error)
    problem = "cannot be read" + "".join(f" ({error})" for error in problems)
    hint = "copy it to a NumPy array first (outside jit, from all devices to the host)"
    raise _refusal(name, value, problem, hint) from problems[-1]


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
        return _from_array(name, value, empty=empty)  # type: ignore[arg-type] # `is` does not narrow
    if isinstance(value, np.generic) and not isinstance(value, np.str_):
        return _from_array(name, np.asarray(value), value=value, is_ours=True)
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
        name, stored = _KNOWN.get(dtype, ("", dtype))
    else:
        name = str(dtype).rpartition(".")[2]  # torch.float32
        stored = dtypes.numpy_dtype(name) if name in dtypes.NAMES else np.dtype(bool)
    if name not in dtypes.NAMES or name == dtypes.STRING or shape is None:
        return None
    return Snapshot(dtype=name, array=np.broadcast_to(np.zeros((), stored), tuple(shape)))


def _from_object(name: str, value: object, empty: Empty | None) -> Snapshot:
    if _is_torch(value):
        return _from_torch(name, value, empty)
    if isinstance(value, str):
        return _from_strings(name, value, (), value)
    if isinstance(value, complex):
        return Snapshot(dtype="complex128", array=np.array(value, _COMPLEX128))
    if isinstance(value, np.ma.MaskedArray):
        return _from_masked(name, value)
    if isinstance(value, np.ndarray):
        return _from_array(name, value)
    if isinstance(value, bytes):
        raise _refusal(name, value, "is no tensor", _HINTS["S"])
    if _has(value, "__array__", "__array_interface__", "__dlpack__") or _is_buffer(value):
        return _from_protocol(name, value)
    if isinstance(value, Sequence):
        return _from_sequence(name, value)
    if value is None:
        raise _refusal(name, value, "is no value", "leave the name out of this call")
    if isinstance(value, dict):
        hint = "log its items under names of their own, for instance 'outer/inner'"
        raise _refusal(name, value, "is no tensor", hint)
    hint = "log a number, a str, or something that NumPy makes an array of"
    raise _refusal(name, value, "is no tensor", hint)


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
    plain = _plain_str(name)
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
        number = _MODE_NUMBERS.get(_plain_str(mode).upper())
        if number is not None:
            return number
    known = ", ".join(repr(known) for known in layout.MODES)
    raise ArgumentError(f"a mode is one of {known}, not {mode!r}", argument="mode")
