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
from tensorstore_fmt.writing.convert import check_name
from tensorstore_fmt.writing.options import StatsChoice, WriterOptions
from tensorstore_fmt.writing.pending import Generation, Held, InlineStage, Save
from tensorstore_fmt.writing.series import Group, Kept, SeriesBook
from tensorstore_fmt.writing.snapshots import Snapshot

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

    A signal may end any method anywhere. Doing the same again is right then: what was taken
    already is replaced.

    Parameters
    ----------
    put
        Queues a save of a generation for the encoders.
    release
        Gives back what was held for tensors that are not stored after all.
    """

    def __init__(
        self,
        options: WriterOptions,
        *,
        put: Callable[[Generation, Save], None],
        release: Callable[[list[Held]], None],
    ) -> None:
        self._book = SeriesBook(options)
        self._put = put
        self._release = release
        self._floats: dict[tuple[int, str], Kept] = {}

    def set_stats(self, name: str, choice: StatsChoice) -> None:
        """Say how the statistics of one name are kept."""
        self._book.set_stats(name, choice)

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

    def plan_float(self, name: str, mode: int) -> Kept:
        """Give how a Python float will be kept: it takes a short way."""
        kept = self._floats.get((mode, name))
        if kept is None:
            check_name(name)
            kept = self._book.kept(self._book.group(name, mode), "float64", (), 8)
            kept = self._floats.setdefault((mode, name), kept)
        return kept

    def float_stage(self, generation: Generation, name: str, mode: int) -> InlineStage:
        """Give the stage of a series of Python floats."""
        stage = self._stage(generation, self.plan_float(name, mode))
        generation.floats[mode, name] = stage
        return stage

    def add(
        self, generation: Generation, kept: Kept, tensor: Tensor, step: int, held: Held
    ) -> Save | None:
        """Take one tensor at one step; give the save that has to be sent now."""
        array = tensor.snapshot.array
        group = kept.group
        if step <= group.last_step:
            self.replace(generation, kept, step)
        group.last_step = max(group.last_step, step)
        if kept.storing == "inline":
            is_string = kept.series.dtype == dtypes.STRING
            value = array.reshape(-1).tolist() if is_string else array.tobytes()
            self._stage(generation, kept).rows.append((step, value))
            return None
        if kept.storing == "joined":
            return self._join(generation, kept, array, step, held)
        save = Save(kept, [(step, array, held)])
        generation.saves.append(save)
        return save

    def is_shared(self, generation: Generation, kept: Kept, step: int) -> bool:
        """Say whether a chunk of this generation holds the step together with others.

        Then it cannot be taken back: the step has to be saved again by a later flush.
        """
        return step <= kept.group.last_step and any(
            len(save.steps) > 1 and save.kept.group is kept.group and step in save.steps
            for save in generation.saves
        )

    def replace(self, generation: Generation, kept: Kept, step: int) -> None:
        """Make room for a step that is saved again, perhaps in another way.

        What earlier generations hold of it loses by the order of flushes, but only against
        something of the same kind: statistics against statistics.
        """
        group = kept.group
        self._forget(generation, group, step)
        hidden = []
        if group.stats is not None and kept.stats is None:
            hidden.append(group.stats)
        if group.has_data and not kept.has_data:
            hidden.append(kept.series)
        if hidden:
            generation.hidden[group, step] = hidden

    def _forget(self, generation: Generation, group: Group, step: int) -> None:
        """Remove what this generation holds of a step."""
        generation.hidden.pop((group, step), None)
        for stage in generation.inline.values():
            if stage.kept.group is group:
                stage.forget(step)
        if generation.dropped:
            generation.dropped = [
                (series, at)
                for series, at in generation.dropped
                if at != step or not group.has(series)
            ]
        for save in generation.saves:
            if save.kept.group is not group:
                continue
            if save.is_closed:
                if step in save.steps:
                    save.replaced.add(step)
            elif gone := [held for at, _, held in save.rows if at == step]:
                save.rows = [row for row in save.rows if row[0] != step]
                self._release(gone)

    def drop(self, generation: Generation, kept: Kept, step: int) -> None:
        """Record a tensor that could not be taken."""
        group = kept.group
        if step <= group.last_step:
            self._forget(generation, group, step)
            if group.stats is not None:
                generation.hidden[group, step] = [group.stats]
        group.last_step = max(group.last_step, step)
        what = (kept.series, step)
        if generation.dropped[-1:] != [what]:
            generation.dropped.append(what)

    def last(self, name: str, mode: int) -> Kept | None:
        """Give how the last tensor of a name was kept."""
        return self._book.last(name, mode)

    def drop_named(self, generation: Generation, name: str, mode: int, step: int) -> bool:
        """Record what could not be looked at, as what the name stood for; False: it is new."""
        kept = self.last(name, mode)
        if kept is not None:
            self.drop(generation, kept, step)
        return kept is not None

    def send(self, generation: Generation, save: Save) -> None:
        """Let the encoders have a save."""
        save.close()
        self._put(generation, save)
        save.is_queued = True

    def finish(self, generation: Generation) -> None:
        """Send what still waits to the encoders; nothing is added to the generation any more."""
        for save in generation.saves:
            if not save.is_queued:
                self.send(generation, save)

    def _stage(self, generation: Generation, kept: Kept) -> InlineStage:
        stage = generation.inline.get(kept)
        if stage is None:
            stage = generation.inline[kept] = InlineStage(kept)
        return stage

    def _join(
        self, generation: Generation, kept: Kept, array: np.ndarray, step: int, held: Held
    ) -> Save | None:
        save = generation.joined.get(kept)
        if save is not None and (save.is_closed or (save.rows and step <= save.rows[-1][0])):
            self.send(generation, save)  # steps of a save ascend
            save = None
        if save is None:
            save = Save(kept)
            generation.saves.append(save)
            generation.joined[kept] = save
        save.rows.append((step, array, held))
        n = len(save.rows)
        is_full = (n + 1) * kept.step_nbytes > grid.DEFAULT_CHUNK_NBYTES or n >= _MAX_JOINED_STEPS
        return save if is_full else None


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
