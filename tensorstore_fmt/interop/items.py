"""Tensors on their way into a file of another format: what they are, and fitting them in."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt import dtypes
from tensorstore_fmt.errors import ArgumentError

__all__ = ["Array", "Cast", "Item", "fit"]

Array: TypeAlias = NDArray[Any]
Cast: TypeAlias = Literal["float32", "bits"]

_PLAIN_FLOATS: Final = frozenset({"float16", "float32", "float64"})
_SHOWN: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One array to be written.

    Attributes
    ----------
    name
        Its key in the file.
    dtype
        Its stored name (`dtypes.NAMES`).
    shape
        Of all of it.
    pieces
        Reads it: arrays that follow each other along the first axis, or one whole array.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Sequence[Callable[[], Array]]]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array; of strings, nobody knows before reading them."""
        return math.prod(self.shape) * dtypes.itemsize(self.dtype)

    def arrays(self) -> list[Callable[[], Array]]:
        """Give the pieces, each read when called: C order, little-endian, checked."""
        expected = dtypes.numpy_dtype(self.dtype)

        def checked(piece: Callable[[], Array]) -> Callable[[], Array]:
            def read() -> Array:
                array = np.asarray(piece(), object if self.dtype == dtypes.STRING else None)
                if array.dtype.newbyteorder("=") != expected.newbyteorder("="):
                    raise ArgumentError(
                        f"{self.name!r} is {array.dtype} in some steps and {self.dtype} in others; "
                        "export them apart",
                        name=self.name,
                    )
                return np.ascontiguousarray(array, expected).reshape(array.shape)

            return read

        return [checked(piece) for piece in self.pieces()]


def fit(
    items: Sequence[Item], known: Collection[str], cast: Cast | None, *, file_format: str
) -> list[Item]:
    """Convert what the file format has no dtype for, as far as the caller asked for it.

    Raises
    ------
    ArgumentError
        Code ``unfit_dtype``: names the tensors, and what can be done.
    """
    fitted = [item if item.dtype in known else _cast(item, known, cast) for item in items]
    unfit = [item for item, made in zip(items, fitted, strict=True) if made is None]
    if unfit:
        shown = ", ".join(f"{item.name!r} ({item.dtype})" for item in unfit[:_SHOWN])
        more = f" and {len(unfit) - _SHOWN} more" if len(unfit) > _SHOWN else ""
        raise ArgumentError(
            f"{file_format} files have no dtype for {shown}{more}; {_advice(unfit, known)}",
            code="unfit_dtype",
            names=[item.name for item in unfit],
            dtypes=sorted({item.dtype for item in unfit}),
        )
    return [made for made in fitted if made is not None]


def _advice(unfit: Sequence[Item], known: Collection[str]) -> str:
    ways = []
    if all(_cast(item, known, "float32") for item in unfit):
        ways.append("store them as float32, which holds each of their values (--cast float32)")
    if all(_cast(item, known, "bits") for item in unfit):
        ways.append("as unsigned integers with the same bits (--cast bits)")
    return " or ".join(ways) or "choose other names (--names)"


def _cast(item: Item, known: Collection[str], cast: Cast | None) -> Item | None:
    """Give the item with a dtype that the format has; None if that would lose something."""
    if item.dtype == dtypes.STRING or cast is None:
        return None
    if cast == "float32":
        is_small = dtypes.itemsize(item.dtype) <= 2 and not dtypes.is_complex(item.dtype)
        if not is_small or item.dtype in _PLAIN_FLOATS or "float32" not in known:
            return None
        return replace(item, dtype="float32", pieces=_converted(item, _as_float32))
    name = f"uint{8 * dtypes.itemsize(item.dtype)}"
    if name not in known:
        return None
    return replace(item, dtype=name, pieces=_converted(item, _as_bits))


def _converted(
    item: Item, convert: Callable[[Array], Array]
) -> Callable[[], list[Callable[[], Array]]]:
    def pieces() -> list[Callable[[], Array]]:
        return [lambda read=read: convert(read()) for read in item.arrays()]  # type: ignore[misc]

    return pieces


def _as_float32(array: Array) -> Array:
    return array.astype(np.float32)


def _as_bits(array: Array) -> Array:
    flat = array.reshape(-1)
    return flat.view(f"<u{array.dtype.itemsize}").reshape(array.shape)
