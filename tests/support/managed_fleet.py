"""A ManagedFleet with a launcher in memory, a clock that a test sets, and a store that can be
full.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from batchlab.adapters.memory.launcher import MemoryState
from batchlab.core.errors import BackendError
from batchlab.core.model import GroupView, Instance, Pool
from batchlab.fleet.fleet_port import ManagedFleet
from tests.support.fleet import CountedIds, ManualClock, TableLauncher, checked_in, counted

POOL = Pool("p", max_size=4)
USER = "a user request"


class Crash(BaseException):
    """The manager dies here."""


class Disk(MemoryState):
    """A store that a test can fill up."""

    full = False

    def save(self, data: bytes) -> None:
        if self.full:
            raise BackendError("no space left on device")
        super().save(data)


@dataclass
class World:
    """A fleet and its dependencies. `restart` simulates a crash of the manager."""

    launcher: TableLauncher = field(default_factory=TableLauncher)
    clock: ManualClock = field(default_factory=ManualClock)
    ids: CountedIds = field(default_factory=CountedIds)
    store: Disk = field(default_factory=Disk)
    options: dict[str, Any] = field(default_factory=dict)
    fleet: ManagedFleet = field(init=False)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.fleet = ManagedFleet(self.launcher, self.clock, self.ids, self.store, **self.options)

    async def tick(self, after_s: float = 0.0) -> list[Instance]:
        self.clock.time_s += after_s
        return list(await self.fleet.tick())

    async def view(self) -> GroupView:
        return next(iter(await self.fleet.describe()))

    async def launch(self, size: int, *, ready: bool = True, pool: Pool = POOL) -> list[str]:
        """Request `size` instances, and return the ids of the group's counted instances."""
        await self.fleet.ensure(pool)
        await self.fleet.set_desired(pool.name, size, cause=USER)
        await self.fleet.tick()
        chosen = counted(await self.view())
        for name in chosen if ready else []:
            await self.fleet.ready(name)
        return chosen

    async def states(self) -> list[str]:
        return [str(instance.state) for instance in (await self.view()).instances]

    async def causes(self) -> list[str]:
        return [a.cause for a in await self.fleet.activities(limit=1_000)]


in_a_world = checked_in(World)
