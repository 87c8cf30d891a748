"""Which series a tensor belongs to, and how it is kept: inline, k steps to a chunk, in a grid."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final, Literal

from tensorstore_fmt import dtypes
from tensorstore_fmt.errors import ArgumentError, StateError
from tensorstore_fmt.format import grid, layout, sampling, statistics
from tensorstore_fmt.format.catalog import Series
from tensorstore_fmt.writing.options import StatsChoice, WriterOptions

__all__ = ["Group", "Kept", "SeriesBook", "step_table_series"]

Storing = Literal["inline", "joined", "gridded"]

# A grid that was chosen for one shape also serves others, up to chunks this many times as large.
_GRID_SLACK: Final = 4


@dataclass(slots=True, eq=False)
class Group:
    """All series of one (name, mode, part): a later step in one replaces it in the others.

    Attributes
    ----------
    stats
        The series of its statistics, if any of its values had some.
    has_data
        Whether any of its values was kept, and not their statistics alone.
    """

    name: str
    mode: int
    global_shape: tuple[int, ...] = ()
    origin: tuple[int, ...] = ()
    last_step: int = -1
    grids: dict[tuple[str, int], list[tuple[int, ...]]] = field(default_factory=dict)
    kept: dict[tuple[str, tuple[int, ...]], Kept] = field(default_factory=dict)
    stats: Series | None = None
    has_data: bool = False

    def has(self, series: Series) -> bool:
        """Say whether a series of data is one of these."""
        return (series.name, series.mode, series.global_shape, series.origin) == (
            self.name,
            self.mode,
            self.global_shape,
            self.origin,
        )


@dataclass(slots=True, eq=False)
class Kept:
    """How tensors of one series and one shape are kept. Identity is by object."""

    group: Group
    series: Series
    step_nbytes: int
    storing: Storing
    stats: Series | None
    has_data: bool
    hint: sampling.Hint = field(default_factory=sampling.Hint)

    @property
    def boxes(self) -> int:
        """Number of chunks of one step."""
        return grid.n_chunks(self.series.shape, self.series.grid)


class SeriesBook:
    """Finds or makes the `Kept` of a tensor; all threads may use it."""

    def __init__(self, options: WriterOptions) -> None:
        self._options = options
        self._groups: dict[tuple[object, ...], Group] = {}
        self._last: dict[tuple[str, int], Kept] = {}
        self._stats: dict[str, StatsChoice] = {}

    def set_stats(self, name: str, choice: StatsChoice) -> None:
        """Say for one name what the options say for patterns; before its first value."""
        if self._stats.get(name, self._options.stats_for(name)) == choice:
            return
        if any(group.name == name and group.kept for group in self._groups.values()):
            raise StateError(
                f"{name!r} was logged already; say how its statistics are kept before that",
                code="logged",
                name=name,
            )
        self._stats[name] = choice

    def group(
        self,
        name: str,
        mode: int,
        global_shape: tuple[int, ...] = (),
        origin: tuple[int, ...] = (),
    ) -> Group:
        """Give the group of a name."""
        key = (name, mode, global_shape, origin)
        group = self._groups.get(key)
        if group is None:
            group = Group(name=name, mode=mode, global_shape=global_shape, origin=origin)
            group = self._groups.setdefault(key, group)  # another thread may have been faster
        return group

    def kept(self, group: Group, dtype: str, shape: tuple[int, ...], step_nbytes: int) -> Kept:
        """Give how a tensor of this dtype and shape is kept.

        Raises
        ------
        ArgumentError
            ``chunks`` for this name does not fit its rank, or gives chunks above the limits.
        """
        kept = group.kept.get((dtype, shape))
        if kept is None:
            kept = self._make(group, dtype, shape, step_nbytes)
            if dtype != dtypes.STRING and len(group.kept) < 1024:  # shapes may change for ever
                kept = group.kept.setdefault((dtype, shape), kept)
            self._last[group.name, group.mode] = kept
        return kept

    def last(self, name: str, mode: int) -> Kept | None:
        """Give what was found out last about a name."""
        return self._last.get((name, mode))

    def _make(self, group: Group, dtype: str, shape: tuple[int, ...], step_nbytes: int) -> Kept:
        name = group.name
        wanted = self._options.chunk_shape_for(name, len(shape))
        if wanted is not None:
            cut = wanted
        elif dtype == dtypes.STRING:
            cut = (0,) * len(shape)
        else:
            cut = self._choose_grid(group, dtype, shape)
        lengths = grid.steps_lengths(shape, cut)
        itemsize = dtypes.itemsize(dtype)
        box_nbytes = (
            math.prod(min(n, g) for n, g in zip(shape, lengths, strict=True)) * itemsize
            if itemsize
            else step_nbytes
        )
        if box_nbytes > layout.MAX_CHUNK_RAW_NBYTES:
            raise ArgumentError(
                f"{name!r}: a chunk would have {box_nbytes:,} bytes, at most "
                f"{layout.MAX_CHUNK_RAW_NBYTES:,} are possible; give smaller lengths in chunks=",
                name=name,
            )
        series = Series(
            name=name,
            kind=layout.KIND_DATA,
            mode=group.mode,
            dtype=dtype,
            shape=shape,
            grid=cut,
            global_shape=group.global_shape,
            origin=group.origin,
        )
        boxes = grid.n_chunks(shape, cut)
        storing: Storing = "gridded"
        if boxes == 1 and step_nbytes <= layout.INLINE_STEP_NBYTES:
            storing = "inline"
        elif boxes == 1 and step_nbytes <= grid.DEFAULT_CHUNK_NBYTES // 2:
            storing = "joined"
        choice = self._stats.get(name, self._options.stats_for(name))
        has_stats = bool(choice) and statistics.supports(dtype) and 0 not in shape
        has_data = choice != "only" or not has_stats or storing == "inline"
        stats = None
        if has_stats and storing != "inline":
            stats = group.stats = _stats_series(series)
        group.has_data |= has_data
        return Kept(
            group=group,
            series=series,
            step_nbytes=step_nbytes,
            storing=storing,
            stats=stats,
            has_data=has_data,
        )

    def _choose_grid(self, group: Group, dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Choose a grid; one that this name has already is taken where it will do."""
        known = group.grids.setdefault((dtype, len(shape)), [])
        itemsize = dtypes.itemsize(dtype)
        total = math.prod(shape) * itemsize
        for cut in known:
            lengths = grid.steps_lengths(shape, cut)
            box = math.prod(min(n, g) for n, g in zip(shape, lengths, strict=True)) * itemsize
            is_small = box < grid.DEFAULT_CHUNK_NBYTES // _GRID_SLACK and box < total
            if box <= _GRID_SLACK * grid.DEFAULT_CHUNK_NBYTES and not is_small:
                return cut
        cut = grid.choose_grid(shape, itemsize)
        if cut not in known:
            known.append(cut)
        return cut


def _stats_series(series: Series) -> Series:
    return Series(
        name=series.name,
        kind=layout.KIND_STATS,
        mode=series.mode,
        dtype="float64",
        shape=(layout.STATS_LEN,),
        grid=(0,),
        global_shape=series.global_shape,
        origin=series.origin,
    )


def step_table_series(mode: int) -> Series:
    """Give the series of the step table of a mode (spec, "The step table")."""
    return Series(name="", kind=layout.KIND_STEPS, mode=mode, dtype="int64", shape=(2,), grid=(0,))
