"""Names as a caller writes them: names and patterns."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from tensorstore_fmt.errors import NameNotFoundError

if TYPE_CHECKING:
    from tensorstore_fmt.reading.run import Run

__all__ = ["expand", "no_match"]

_SHOWN = 3


def expand(run: Run, patterns: Sequence[str] | None) -> list[str]:
    """Give the names that some of the patterns fit, each once, in the order of the patterns.

    A pattern that is itself a name means this name only, even if it has ``*`` or ``[`` in it.
    None means all names.

    Raises
    ------
    NameNotFoundError
        Nothing fits a pattern.
    """
    every = run.names()
    if patterns is None:
        return every
    known = set(every)
    found: dict[str, None] = {}
    for pattern in patterns:
        fitting = [pattern] if pattern in known else [n for n in every if fnmatchcase(n, pattern)]
        if not fitting:
            raise no_match(run, pattern)
        found |= dict.fromkeys(fitting)
    return list(found)


def no_match(run: Run, pattern: str) -> NameNotFoundError:
    """Say that no name fits, and which are near, or which there are."""
    if not set(pattern) & set("*?["):
        try:
            run[pattern]
        except NameNotFoundError as error:
            return error
    every = run.names()
    shown = ", ".join(map(repr, every[:_SHOWN]))
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    has = f"it has {shown}{more}" if every else "it has none yet"
    return NameNotFoundError(
        f"{run.describe()}: no name fits {pattern!r}; {has}", pattern=pattern, names=len(every)
    )
