"""The scaling policy: desired capacity from seconds of backlog, the same on every backend.

desired = backlog seconds ÷ (drain target × slots), clamped. Out at once; in only after a cooldown,
one decision at a time, naming idle instances; to min after an idle time. Each decision says why.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from batchlab.core.model import Control, GroupView, JobId, JobState, LifecycleState
from batchlab.core.text import count
from batchlab.manager.counters import Counts
from batchlab.manager.scaling.launch_breaker import Boots
from batchlab.manager.scaling.worker_registry import Registry
from batchlab.manager.settings import ManagerSettings
from batchlab.manager.state import LiveJob, Ports
from batchlab.manager.usage.caps import Caps

log = logging.getLogger(__name__)


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
    work = f"a backlog of {count(backlog.tasks, 'task')} ({backlog.seconds:.1f} s of work)"
    return desired, (
        f"{work} drains in {drain_target_s:g} s on {count(needed, 'instance')} of "
        f"{count(pool.slots, 'slot')}, limits "
        f"{pool.min_size}-{pool.max_size}"
    )


@dataclass(frozen=True, slots=True)
class Warmth:
    """The least capacity that a pool is to have before its work is there, and why."""

    count: int
    why: str


class Autoscaler:
    """Applies the policy to every pool at each tick."""

    def __init__(
        self,
        ports: Ports,
        settings: ManagerSettings,
        lives: Mapping[JobId, LiveJob],
        registry: Registry,
        caps: Caps | None = None,
        on_decision: Callable[[GroupView, int, str, Backlog], None] = lambda *_: None,
        counts: Counts | None = None,
    ) -> None:
        """`caps` on cost are asked before anything is launched. `on_decision` hears of each
        change of desired capacity: the group before it, capacity after it, why, the backlog."""
        self._counts = counts or Counts()
        self._ports = ports
        self._settings = settings
        self._lives = lives
        self._registry = registry
        self._caps = caps
        self._on_decision = on_decision
        self._shrunk_s: dict[str, float] = {}
        self._idle_since_s: dict[str, float] = {}
        self.boots = Boots(ports.clock, settings, registry.has_reported)
        self.held: dict[str, int] = {}
        """Pools whose capacity a person has set by hand; the policy leaves them alone."""
        self._short: set[str] = set()
        """Those of them that have less now, because their instances do not come up."""
        self.warmth: Callable[[GroupView], Warmth | None] = lambda _: None
        """Asked what a pool is to have for what is due soon."""

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
                if live.is_held or (live.budget and counts.mean_s is None):
                    # Under a cap what is cut is finished, and while nobody knows how long a task
                    # takes, capacity is had for nothing else.
                    left = min(left, live.cut_tasks(stage.name))
                seconds += left * live.task_s(stage, now_s)
                tasks += left * stage.slots
        return Backlog(seconds, tasks)

    async def scale(self, view: GroupView) -> None:
        """Bring one pool's group to what its backlog asks for."""
        pool = view.pool.name
        await self.protect_the_busy(view)
        if pool in self.held:
            await self._keep(view, self.held[pool])
            return
        backlog = self.backlog(pool)
        desired, why = wanted(backlog, view, self._settings.drain_target_s)
        if (warmth := self.warmth(view)) and warmth.count > desired:
            desired, why = warmth.count, warmth.why
        now_s = self._ports.clock.monotonic_s()
        if backlog.tasks:
            self._idle_since_s.pop(pool, None)
        if self._caps:
            desired, why = self._caps.launches(view, desired, why)
        most = self.boots.most(view)
        if most is not None and (view.desired > most or desired > most):
            # At once: what is Pending will not come up, and would be replaced.
            await self.decide(view, most, self.boots.trouble(pool))
            return
        if desired > view.desired:
            await self.decide(view, desired, why)
        elif desired < view.desired and self._may_shrink(pool, backlog, now_s):
            await self._shrink(view, desired, why)
            self._shrunk_s[pool] = now_s

    async def decide(self, view: GroupView, desired: int, why: str) -> None:
        """Set desired capacity, and say so."""
        await self._ports.fleet.set_desired(view.pool.name, desired, cause=why)
        if desired != view.desired:
            self._decided(view, desired, why)

    def _decided(self, view: GroupView, desired: int, why: str) -> None:
        pool, before = view.pool.name, view.desired
        self._on_decision(view, desired, why, self.backlog(pool))
        self._counts.decided(pool, before, desired)
        log.info("desired capacity %d, before %d: %s", desired, before, why, extra={"pool": pool})

    async def _keep(self, view: GroupView, by_hand: int) -> None:
        """Leave the pool as it was set by hand, but for instances that do not come up."""
        pool = view.pool.name
        limits, most = view.pool, self.boots.most(view)
        wanted = max(limits.min_size, min(limits.max_size, by_hand))
        if most is not None and min(most, wanted) != view.desired:
            self._short.add(pool)
            await self.decide(view, min(most, wanted), self.boots.trouble(pool))
        elif most is None and pool in self._short:
            self._short.discard(pool)
            await self.decide(view, wanted, "instances come up again")

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
        before, surplus = view, view.desired - desired
        pool = view.pool.name
        idle = [i for i in self._registry.idle(pool) if i in alive][:surplus]
        if idle:
            await self._ports.fleet.terminate(pool, idle, decrement=True, cause=why)
            view = replace(view, desired=view.desired - len(idle))
            self._decided(before, view.desired, why)
        pending = sum(i.state is LifecycleState.PENDING for i in view.instances)
        rest = min(surplus - len(idle), pending)
        if rest > 0:
            await self.decide(view, view.desired - rest, why)

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
