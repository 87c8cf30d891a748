"""From tensors of a run to the items of a file: which steps, and pieces that fit memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, TypedDict

import numpy as np

from tensorstore_fmt import dtypes
from tensorstore_fmt.errors import ArgumentError, StepNotFoundError
from tensorstore_fmt.interop.items import Array, Item
from tensorstore_fmt.reading.steps import Steps, step_set

if TYPE_CHECKING:
    from tensorstore_fmt.reading.run import Run
    from tensorstore_fmt.reading.tensor import Tensor

__all__ = ["Step", "Where", "common_step", "item_at", "narrowed", "saved_steps", "stacked"]

Step: TypeAlias = int | Literal["first", "last"]

_SHOWN: Final = 8
_SMALL_NBYTES: Final = 512  # on average over its steps
_PIECE_NBYTES: Final = 32 * 1024 * 1024


class Where(TypedDict, total=False):
    """What to take where several saved the same name; as `Tensor.select`."""

    mode: str | None
    worker: int | None
    attempt: int | None


def narrowed(run: Run, name: str, where: Where) -> Tensor:
    """Give a tensor, narrowed to what was saved of it.

    Raises
    ------
    NameNotFoundError
        The run has no such name.
    ArgumentError
        Code ``empty_selection``: nothing of it was saved there; names where it was.
    """
    tensor = run[name]
    part = tensor.select(**where)
    try:
        part.modes  # noqa: B018 - raises if there are none
    except ArgumentError as error:
        if error.code != "empty_selection":
            raise
        asked = ", ".join(f"{key} {value}" for key, value in where.items() if value is not None)
        raise ArgumentError(
            f"{name!r} was not saved in {asked}; it was in the modes {', '.join(tensor.modes)}, "
            f"by the workers {_list(tensor.workers)}, in the attempts {_list(tensor.attempts)}",
            code=error.code,
            name=name,
        ) from None
    return part


def _list(numbers: Sequence[int]) -> str:
    more = " …" if len(numbers) > _SHOWN else ""
    return ", ".join(map(str, numbers[:_SHOWN])) + more


def common_step(tensors: Sequence[Tensor], step: Step) -> int:
    """Give a step as a number: with a word, the first or last that all tensors have.

    Raises
    ------
    StepNotFoundError
        They have none in common.
    """
    if not isinstance(step, str):
        return step
    common = tensors[0].steps if tensors else np.empty(0, np.int64)
    for tensor in tensors[1:]:
        common = np.intersect1d(common, tensor.steps)
    if not len(common):
        what = (
            f"{tensors[0].name!r} has no saved step"
            if len(tensors) == 1
            else f"no step has all of the {len(tensors)} names; give a step number, or fewer names"
        )
        raise StepNotFoundError(what)
    return int(common[0 if step == "first" else -1])


def saved_steps(tensor: Tensor, steps: Steps) -> list[int]:
    """Give the saved steps that are meant, at least one.

    Raises
    ------
    NotThereError
        None was saved.
    """
    saved = tensor.steps
    found: list[int] = saved[step_set(steps).of_saved(saved)].tolist()
    if not found:
        tensor.read(steps=steps)  # raises if it knows why
        near = f"; it has {len(saved)} from {saved[0]} to {saved[-1]}" if len(saved) else ""
        raise StepNotFoundError(
            f"{tensor.name!r}: no step was saved in this range{near}", name=tensor.name
        )
    return found


def item_at(tensor: Tensor, step: int) -> Item:
    """Give a tensor at one step; a small one is read at once, others when they are written."""
    if tensor.nbytes <= _SMALL_NBYTES * tensor.step_summary[0]:
        value = tensor.read(step=step)
        small: Array = np.asarray(value, object if isinstance(value, str) else None)
        return Item(
            name=tensor.name,
            dtype=_dtype_name(small),
            shape=small.shape,
            pieces=lambda: [lambda: small],
        )
    shape = tensor.shape_at(step)
    return Item(
        name=tensor.name,
        dtype=_dtype_at(tensor, step, len(shape)),
        shape=shape,
        pieces=lambda: [lambda: tensor.read(step=step)],
    )


def stacked(tensor: Tensor, steps: Sequence[int]) -> Item:
    """Give a tensor at several steps, stacked along a new first axis."""
    shape = tensor.shape_at(steps[0])
    dtype = _dtype_at(tensor, steps[0], len(shape))
    step_nbytes = max(1, dtypes.itemsize(dtype) * math.prod(shape))
    count = max(1, _PIECE_NBYTES // step_nbytes)

    def piece(some: Sequence[int]) -> Callable[[], Array]:
        def read() -> Array:
            array: Array = tensor.read(steps=some)
            if array.shape[1:] != shape:
                raise ArgumentError(
                    f"{tensor.name!r} has shape {shape} at step {steps[0]} and "
                    f"{array.shape[1:]} at step {some[0]}; such steps cannot be stacked",
                    code="shape_varies",
                    name=tensor.name,
                )
            return array

        return read

    return Item(
        name=tensor.name,
        dtype=dtype,
        shape=(len(steps), *shape),
        pieces=lambda: [piece(steps[i : i + count]) for i in range(0, len(steps), count)],
    )


def _dtype_at(tensor: Tensor, step: int, rank: int) -> str:
    """Give the dtype at a step, which need not be that of the last one; reads no element."""
    nothing = np.asarray(tensor.read(step=step, index=(slice(0, 0),) * rank))
    return _dtype_name(nothing)


def _dtype_name(array: Array) -> str:
    return dtypes.STRING if array.dtype.kind in "OUT" else dtypes.dtype_name(array.dtype)
