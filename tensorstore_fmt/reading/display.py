"""How runs and tensors show themselves, in text and in notebooks. Names may hold anything."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensorstore_fmt.reading.run import Run
    from tensorstore_fmt.reading.tensor import Tensor

__all__ = ["printable", "quoted", "run_html", "run_text", "size_text", "tensor_html", "tensor_text"]

_MOST_ROWS = 30
_MOST_CHARACTERS = 80
_TIMES = " × "  # noqa: RUF001 - meant


def quoted(text: str) -> str:
    """Give a name between quotes, without anything that could change a terminal."""
    return f"'{printable(text)}'"


def printable(text: str) -> str:
    """Give the beginning of a text that a stranger wrote, safe for a terminal."""
    shown = text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)


def size_text(nbytes: int) -> str:
    """Give a number of bytes in a unit that a person would choose (powers of 1000)."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{nbytes} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    raise AssertionError


def _shape_text(shape: Sequence[int | None]) -> str:
    return _TIMES.join("?" if n is None else str(n) for n in shape) or "scalar"


def tensor_rows(tensor: Tensor) -> list[tuple[str, str]]:
    """Say what a tensor is, from the catalogs alone."""
    rows = [
        ("dtype", printable(tensor.dtype_name) if tensor.has_data else "only statistics"),
        ("shape", _shape_text(tensor.shape) if tensor.has_data else "-"),
        ("steps", _steps_text(tensor)),
        ("size", f"{size_text(tensor.nbytes)}, stored {size_text(tensor.stored_nbytes)}"),
    ]
    modes, workers = tensor.modes, tensor.workers
    if modes != ("NONE",):
        rows.append(("modes", ", ".join(modes)))
    if workers != (0,):
        rows.append(("workers", _list_text(list(map(str, workers)))))
    return rows


def _steps_text(tensor: Tensor) -> str:
    n, first, last = tensor.step_summary
    return f"about {n}, {first} to {last}" if n > 1 else f"{first}"


def _list_text(items: Sequence[str]) -> str:
    more = f" … ({len(items)})" if len(items) > 8 else ""
    return ", ".join(items[:8]) + more


def tensor_text(tensor: Tensor) -> str:
    """Give one line; an error is shown, not raised."""
    try:
        rows = tensor_rows(tensor)
    except Exception as error:  # noqa: BLE001 - a repr must not raise
        return f"<Tensor {quoted(tensor.name)}: {type(error).__name__}>"
    said = ", ".join(f"{key} {value}" for key, value in rows)
    return f"<Tensor {quoted(tensor.name)}: {said}>"


def tensor_html(tensor: Tensor) -> str:
    """Give a small table."""
    return _html_table(quoted(tensor.name), [], tensor_rows(tensor))


def run_text(run: Run) -> str:
    """Give one line; nothing is read from the storage for it but, once, the index."""
    where = run.describe()
    try:
        state = "closed" if run.is_closed else "open"
        said = f"{len(run)} names, {_count(run.num_workers, 'worker')}, {state}"
        if run.damage:
            said += f", {_count(len(run.damage), 'problem')} (see .damage)"
    except Exception as error:  # noqa: BLE001 - a repr must not raise
        said = type(error).__name__
    return f"<Run {quoted(where)}: {said}>"


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def run_html(run: Run) -> str:
    """Give a table of the first names."""
    names = run.names()
    rows = []
    for name in names[:_MOST_ROWS]:
        tensor = run[name]
        cells = dict(tensor_rows(tensor))
        rows.append((quoted(name), *(cells[key] for key in ("dtype", "shape", "steps", "size"))))
    if len(names) > _MOST_ROWS:
        rows.append((f"… and {len(names) - _MOST_ROWS} more", "", "", "", ""))
    return _html_table(run_text(run), ["name", "dtype", "shape", "steps", "size"], rows)


def _html_table(caption: str, heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        inner = "".join(
            f'<{tag} style="text-align:left">{html.escape(cell)}</{tag}>' for cell in cells
        )
        return f"<tr>{inner}</tr>"

    head = line(heading, "th") if heading else ""
    body = "".join(line(row, "td") for row in rows)
    return f"<table><caption>{html.escape(caption)}</caption>{head}{body}</table>"
