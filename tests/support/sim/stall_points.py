"""Stall points of a leader. A test holds each port call of a leader in turn while another manager leads. The held call
takes effect after that.

Invariant: up to the held call, a replay equals the run in which the calls were counted. Call k of a replay is therefore
call k of the count.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from batchlab.core.model import Pool
from batchlab.sim import trial
from batchlab.sim.actors import Actor
from batchlab.sim.event_loop import SimLoop
from batchlab.sim.tasks import Script
from batchlab.sim.world import World

FIRST = "manager-1"
LONGEST_S = 300.0
"""The virtual time after which a held call takes effect, even if its scene has not set the event."""
LIMIT_S = 20_000.0
STEPS = 3_000_000

Story = Callable[[World, asyncio.Event], Awaitable[None]]
"""A scene's requests of the users, and its checks. A story sets its event when the held call must take effect."""


class After(StrEnum):
    """The state of the two managers when the held call takes effect."""

    DEPOSED = "the first manager goes on, and the second one still leads"
    ALONE = "the first manager goes on, and the second one has ended"
    KILLED = "the first manager was killed, and another one leads"


@dataclass(slots=True)
class Hold:
    """Holder of the first manager's call number `call`. The process freezes, or is killed, while
    the request is in transit. The request reaches the service later."""

    call: int
    how: After
    labels: list[str] = field(default_factory=list)
    """The first manager's calls so far, such as "ledger.AddCut"."""
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    _actor: Actor | None = None
    _effect: Callable[[], Awaitable[Any]] | None = None
    _answer: asyncio.Future[Any] | None = None

    async def perform(self, actor: Actor, call: int, label: str, effect: Callable[[], Awaitable[Any]]) -> Any:
        """Perform the effect of an actor's call. For the held call, freeze the actor, and return the answer once the
        call has taken effect."""
        if actor.name == FIRST:
            self.labels.append(label)
        if actor.name != FIRST or call != self.call:
            return await effect()
        self._actor, self._effect = actor, effect
        self._answer = asyncio.get_running_loop().create_future()
        actor.freeze()
        self.reached.set()
        return await self._answer

    def kill(self) -> None:
        assert self._actor
        self._actor.kill()

    async def land(self) -> None:
        """Let the request take effect, and thaw the process that sent it."""
        assert self._actor
        assert self._effect
        assert self._answer
        try:
            answer = await self._effect()
        except Exception as error:  # noqa: BLE001 - the answer belongs to the process that asked
            if not self._answer.done():
                self._answer.set_exception(error)
        else:
            if not self._answer.done():
                self._answer.set_result(answer)
        self._actor.thaw()


@dataclass(frozen=True, slots=True)
class Scene:
    """A small world without faults, and the story that runs in it."""

    story: Story
    script: Script
    pools: tuple[Pool, ...] = (Pool("default", 0, 2, 1),)

    def calls(self) -> list[str]:
        """Return the port calls that the first manager makes, in order."""
        none = Hold(0, After.DEPOSED)
        self._run(none)
        return none.labels

    def replay(self, call: int, how: After) -> None:
        """Hold call number `call` of the first manager, counted from 1, and run the story. Raises SimulationError if a
        promise is broken."""
        self._run(Hold(call, how))

    def _run(self, hold: Hold) -> None:
        loop = SimLoop(inline_executor=True)
        loop.run(self._main(hold), limit_s=LIMIT_S, limit_steps=STEPS)

    async def _main(self, hold: Hold) -> None:
        faults = trial.calm(1)
        faults.intercept = hold.perform
        world = World(1, self.pools, script=self.script, faults=faults, logged=False, sql=False)
        supervisor = asyncio.create_task(world.supervise(), name="supervisor")
        lands = asyncio.Event()
        holding = asyncio.create_task(_hold(world, hold, lands), name="hold")
        await self.story(world, lands)
        lands.set()
        if hold.reached.is_set():
            await holding
        holding.cancel()
        supervisor.cancel()
        await world.ledger.close()


async def _hold(world: World, hold: Hold, lands: asyncio.Event) -> None:
    await hold.reached.wait()
    if hold.how is After.KILLED:
        hold.kill()  # The supervisor starts the next manager.
        second = None
    else:
        second = world.start_manager()
    with suppress(TimeoutError):
        async with asyncio.timeout(LONGEST_S):
            await _another_leads(world)
            await lands.wait()
    if hold.how is After.ALONE and second:
        second.cancel()
        await asyncio.wait([second])
    await hold.land()


async def _another_leads(world: World) -> None:
    while True:
        others = [post.manager for post in world.manager_processes if post.actor.name != FIRST]
        if any(other.is_leader.is_set() for other in others):
            return
        await asyncio.sleep(0.5)
