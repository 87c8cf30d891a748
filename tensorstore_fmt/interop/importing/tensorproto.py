"""TensorProto messages, as smdebug and TensorBoard write them, to NumPy arrays."""

from __future__ import annotations

import math
from typing import Any, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt.errors import FormatError, UnsupportedError
from tensorstore_fmt.format import layout
from tensorstore_fmt.interop.importing.wire import Value, fields, packed_varints, signed

__all__ = ["Strings", "decode_tensor"]

Strings = list[bytes]

_STRING: Final = 7

# Numbers of TensorFlow's enum of dtypes. Quantised ones have no meaning without their scale.
_DTYPES: Final[dict[int, np.dtype[Any]]] = {
    number: np.dtype(dtype)
    for number, dtype in {
        1: np.float32, 2: np.float64, 3: np.int32, 4: np.uint8, 5: np.int16, 6: np.int8,
        8: np.complex64, 9: np.int64, 10: np.bool_, 14: ml_dtypes.bfloat16, 17: np.uint16,
        18: np.complex128, 19: np.float16, 22: np.uint32, 23: np.uint64,
        24: ml_dtypes.float8_e5m2, 25: ml_dtypes.float8_e4m3fn,
        26: ml_dtypes.float8_e4m3fnuz, 27: ml_dtypes.float8_e4m3b11fnuz,
        28: ml_dtypes.float8_e5m2fnuz, 29: ml_dtypes.int4, 30: ml_dtypes.uint4,
    }.items()
}  # fmt: skip

_MAX_FILLED_NBYTES: Final = 64 * 1024 * 1024  # from one value, by its shape alone

# Fields with the elements one by one: what one of them is made of.
_FIXED: Final = {5: "<f4", 6: "<f8", 9: "<c8", 12: "<c16"}
_VARINTS: Final = (7, 10, 11, 13, 16, 17)
_FLOAT8_BYTES: Final = 18


def decode_tensor(message: memoryview) -> tuple[NDArray[Any] | Strings, tuple[int, ...]]:
    """Decode a tensor.

    Returns
    -------
    array or list of bytes, shape
        An array of that shape, which may share the message's memory; or the elements of a tensor
        of strings, in C order. Strings without a shape are one row.

    Raises
    ------
    FormatError
        It is no such message, or its shape does not fit its content.
    UnsupportedError
        Code ``unknown_dtype``.
    """
    number, content = 0, None
    shape: tuple[int, ...] | None = None
    strings: Strings = []
    elements: dict[int, list[Value]] = {}
    for field, value in fields(message):
        if field == 1 and isinstance(value, int):
            number = value
        elif field == 2 and isinstance(value, memoryview):
            shape = _shape(value)
        elif field == 4 and isinstance(value, memoryview):
            content = value
        elif field == 8 and isinstance(value, memoryview):
            strings.append(bytes(value))
        elif field in _FIXED or field in _VARINTS or field == _FLOAT8_BYTES:
            elements.setdefault(field, []).append(value)
    if number == _STRING or (number == 0 and strings):
        return _strings(strings, shape)
    dtype = _DTYPES.get(number)
    if dtype is None:
        raise UnsupportedError(
            f"a tensor of the dtype {number} of TensorFlow's enum, which cannot be stored here",
            code="unknown_dtype",
            dtype=number,
        )
    shape = shape or ()
    if content is not None and len(content):
        return _from_content(content, dtype, shape), shape
    return _from_elements(elements, dtype, shape), shape


def _shape(message: memoryview) -> tuple[int, ...]:
    shape = []
    for field, value in fields(message):
        if field == 2 and isinstance(value, memoryview):
            sizes = [v for f, v in fields(value) if f == 1 and isinstance(v, int)]
            shape.append(signed(sizes[-1]) if sizes else 0)
        elif field == 3 and value:
            raise FormatError("a tensor of unknown shape")
    if len(shape) > layout.MAX_RANK or any(not 0 <= n <= layout.MAX_AXIS for n in shape):
        raise FormatError(f"a tensor of the shape {shape[:40]}", code="limit")
    return tuple(shape)


def _strings(strings: Strings, shape: tuple[int, ...] | None) -> tuple[Strings, tuple[int, ...]]:
    shape = (len(strings),) if shape is None else shape
    if math.prod(shape) != len(strings):
        raise FormatError(f"{len(strings)} strings for the shape {shape}")
    return strings, shape


def _from_content(content: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Any:  # noqa: ANN401 - an array
    if math.prod(shape) * dtype.itemsize != len(content):
        raise FormatError(f"{len(content)} bytes for the shape {shape} of {dtype}")
    if dtype == np.bool_:  # any byte but 0 is True; NumPy wants 1
        return (np.frombuffer(content, np.uint8) != 0).reshape(shape)
    return np.frombuffer(content, dtype.newbyteorder("<")).reshape(shape)


def _from_elements(
    elements: dict[int, list[Value]], dtype: np.dtype[Any], shape: tuple[int, ...]
) -> Any:  # noqa: ANN401 - an array
    size = math.prod(shape)
    parts: list[NDArray[Any]] = []
    for field, values in elements.items():
        parts += [_part(field, value, dtype) for value in values]
    flat = np.concatenate(parts) if parts else np.empty(0, dtype)
    if len(flat) == size:
        return flat.reshape(shape)
    if len(flat) > size:
        raise FormatError(f"{len(flat)} elements for the shape {shape}")
    if size * dtype.itemsize > _MAX_FILLED_NBYTES:
        raise FormatError(f"{len(flat)} elements to fill the shape {shape}", code="limit")
    # The last element stands for all that follow; none at all are zeros.
    filled = np.zeros(size, dtype)
    filled[: len(flat)] = flat
    if len(flat):
        filled[len(flat) :] = flat[-1]
    return filled.reshape(shape)


def _part(field: int, value: Value, dtype: np.dtype[Any]) -> NDArray[Any]:
    if field in _FIXED:
        kind = np.dtype(_FIXED[field])
        if isinstance(value, int) or len(value) % kind.itemsize:
            raise FormatError(f"elements in field {field} of a tensor that are no {kind}")
        if kind.kind == "c":  # as pairs of floats
            floats = np.frombuffer(value, "<f4" if kind.itemsize == 8 else "<f8")
            return floats.view(kind).astype(dtype)
        return np.frombuffer(value, kind).astype(dtype)
    if field == _FLOAT8_BYTES and isinstance(value, memoryview):
        return np.frombuffer(value, np.uint8).view(dtype)
    numbers = np.array([value], np.uint64) if isinstance(value, int) else packed_varints(value)
    if field != 13:
        return numbers.view(np.int64).astype(dtype)
    if dtype.itemsize != 2:
        raise FormatError(f"bits of a half type in a tensor of {dtype}")
    return numbers.astype(np.uint16).view(dtype)
