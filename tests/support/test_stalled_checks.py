"""Repetition of checks that fail at a slow service."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from batchlab.adapters.clock import WallClock
from batchlab.core.ports import Queue
from tests.support.contract.queue_worlds import STALLED_S, TRIES, QueueWorld, unless_stalled


class Slow:
    """A service that delays its caller."""

    def __init__(self, takes_s: float) -> None:
        self.takes_s = takes_s

    async def purge(self, _: str) -> None:
        await asyncio.sleep(self.takes_s)


def tries(takes_s: float, *, wrong: bool) -> int:
    """Return how often a check runs that always fails, or that fails only at first."""
    count = 0

    async def check(world: QueueWorld) -> None:
        nonlocal count
        count += 1
        await world.queue.purge("q")
        await world.advance(0)
        assert count > 1
        assert not wrong

    queue = cast("Queue", Slow(takes_s))
    world = QueueWorld(queue, WallClock(), asyncio.sleep)
    if wrong or not takes_s:
        with pytest.raises(AssertionError):
            asyncio.run(unless_stalled(check)(world))
    else:
        asyncio.run(unless_stalled(check)(world))
    return count


def test_a_failure_on_an_idle_machine_counts_at_once() -> None:
    assert tries(0.0, wrong=True) == 1


def test_a_failure_on_a_stalled_machine_is_looked_at_again() -> None:
    assert tries(STALLED_S + 0.1, wrong=False) == 2


def test_a_service_that_is_wrong_fails_however_slow_the_machine() -> None:
    assert tries(STALLED_S + 0.1, wrong=True) == TRIES
