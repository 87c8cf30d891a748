"""When and how long to try again."""

from __future__ import annotations

import asyncio

import pytest

from tensorstore_fmt.storage.retry import RetryPolicy, TransientError, with_retries


def _run(failures: int, **changes: float) -> tuple[int, list[float]]:
    slept: list[float] = []

    async def sleep(delay_s: float) -> None:
        slept.append(delay_s)

    async def attempt(number: int) -> int:
        if number < failures:
            raise TransientError(OSError(f"attempt {number}"))
        return number

    return asyncio.run(with_retries(attempt, RetryPolicy(sleep=sleep, **changes))), slept


def test_success_sleeps_nothing() -> None:
    assert _run(0) == (0, [])


def test_delays_double_up_to_a_bound() -> None:
    number, slept = _run(9)
    assert number == 9
    bounds = [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5, 5]
    assert all(bound / 2 <= delay <= bound for delay, bound in zip(slept, bounds, strict=True))


def test_time_is_bounded() -> None:
    with pytest.raises(OSError, match="attempt") as caught:
        _run(10**6, budget_s=3)
    assert "attempts failed" in caught.value.__notes__[0]
    with pytest.raises(OSError, match="attempt 0"):
        _run(10**6, budget_s=0)


def test_slow_attempts_count() -> None:
    async def attempt(number: int) -> None:
        await asyncio.sleep(0.05)
        raise TransientError(TimeoutError(number))

    with pytest.raises(TimeoutError) as caught:
        asyncio.run(with_retries(attempt, RetryPolicy(budget_s=0.12, first_delay_s=0.001)))
    assert caught.value.args[0] <= 3


def test_other_failures_pass_at_once() -> None:
    async def attempt(number: int) -> None:
        raise PermissionError(number)

    with pytest.raises(PermissionError) as caught:
        asyncio.run(with_retries(attempt, RetryPolicy()))
    assert caught.value.args == (0,)
