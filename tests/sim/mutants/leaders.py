"""Planted bugs in the change of leaders, and in the manager's waits for workers.

Each docstring describes the code of the mutant, and names the promise that it breaks.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence

from batchlab.core.ports import BundleRecord, ChangeResult, Depth
from batchlab.manager.adoption import Adoption
from batchlab.manager.live_jobs import PoolWork
from batchlab.manager.manager import LeaderLease
from batchlab.manager.reconciler import Reconciler
from batchlab.manager.state import LiveJob
from batchlab.manager.unresponsive_workers import UnresponsiveWorkers
from tests.sim.mutants.kit import Plant, planted


@planted("lead")
def lost_lease_noticed_late(plant: Plant) -> None:
    """A manager that reads another manager's name in the lease reads the lease twice more before it stops. Until it
    stops, both managers lead (lead).
    """
    original = LeaderLease.renew

    @plant.method(LeaderLease, "renew")
    async def keep(self: LeaderLease, on_gap: Callable[[], None]) -> None:
        for _ in range(3):
            await original(self, on_gap)
            await asyncio.sleep(self._ttl_s / 3)


@planted("waste")
def adoption_without_a_wait(plant: Plant) -> None:
    """A new leader treats each outstanding bundle as lost. The leader sends copies of bundles that workers still hold
    (waste).
    """
    original = Adoption._prepare

    @plant.method(Adoption, "_prepare")
    async def _prepare(
        self: Adoption, result: ChangeResult, *, planned: Sequence[BundleRecord] | None = None, concurrent: bool = False
    ) -> LiveJob:
        live = await original(self, result, planned=planned, concurrent=concurrent)
        if not result.is_new:
            for one in live.all_outstanding():
                one.heard_s = -math.inf
        return live


@planted("silence")
def silence_forgiven_while_a_queue_has_messages(plant: Plant) -> None:
    """The manager searches for a lost bundle only when the queue is empty. A lost bundle is not found as long as the
    queue contains other messages (silence).
    """
    original = Reconciler._limit_s

    @plant.method(Reconciler, "_limit_s")
    def _limit_s(self: Reconciler, pool: str, depth: Depth) -> float:
        return math.inf if depth.visible else original(self, pool, depth)


@planted("silence", "I5")
def silence_of_an_instance_forgiven(plant: Plant) -> None:
    """The manager treats every instance as responsive as long as the manager has an unfinished job. An instance whose
    worker has stopped is not replaced (silence).
    """
    original = UnresponsiveWorkers._has_reported

    @plant.method(UnresponsiveWorkers, "_has_reported")
    def _heard(self: UnresponsiveWorkers, instance: str, since_s: float) -> bool:
        return original(self, instance, since_s) or bool(self._registry._lives)


@planted("priority")
def priority_ignored(plant: Plant) -> None:
    """All jobs with remaining tasks share the window of a pool, independently of their priorities. A job with a high
    priority waits for jobs with a lower priority (priority).
    """

    @plant.method(PoolWork, "has_higher")
    def has_higher(self: PoolWork, priority: int) -> bool:
        return False
