"""Reading ``.safetensors`` files, tensor by tensor, without the package of that name."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt import dtypes
from tensorstore_fmt.errors import FormatError, TruncatedError, UnsupportedError
from tensorstore_fmt.format import layout
from tensorstore_fmt.interop.safetensors import DTYPES
from tensorstore_fmt.storage.foreign import ForeignFolder

__all__ = ["read"]

_NAMES: Final = {theirs: ours for ours, theirs in DTYPES.items()}
_METADATA: Final = "__metadata__"
_MAX_HEADER_NBYTES: Final = 100_000_000  # the package refuses more


def read(
    folder: ForeignFolder, path: str, nbytes: int
) -> Iterator[tuple[str, NDArray[Any] | FormatError]]:
    """Iterate over the tensors of a file, in the order of their bytes.

    Raises
    ------
    FormatError
        It is no such file.
    """
    head = folder.read(path, 0, 8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > min(_MAX_HEADER_NBYTES, nbytes - 8):
        raise FormatError(f"no .safetensors file: a header of {length} bytes in {nbytes}")
    try:
        header = json.loads(folder.read(path, 8, length))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"its header is no JSON: {error}") from None
    if not isinstance(header, dict):
        raise FormatError("its header is no object")
    header.pop(_METADATA, None)
    begin = 8 + length
    places: list[tuple[int, int, str]] = []
    for name, row in header.items():
        try:
            start, stop = (int(offset) for offset in row["data_offsets"])
        except (KeyError, TypeError, ValueError):
            yield name, FormatError("its header does not say where it lies")
            continue
        places.append((start, stop, name))
    for start, stop, name in sorted(places):
        try:
            dtype, shape = _described(header[name])
            if not 0 <= start <= stop or stop - start != math.prod(shape) * dtype.itemsize:
                raise FormatError(f"bytes {start} to {stop} for the shape {shape} of {dtype}")
            if begin + stop > nbytes:
                raise TruncatedError(f"it ends at byte {begin + stop}, the file at {nbytes}")
        except FormatError as error:
            yield name, error
            continue
        data = folder.read(path, begin + start, stop - start)
        if len(data) != stop - start:
            yield name, TruncatedError("the file became shorter while it was read")
            continue
        if dtype == np.bool_:
            yield name, (np.frombuffer(data, np.uint8) != 0).reshape(shape)
        else:
            yield name, np.frombuffer(data, dtype).reshape(shape)


def _described(row: dict[str, Any]) -> tuple[np.dtype[Any], tuple[int, ...]]:
    kind, shape = row.get("dtype"), row.get("shape")
    if kind not in _NAMES:
        raise UnsupportedError(f"the dtype {kind}", code="unknown_dtype")
    if (
        not isinstance(shape, list)
        or len(shape) > layout.MAX_RANK
        or not all(isinstance(n, int) and 0 <= n <= layout.MAX_AXIS for n in shape)
    ):
        raise FormatError(f"the shape {shape!r:.100}")
    return dtypes.numpy_dtype(_NAMES[kind]), tuple(shape)
