"""Planted bugs in the end of a fleet without a manager.

Each docstring describes the code of the mutant, and names the promise that it breaks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from batchlab.fleet.changes import Changes
from batchlab.fleet.group_state import Group
from batchlab.manager.fleet_end import FleetEnd
from batchlab.worker.leader_watch import LeaderWatch
from tests.sim.mutants.kit import Plant, planted


@planted("orphans", weather="orphans")
def end_scheduled_only_far_in_the_future(plant: Plant) -> None:
    """The manager schedules the end of the fleet in a month. Without a manager, the fleet does not end (orphans)."""
    original = FleetEnd._attempt

    @plant.method(FleetEnd, "_attempt")
    async def _attempt(self: FleetEnd, pool: str) -> bool:
        self._orphan_s *= 15_000
        try:
            return await original(self, pool)
        finally:
            self._orphan_s /= 15_000


@planted("orphans", weather="orphans")
def end_keeps_the_minimum(plant: Plant) -> None:
    """The scheduled action sets the desired capacity to the minimum, and the minimum stays above 0. A pool with a
    minimum does not end (orphans).
    """

    @plant.method(Changes, "end")
    def end(self: Changes, group: Group) -> None:
        group.end_s = None
        group.pool = replace(group.pool, max_size=group.pool.min_size)
        self.set_desired(group, group.pool.min_size, "a scheduled action")


@planted("orphans", weather="orphans")
def end_never_postponed(plant: Plant) -> None:
    """A manager schedules the end of the fleet at its start, and does not postpone the end. The fleet ends although the
    manager leads (orphans).
    """

    @plant.method(FleetEnd, "run")
    async def run(self: FleetEnd) -> None:
        await asyncio.sleep(1e9)


@planted("orphans", weather="orphans")
def protected_worker_waits_forever(plant: Plant) -> None:
    """A worker does not watch the leader beat. An instance with scale-in protection stays without a manager
    (orphans).
    """

    @plant.method(LeaderWatch, "wait_until_orphaned")
    async def wait_until_orphaned(self: LeaderWatch, is_idle: Callable[[], bool]) -> None:
        await asyncio.sleep(1e9)


@planted("I5", "I7", "ends", weather="orphans")
def limits_not_restored_after_the_end(plant: Plant) -> None:
    """A manager that was suspended does not restore the limits after the fleet's end. The pool does not
    launch instances for its remaining jobs (I7).
    """

    @plant.method(FleetEnd, "_restore")
    async def _restore(self: FleetEnd, pool: str) -> None:
        pass
