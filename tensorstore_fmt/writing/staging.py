"""Taking what is logged into the current generation; all under the writer's lock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from tensorstore_fmt import dtypes
from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.format import grid, layout
from tensorstore_fmt.format.strings import pack_strings
from tensorstore_fmt.writing.convert import Snapshot, check_name
from tensorstore_fmt.writing.options import WriterOptions
from tensorstore_fmt.writing.pending import Generation, InlineStage, JoinedStage, Save
from tensorstore_fmt.writing.series import Group, Kept, SeriesBook

__all__ = ["Part", "Staging", "Tensor", "check_box", "check_part", "flatten"]

_MAX_JOINED_STEPS: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A box of a larger tensor, as one worker of several holds it; pass it to `log` as a value.

    Attributes
    ----------
    value
        The box: anything `log` takes, of rank 1 or more.
    global_shape
        Shape of the whole tensor, in elements.
    origin
        Where in it the box begins, in elements.
    """

    value: object
    global_shape: tuple[int, ...]
    origin: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tensor:
    """One value of a `log` call, copied: its name, snapshot and part."""

    name: str
    snapshot: Snapshot
    global_shape: tuple[int, ...] = ()
    origin: tuple[int, ...] = ()


class Staging:
    """Sorts tensors into inline, joined and gridded ones.

    Parameters
    ----------
    send
        Takes a generation and a save that is ready for the encoders.
    """

    def __init__(self, options: WriterOptions, send: Callable[[Generation, Save], None]) -> None:
        self._book = SeriesBook(options)
        self._send = send
        self._floats: dict[tuple[int, str], Kept] = {}

    def plan(self, tensor: Tensor, mode: int) -> tuple[Kept, int]:
        """Give how a tensor will be kept and its raw bytes; refuses what cannot be stored."""
        array, dtype = tensor.snapshot.array, tensor.snapshot.dtype
        if dtype == dtypes.STRING:
            nbytes = _string_nbytes(array)
            if nbytes > layout.MAX_CHUNK_RAW_NBYTES:
                raise ArgumentError(
                    f"{tensor.name!r}: {nbytes:,} bytes of text in one value, at most "
                    f"{layout.MAX_CHUNK_RAW_NBYTES:,} are possible; log it in pieces",
                    name=tensor.name,
                )
        else:
            nbytes = array.nbytes
        group = self._book.group(tensor.name, mode, tensor.global_shape, tensor.origin)
        return self._book.kept(group, dtype, array.shape, nbytes), nbytes

    def float_stage(self, generation: Generation, name: str, mode: int) -> InlineStage:
        """Give the stage of a series of Python floats, which takes the short way."""
        kept = self._floats.get((mode, name))
        if kept is None:
            check_name(name)
            kept = self._book.kept(self._book.group(name, mode), "float64", (), 8)
            self._floats[mode, name] = kept
        stage = self._stage(generation, kept)
        generation.floats[mode, name] = stage
        return stage

    def add(
        self, generation: Generation, kept: Kept, tensor: Tensor, step: int, nbytes: int
    ) -> None:
        """Take one tensor at one step."""
        array = tensor.snapshot.array
        group = kept.group
        if step <= group.last_step:
            self.forget(generation, group, step)
        group.last_step = max(group.last_step, step)
        generation.raw_nbytes += nbytes
        if kept.storing == "inline":
            stage = self._stage(generation, kept)
            stage.steps.append(step)
            is_string = kept.series.dtype == dtypes.STRING
            stage.values.append(array.reshape(-1).tolist() if is_string else array.tobytes())
        elif kept.storing == "joined":
            self._join(generation, kept, array, step, nbytes)
        else:
            self._save(generation, Save(kept, [step], [array], nbytes))

    def is_shared(self, generation: Generation, kept: Kept, step: int) -> bool:
        """Say whether a chunk of this generation holds the step together with others.

        Then it cannot be taken back: the step has to be saved again by a later flush.
        """
        return step <= kept.group.last_step and any(
            len(save.steps) > 1 and save.kept.group is kept.group and step in save.steps
            for save in generation.saves
        )

    def forget(self, generation: Generation, group: Group, step: int) -> None:
        """Remove what this generation holds of a step that is being saved again.

        What it holds of earlier generations loses by the order of flushes.
        """
        for stage in generation.inline.values():
            if stage.kept.group is group:
                stage.forget(step)
        for joined in list(generation.joined.values()):
            if joined.kept.group is group and step in joined.steps:
                at = joined.steps.index(step)
                del joined.steps[at], joined.arrays[at]
        for save in generation.saves:
            if save.kept.group is group and step in save.steps:
                save.replaced.add(step)

    def drop(self, generation: Generation, kept: Kept, step: int) -> None:
        """Record a tensor that could not be taken."""
        if step <= kept.group.last_step:
            self.forget(generation, kept.group, step)
        kept.group.last_step = max(kept.group.last_step, step)
        generation.dropped.append((kept.series, step))

    def finish(self, generation: Generation) -> None:
        """Send the joined series that still wait to the encoders."""
        for kept in list(generation.joined):
            self._send_joined(generation, kept)

    def _stage(self, generation: Generation, kept: Kept) -> InlineStage:
        stage = generation.inline.get(kept)
        if stage is None:
            stage = generation.inline[kept] = InlineStage(kept)
        return stage

    def _join(
        self, generation: Generation, kept: Kept, array: np.ndarray, step: int, nbytes: int
    ) -> None:
        stage = generation.joined.get(kept)
        if stage is not None and stage.steps and step <= stage.steps[-1]:
            self._send_joined(generation, kept)  # steps of a save ascend
            stage = None
        if stage is None:
            stage = generation.joined[kept] = JoinedStage(kept)
        stage.steps.append(step)
        stage.arrays.append(array)
        stage.nbytes += nbytes
        if (
            stage.nbytes + kept.step_nbytes > grid.DEFAULT_CHUNK_NBYTES
            or len(stage.steps) >= _MAX_JOINED_STEPS
        ):
            self._send_joined(generation, kept)

    def _send_joined(self, generation: Generation, kept: Kept) -> None:
        stage = generation.joined.pop(kept)
        if stage.steps:
            self._save(generation, Save(kept, stage.steps, stage.arrays, stage.nbytes))

    def _save(self, generation: Generation, save: Save) -> None:
        generation.saves.append(save)
        with generation.done:
            generation.outstanding += 1
        self._send(generation, save)


def _string_nbytes(array: np.ndarray) -> int:
    if array.size == 0:
        return 0
    return len(pack_strings(array.reshape(-1).tolist()))


def flatten(data: Mapping[str, object], prefix: str = "") -> list[tuple[str, object]]:
    """Give the items of nested dicts under names joined by ``/``."""
    items: list[tuple[str, object]] = []
    for name, value in data.items():
        if isinstance(value, Mapping):
            items += flatten(value, f"{prefix}{check_name(name)}/")
        else:
            items.append((prefix + name if prefix else name, value))
    return items


def check_part(name: str, part: Part) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Give global shape and origin of a part as tuples, or refuse them."""
    shape, origin = tuple(part.global_shape), tuple(part.origin)
    for what, values in (("global_shape", shape), ("origin", origin)):
        if not all(hasattr(n, "__index__") and 0 <= n <= layout.MAX_AXIS for n in values):
            raise ArgumentError(f"{name!r}: {what} {values} is not a tuple of integers from 0")
    if len(shape) != len(origin) or not shape:
        raise ArgumentError(
            f"{name!r}: global_shape {shape} and origin {origin} need one number for each axis, "
            "and at least one axis"
        )
    return shape, origin


def check_box(tensor: Tensor) -> None:
    """Refuse a part that does not lie in its global tensor."""
    shape = tensor.snapshot.array.shape
    if len(shape) != len(tensor.global_shape) or any(
        o + n > g for o, n, g in zip(tensor.origin, shape, tensor.global_shape, strict=True)
    ):
        raise ArgumentError(
            f"{tensor.name!r}: a part of shape {shape} at {tensor.origin} does not lie in "
            f"{tensor.global_shape}",
            name=tensor.name,
        )
