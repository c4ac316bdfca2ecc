"""Instances whose worker has stopped without dying. The grid replaces only the instance of the stopped worker."""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Callable, Coroutine, Sequence
from typing import Any
from unittest.mock import AsyncMock

import pytest

from batchlab.adapters.memory.objects import SimObjects
from batchlab.adapters.sql import open_memory
from batchlab.core.errors import BackendError, BatchlabError, Refused
from batchlab.core.model import GroupView, Instance, LifecycleState, Pool
from batchlab.core.port_retries import Patience
from batchlab.core.protocol.messages import Beat
from batchlab.core.service_settings import ManagerSettings
from batchlab.manager.context import Context
from batchlab.manager.state import Ports
from batchlab.manager.unresponsive_workers import UnresponsiveWorkers, WorkEvidence
from batchlab.manager.worker_registry import LOST_S
from batchlab.sim.actors import SimClock, SimIds
from batchlab.sim.event_loop import SimLoop
from batchlab.sim.world import World
from tests.support.no_fleet import NoFleet
from tests.support.sim.scenes import A, ended_well, in_world, job, leader, stage, submitted, takes

POOL = Pool("default", 0, 4)
OTHER = Pool("other", 0, 4)


def test_hanging_worker_delays_no_job_and_its_instance_is_replaced() -> None:
    """Before, the worker counted as busy, so its instance could not be ended. The last tasks waited forever for its
    capacity (I7)."""

    async def act(world: World) -> None:
        made = job(stage(A), items=40)
        await submitted(world, made)
        manager = await leader(world)
        while not manager.registry.busy("default"):
            await asyncio.sleep(0.5)
        (worker, *_) = world.workers.values()
        worker.actor.freeze()
        await ended_well(world, made)
        async with asyncio.timeout(300):
            while (await manager.ports.fleet.describe())[0].desired:
                await asyncio.sleep(5)
        causes = [activity.cause for activity in await manager.ports.fleet.activities()]
        assert any("its worker has been silent for" in cause for cause in causes)

    in_world(act, script=takes(2.0))


# --- Silent instances ----------------------------------------------------------------------------


class Group(NoFleet):
    """A pool of these instances that records which ones are reported as unhealthy."""

    def __init__(self, *instances: str) -> None:
        self.instances = list(instances)
        self.unhealthy: list[str] = []
        self.errors: dict[str, BatchlabError] = {}
        self.others: list[str] = []
        """The instances of another pool."""

    async def set_health(self, instance: str, *, healthy: bool, cause: str) -> None:
        assert not healthy
        if error := self.errors.get(instance):
            raise error
        self.unhealthy.append(instance)
        (self.instances if instance in self.instances else self.others).remove(instance)

    async def describe(self) -> Sequence[GroupView]:
        up = [Instance(instance, "default", LifecycleState.IN_SERVICE, 0.0) for instance in self.instances]
        boots = Instance("i-boots", "default", LifecycleState.PENDING, 0.0)
        there = [Instance(other, "other", LifecycleState.IN_SERVICE, 0.0) for other in self.others]
        return (GroupView(POOL, len(up), (*up, boots)), GroupView(OTHER, len(there), tuple(there)))


class Scene:
    """A manager's look at such a pool, once a second."""

    def __init__(self, *instances: str) -> None:
        rng = random.Random(1)
        self.fleet = Group(*instances)
        self.clock = SimClock(asyncio.get_running_loop(), 1_700_000_000.0)
        ports = Ports(
            SimObjects(),
            None,  # type: ignore[arg-type]
            self.fleet,
            open_memory(),
            self.clock,
            SimIds(rng),
            Patience(rng),
        )
        self._ports = ports
        self._listen()
        self._number = 0

    def _listen(self) -> None:
        context = Context(self._ports, ManagerSettings(silence_s=30.0))
        self.registry = context.registry
        self.silence = UnresponsiveWorkers(context, WorkEvidence(context, AsyncMock()))

    async def restart(self) -> None:
        """Let another manager take the lead."""
        await self.registry.instances.save()
        self._listen()
        await self.registry.instances.load()

    async def looks(self, seconds: int, *heard: str) -> list[str]:
        """Return the instances that are reported as unhealthy within `seconds`, while the `heard` ones send a heartbeat
        every minute."""
        for second in range(seconds):
            if second % 60 == 0:
                self._number += 1
                for one in heard:
                    beat = Beat(f"w-{one}", one, "default", 1.0, 1, 0, (), self._number)
                    await self.registry.receive_beat(beat, ())
            described = await self.fleet.describe()
            await self.registry.update_instances(described)
            await self.silence.check(described)
            await asyncio.sleep(1.0)
        return self.fleet.unhealthy


def play(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    SimLoop().run(main())


def test_only_unresponsive_instances_are_replaced() -> None:
    async def main() -> None:
        scene = Scene("i-beats", "i-stopped", "i-unknown")
        await scene.looks(1, "i-beats", "i-stopped")
        assert await scene.looks(int(LOST_S) - 2, "i-beats") == []
        assert await scene.looks(4, "i-beats") == ["i-unknown", "i-stopped"]
        assert await scene.looks(1_000, "i-beats") == ["i-unknown", "i-stopped"]

    play(main)


def test_instances_are_replaced_one_at_a_time_if_none_responds() -> None:
    async def main() -> None:
        scene = Scene("i-1", "i-2", "i-3")
        assert await scene.looks(int(LOST_S) + 2) == ["i-1"]
        assert await scene.looks(int(LOST_S) - 5) == ["i-1"]
        assert await scene.looks(5) == ["i-1", "i-2"]

    play(main)


def test_each_pool_is_judged_separately() -> None:
    async def main() -> None:
        scene = Scene("i-beats", "i-1", "i-2")
        scene.fleet.others = ["i-3", "i-4"]
        assert await scene.looks(int(LOST_S) + 2, "i-beats") == ["i-1", "i-2", "i-3"]

    play(main)


def test_time_without_a_listening_manager_is_not_silence() -> None:
    async def main() -> None:
        scene = Scene("i-beats", "i-1")
        for _ in range(3):
            assert await scene.looks(int(LOST_S / 2), "i-beats") == []
            await asyncio.sleep(10 * LOST_S)
            await scene.looks(1, "i-beats", "i-1")
        assert await scene.looks(int(LOST_S) - 10, "i-beats") == []
        assert await scene.looks(20, "i-beats") == ["i-1"]

    play(main)


def test_time_without_a_reachable_queue_is_not_counted() -> None:
    """Before, each backlog restarted the count, so under steady load no instance was ever replaced."""

    async def main() -> None:
        scene = Scene("i-beats", "i-1")
        assert await scene.looks(int(LOST_S / 2), "i-beats") == []
        scene.registry.outage_s = math.inf
        assert await scene.looks(int(10 * LOST_S)) == []
        for _ in range(4):
            scene.registry.outage_s = scene.clock.monotonic_s()
            assert await scene.looks(int(LOST_S / 10), "i-beats") == []
        assert await scene.looks(int(LOST_S / 10) - 10, "i-beats") == []
        assert await scene.looks(20, "i-beats") == ["i-1"]

    play(main)


def test_new_leader_continues_the_count_of_silence() -> None:
    """Before, each restart of the manager restarted the count, so an instance with a stopped worker stayed for 1,500 s
    or longer."""

    async def main() -> None:
        scene = Scene("i-beats", "i-1")
        for _ in range(3):
            assert await scene.looks(int(0.3 * LOST_S) + 2, "i-beats") == []
            await scene.restart()
        assert await scene.looks(int(0.1 * LOST_S) + 2, "i-beats") == ["i-1"]

    play(main)


def test_one_that_cannot_be_replaced_is_tried_again_and_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        scene = Scene("i-beats", "i-1", "i-2", "i-3")
        scene.fleet.errors = {"i-1": Refused("there is no such instance"), "i-2": BackendError("access denied")}
        with caplog.at_level(logging.INFO):
            assert await scene.looks(int(LOST_S) + 2, "i-beats") == ["i-3"]
        for error in scene.fleet.errors.values():
            assert caplog.text.count(f"cannot be replaced: {error}") == 1
        scene.fleet.errors = {}
        assert await scene.looks(int(LOST_S) + 2, "i-beats") == ["i-3", "i-1", "i-2"]

    play(main)
