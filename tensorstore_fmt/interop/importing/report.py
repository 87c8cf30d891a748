"""Reports: what an import has brought over, and what it had to leave."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Final

__all__ = ["ImportReport", "Skipped"]

_MAX_LISTED: Final = 1000
_SHOWN: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """Something that was not imported.

    Attributes
    ----------
    file
        Relative to the source.
    offset
        Where in it, in bytes; None: all of it.
    code
        Why, as a word: ``checksum``, ``truncated``, ``missing_file``, ``replaced`` …
    reason
        Why, as a sentence.
    is_damage
        Whether something was lost that should be there; else it only has no place in a run, or
        was saved again later.
    """

    file: str
    offset: int | None
    code: str
    reason: str
    is_damage: bool


@dataclass(slots=True, kw_only=True)
class ImportReport:
    """What an import did.

    Attributes
    ----------
    kind, source, run
        Format and place of the source, and place of the run, without credentials.
    is_finished
        Whether the source says that it was finished; None if it cannot tell.
    workers
        Names of the workers in the source; the place in this list is the worker's number here.
    missing_workers
        How many workers should be there, but have left nothing.
    steps, values, names, nbytes
        Steps (of each mode and worker), values, different names, and bytes of values imported.
    unchecked
        Values that the source holds without a checksum, so that nobody can say whether they are
        still what was written.
    skipped
        The first 1,000 of what was left; `skipped_count` counts all.
    damage_count
        How many of these are damage.
    """

    kind: str
    source: str
    run: str
    is_finished: bool | None = None
    workers: list[str] = field(default_factory=list)
    missing_workers: int = 0
    steps: int = 0
    values: int = 0
    names: int = 0
    nbytes: int = 0
    unchecked: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    skipped_count: int = 0
    damage_count: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing was damaged or missing."""
        return self.damage_count == 0

    def skip(
        self,
        file: str,
        offset: int | None,
        code: str,
        reason: str,
        *,
        is_damage: bool = True,
    ) -> None:
        """Note that something is left out."""
        self.skipped_count += 1
        self.damage_count += is_damage
        if len(self.skipped) < _MAX_LISTED:
            self.skipped.append(
                Skipped(file=file, offset=offset, code=code, reason=reason, is_damage=is_damage)
            )

    def as_dict(self) -> dict[str, object]:
        """Give all of it as JSON would say it."""
        return {**asdict(self), "ok": self.ok}

    def __str__(self) -> str:
        what = f"{self.values:,} values of {self.names:,} names in {self.steps:,} steps"
        lines = [f"{self.run}: {what}, {self.nbytes:,} bytes, from {self.source}"]
        if self.is_finished is False:
            lines.append("the source was not finished: what it wrote later is not here")
        if self.missing_workers:
            lines.append(f"{self.missing_workers:,} workers have left nothing")
        if self.unchecked:
            lines.append(f"{self.unchecked:,} values had no checksum in the source")
        for each in self.skipped[:_SHOWN]:
            place = each.file if each.offset is None else f"{each.file}, byte {each.offset}"
            lines.append(f"{'lost' if each.is_damage else 'left out'}: {place}: {each.reason}")
        if self.skipped_count > _SHOWN:
            lines.append(f"… and {self.skipped_count - _SHOWN:,} more (--json has 1,000 of them)")
        return "\n".join(lines)
