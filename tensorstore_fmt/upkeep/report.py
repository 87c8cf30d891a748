"""What the tools found and did: plain data, for people (`str`) and for programs (`as_dict`)."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from tensorstore_fmt.format import layout

__all__ = ["Action", "CompactReport", "Lost", "Names", "Problem", "RecoverReport", "VerifyReport"]

Names: TypeAlias = tuple[tuple[str, tuple[int, ...]], ...]
"""Names that are hit, each with the steps that are."""

Progress: TypeAlias = Callable[[int, int, str], None]
"""Told how much is done, of how much, and of what."""

_MOST_SHOWN: Final = 20
_MOST_STEPS: Final = 12


def _steps_text(steps: Sequence[int]) -> str:
    if not steps:
        return "steps unknown"
    shown = ", ".join(map(str, steps[:_MOST_STEPS]))
    more = len(steps) - _MOST_STEPS
    text = f"step{'s' if len(steps) > 1 else ''} {shown}"
    return f"{text} and {more:,} more" if more > 0 else text


def _names_text(names: Names) -> str:
    texts = [f"{name!r} ({_steps_text(steps)})" for name, steps in names[:_MOST_SHOWN]]
    if len(names) > _MOST_SHOWN:
        texts.append(f"{len(names) - _MOST_SHOWN:,} more names")
    return ", ".join(texts)


def _lines(items: Iterable[object], total: int) -> list[str]:
    lines = [f"  {item}" for item, _ in zip(items, range(_MOST_SHOWN), strict=False)]
    if total > _MOST_SHOWN:
        lines.append(f"  … and {total - _MOST_SHOWN:,} more")
    return lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is not as the spec says, or worth knowing.

    Attributes
    ----------
    code
        A code of the spec ("Failures") for damage, or what the note is about: ``unsealed``,
        ``unreferenced``, ``torn``, ``leftover``, ``outdated``, ``not_closed``, ``attempt``,
        ``uncommitted``, ``unknown_dtype``, ``unknown_codec``, ``set_aside``.
    severity
        ``damage``: stored bytes are wrong or gone. ``note``: nothing is wrong.
    file, offset
        Where, relative to the run; None where there is no one place.
    what
        A sentence.
    names
        What is hit: names, each with its steps; no steps: some, it cannot be told which.
    """

    code: str
    severity: Literal["damage", "note"]
    file: str | None
    offset: int | None = None
    what: str
    names: Names = ()

    def __str__(self) -> str:
        place = self.file or "run"
        if self.offset is not None:
            place += f" at {self.offset:,}"
        text = f"{self.severity} [{self.code}] {place}: {self.what}"
        return f"{text}; hits {_names_text(self.names)}" if self.names else text


def _count(n: int, what: str, several: str | None = None) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {several or what + 's'}"


class _Report(ABC):
    """What all reports have in common."""

    __slots__ = ()

    def as_dict(self) -> dict[str, Any]:
        """Give everything as what JSON can say."""
        values: dict[str, Any] = dataclasses.asdict(self)  # type: ignore[call-overload] # all are
        values["ok"] = self.ok
        return values

    @property
    @abstractmethod
    def ok(self) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport(_Report):
    """What `verify` found.

    Attributes
    ----------
    problems
        Everything that was found, damage first.
    segments, shards, entries, chunks
        How many were checked; chunks are payloads, each counted once.
    nbytes
        Bytes that were checked.
    unreferenced_nbytes
        Bytes of payloads in shards that no entry names: never committed, or replaced.
    """

    url: str
    problems: tuple[Problem, ...]
    segments: int
    shards: int
    entries: int
    chunks: int
    nbytes: int
    unreferenced_nbytes: int

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged; notes do not count."""
        return not any(p.severity == "damage" for p in self.problems)

    @property
    def damage(self) -> tuple[Problem, ...]:
        """The problems that are damage."""
        return tuple(p for p in self.problems if p.severity == "damage")

    def __str__(self) -> str:
        found = "ok" if self.ok else f"{_count(len(self.damage), 'place')} DAMAGED"
        text = (
            f"{self.url}: {found}; checked "
            f"{_count(self.segments, 'segment')}, {_count(self.shards, 'shard')}, "
            f"{_count(self.entries, 'entry', 'entries')}, {_count(self.chunks, 'chunk')}, "
            f"{self.nbytes / 1e6:,.1f} MB"
        )
        if self.unreferenced_nbytes:
            text += f" ({self.unreferenced_nbytes / 1e6:,.1f} MB of payload are not referenced)"
        return "\n".join([text, *_lines(self.problems, len(self.problems))])


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """One thing that `recover` did, or would do.

    Attributes
    ----------
    kind
        ``close`` a dead writer, ``rebuild`` its index, ``seal`` a shard, ``set_aside`` or
        ``delete`` a file, ``bundle``, ``run_json``.
    """

    kind: str
    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind} {self.file}: {self.what}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """What could not be brought back.

    Attributes
    ----------
    name
        Name of the tensor; None if that is lost too.
    mode, kind
        ``None``, ``"TRAIN"`` …; ``"data"``, ``"statistics"`` or ``"steps"``.
    steps
        The steps of it that are gone. Where the index itself is gone: those that were logged in
        the range that is missing, so at most these.
    """

    name: str | None
    mode: str | None = None
    kind: str = "data"
    steps: tuple[int, ...] = ()
    what: str

    def __str__(self) -> str:
        if self.name is None:
            return self.what
        mode = f" in {self.mode}" if self.mode else ""
        kind = "" if self.kind == "data" else f" ({self.kind})"
        return f"{self.name!r}{kind}{mode}, {_steps_text(self.steps)}: {self.what}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoverReport(_Report):
    """What `recover` did, or with ``dry_run`` would do.

    Attributes
    ----------
    actions
        In order; empty if there was nothing to do.
    lost
        What is gone for good.
    left
        What is not right and was left as it is, with the reason.
    is_closed
        Whether the run is closed now, or with ``dry_run`` would be.
    """

    url: str
    dry_run: bool
    actions: tuple[Action, ...]
    lost: tuple[Lost, ...]
    left: tuple[str, ...]
    restored_entries: int
    is_closed: bool

    @property
    def ok(self) -> bool:
        """Whether everything that was committed is readable, as far as the index can tell."""
        return not self.lost and not self.left

    def __str__(self) -> str:
        verb = "would be done" if self.dry_run else "done"
        done = f"{_count(len(self.actions), 'thing')} {verb}" if self.actions else "nothing to do"
        state = "closed" if self.is_closed else "not closed"
        verb = "would be" if self.dry_run and self.actions else "is"
        lines = [f"{self.url}: {done}; the run {verb} {state}"]
        lines += _lines(self.actions, len(self.actions))
        if self.lost:
            lines.append("LOST for good:")
            lines += _lines(self.lost, len(self.lost))
        if self.left:
            lines.append("left as it is:")
            lines += _lines(self.left, len(self.left))
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactReport(_Report):
    """What `compact` did.

    Attributes
    ----------
    segments_before, segments_after, nbytes_before, nbytes_after
        Number and bytes of the files in ``index/``.
    has_bundle
        Whether ``index.bundle`` holds all of them now.
    left
        What was left as it is, with the reason: damaged segments, features of newer versions.
    """

    url: str
    segments_before: int
    segments_after: int
    nbytes_before: int
    nbytes_after: int
    has_bundle: bool
    left: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing stood in the way."""
        return not self.left

    def __str__(self) -> str:
        text = (
            f"{self.url}: {_count(self.segments_before, 'segment')} "
            f"({self.nbytes_before / 1e6:,.2f} MB) before, "
            f"{self.segments_after:,} now ({self.nbytes_after / 1e6:,.2f} MB)"
            f"{', with a bundle' if self.has_bundle else ''}"
        )
        return "\n".join([text, *_lines(self.left, len(self.left))])


def mode_text(mode: int) -> str | None:
    """Give the name of a mode; None is also what users say for mode 0."""
    return layout.MODES[mode] if 0 <= mode < len(layout.MODES) else f"mode {mode}"


KIND_TEXTS: Final = {
    layout.KIND_DATA: "data",
    layout.KIND_STATS: "statistics",
    layout.KIND_STEPS: "steps",
}
