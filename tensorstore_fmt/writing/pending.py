"""What waits for the next commit: placed payloads, entries, and the generation they belong to."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np

from tensorstore_fmt.format import layout
from tensorstore_fmt.format.catalog import Series
from tensorstore_fmt.writing.series import Group, Kept

__all__ = [
    "Generation",
    "Held",
    "InlineStage",
    "PendingEntry",
    "Placed",
    "Save",
    "ShardFile",
]


@dataclass(slots=True, eq=False)
class ShardFile:
    """A shard, and from where on it may not survive power loss; all of its payloads share it.

    Attributes
    ----------
    synced_nbytes
        What lies before this was synced.
    is_abandoned
        A sync has failed: what lies behind may be gone, and nothing is added any more.
    """

    name: layout.ShardName
    synced_nbytes: int = 0
    is_abandoned: bool = False


@dataclass(slots=True, eq=False)
class Placed:
    """A payload, and where it lies as soon as it was written."""

    codec: int
    raw_nbytes: int
    nbytes: int
    crc32c: int
    digest: int | None = None
    inline: bytes | None = None
    shard: ShardFile | None = None
    offset: int = 0
    is_dropped: bool = False  # it could not be written

    @property
    def is_lost(self) -> bool:
        """Whether no segment may name it from now on."""
        shard = self.shard
        return self.is_dropped or (
            shard is not None and shard.is_abandoned and self.offset >= shard.synced_nbytes
        )


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


@dataclass(slots=True, eq=False)
class Held:
    """Raw bytes that a tensor takes of the quota, until they are given back."""

    nbytes: int = 0


@dataclass(slots=True, eq=False)
class InlineStage:
    """Steps of a tiny series since the last flush.

    One list, not two that belong together: a signal may come between any two statements.
    """

    kept: Kept
    rows: list[tuple[int, object]] = field(default_factory=list)  # a Python scalar, or bytes

    def forget(self, step: int) -> None:
        """Remove a step that is being saved again."""
        if any(row[0] == step for row in self.rows):
            self.rows = [row for row in self.rows if row[0] != step]


@dataclass(slots=True, eq=False)
class Save:
    """Tensors that go to the encoders together: first open, then closed, queued, and finished.

    Attributes
    ----------
    rows
        Steps with what was copied; the encoders empty it.
    steps
        The steps, as soon as it is closed.
    replaced
        Steps that were saved again in the same flush, after it was closed.
    entries, is_lost
        What the encoders made of it, or that they could not.
    """

    kept: Kept
    rows: list[tuple[int, np.ndarray, Held]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    replaced: set[int] = field(default_factory=set)
    entries: list[PendingEntry] = field(default_factory=list)
    is_closed: bool = False
    is_queued: bool = False
    is_claimed: bool = False
    is_lost: bool = False

    def close(self) -> None:
        """Take no more steps; more than once is fine."""
        if not self.is_closed:
            self.steps = [row[0] for row in self.rows]
            self.is_closed = True


class Generation:
    """Everything logged between two flushes: it becomes visible at once."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.inline: dict[Kept, InlineStage] = {}
        self.joined: dict[Kept, Save] = {}  # those that may still be open
        self.floats: dict[tuple[int, str], InlineStage] = {}
        self.step_tables: dict[int, list[tuple[int, int, int]]] = {}  # step, mode step, time
        self.saves: list[Save] = []
        self.dropped: list[tuple[Series, int]] = []
        # Of steps that are saved again: what an earlier flush may hold and this one does not.
        self.hidden: dict[tuple[Group, int], list[Series]] = {}
        self.raw_nbytes = 0
        self.finished = 0  # of the saves, by the encoders
        self.done = threading.Condition()

    @property
    def is_empty(self) -> bool:
        """Whether nothing was logged."""
        return not (self.inline or self.saves or self.dropped or self.step_tables)

    def claim(self, save: Save) -> bool:
        """Say whether a save is to be encoded: it may have been queued twice."""
        with self.done:
            is_first, save.is_claimed = not save.is_claimed, True
        return is_first

    def finish(self) -> None:
        """Note that a save was encoded, or lost."""
        with self.done:
            self.finished += 1
            self.done.notify_all()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until all saves are encoded, and say so; nothing may be added any more."""
        with self.done:
            return self.done.wait_for(lambda: self.finished == len(self.saves), timeout_s)
