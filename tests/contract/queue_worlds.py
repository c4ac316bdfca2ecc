"""The worlds in which the one suite for the Queue port runs; a new adapter adds its own here."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from batchlab.adapters.sim.queue import SimQueue
from batchlab.adapters.sqlite_queue import SqliteQueue
from batchlab.ports import Clock, Message, Outgoing, Queue, QueueSpec
from batchlab.sim.loop import SimLoop

IN_FLIGHT = 25
"""The limit of messages in flight that the worlds are built with, in place of SQS's 120,000."""


class SteppedClock:
    """The machine's time plus what it has been set forward."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def now_s(self) -> float:
        return time.time() + self.ahead_s

    def monotonic_s(self) -> float:
        return time.monotonic() + self.ahead_s


class LoopClock:
    """The running loop's time; after each step it is what the simulator's loop says."""

    def now_s(self) -> float:
        return 1_700_000_000.0 + asyncio.get_running_loop().time()

    def monotonic_s(self) -> float:
        return asyncio.get_running_loop().time()


@dataclass(slots=True)
class QueueWorld:
    """A queue service. Checks use whole seconds, so that a service with its own clock can pass.

    `advance` makes that many seconds pass for the service. `exact` says that stale receipts are
    always answered as refused and that a limit of IN_FLIGHT messages applies; `jumps` that hours
    may pass at once.
    """

    queue: Queue
    clock: Clock
    advance: Callable[[float], Awaitable[None]]
    exact: bool = True
    jumps: bool = True
    _names: itertools.count[int] = field(default_factory=itertools.count)

    async def make(
        self,
        *,
        visibility_s: float = 30.0,
        retention_s: float = 345_600.0,
        dead_letters: str | None = None,
        max_receives: int = 10,
    ) -> str:
        """A new empty queue; returns its name."""
        name = f"suite-{next(self._names)}"
        spec = QueueSpec(name, visibility_s, retention_s, dead_letters, max_receives)
        await self.queue.ensure(spec)
        return name

    async def send(self, name: str, *bodies: str, delay_s: float = 0.0) -> None:
        """Send any number of bodies."""
        for start in range(0, len(bodies), 10):
            some = bodies[start : start + 10]
            await self.queue.send(name, [Outgoing(body, delay_s) for body in some])

    async def receive(
        self, name: str, count: int = 1, *, visibility_s: float | None = None
    ) -> list[Message]:
        """Exactly `count` messages, in any order, within seconds."""
        found: list[Message] = []
        while len(found) < count:
            some = await self.queue.receive(
                name, max_messages=min(10, count - len(found)), wait_s=3, visibility_s=visibility_s
            )
            assert some, f"{len(found)} of {count} messages came"
            found += some
        return found

    async def empty(self, name: str) -> bool:
        """Whether a receive finds nothing now."""
        return not await self.queue.receive(name, wait_s=0)


def bodies(messages: Sequence[Message]) -> list[str]:
    return sorted(message.body for message in messages)


def receipts(messages: Sequence[Message]) -> list[str]:
    return [message.receipt for message in messages]


Check = Callable[[QueueWorld], Awaitable[None]]


async def _checked(check: Check, world: QueueWorld) -> None:
    await check(world)


def _sim(check: Check, tmp_path: Path) -> None:
    clock = LoopClock()
    queue = SimQueue(clock, random.Random(1), max_in_flight=IN_FLIGHT)
    SimLoop().run(_checked(check, QueueWorld(queue, clock, asyncio.sleep)), limit_s=1e6)


def _sqlite(check: Check, tmp_path: Path) -> None:
    clock = SteppedClock()

    async def advance(seconds: float) -> None:
        clock.ahead_s += seconds

    async def run() -> None:
        queue = SqliteQueue(tmp_path / "queue.db", clock, max_in_flight=IN_FLIGHT)
        try:
            await check(QueueWorld(queue, clock, advance))
        finally:
            await queue.close()

    asyncio.run(run())


QUEUE_WORLDS: Mapping[str, Callable[[Check, Path], None]] = {"sim": _sim, "sqlite": _sqlite}


def on_every_queue(check: Check) -> Callable[[str, Path], None]:
    """Turn an async check of a world into a test that runs in each of them."""

    @pytest.mark.parametrize("world", list(QUEUE_WORLDS))
    def test(world: str, tmp_path: Path) -> None:
        QUEUE_WORLDS[world](check, tmp_path)

    test.__name__, test.__doc__ = check.__name__, check.__doc__
    return test
