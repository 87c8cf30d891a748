"""``.safetensors`` files, written without the package of that name.

The container is eight bytes with the length of a JSON header, the header, the bytes of the
tensors. The package's NumPy writer wants all tensors in memory at once, and users of the other
formats need not install it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO, Final

import numpy as np

from tensorstore_fmt import dtypes
from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.interop.items import Item

__all__ = ["DTYPES", "write_safetensors"]

DTYPES: Final[dict[str, str]] = {
    "bool": "BOOL",
    "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
"""Names of dtypes, ours to those of safetensors."""

_METADATA: Final = "__metadata__"
_MAX_HEADER_NBYTES: Final = 100_000_000  # readers refuse more


def write_safetensors(
    file: BinaryIO,
    items: Sequence[Item],
    on_piece: Callable[[int], None],
    *,
    metadata: Mapping[str, str],
) -> None:
    """Write arrays by name, the widest elements first, so that all are aligned.

    Raises
    ------
    ArgumentError
        A name the format keeps for itself, or too many names for its header.
    """
    ordered = sorted(items, key=lambda item: (-dtypes.itemsize(item.dtype), item.name))
    header: dict[str, object] = {_METADATA: dict(metadata)}
    offset = 0
    for item in ordered:
        if item.name == _METADATA:
            raise ArgumentError(
                f"a tensor in a .safetensors file cannot be called {_METADATA}", name=item.name
            )
        header[item.name] = {
            "dtype": DTYPES[item.dtype],
            "shape": list(item.shape),
            "data_offsets": [offset, offset + item.nbytes],
        }
        offset += item.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER_NBYTES:
        raise ArgumentError(
            f"{len(items):,} names make a header of {len(text):,} bytes, and .safetensors allows "
            f"{_MAX_HEADER_NBYTES:,}; export fewer at once (--names)"
        )
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for item in ordered:
        written = 0
        for read in item.arrays():
            array = read()
            file.write(array.reshape(-1).view(np.uint8).data)
            written += array.nbytes
            on_piece(array.nbytes)
        assert written == item.nbytes, f"{item.name}: {written} bytes, {item.nbytes} announced"
