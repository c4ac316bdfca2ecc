"""The scaling policy: desired capacity from seconds of backlog, the same on every backend.

desired = backlog seconds ÷ (drain target × slots), clamped. Out at once; in only after a cooldown,
one decision at a time, naming idle instances; to min after an idle time. Each decision says why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from batchlab.manager.live import LiveJob, ManagerSettings, Ports
from batchlab.manager.registry import Registry
from batchlab.model import Control, GroupView, JobId, JobState, LifecycleState

UNKNOWN_TASK_S = 1.0
"""Assumed for a task before any has been measured, or as long as the first has been out for."""


@dataclass(frozen=True, slots=True)
class Backlog:
    """Work that a pool still has to do: `seconds` of task time × slots, over `tasks` tasks that
    could run in parallel."""

    seconds: float = 0.0
    tasks: int = 0


def wanted(backlog: Backlog, view: GroupView, drain_target_s: float) -> tuple[int, str]:
    """Desired capacity for a backlog, with the reason in words."""
    pool = view.pool
    if not backlog.tasks:
        return pool.min_size, "there is no backlog"
    needed = math.ceil(backlog.seconds / (drain_target_s * pool.slots))
    # More instances than tasks would only idle; one task needs one instance however short it is.
    useful = math.ceil(backlog.tasks / pool.slots)
    desired = max(pool.min_size, min(pool.max_size, max(1, min(needed, useful))))
    return desired, (
        f"a backlog of {backlog.tasks} tasks ({backlog.seconds:.1f} s of work) drains in "
        f"{drain_target_s:g} s on {needed} instances of {pool.slots} slots, limits "
        f"{pool.min_size}-{pool.max_size}"
    )


class Autoscaler:
    """Applies the policy to every pool at each tick."""

    def __init__(
        self,
        ports: Ports,
        settings: ManagerSettings,
        lives: Mapping[JobId, LiveJob],
        registry: Registry,
    ) -> None:
        self._ports = ports
        self._settings = settings
        self._lives = lives
        self._registry = registry
        self._shrunk_s: dict[str, float] = {}
        self._idle_since_s: dict[str, float] = {}
        self.held: dict[str, int] = {}
        """Pools whose capacity a person has set by hand; the policy leaves them alone."""

    def backlog(self, pool: str) -> Backlog:
        """What all running jobs still have to do in a pool."""
        seconds, tasks = 0.0, 0
        now_s = self._ports.clock.monotonic_s()
        for live in self._lives.values():
            if live.record.control is not Control.RUN or live.record.state is JobState.SCHEDULED:
                continue
            for stage in live.job.stages:
                counts = live.stages[stage.name].counts
                if stage.pool != pool or counts.planned is None:
                    continue
                left = max(0, counts.planned - counts.terminal)
                mean_s = counts.mean_s
                if mean_s is None:
                    mean_s = max(UNKNOWN_TASK_S, now_s - live.since_s)
                seconds += left * mean_s * stage.slots
                tasks += left * stage.slots
        return Backlog(seconds, tasks)

    async def scale(self, view: GroupView) -> None:
        """Bring one pool's group to what its backlog asks for."""
        pool = view.pool.name
        await self.protect_the_busy(view)
        if pool in self.held:
            return
        backlog = self.backlog(pool)
        desired, why = wanted(backlog, view, self._settings.drain_target_s)
        now_s = self._ports.clock.monotonic_s()
        if backlog.tasks:
            self._idle_since_s.pop(pool, None)
        if desired > view.desired:
            await self._ports.fleet.set_desired(pool, desired, cause=why)
        elif desired < view.desired and self._may_shrink(pool, backlog, now_s):
            await self._shrink(view, desired, why)
            self._shrunk_s[pool] = now_s

    def _may_shrink(self, pool: str, backlog: Backlog, now_s: float) -> bool:
        if not backlog.tasks:
            since_s = self._idle_since_s.setdefault(pool, now_s)
            return now_s - since_s >= self._settings.idle_s
        last_s = self._shrunk_s.setdefault(pool, now_s)
        return now_s - last_s >= self._settings.cooldown_in_s

    async def _shrink(self, view: GroupView, desired: int, why: str) -> None:
        """Name idle instances; a busy one is never chosen (I5). What has not even come up yet
        goes by lowering desired capacity, which the group takes from the Pending."""
        alive = {i.id for i in view.instances if i.state is LifecycleState.IN_SERVICE}
        surplus = view.desired - desired
        pool = view.pool.name
        idle = [i for i in self._registry.idle(pool) if i in alive][:surplus]
        if idle:
            await self._ports.fleet.terminate(pool, idle, decrement=True, cause=why)
        pending = sum(i.state is LifecycleState.PENDING for i in view.instances)
        rest = min(surplus - len(idle), pending)
        if rest > 0:
            target = view.desired - len(idle) - rest
            await self._ports.fleet.set_desired(pool, target, cause=why)

    async def protect_the_busy(self, view: GroupView) -> None:
        """Tell the group who is busy by now; to be done before it is asked to shrink (I5)."""
        pool = view.pool.name
        alive = [i for i in view.instances if i.state is LifecycleState.IN_SERVICE]
        busy = frozenset(self._registry.busy(pool))
        # By what the group says and not by what we told it: another manager may have led meanwhile.
        if on := sorted(i.id for i in alive if i.id in busy and not i.protected):
            await self._ports.fleet.protect(pool, on, on=True)
        if off := sorted(i.id for i in alive if i.id not in busy and i.protected):
            await self._ports.fleet.protect(pool, off, on=False)
