"""What waits for the next commit: placed payloads, entries, and the generation they belong to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from tensorstore_fmt.format import layout
from tensorstore_fmt.format.catalog import Series
from tensorstore_fmt.writing.series import Kept

__all__ = ["Generation", "InlineStage", "JoinedStage", "PendingEntry", "Placed", "runs_of_steps"]


@dataclass(slots=True, eq=False)
class Placed:
    """A payload, and where it lies as soon as it was written."""

    codec: int
    raw_nbytes: int
    nbytes: int
    crc32c: int
    digest: int | None = None
    inline: bytes | None = None
    shard: layout.ShardName | None = None
    offset: int = 0
    is_lost: bool = False


@dataclass(slots=True, eq=False)
class PendingEntry:
    """One entry of the next segment; ``series.shape`` holds all lengths."""

    series: Series
    step: int
    stride: int
    count: int
    chunk: int
    placed: Placed
    is_repeat: bool = False
    is_new: bool = True  # the payload was stored for this entry
    save: object = None  # entries with the same one are chunks of the same tensors


@dataclass(slots=True, eq=False)
class InlineStage:
    """Steps of a tiny series since the last flush."""

    kept: Kept
    steps: list[int] = field(default_factory=list)
    values: list[object] = field(default_factory=list)  # Python scalars, or bytes of one step

    def forget(self, step: int) -> None:
        """Remove a step that is being saved again."""
        while step in self.steps:
            i = self.steps.index(step)
            del self.steps[i], self.values[i]


@dataclass(slots=True, eq=False)
class JoinedStage:
    """Steps of a middle-sized series that will share a chunk."""

    kept: Kept
    steps: list[int] = field(default_factory=list)
    arrays: list[np.ndarray] = field(default_factory=list)
    nbytes: int = 0


@dataclass(slots=True, eq=False)
class Save:
    """Tensors that went to the encoders together; some steps may be replaced meanwhile."""

    kept: Kept
    steps: list[int]
    arrays: list[np.ndarray]
    nbytes: int
    replaced: set[int] = field(default_factory=set)


class Generation:
    """Everything logged between two flushes: it becomes visible at once."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.inline: dict[Kept, InlineStage] = {}
        self.joined: dict[Kept, JoinedStage] = {}
        self.floats: dict[tuple[int, str], InlineStage] = {}
        self.step_tables: dict[int, tuple[list[int], list[tuple[int, int]]]] = {}
        self.saves: list[Save] = []
        self.dropped: list[tuple[Series, int]] = []
        self.raw_nbytes = 0
        self.outstanding = 0  # saves that the encoders still work on
        self.entries: list[PendingEntry] = []
        self.done = threading.Condition()

    @property
    def is_empty(self) -> bool:
        """Whether nothing was logged."""
        return not (self.inline or self.joined or self.saves or self.dropped or self.step_tables)


def runs_of_steps(steps: np.ndarray) -> Iterator[tuple[int, int]]:
    """Cut ascending steps into arithmetic progressions; give (begin, end) positions."""
    begin, n = 0, len(steps)
    if n > 2:
        gaps = np.diff(steps)
        borders = np.flatnonzero(gaps[1:] != gaps[:-1]) + 2  # first position behind a change
        if not len(borders):
            yield 0, n
            return
        while begin < n:
            # The progression from `begin` goes on until the gap changes behind its first two.
            i = int(np.searchsorted(borders, begin + 2))
            end = int(borders[i]) if i < len(borders) else n
            yield begin, end
            begin = end
    else:
        yield 0, n
