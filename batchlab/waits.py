"""Waiting for an event, but no longer than so; and how pauses between tries grow.

Invariant: a cancellation is not lost, or whoever waits in a loop could not be ended any more: not
one that comes in the same moment as the event, as `asyncio.wait_for` loses it before Python 3.12,
nor one in whose place an error has come.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import suppress
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")

STEP_BACK_S = 0.001
"""So long we do nothing, once we have told something on which somebody waits: a kernel may leave
the process that it has woken by that on our own core until we are done."""


def doubled_s(pause_s: float, longest_s: float, times: int = 1) -> float:
    """A pause that has been doubled so many times: the back-off of whatever here tries again. What
    a task's own rule says is in `protocol/settle.py backoff_s`."""
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
