"""The processes of the demo: started, listened to, waited for, and always ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

__all__ = ["Process", "Processes"]

_END_S = 10.0
_LISTEN_S = 10.0


class Process:
    """A module of Python that runs by itself.

    Parameters
    ----------
    name
        For messages.
    words
        Of the command line, behind ``python -m``.
    environment
        Added to that of this process.
    said
        What it gets on its standard input.
    on_line
        Called from a thread with each line that it prints.
    """

    def __init__(
        self,
        name: str,
        words: Sequence[str],
        *,
        environment: Mapping[str, str],
        said: str = "",
        on_line: Callable[[str], None],
    ) -> None:
        self.name = name
        self._on_line = on_line
        self._has_spoken = threading.Event()
        self._is_muted = False
        # So many processes, each with a thread for each core, would only wait for each other.
        one_thread = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process = subprocess.Popen(  # noqa: S603  # our own modules, and no shell
            [sys.executable, "-m", *words],
            env=os.environ | one_thread | {"PYTHONIOENCODING": "utf-8"} | dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,  # so that a traceback is seen too, in its place
            text=True,
            encoding="utf-8",
            errors="replace",
            # Ctrl-C reaches the first process alone, which ends the others in order.
            process_group=0,
        )
        assert self._process.stdin is not None  # it was asked to be a pipe
        with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:
            pipe.write(said)  # if it has ended already, it says why itself
        self._listener = threading.Thread(target=self._listen, name=f"demo-{name}", daemon=True)
        self._listener.start()

    def wait_until_spoken(self, *, timeout_s: float) -> bool:
        """Wait until it has printed a line, or ended; False if neither came in time."""
        return self._has_spoken.wait(timeout_s)

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.poll()

    def wait(self, *, timeout_s: float) -> int | None:
        """Wait for it to end and give its exit code; None if it did not in time."""
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        self._listener.join(_LISTEN_S)  # its last lines
        return code

    def interrupt(self) -> None:
        """Ask it to end, as Ctrl-C would; what it says to that is for nobody."""
        if self.code is None:
            self._is_muted = True
            self._process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """End it."""
        if self.code is None:
            self._process.kill()
        self._process.wait()
        self._listener.join(_LISTEN_S)

    def _listen(self) -> None:
        assert self._process.stdout is not None  # it was asked to be a pipe
        with self._process.stdout as printed:
            for line in printed:
                if not self._is_muted:
                    self._on_line(line.rstrip())
                self._has_spoken.set()
        self._has_spoken.set()


class Processes:
    """Processes that end with the ``with`` statement: those first that were started last."""

    def __init__(self) -> None:
        self._groups: list[list[Process]] = []

    def add(self, group: list[Process]) -> list[Process]:
        """Take a group; one group is ended before the one that was added before it."""
        self._groups.append(group)
        return group

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            for group in reversed(self._groups):
                for process in group:
                    process.interrupt()
                deadline = time.monotonic() + _END_S
                for process in group:
                    process.wait(timeout_s=max(deadline - time.monotonic(), 0))
        finally:  # also after a second Ctrl-C
            for process in [each for group in self._groups for each in group]:
                process.kill()
