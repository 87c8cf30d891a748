"""``.npy`` and ``.npz`` files, written piece by piece."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, BinaryIO, Final, Protocol

import numpy as np

from tensorstore_fmt import dtypes
from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.interop.items import Array, Item

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

__all__ = ["DTYPES", "write_npy", "write_npz"]

# What `np.load` gives back with nothing but NumPy. Of the ml_dtypes NumPy 2 writes a type that
# loads as raw bytes ("V2"), and of float8_e5m2 one that does not load at all.
DTYPES: Final = frozenset(
    name for name in dtypes.NAMES if name == dtypes.STRING or hasattr(np, name) or name == "bool"
)


class _Sink(Protocol):
    def write(self, data: Buffer, /) -> object: ...


def write_npy(file: BinaryIO, item: Item, on_piece: Callable[[int], None]) -> None:
    """Write one array; `on_piece` is told the bytes of each piece written."""
    _write_array(file, item, on_piece)


def write_npz(file: BinaryIO, items: Sequence[Item], on_piece: Callable[[int], None]) -> None:
    """Write arrays by name, uncompressed as `numpy.savez` does.

    Raises
    ------
    ArgumentError
        A name that cannot be the name of a file in a ZIP archive.
    """
    for item in items:
        if "\0" in item.name:
            raise ArgumentError(
                f"{item.name!r} has a NUL character, which ends a name in .npz files",
                name=item.name,
            )
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for item in items:
            # The time of 1980 makes equal tensors equal files.
            entry = zipfile.ZipInfo(f"{item.name}.npy", (1980, 1, 1, 0, 0, 0))
            with archive.open(entry, "w", force_zip64=True) as sink:
                _write_array(sink, item, on_piece)


def _write_array(sink: _Sink, item: Item, on_piece: Callable[[int], None]) -> None:
    readers = item.arrays()
    if item.dtype == dtypes.STRING:
        text = _as_unicode(item, [read() for read in readers])
        dtype = text.dtype
        readers = [lambda: text]
    else:
        dtype = dtypes.numpy_dtype(item.dtype)
    header = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": item.shape,
    }
    np.lib.format.write_array_header_1_0(sink, header)
    size = 0
    for read in readers:
        array = read()
        size += array.size
        sink.write(array.reshape(-1).view(np.uint8).data)
        on_piece(array.nbytes)
    _check_size(item, size)


def _check_size(item: Item, size: int) -> None:
    expected = int(np.prod(item.shape, dtype=object))
    assert size == expected, f"{item.name}: {size} elements read, {expected} announced"


def _as_unicode(item: Item, pieces: Sequence[Array]) -> Array:
    array = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    text = array.astype(np.str_).reshape(item.shape)
    if not np.array_equal(text.astype(object), array):
        raise ArgumentError(
            f"{item.name!r} has strings with NUL at the end, which NumPy would drop", name=item.name
        )
    return text.astype(text.dtype.newbyteorder("<"))
