"""The tables of `format.md`, as rows of texts: so that what they say is used, not said again."""

from __future__ import annotations

from pathlib import Path

FORMAT = Path(__file__).resolve().parent.parent / "format.md"


def names() -> list[str]:
    """Give the names of all tables that are marked."""
    lines = FORMAT.read_text("utf-8").splitlines()
    return [line[12:-4] for line in lines if line.startswith("<!-- table: ")]


def table(name: str) -> list[dict[str, str]]:
    """Give the rows below the mark ``<!-- table: NAME -->``, by column.

    Raises
    ------
    KeyError
        There is no such table, or two.
    """
    lines = FORMAT.read_text("utf-8").splitlines()
    marks = [i for i, line in enumerate(lines) if line == f"<!-- table: {name} -->"]
    if len(marks) != 1:
        raise KeyError(name)
    rows = []
    for line in lines[marks[0] + 1 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    columns, _, *body = rows
    return [dict(zip(columns, row, strict=True)) for row in body]
