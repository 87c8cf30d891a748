"""What a user writes for an index or for steps, parsed without evaluating anything."""

from __future__ import annotations

import re
from types import EllipsisType
from typing import Final, Literal, TypeAlias

from tensorstore_fmt.cli.failures import UsageError

__all__ = ["IndexItem", "parse_index", "parse_step", "parse_steps"]

IndexItem: TypeAlias = int | slice | EllipsisType

_INTEGER: Final = re.compile(r"[+-]?[0-9]{1,19}", re.ASCII)
_NUMBER: Final = re.compile(r"[0-9]{1,19}", re.ASCII)
_SPACE: Final = " \t"


def parse_index(text: str) -> tuple[IndexItem, ...]:
    """Parse a basic index: ``[3, 5, :20, ::-1, ...]``, with or without the brackets.

    Raises
    ------
    UsageError
        Code ``bad_index``; the message points at the place.
    """
    start, stop = 0, len(text)
    while start < stop and text[start] in _SPACE:
        start += 1
    while start < stop and text[stop - 1] in _SPACE:
        stop -= 1
    inner = text[start:stop]
    if inner.startswith(("[", "(")):
        end = {"[": "]", "(": ")"}[inner[0]]
        if not inner.endswith(end) or len(inner) < 2:
            raise _bad_index(text, len(text), f"a {end} is missing")
        start, stop = start + 1, stop - 1
    items: list[IndexItem] = []
    for place, part in _parts(text, start, stop):
        items.append(_item(text, place, part))
    if sum(item is Ellipsis for item in items) > 1:
        raise _bad_index(text, text.rindex("..."), "only one ... can stand in an index")
    return tuple(items)


def _parts(text: str, start: int, stop: int) -> list[tuple[int, str]]:
    """Split at commas; a last comma may end the list."""
    parts = []
    place = start
    for part in text[start:stop].split(","):
        parts.append((place, part))
        place += len(part) + 1
    if not parts[-1][1].strip(_SPACE):
        parts.pop()
    return parts


def _item(text: str, place: int, part: str) -> IndexItem:
    stripped = part.strip(_SPACE)
    place += len(part) - len(part.lstrip(_SPACE))
    if stripped in ("...", "…", "Ellipsis"):
        return Ellipsis
    if not stripped:
        raise _bad_index(text, place, "an index is missing before the comma")
    bounds = stripped.split(":")
    if len(bounds) > 3:
        raise _bad_index(text, place, "a slice is start:stop:step")
    numbers: list[int | None] = []
    for bound in bounds:
        inner = bound.strip(_SPACE)
        if not inner and len(bounds) > 1:
            numbers.append(None)
        elif _INTEGER.fullmatch(inner):
            numbers.append(int(inner))
        else:
            what = f"{inner[:20]!r} is no integer"
            raise _bad_index(text, place + bound.find(inner) if inner else place, what)
        place += len(bound) + 1
    if len(numbers) == 1:
        assert numbers[0] is not None
        return numbers[0]
    if len(numbers) == 3 and numbers[2] == 0:
        raise _bad_index(text, place - 2, "the step of a slice cannot be 0")
    return slice(*numbers)


def _bad_index(text: str, place: int, what: str) -> UsageError:
    return UsageError(
        f"index {text[:80]!r}, character {place + 1}: {what}; "
        "write integers, slices and ... as in '[3, 5, :20, ::2]'",
        code="bad_index",
        index=text,
        character=place + 1,
    )


def parse_steps(text: str) -> slice:
    """Parse a range of step numbers: ``100:200``, ``:50``, ``0:1000:100``, or one step.

    As in Python the end is not part of it.

    Raises
    ------
    UsageError
        Code ``bad_steps``.
    """
    bounds = text.strip().split(":")
    if len(bounds) > 3 or not all(not bound or _NUMBER.fullmatch(bound) for bound in bounds):
        raise _bad_steps(text)
    numbers = [int(b) if b else None for b in bounds]
    if len(numbers) == 1:
        if numbers[0] is None:
            raise _bad_steps(text)
        return slice(numbers[0], numbers[0] + 1)
    if len(numbers) == 3 and numbers[2] == 0:
        raise _bad_steps(text)
    return slice(*numbers)


def _bad_steps(text: str) -> UsageError:
    return UsageError(
        f"--steps {text[:80]!r}: write step numbers as FIRST:END or FIRST:END:EVERY, each 0 or "
        "more, END not included, as in 100:200 or :1000:10",
        code="bad_steps",
        steps=text,
    )


def parse_step(text: str) -> int | Literal["first", "last"]:
    """Parse one step: a number, or the words ``first`` and ``last``.

    Raises
    ------
    UsageError
        Code ``bad_steps``.
    """
    plain = text.strip()
    if plain in ("first", "last"):
        return "first" if plain == "first" else "last"
    if not _NUMBER.fullmatch(plain):
        raise UsageError(
            f"--step {text[:80]!r}: write a step number, 'first' or 'last' "
            "(several: --steps FIRST:END)",
            code="bad_steps",
            steps=text,
        )
    return int(plain)
