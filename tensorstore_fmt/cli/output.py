"""What a verb prints: lines for people or one JSON document, never both on stdout."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from tensorstore_fmt.cli.text import escape, table
from tensorstore_fmt.errors import LimitError

__all__ = ["Output", "json_text", "json_value"]

_REDRAW_S: Final = 0.1


def json_value(value: object) -> object:
    """Turn a value into what strict JSON can say.

    NaN and infinities become the strings ``"nan"``, ``"inf"`` and ``"-inf"`` (null would also
    mean absent), complex numbers ``[real, imaginary]``, bytes hexadecimal text, arrays nested
    lists. Floats keep all their digits.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, complex):
        return [json_value(value.real), json_value(value.imag)]
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    if hasattr(value, "tolist"):  # NumPy's arrays and scalars; importing NumPy costs 0.1 s
        plain = value.tolist()
        # the elements of an ml_dtypes array stay what they are
        return (
            _plain_float(plain)
            if plain is value or type(plain) is type(value)
            else (json_value(plain))
        )
    if isinstance(value, Iterable):
        return [json_value(item) for item in value]
    if hasattr(value, "__float__"):
        return _plain_float(value)
    return str(value)


def _plain_float(value: object) -> object:
    number = float(value)  # type: ignore[arg-type]  # the caller has seen __float__ or a scalar
    integral = hasattr(value, "__index__")
    return int(number) if integral else json_value(number)


def json_text(value: object, *, indent: int | None = None) -> str:
    """Write strict JSON that a terminal does not obey, however deep the value is."""
    try:
        text = json.dumps(json_value(value), indent=indent, allow_nan=False, ensure_ascii=False)
    except RecursionError:
        raise LimitError("this is nested too deeply to be shown; read it from Python") from None
    if text.replace("\n", "").isprintable():
        return text
    # In JSON such characters stand within strings only.
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


class Output:
    """Where one call of the command writes.

    Parameters
    ----------
    is_json
        Whether stdout is to hold one JSON document.
    """

    def __init__(self, *, is_json: bool) -> None:
        self.is_json = is_json
        self._drawn_at = 0.0
        self._drawn = 0
        self._has_progress = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    @property
    def width(self) -> int | None:
        """Columns of the terminal; None if stdout is none, so that nothing is cut."""
        if sys.stdout.isatty():
            return shutil.get_terminal_size().columns
        return None

    def json(self, document: object) -> None:
        """Print the JSON document."""
        print(json_text(document, indent=2))

    def line(self, text: str = "") -> None:
        """Print one line; the text is escaped."""
        print(escape(text))

    def table(
        self,
        heading: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        left: Sequence[str] = (),
        indent: str = "",
    ) -> None:
        """Print an aligned table; the cells are escaped."""
        width = None if self.width is None else self.width - len(indent)
        safe = [[escape(cell) for cell in row] for row in rows]
        for line in table(heading, safe, left=left, width=width):
            print(indent + line)

    def note(self, text: str) -> None:
        """Say something beside the result, on stderr."""
        self.end_progress()
        print(escape(text), file=sys.stderr)

    def progress(self, done: int, total: int | None, what: str = "") -> None:
        """Show how far long work is, if stderr is a terminal."""
        if not self._has_progress or time.monotonic() - self._drawn_at < _REDRAW_S:
            return
        self._drawn_at = time.monotonic()
        amount = f"{100 * done // total:3d} %" if total else f"{done:,}"
        columns = shutil.get_terminal_size().columns - 1
        text = escape(f"{amount}  {what}")[:columns]
        sys.stderr.write("\r" + text.ljust(self._drawn))
        sys.stderr.flush()
        self._drawn = len(text)

    def end_progress(self) -> None:
        """Wipe the line of `progress`."""
        if self._drawn:
            sys.stderr.write("\r" + " " * self._drawn + "\r")
            sys.stderr.flush()
            self._drawn = 0
