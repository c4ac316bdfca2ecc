"""The queues of the contract suite of the Queue port. A new adapter is one more entry.

`DIFFERENCES` names the rules of SQS that an emulator breaks. The check of such a rule must fail
there.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest

from batchlab.adapters.aws.network_wakeups import NetworkWakeups
from batchlab.adapters.aws.sqs import SqsQueue
from batchlab.adapters.clock import WallClock
from batchlab.adapters.local.local_wakeup_queue import FifoWakeups, WakeupQueue, Wakeups
from batchlab.adapters.local.sqlite_queue import SqliteQueue
from batchlab.adapters.memory.queue import SimQueue
from batchlab.core.port_retries import Patience, patiently
from batchlab.core.ports import Clock, Message, Outgoing, Queue, QueueSpec
from batchlab.sim.actors import Actor
from batchlab.sim.event_loop import SimLoop
from batchlab.sim.faults import Faults, Weather
from batchlab.sim.port_wrappers import wrap
from tests.support.contract.emulator_worlds import at_emulators
from tests.support.contract.side_by_side import SideBySide

T = TypeVar("T")

IN_FLIGHT = 25
"""The maximum number of in-flight messages in the test worlds, in place of SQS's 120,000."""


# Queue names are unique across all worlds, because checks may share a service.
_NAMES = itertools.count()


class SteppedClock:
    """The machine's clock plus an offset that a test increases."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def now_s(self) -> float:
        return time.time() + self.ahead_s

    def monotonic_s(self) -> float:
        return time.monotonic() + self.ahead_s


class LoopClock:
    """The clock of the running event loop, which the simulator's loop advances."""

    def now_s(self) -> float:
        return 1_700_000_000.0 + asyncio.get_running_loop().time()

    def monotonic_s(self) -> float:
        return asyncio.get_running_loop().time()


@dataclass(slots=True)
class QueueWorld:
    """A queue service. Checks use whole seconds, so that a service with its own clock can pass.

    `advance` lets that many seconds pass for the service. If `exact` is true, the service always rejects stale
    receipts, does not count a canceled receive, keeps the first receive time of a dead letter, and limits in-flight
    messages to IN_FLIGHT. If `jumps` is true, `advance` can skip hours at once. If `patient` is true, the queue retries
    calls that raise Throttled. A waiting receive notices a message that becomes visible without a send after at most
    `late_s`. SQS does not specify this delay.
    """

    queue: Queue
    clock: Clock
    advance: Callable[[float], Awaitable[None]]
    exact: bool = True
    jumps: bool = True
    patient: bool = False
    late_s: float = 0.0

    async def make(
        self,
        *,
        visibility_s: float = 30.0,
        retention_s: float = 345_600.0,
        dead_letters: str | None = None,
        max_receives: int = 10,
    ) -> str:
        """Create an empty queue, and return its name."""
        name = f"suite-{next(_NAMES)}"
        spec = QueueSpec(name, visibility_s, retention_s, dead_letters, max_receives)
        await self.queue.ensure(spec)
        return name

    async def send(self, name: str, *bodies: str, delay_s: float = 0.0) -> None:
        """Send messages with these bodies, in batches if needed."""
        for start in range(0, len(bodies), 10):
            some = bodies[start : start + 10]
            await self.queue.send(name, [Outgoing(body, delay_s) for body in some])

    async def receive(self, name: str, count: int = 1, *, visibility_s: float | None = None) -> list[Message]:
        """Receive exactly `count` messages within seconds, in any order."""
        found: list[Message] = []
        while len(found) < count:
            some = await self.queue.receive(
                name, max_messages=min(10, count - len(found)), wait_s=3, visibility_s=visibility_s
            )
            assert some, f"{len(found)} of {count} messages came"
            found += some
        return found

    async def empty(self, name: str) -> bool:
        """Return whether a receive finds no message now."""
        return not await self.queue.receive(name, wait_s=0)


def bodies(messages: Sequence[Message]) -> list[str]:
    return sorted(message.body for message in messages)


def receipts(messages: Sequence[Message]) -> list[str]:
    return [message.receipt for message in messages]


Check = Callable[[QueueWorld], Coroutine[Any, Any, None]]


STALLED_S = 0.5
"""The total delay of a check's calls from which a failure of the check is ignored and the check is repeated. Checks
stay one second away from each change of state, and the limit is half of that second."""
TRIES = 4


class _Watched:
    """A service that measures for how long its calls have delayed a check."""

    def __init__(self, world: QueueWorld) -> None:
        self._world = world
        self.stalled_s = 0.0

    def world(self) -> QueueWorld:
        return replace(self._world, queue=cast("Queue", self), advance=self._advance)

    async def _advance(self, seconds: float) -> None:
        await self._timed(self._world.advance(seconds), seconds)

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        call = getattr(self._world.queue, name)

        async def timed(*args: Any, **options: Any) -> Any:
            allowed_s = options.get("wait_s", 20.0) if name == "receive" else 0.0
            return await self._timed(call(*args, **options), allowed_s)

        return timed

    async def _timed(self, call: Awaitable[T], allowed_s: float) -> T:
        begun_s = time.monotonic()
        try:
            return await call
        finally:
            self.stalled_s += max(0.0, time.monotonic() - begun_s - allowed_s)


def unless_stalled(check: Check) -> Check:
    """Repeat a failed check if slow calls delayed it. The clock of the service continues while the machine is busy."""

    async def tried(world: QueueWorld) -> None:
        for left in reversed(range(TRIES)):
            watched = _Watched(world)
            try:
                await check(watched.world())
            except AssertionError:
                if not left or watched.stalled_s < STALLED_S:
                    raise
            else:
                return

    return tried


def _as_it_is(world: QueueWorld) -> QueueWorld:
    return world


def _wrapped(world: QueueWorld) -> QueueWorld:
    """Return the queue as an actor of the simulator sees it, without faults."""
    faults = Faults(random.Random(1), latency_s=(0.0, 0.0))
    return replace(world, queue=wrap(world.queue, "queue", Actor("a"), faults))


def _faulty(world: QueueWorld) -> QueueWorld:
    """Return a queue on which 20% of the calls fail without an effect and are retried."""
    weather = Weather(throttled=0.1, unreachable=0.1)
    faults = Faults(random.Random(1), weather, latency_s=(0.0, 0.0))
    seen = wrap(world.queue, "queue", Actor("a"), faults)
    return replace(world, queue=patiently(seen, Patience(random.Random(1))), patient=True)


Seen = Callable[[QueueWorld], QueueWorld]


def _sim(seen: Seen, check: Check, tmp_path: Path) -> None:
    clock = LoopClock()
    queue = SimQueue(clock, random.Random(1), max_in_flight=IN_FLIGHT)
    SimLoop().run(check(seen(QueueWorld(queue, clock, asyncio.sleep))), limit_s=1e6)


def _sqlite(seen: Seen, check: Check, tmp_path: Path) -> None:
    clock = SteppedClock()

    async def advance(seconds: float) -> None:
        clock.ahead_s += seconds

    async def run() -> None:
        queue = SqliteQueue(tmp_path / "queue.db", clock, max_in_flight=IN_FLIGHT)
        try:
            await check(seen(QueueWorld(queue, clock, advance)))
        finally:
            await queue.close()

    asyncio.run(run())


def _rung(wakeups: Callable[[Path], Wakeups], check: Check, tmp_path: Path) -> None:
    clock = SteppedClock()

    async def advance(seconds: float) -> None:
        clock.ahead_s += seconds

    async def run() -> None:
        inner = SqliteQueue(tmp_path / "queue.db", clock, max_in_flight=IN_FLIGHT)
        queue = WakeupQueue(inner, wakeups(tmp_path / "bells"))
        try:
            await check(QueueWorld(queue, clock, advance, late_s=1.2))
        finally:
            await queue.close()

    asyncio.run(run())


# LocalStack checks once per second for messages that become visible. A long poll of moto does not check at all.
_LATE_S = {"localstack": 1.2, "moto": 1.2}


def at_emulator(name: str, queue: SqsQueue) -> QueueWorld:
    """Return a world of an emulator, in which time passes at its real speed."""
    late_s = _LATE_S.get(name, 0.0)
    return QueueWorld(queue, WallClock(), asyncio.sleep, exact=False, jumps=False, late_s=late_s)


QUEUE_WORLDS: Mapping[str, Callable[[Check, Path], None]] = {
    "sim": partial(_sim, _as_it_is),
    "sim wrapped": partial(_sim, _wrapped),
    "sim faulty": partial(_sim, _faulty),
    "sqlite": partial(_sqlite, _as_it_is),
    "sqlite faulty": partial(_sqlite, _faulty),
    "rung": partial(_rung, FifoWakeups),
    "rung by network": partial(_rung, lambda _: NetworkWakeups("127.255.255.255")),
}

DIFFERENCES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "test_every_receive_has_its_own_receipt_and_an_old_one_cannot_delete": (
        "DeleteMessage with a receipt that is not the latest does not delete",
        ("localstack", "moto"),
    ),
    "test_an_old_receipt_cannot_change_visibility": (
        "only the latest receipt changes a message's visibility",
        ("localstack", "moto"),
    ),
    "test_only_a_message_in_flight_can_be_changed": (
        "ChangeMessageVisibility of a message that is not in flight answers MessageNotInflight",
        ("ministack", "localstack", "moto"),
    ),
}
"""The rule of SQS that emulators break, and the names of these emulators, by check."""

UNTRIED: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "test_receivers_at_the_same_time_share_no_message": (
        "it gives messages out without a lock, and so now and then one of them twice",
        ("moto",),
    )
}
"""The reason why a check is not run, and the emulators that this concerns, by check."""

CHECKS: dict[Callable[..., None], Check] = {}
"""The checks that may run at the same time as others, by test."""


def on_every_queue(check: Check, *, alone: bool = False) -> Callable[[str, Path, pytest.FixtureRequest], None]:
    """Turn an async check of a world into a test that runs in each world.

    `alone` means that the check measures time, so no other check may run at the same time.
    """

    tried = unless_stalled(check)

    @pytest.mark.parametrize("world", [*QUEUE_WORLDS, *at_emulators(check, DIFFERENCES, UNTRIED)])
    def test(world: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
        if world in QUEUE_WORLDS:
            QUEUE_WORLDS[world](check, tmp_path)
        else:
            checks: SideBySide[QueueWorld] = request.getfixturevalue(f"queue_checks_{world}")
            checks.run(tried)

    test.__name__, test.__doc__ = check.__name__, check.__doc__
    if not alone:
        CHECKS[test] = tried
    return test


on_every_queue_alone = partial(on_every_queue, alone=True)
