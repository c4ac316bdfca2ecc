"""Retries of calls to ports, and waits for events.

Patience waits through S3's 409 and 503, throttling of SQS, and short outages. It is only for calls that may be
repeated. The protocol ensures this for all of its calls.

Invariant: a cancellation is never lost, because a loop that misses one could not be stopped. Two cases need care. A
cancellation may arrive together with the event, and `asyncio.wait_for` loses it before Python 3.12. An error may also
hide a cancellation.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar, cast

from batchlab.core.errors import Throttled, Unreachable

A = TypeVar("A")
B = TypeVar("B")

STEP_BACK_S = 0.001
"""Pause after waking another process. Until this process pauses, the kernel may keep the other one
waiting for the same core."""


def doubled_s(pause_s: float, longest_s: float, times: int = 1) -> float:
    """Return a pause after `times` doublings, at most `longest_s`.

    All retries in this package use it. The retry rules of tasks use `RetryRule.wait_s`.
    """
    return min(longest_s, pause_s * 2.0 ** min(times, 64))  # 2.0**1024 overflows


def cancels() -> int:
    """Return how often the current task has been asked to cancel."""
    task = asyncio.current_task()
    return task.cancelling() if task else 0


def raise_if_cancelled(before: int = 0) -> None:
    """Raise CancelledError if the current task has received more than `before` cancellations.

    It is for code that catches errors and continues. An error may hide a cancellation: the first error of a group of
    calls, or an error from an object that was being closed. A cancellation is not delivered again.
    """
    if cancels() > before:
        raise asyncio.CancelledError


async def both(first: Awaitable[A], second: Awaitable[B]) -> tuple[A, B]:
    """Await two things concurrently. If one fails or this call is canceled, the other is canceled."""
    tasks = asyncio.ensure_future(first), asyncio.ensure_future(second)
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def set_within(event: asyncio.Event, seconds: float) -> bool:
    """Wait at most `seconds` until the event is set. Return whether it is set."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()


T = TypeVar("T")

FIRST_WAIT_S = 0.05
LONGEST_WAIT_S = 5.0


class Patience:
    """Retries with exponentially growing waits and jitter, for at most `limit_s` in total."""

    def __init__(self, rng: random.Random, *, limit_s: float = 60.0) -> None:
        self._rng = rng
        self._limit_s = limit_s

    async def __call__(self, call: Callable[[], Awaitable[T]]) -> T:
        """Return the result of `call`. Raise its last Throttled or Unreachable after the time limit."""
        wait_s, waited_s, before = FIRST_WAIT_S, 0.0, cancels()
        while True:
            try:
                return await call()
            except (Throttled, Unreachable):
                raise_if_cancelled(before)
                if waited_s >= self._limit_s:
                    raise
            # Full jitter: workers that were throttled together must not retry together.
            pause_s = self._rng.uniform(0, wait_s)
            await asyncio.sleep(pause_s)
            waited_s += pause_s
            wait_s = doubled_s(wait_s, LONGEST_WAIT_S)


class _Patient:
    def __init__(self, inner: object, patience: Patience) -> None:
        self._inner = inner
        self._patience = patience

    def __getattr__(self, name: str) -> Any:
        target = getattr(self._inner, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            return await self._patience(lambda: target(*args, **kwargs))

        setattr(self, name, call)
        return call


def patiently(port: T, patience: Patience) -> T:
    """Return `port` with retries in every call. All methods must be async and repeatable.

    The result may be that of a second try, such as "not new" for a change that the first try made.
    """
    # A dynamic proxy replaces about twenty methods that would only delegate their calls.
    return cast(T, _Patient(port, patience))
