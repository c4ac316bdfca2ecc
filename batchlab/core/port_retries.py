"""Retries of calls to ports, and waits for events.

The class Patience retries calls after S3's errors 409 and 503, throttling of SQS, and short outages. Patience is only
for calls that may be repeated. All calls of the protocol may be repeated.

Invariant: a cancellation is never lost, because a loop that misses a cancellation could not be stopped. Before Python
3.12, `asyncio.wait_for` loses a cancellation that arrives at the same time as the awaited event. An error that a caller
catches may also hide a cancellation.
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
"""Pause in seconds after waking another process.

Without a pause, the kernel may let the woken process wait for the core of the current process.
"""


def doubled_s(pause_s: float, longest_s: float, times: int = 1) -> float:
    """Return `pause_s` after it was doubled `times` times, but at most `longest_s`.

    All retries in the package use `doubled_s`, except retries of tasks, which use `RetryRule.wait_s`.
    """
    return min(longest_s, pause_s * 2.0 ** min(times, 64))  # 2.0**1024 overflows


def cancels() -> int:
    """Return the number of requests to cancel the current asyncio task."""
    task = asyncio.current_task()
    return task.cancelling() if task else 0


def raise_if_cancelled(before: int = 0) -> None:
    """Raise CancelledError if the current asyncio task has received more than `before` cancellations.

    Code that catches errors and continues must call `raise_if_cancelled`, because an error may hide a cancellation,
    which is not delivered again. A cancellation may be hidden by the first error of a group of calls, or by an error
    from an object that was being closed.
    """
    if cancels() > before:
        raise asyncio.CancelledError


async def both(first: Awaitable[A], second: Awaitable[B]) -> tuple[A, B]:
    """Await two awaitables concurrently.

    If one awaitable fails or the caller is canceled, both awaitables are canceled.
    """
    tasks = asyncio.ensure_future(first), asyncio.ensure_future(second)
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def set_within(event: asyncio.Event, seconds: float) -> bool:
    """Wait at most `seconds` until the event is set, and return whether the event is set."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()


async def set_after(event: asyncio.Event, seconds: float) -> None:
    """Wait until the event is set, and set the event after `seconds`.

    `set_after` needs less CPU time than `set_within`, whose timeout cancels the wait. The caller clears the event.
    """
    timer = asyncio.get_running_loop().call_later(seconds, event.set)
    try:
        await event.wait()
    finally:
        timer.cancel()


T = TypeVar("T")

FIRST_WAIT_S = 0.05
LONGEST_WAIT_S = 5.0


class Patience:
    """Retries with exponentially growing waits and jitter, for at most `limit_s` seconds in total."""

    def __init__(self, rng: random.Random, *, limit_s: float = 60.0) -> None:
        self._rng = rng
        self._limit_s = limit_s

    async def __call__(self, call: Callable[[], Awaitable[T]]) -> T:
        """Return the result of `call`.

        After the time limit, raise the last Throttled or Unreachable that `call` raised.
        """
        wait_s, waited_s, before = FIRST_WAIT_S, 0.0, cancels()
        while True:
            try:
                return await call()
            except (Throttled, Unreachable):
                raise_if_cancelled(before)
                if waited_s >= self._limit_s:
                    raise
            # Use full jitter, so that workers that were throttled at the same time do not retry at the same time.
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
    """Return `port` with retries in every call. All methods of the port must be async and repeatable.

    The result of a call may come from a second try. For example, the second try may return "not new" for a change that
    the first try made.
    """
    # Use a dynamic proxy instead of about twenty methods that would only delegate their calls.
    return cast(T, _Patient(port, patience))
