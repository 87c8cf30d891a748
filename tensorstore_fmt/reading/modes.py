"""Modes as callers say them: a word, or None for all of them."""

from __future__ import annotations

from typing import Final

from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.format import layout

__all__ = ["MODE_NAMES", "mode_number"]

MODE_NAMES: Final[tuple[str, ...]] = tuple(mode or "NONE" for mode in layout.MODES)
"""Name of each mode's number; ``NONE`` is what was logged without a mode."""


def mode_number(mode: str | None) -> int | None:
    """Give the number of a mode that a caller asks for; None asks for any.

    Raises
    ------
    ArgumentError
        There is no such mode.
    """
    if mode is None:
        return None
    try:
        return MODE_NAMES.index(mode.upper())
    except (ValueError, AttributeError):
        raise ArgumentError(
            f"mode {mode!r} does not exist; use one of {', '.join(MODE_NAMES)}, or None for any",
            mode=mode,
        ) from None
