"""The follower as the training process sees it: started, listened to, waited for, stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from tensorstore_fmt.demo.digits.observation import OPTIONS_VARIABLE, READY, Observation

__all__ = ["Companion"]

_STOP_S = 10.0


class Companion:
    """A running follower process, as a context manager that always ends it.

    Parameters
    ----------
    url, storage_options
        The run to follow. The options travel as JSON in an environment variable.
    on_observation
        Called from a thread with what the follower saw.
    on_text
        Called from a thread with any other line the follower printed: a warning, a traceback.
    """

    def __init__(
        self,
        url: str,
        *,
        storage_options: Mapping[str, object] | None,
        on_observation: Callable[[Observation], None],
        on_text: Callable[[str], None],
    ) -> None:
        self._command = [
            sys.executable,
            "-m",
            "tensorstore_fmt.demo.digits.follower",
            url,
            "--json",
        ]
        options = None if storage_options is None else dict(storage_options)
        self._environment = os.environ | {OPTIONS_VARIABLE: json.dumps(options)}
        self._on_observation = on_observation
        self._on_text = on_text
        self._changed = threading.Condition()
        self._is_ready = False
        self._has_ended = False
        self._last_step = -1

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(  # noqa: S603  # our own module, and no shell
            self._command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,  # so that a traceback is seen too, in its place
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        self._listener = threading.Thread(target=self._listen, name="demo-follower", daemon=True)
        self._listener.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._listener.join(_STOP_S)

    def wait_until_ready(self, *, timeout_s: float) -> bool:
        """Wait until the follower has started; False if it did not in time, or ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_ready or self._has_ended, timeout_s)
            return self._is_ready

    def wait_for_step(self, step: int, *, timeout_s: float) -> bool:
        """Wait until the follower has seen `step`; False if it did not in time, or ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._last_step >= step or self._has_ended, timeout_s)
            return self._last_step >= step

    def wait_for_end(self, *, timeout_s: float) -> int | None:
        """Wait for the follower to end by itself and give its exit code; None if it did not."""
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        self._listener.join(_STOP_S)  # its last lines
        return code

    def _listen(self) -> None:
        assert self._process.stdout is not None  # it was asked to be a pipe
        with self._process.stdout as lines:
            for line in lines:
                self._take(line.rstrip())
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    def _take(self, line: str) -> None:
        observation = Observation.from_json(line)
        if observation is not None:
            self._on_observation(observation)
        elif line != READY:
            self._on_text(line)
        with self._changed:
            self._is_ready |= line == READY
            if observation is not None:
                self._last_step = observation.step
            self._changed.notify_all()
