"""Actors of the simulator. A kill ends all tasks of one process at once, and no other process."""

from __future__ import annotations

import asyncio

import pytest

from batchlab.sim.actors import Actor, ActorKilled, SimulationError
from batchlab.sim.event_loop import Crashed, SimLoop
from tests.support.sim.loop import fail_soon, forever


class World:
    """An actor whose tasks record how they end."""

    def __init__(self) -> None:
        self.actor = Actor("a")
        self.ends: list[str] = []

    async def linger(self, name: str) -> None:
        try:
            await forever()
        finally:
            self.ends.append(name)

    async def tree(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self.linger("child"))
            await asyncio.sleep(1)
            await asyncio.gather(self.linger("left"), asyncio.shield(self.linger("shielded")))


def test_kill_ends_every_task_of_its_actor_only() -> None:
    world, loop = World(), SimLoop()

    async def main() -> bool:
        other = asyncio.create_task(world.linger("other"))
        root = world.actor.spawn(world.tree())
        await asyncio.sleep(5)
        world.actor.kill()
        await asyncio.wait([root])
        assert sorted(world.ends) == ["child", "left", "shielded"]
        assert loop.time() == 5
        return other.done()

    assert loop.run(main()) is False
    assert not world.actor.alive


def test_a_killed_actors_tasks_end_in_the_order_they_were_spawned() -> None:
    world = World()

    async def main() -> None:
        for i in range(50):
            world.actor.spawn(world.linger(f"{i:02d}"))
        await asyncio.sleep(1)
        world.actor.kill()
        await asyncio.sleep(0)

    SimLoop().run(main())
    assert world.ends == [f"{i:02d}" for i in range(50)]


def test_error_of_a_dead_actor_is_ignored() -> None:
    async def fails_when_dying() -> None:
        try:
            await forever()
        finally:
            raise KeyError("in finally")

    async def root() -> None:
        asyncio.get_running_loop().call_later(3, int, "no number")
        await asyncio.gather(fails_when_dying(), fails_when_dying())

    async def main() -> None:
        actor = Actor("a")
        actor.spawn(root())
        await asyncio.sleep(1)
        actor.kill()
        await asyncio.sleep(5)

    SimLoop().run(main())


def test_cancellation_of_a_foreign_future_by_a_death_is_not_a_crash() -> None:
    async def main() -> None:
        echo = BaseExceptionGroup("gathered", [ActorKilled("a"), ActorKilled("b")])
        asyncio.get_running_loop().create_future().set_exception(echo)
        await asyncio.sleep(1)

    SimLoop().run(main())


def test_failure_left_by_a_death_is_not_a_crash() -> None:
    """A parent that would have handled its child's failure was killed before that."""
    kept: list[asyncio.Task[None]] = []

    async def root() -> None:
        kept.append(asyncio.create_task(fail_soon()))
        await forever()

    async def main() -> None:
        actor = Actor("a")
        actor.spawn(root())
        await asyncio.sleep(2)
        actor.kill()

    SimLoop().run(main())
    assert kept[0].done()


def test_a_living_actors_crash_names_the_actor() -> None:
    async def main() -> None:
        Actor("w-7").spawn(fail_soon())
        await asyncio.sleep(5)

    with pytest.raises(Crashed, match="w-7"):
        SimLoop().run(main())


def test_a_task_that_outlives_one_cancellation_is_cancelled_again() -> None:
    loop = SimLoop()

    async def stubborn() -> None:
        for _ in range(20):
            try:
                await asyncio.sleep(100)
            except asyncio.CancelledError:
                continue

    async def main() -> None:
        actor = Actor("a")
        root = actor.spawn(stubborn())
        await asyncio.sleep(1)
        actor.kill()
        await asyncio.wait([root])

    loop.run(main())
    assert loop.time() == 1


def test_a_task_that_swallows_every_cancellation_is_an_error() -> None:
    given_up = False

    async def immortal() -> None:
        while not given_up:
            try:
                await asyncio.sleep(100)
            except asyncio.CancelledError:
                continue

    async def main() -> None:
        nonlocal given_up
        actor = Actor("a")
        actor.spawn(immortal(), name="immortal")
        await asyncio.sleep(1)
        actor.kill()
        try:
            await asyncio.sleep(1)
        finally:
            given_up = True

    with pytest.raises(Crashed, match="swallows every cancellation: immortal"):
        SimLoop().run(main())


def test_the_dead_start_nothing() -> None:
    async def root(late: list[str]) -> None:
        def from_the_grave() -> None:
            asyncio.get_running_loop().create_task(act(late))

        asyncio.get_running_loop().call_later(2, from_the_grave)
        await forever()

    async def act(late: list[str]) -> None:
        late.append("acted")

    async def main() -> list[str]:
        actor, late = Actor("a"), list[str]()
        actor.spawn(root(late))
        await asyncio.sleep(1)
        actor.kill()
        actor.kill()
        await asyncio.sleep(5)
        with pytest.raises(SimulationError, match="dead"):
            actor.spawn(forever())
        return late

    assert SimLoop().run(main()) == []
