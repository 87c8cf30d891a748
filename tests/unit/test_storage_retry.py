"""When and how long to try again."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tensorstore_fmt.storage import retry
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


def test_an_attempt_that_takes_too_long_is_given_up() -> None:
    numbers = []

    async def attempt(number: int) -> int:
        numbers.append(number)
        if number < 2:
            await asyncio.Event().wait()
        return number

    policy = RetryPolicy(attempt_s=0.01, first_delay_s=0.001)
    assert asyncio.run(with_retries(attempt, policy)) == 2
    assert numbers == [0, 1, 2]
    numbers.clear()
    with pytest.raises(TimeoutError, match="no complete answer"):
        asyncio.run(with_retries(attempt, RetryPolicy(attempt_s=0.01, budget_s=0)))


def test_more_bytes_may_take_longer() -> None:
    policy = RetryPolicy(attempt_s=2, least_bytes_per_s=1000)
    assert [policy.limit_s(n) for n in (0, 500, 10_000)] == [2, 2.5, 12]


def test_a_timeout_of_the_attempt_itself_is_its_own() -> None:
    async def attempt(number: int) -> None:
        raise TimeoutError(number)

    with pytest.raises(TimeoutError) as caught:
        asyncio.run(with_retries(attempt, RetryPolicy()))
    assert caught.value.args == (0,)


def test_who_waits_is_told(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr(retry._Told, "at", float("-inf"))
    _run(1)
    assert caplog.records == []
    _run(9)
    (record,) = caplog.records  # the others come within five seconds
    assert (record.name, record.levelname) == ("tensorstore_fmt", "WARNING")
    assert "attempt 1" in record.getMessage()
    assert "trying again" in record.getMessage()
