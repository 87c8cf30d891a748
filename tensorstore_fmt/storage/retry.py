"""Trying again when a store fails in a way that may pass, for a bounded time."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


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
    sleep
        Waits; replaced in tests.
    """

    budget_s: float = 30.0
    first_delay_s: float = 0.1
    max_delay_s: float = 5.0
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


async def with_retries(attempt: Callable[[int], Awaitable[T]], policy: RetryPolicy) -> T:
    """Await the attempt, which is told how many came before it, until it passes or time is up."""
    began = time.monotonic()
    slept = 0.0
    delay = policy.first_delay_s
    number = 0
    while True:
        try:
            return await attempt(number)
        except TransientError as failure:
            number += 1
            pause = delay * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, guards nothing
            # what was slept counts by itself, so that a replaced sleep ends too
            if max(time.monotonic() - began, slept) + pause > policy.budget_s:
                failure.error.add_note(f"{number} attempts failed")
                raise failure.error from failure.error.__cause__
        await policy.sleep(pause)
        slept += pause
        delay = min(2 * delay, policy.max_delay_s)
