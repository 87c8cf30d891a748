"""Where the demo's words go: lines, and on a terminal a progress bar that they do not break."""

from __future__ import annotations

import os
import shutil
import threading
import time
from typing import Literal, TextIO

__all__ = ["Display"]

_STYLES = {"plain": "", "strong": "1", "faint": "2", "good": "32", "bad": "31", "other": "36"}
_REDRAW_S = 0.05
_PLAIN_LINES = 10


class Display:
    """Lines and one progress bar on a stream, safe to use from several threads.

    On a terminal, progress is a bar on the last line; elsewhere, and with ``TERM=dumb``, a line
    every tenth of the way. Colours appear on a terminal only, and not if ``NO_COLOR`` is set.

    Parameters
    ----------
    out
        Where to write; None for nowhere.
    """

    def __init__(self, out: TextIO | None) -> None:
        self._out = out
        is_terminal = out is not None and out.isatty() and os.environ.get("TERM") != "dumb"
        self._has_bar = is_terminal
        self._has_colours = is_terminal and not os.environ.get("NO_COLOR")
        encoding = (getattr(out, "encoding", None) or "ascii").lower()
        self._full, self._empty = ("━", "─") if encoding.startswith("utf") else ("#", "-")
        self._lock = threading.Lock()
        self._bar = ""
        self._drawn_at = 0.0
        self._tenths = 0

    def line(
        self,
        text: str = "",
        *,
        style: Literal["plain", "strong", "faint", "good", "bad", "other"] = "plain",
    ) -> None:
        """Write one line, above the bar if there is one."""
        if self._out is None:
            return
        with self._lock:
            self._erase()
            code = _STYLES[style]
            coloured = f"\x1b[{code}m{text}\x1b[0m" if code and self._has_colours else text
            self._out.write(coloured + "\n")
            self._draw()

    def progress(self, done: int, total: int, note: str) -> None:
        """Show that `done` of `total` steps are done."""
        if self._out is None:
            return
        with self._lock:
            if self._has_bar:
                if done < total and time.monotonic() - self._drawn_at < _REDRAW_S:
                    return
                self._drawn_at = time.monotonic()
                bar = self._compose(done, total, note)
                self._out.write("\r" + bar.ljust(len(self._bar)))  # erasing first would flicker
                self._out.flush()
                self._bar = bar
            elif done * _PLAIN_LINES // total > self._tenths:
                self._tenths = done * _PLAIN_LINES // total
                self._out.write(f"trained {done} of {total} steps  {note}\n")
                self._out.flush()

    def end_progress(self) -> None:
        """Leave the bar as it stands and go on below it."""
        if self._out is None:
            return
        with self._lock:
            if self._bar:
                self._out.write("\n")
            self._bar = ""

    def _compose(self, done: int, total: int, note: str) -> str:
        columns = shutil.get_terminal_size().columns - 1  # the last one would wrap the line
        left, right = "training ", f" {done}/{total}  {note}"
        width = max(columns - len(left) - len(right), 0)
        full = width * done // total
        return f"{left}{self._full * full}{self._empty * (width - full)}{right}"[:columns]

    def _erase(self) -> None:
        if self._bar and self._out is not None:
            self._out.write("\r" + " " * len(self._bar) + "\r")

    def _draw(self) -> None:
        if self._out is not None:
            self._out.write(self._bar)
            self._out.flush()
