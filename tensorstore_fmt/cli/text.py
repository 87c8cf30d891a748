"""Text for people: what is safe to show, sizes, step ranges, aligned tables."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

__all__ = [
    "bytes_text",
    "cut_middle",
    "escape",
    "number_text",
    "shape_text",
    "steps_text",
    "table",
    "time_text",
]

_UNITS: Final = ("B", "kB", "MB", "GB", "TB", "PB")
_SHORTEST_CUT: Final = 16  # columns that a name keeps however narrow the terminal is
_SHOWN_RANGES: Final = 4
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def escape(text: str) -> str:
    r"""Write characters that a terminal would obey, or that hide what is there, as ``\x1b``.

    Control characters, line breaks, ANSI sequences, bidirectional overrides and other invisible
    characters come from files, so from strangers.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def columns_of(text: str) -> int:
    """Give how many columns of a terminal a printable text takes."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def cut_middle(text: str, width: int) -> str:
    """Shorten a text to a width, keeping its beginning and its end."""
    if columns_of(text) <= width:
        return text
    kept = max(width - 1, 2)
    head, tail = text, text
    while head and columns_of(head) > kept // 2:
        head = head[:-1]
    while tail and columns_of(tail) > kept - kept // 2:
        tail = tail[1:]
    return f"{head}…{tail}"


def bytes_text(nbytes: int) -> str:
    """Give a number of bytes in the unit a person would choose (powers of 1000)."""
    value, power = float(nbytes), 0
    while abs(value) >= 999.95 and power < len(_UNITS) - 1:
        value, power = value / 1000, power + 1
    return f"{nbytes} B" if power == 0 else f"{value:.1f} {_UNITS[power]}"


def number_text(value: object) -> str:
    """Give a statistic in a few digits; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e6 else f"{value:.6g}"
    return str(value)


def shape_text(shape: Sequence[int | None]) -> str:
    """Give a shape as ``64 x 32``; an axis that varies is ``?``, no axes are ``scalar``."""
    return " x ".join("?" if n is None else str(n) for n in shape) or "scalar"


def steps_text(steps: Sequence[int]) -> str:
    """Give ascending steps as ranges with inclusive ends: ``0..290 by 10, 295``."""
    ranges = _ranges(steps)
    shown = [_range_text(each) for each in ranges[:_SHOWN_RANGES]]
    if len(ranges) > _SHOWN_RANGES:
        shown += ["…", str(steps[-1])]
    return ", ".join(shown)


def time_text(us: int) -> str | None:
    """Give microseconds since 1970 as ISO 8601 in UTC; None beyond the years 1 to 9999.

    They come from files, and may be any integer.
    """
    try:
        return (_EPOCH + timedelta(microseconds=us)).isoformat()
    except OverflowError:
        return None


def _ranges(steps: Sequence[int]) -> list[range]:
    found: list[range] = []
    begin = 0
    while begin < len(steps):
        end = begin + 1
        if end < len(steps):
            stride = steps[end] - steps[begin]
            while end < len(steps) and steps[end] - steps[end - 1] == stride:
                end += 1
            if end - begin == 2 and end < len(steps):  # two steps are no progression
                end -= 1
        stride = steps[begin + 1] - steps[begin] if end - begin > 1 else 1
        found.append(range(steps[begin], steps[end - 1] + 1, stride))
        begin = end
        if len(found) > _SHOWN_RANGES:
            break
    return found


def _range_text(steps: range) -> str:
    if len(steps) == 1:
        return str(steps[0])
    if len(steps) == 2:
        return f"{steps[0]}, {steps[1]}"
    every = "" if steps.step == 1 else f" by {steps.step}"
    return f"{steps[0]}..{steps[-1]}{every}"


def table(
    heading: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Sequence[str] = (),
    width: int | None = None,
) -> list[str]:
    """Lay out cells in aligned columns.

    Parameters
    ----------
    heading
        Names of the columns.
    rows
        One text per column, already escaped.
    left
        Columns that are aligned at the left; the others hold numbers.
    width
        Columns of the terminal; the first column is cut in the middle to fit. None: as wide
        as needed.
    """
    cells = [list(heading), *(list(row) for row in rows)]
    widths = [max(map(columns_of, column)) for column in zip(*cells, strict=True)]
    if width is not None:
        others = sum(widths[1:]) + 2 * (len(widths) - 1)
        widths[0] = min(widths[0], max(width - others, _SHORTEST_CUT))
        for row in cells:
            row[0] = cut_middle(row[0], widths[0])
    is_left = [name in left for name in heading]
    return [
        "  ".join(
            text + pad if at_left else pad + text
            for text, at_left, pad in (
                (text, at_left, " " * (room - columns_of(text)))
                for text, at_left, room in zip(row, is_left, widths, strict=True)
            )
        ).rstrip()
        for row in cells
    ]
