"""Actions: what happens when a rule finds something. None of them ever stops the rules."""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.rules.rule import Finding
from tensorstore_fmt.rules.stopping import request_stop

if TYPE_CHECKING:
    from tensorstore_fmt.reading.run import Run

__all__ = ["Action", "AlertLog", "Callback", "StopTraining", "Webhook"]

_logger = logging.getLogger("tensorstore_fmt")
_WAITING: Final = 1000
_SCHEMES: Final = ("http://", "https://")


class Action(ABC):
    """Something to do with each finding. `act` may raise: it is logged, and the rules go on."""

    @abstractmethod
    def act(self, finding: Finding, run: Run) -> None:
        """Do it; quickly, for the rules wait."""

    def close(self) -> None:  # noqa: B027 - most have nothing to close
        """Finish what is under way; called when the runner ends."""


class Callback(Action):
    """Call a function with the finding."""

    def __init__(self, function: Callable[[Finding], object]) -> None:
        self._function = function

    def act(self, finding: Finding, run: Run) -> None:  # noqa: ARG002 - as the others
        """Call it."""
        self._function(finding)


class AlertLog(Action):
    """Append one line of JSON to a file of this machine.

    A line is written at once, so that several programs may append to the same file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)

    def act(self, finding: Finding, run: Run) -> None:
        """Append it."""
        line = json.dumps(document(finding, run), ensure_ascii=False, allow_nan=False) + "\n"
        handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)


class StopTraining(Action):
    """Ask the training to stop, through the run (`tensorstore_fmt.rules.stopping`); once."""

    def __init__(self) -> None:
        self.requested = False

    def act(self, finding: Finding, run: Run) -> None:
        """Ask, if the run is still being written."""
        if not self.requested and not run.is_closed:
            request_stop(run, str(finding), rule=finding.rule, step=finding.step)
            self.requested = True


class Webhook(Action):
    """POST the finding as JSON to a URL, from a thread of its own.

    What cannot be delivered is given up after `timeout_s`, logged and counted (`failures`); a
    thousand wait at most, more are given up at once.
    """

    def __init__(
        self, url: str, *, timeout_s: float = 10.0, headers: Mapping[str, str] | None = None
    ) -> None:
        if not url.lower().startswith(_SCHEMES):
            raise ArgumentError(f"a webhook is a http:// or https:// URL, not {url!r:.100}")
        self._url = url
        self._timeout_s = timeout_s
        self._headers = {"Content-Type": "application/json", **(headers or {})}
        self._queue: queue.Queue[bytes | None] = queue.Queue(_WAITING)
        self._thread: threading.Thread | None = None
        self.delivered = self.failures = 0

    def act(self, finding: Finding, run: Run) -> None:
        """Enqueue it."""
        body = json.dumps(document(finding, run), allow_nan=False).encode()
        if self._thread is None:
            self._thread = threading.Thread(target=self._deliver, name="tsf-webhook", daemon=True)
            self._thread.start()
        try:
            self._queue.put_nowait(body)
        except queue.Full:
            self._failed("too many findings wait to be delivered")

    def close(self) -> None:
        """Wait until what is enqueued was sent or given up, for twice the time-out at most."""
        thread, self._thread = self._thread, None
        if thread is not None:
            try:
                self._queue.put(None, timeout=self._timeout_s)
            except queue.Full:
                self._failed("the end came first")
            thread.join(2 * self._timeout_s)

    def _deliver(self) -> None:
        while (body := self._queue.get()) is not None:
            request = urllib.request.Request(  # noqa: S310 - the scheme was checked
                self._url, data=body, headers=self._headers, method="POST"
            )
            try:
                with urllib.request.urlopen(request, timeout=self._timeout_s):  # noqa: S310 - same
                    self.delivered += 1
            except (OSError, ValueError) as error:  # URLError, HTTPError and time-outs are OSError
                self._failed(f"{type(error).__name__}: {error}")

    def _failed(self, why: str) -> None:
        self.failures += 1
        _logger.warning("a webhook was not delivered (%s in all): %s", self.failures, why)


def document(finding: Finding, run: Run) -> dict[str, Any]:
    """Give a finding as strict JSON can say it, with the place and id of its run."""
    fields = {
        key: repr(value) if isinstance(value, float) and not abs(value) < float("inf") else value
        for key, value in finding.as_dict().items()
    }
    return {"run": run.describe(), "run_id": run.run_id, **fields}
