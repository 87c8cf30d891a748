"""Trying again when a store fails in a way that may pass, for a bounded time.

Who waits is told: from the second failure on, a record of the logger ``tensorstore_fmt`` at level
WARNING, at most one in five seconds in a process.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeVar

T = TypeVar("T")

_LOGGER: Final = logging.getLogger("tensorstore_fmt")
_SAY_EVERY_S: Final = 5.0


class TransientError(Exception):
    """A failure that may pass; ``error`` is what the caller gets if it does not."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.error = error


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How long to go on.

    Attributes
    ----------
    budget_s
        No new attempt begins later than this after the first one began.
    first_delay_s, max_delay_s
        The delay doubles from the first to the greatest, each time shortened at random by up to
        a half, so that the ranks of a job do not come back all at once.
    attempt_s, least_bytes_per_s
        One attempt is given up after so long, and as long again as its bytes take at this rate:
        a server that sends a byte a second is as good as dead.
    sleep
        Waits; replaced in tests.
    """

    budget_s: float = 30.0
    first_delay_s: float = 0.1
    max_delay_s: float = 5.0
    attempt_s: float = 60.0
    least_bytes_per_s: float = 50_000.0
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    def limit_s(self, nbytes: int) -> float:
        """Give how long an attempt may take that moves so many bytes."""
        return self.attempt_s + nbytes / self.least_bytes_per_s


async def with_retries(
    attempt: Callable[[int], Awaitable[T]], policy: RetryPolicy, *, nbytes: int = 0
) -> T:
    """Await the attempt, which is told how many came before it, until it passes or time is up.

    Parameters
    ----------
    nbytes
        How many bytes it moves, at most.
    """
    began = time.monotonic()
    slept = 0.0
    delay = policy.first_delay_s
    number = 0
    while True:
        try:
            return await _limited(attempt(number), policy.limit_s(nbytes))
        except TransientError as failure:
            number += 1
            pause = delay * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, guards nothing
            # what was slept counts by itself, so that a replaced sleep ends too
            if max(time.monotonic() - began, slept) + pause > policy.budget_s:
                failure.error.add_note(f"{number} attempts failed")
                raise failure.error from failure.error.__cause__
            if number > 1:
                _tell(failure.error, pause)
        await policy.sleep(pause)
        slept += pause
        delay = min(2 * delay, policy.max_delay_s)


async def _limited(attempt: Awaitable[T], limit_s: float) -> T:
    try:
        async with asyncio.timeout(limit_s) as limit:
            return await attempt
    except TimeoutError as error:
        if not limit.expired():
            raise
        said = f"no complete answer within {limit_s:.3g} s"
        raise TransientError(TimeoutError(errno.ETIMEDOUT, said)) from error


class _Told:
    """When something was said last; threads may race for it, at worst it is said twice."""

    at = float("-inf")


def _tell(error: OSError, pause_s: float) -> None:
    now = time.monotonic()
    if now - _Told.at >= _SAY_EVERY_S:
        _Told.at = now
        _LOGGER.warning("%s; trying again in %.1f s", error, pause_s)
