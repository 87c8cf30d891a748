"""Following: waiting for steps while a run is being written."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt.errors import StepNotFoundError
from tensorstore_fmt.format import layout
from tensorstore_fmt.reading.modes import MODE_NAMES
from tensorstore_fmt.reading.session import Session
from tensorstore_fmt.reading.step_runs import StepRuns
from tensorstore_fmt.reading.steptable import is_complete, logged_steps

__all__ = ["follow", "wait_for_step"]


# From one look to the next: at least, at most, and as a part of the time that nothing happened.
# A look at a disk takes less than 0.1 ms; at a bucket it costs a request that is paid for.
_LOCAL: Final = (0.01, 0.5, 0.02)
_REMOTE: Final = (0.5, 5.0, 0.1)


@dataclass(slots=True)
class _Pause:
    """Sleeps between looks: short at first, longer while nothing happens.

    Attributes
    ----------
    shortest_s, longest_s
        Bounds of the time from the beginning of a look to that of the next.
    part
        That time as a part of the time in which nothing happened.
    deadline
        By `time.monotonic`; None for never.
    """

    shortest_s: float
    longest_s: float
    part: float
    deadline: float | None
    _quiet_since: float
    _looked: float

    @classmethod
    def of(cls, session: Session, poll_s: float | None, timeout_s: float | None) -> _Pause:
        shortest, longest, part = _LOCAL if session.storage.is_local else _REMOTE
        if poll_s is not None:
            shortest = longest = max(poll_s, 0.001)
        now = time.monotonic()
        deadline = None if timeout_s is None else now + timeout_s
        return cls(shortest, longest, part, deadline, now, now)

    def reset(self) -> None:
        """Something happened: look again soon."""
        self._quiet_since = time.monotonic()

    def sleep(self) -> bool:
        """Sleep until the next look is due; False if the time is over."""
        now = time.monotonic()
        due_s = min(max((now - self._quiet_since) * self.part, self.shortest_s), self.longest_s)
        took_s = now - self._looked
        # A store that is slow to answer is not asked all the time: at least as long as it took.
        pause = max(due_s - took_s, min(took_s, due_s))
        if self.deadline is not None:
            left = self.deadline - now
            if left <= 0:
                return False
            pause = min(pause, left)
        time.sleep(pause)
        self._looked = now + pause
        return True


def wait_for_step(
    session: Session, step: int, mode: int | None, *, timeout_s: float | None
) -> None:
    """Return when a step was logged and is complete.

    Raises
    ------
    StepNotFoundError
        It was not logged and never will be.
    TimeoutError
        `timeout_s` has passed.
    """
    pause = _Pause.of(session, None, timeout_s)
    while True:
        is_there = len(logged_steps(session, mode, step, step)) > 0
        if is_complete(session, step, mode):
            if is_there:
                return
            in_mode = "" if mode is None else f" in mode {MODE_NAMES[mode]}"
            raise StepNotFoundError(
                f"step {step} was not logged{in_mode}, and never will be", step=step
            )
        if not pause.sleep():
            seen = "logged, but not by all workers" if is_there else "not logged"
            raise TimeoutError(f"step {step} was {seen} after {timeout_s} s")
        if session.refresh():
            pause.reset()


class _Progress:
    """Which steps were given out already, mode by mode."""

    def __init__(self, mode: int | None) -> None:
        self._modes = range(len(layout.MODES)) if mode is None else (mode,)
        self._done = dict.fromkeys(self._modes, -1)
        self._given = StepRuns()
        self._attempt = -1

    def new(self, session: Session) -> NDArray[np.int64]:
        """Give the steps that are complete now and were not before, ascending."""
        view = session.view
        if view.attempts and view.attempts[-1] != self._attempt:
            if self._attempt >= 0:  # what the new attempt saves again is new
                resume = view.resume_step(view.attempts[-1])
                self._done = {m: min(done, resume - 1) for m, done in self._done.items()}
                self._given.cut(resume)
            self._attempt = view.attempts[-1]
        parts = [np.empty(0, np.int64)]
        for mode in self._modes:
            through = min(view.complete_through(mode), layout.MAX_STEP)
            if through > self._done[mode]:
                parts.append(logged_steps(session, mode, self._done[mode] + 1, through))
                self._done[mode] = through
        new = np.unique(np.concatenate(parts))
        if len(self._modes) > 1:
            new = new[~self._given.has(new)]
            self._given.add(new)
        return new


def follow(
    session: Session, mode: int | None, *, poll_s: float | None, timeout_s: float | None
) -> Iterator[int]:
    """Give each step when it is visible and complete; end when the run is closed.

    A step that is logged in several modes comes once, with the first of them. If a later
    attempt resumes before steps that were given, what it saves comes again.

    Raises
    ------
    TimeoutError
        Nothing new for `timeout_s`.
    """
    progress = _Progress(mode)
    pause = _Pause.of(session, poll_s, timeout_s)
    while True:
        is_last = session.view.is_closed
        steps = progress.new(session).tolist()
        yield from steps
        if is_last:
            return
        if steps:
            pause = _Pause.of(session, poll_s, timeout_s)
        if not pause.sleep():
            raise TimeoutError(f"no new step was complete for {timeout_s} s")
        if session.refresh():
            pause.reset()
