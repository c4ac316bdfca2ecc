"""Patience with a port: S3's 409 and 503, SQS throttling and short outages are waited out.

Invariant: only calls that may be repeated come through here, which the protocol makes of all.

Waiting for an event, but no longer than so; and how pauses between tries grow.

Invariant: a cancellation is not lost, or whoever waits in a loop could not be ended any more: not
one that comes in the same moment as the event, as `asyncio.wait_for` loses it before Python 3.12,
nor one in whose place an error has come.
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
"""So long we do nothing, once we have told something on which somebody waits: a kernel may leave
the process that it has woken by that on our own core until we are done."""


def doubled_s(pause_s: float, longest_s: float, times: int = 1) -> float:
    """A pause that has been doubled so many times: the back-off of whatever here tries again. What
    a task's own rule says is in `core/protocol/settlement.py backoff_s`."""
    return min(longest_s, pause_s * 2.0 ** min(times, 64))  # 2.0**1024 overflows


def cancels() -> int:
    """How often the task that runs has been asked to end so far."""
    task = asyncio.current_task()
    return task.cancelling() if task else 0


def heed_cancellation(before: int = 0) -> None:
    """CancelledError where this task has been asked to end more often than `before`: for who
    catches errors in order to go on. One may have come in a cancellation's place (the first to fail
    of a group of calls, or a word from what was being closed), and that is not given twice."""
    if cancels() > before:
        raise asyncio.CancelledError


async def both(first: Awaitable[A], second: Awaitable[B]) -> tuple[A, B]:
    """Await two things at once. If one fails or this is cancelled, the other is cancelled."""
    tasks = asyncio.ensure_future(first), asyncio.ensure_future(second)
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def set_within(event: asyncio.Event, seconds: float) -> bool:
    """Wait until the event is set, for so long at the most; whether it is."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()


T = TypeVar("T")

FIRST_WAIT_S = 0.05
LONGEST_WAIT_S = 5.0


class Patience:
    """Tries again with exponentially growing, jittered waits, `limit_s` in all at the most."""

    def __init__(self, rng: random.Random, *, limit_s: float = 60.0) -> None:
        self._rng = rng
        self._limit_s = limit_s

    async def __call__(self, call: Callable[[], Awaitable[T]]) -> T:
        """The result of `call`; its last Throttled or Unreachable once patience has run out."""
        wait_s, waited_s, before = FIRST_WAIT_S, 0.0, cancels()
        while True:
            try:
                return await call()
            except (Throttled, Unreachable):
                heed_cancellation(before)
                if waited_s >= self._limit_s:
                    raise
            # Full jitter: workers that were throttled together must not come back together.
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
    """`port` with patience in every call: for a port whose methods are all async and repeatable.

    What such a method answers may be the answer to its second try: "not new" for what was new.
    """
    # A dynamic proxy behind the type of what it stands for: twenty delegates would say nothing.
    return cast(T, _Patient(port, patience))
