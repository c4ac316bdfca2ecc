"""Scaling policy, launch breaker, and prewarming.

Every backend uses the same scaling policy. Desired capacity is backlog seconds ÷ (drain target × slots), within the
pool's limits. Scale-out takes effect at the next tick without a cooldown. Scale-in waits for a cooldown and terminates
only idle instances. An idle pool shrinks to the pool's minimum size.

The launch breaker stops launches in a pool whose instances do not start, because an Auto Scaling group replaces failed
instances forever, and every launch is billed. After consecutive failed launches, the pool keeps its running and booting
instances, and the launch breaker permits one more launch after each pause. Each pause between launches is twice as long
as the previous pause. The launch breaker permits all launches again after one instance has started.

Prewarming sets a minimum capacity of a pool before a schedule is due. Prewarming ends when the scaling policy knows the
work of the schedule's job, or when no job starts at the due time. Cost caps limit prewarming.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from batchlab.core import due_times
from batchlab.core.job_definition import JobDef, SplitBy
from batchlab.core.model import GroupView, Instance, LifecycleState, Pool
from batchlab.core.port_retries import doubled_s
from batchlab.core.ports import Clock
from batchlab.core.schedules import ON_TIME_S, RunState, Schedule
from batchlab.core.service_settings import ManagerSettings
from batchlab.core.text import count
from batchlab.manager.context import Context, Part
from batchlab.manager.cost_caps import CostCaps
from batchlab.manager.scheduler import Scheduler
from batchlab.manager.state import UNKNOWN_TASK_S, Backlog

log = logging.getLogger(__name__)


MAX_PAUSE_S = 1800.0
_ENDED = (LifecycleState.TERMINATING, LifecycleState.TERMINATED)


@dataclass(slots=True)
class _PoolLaunches:
    booting: dict[str, float] = field(default_factory=dict)
    """Ids of Pending instances without a heartbeat, with the monotonic time at which the manager first saw each
    instance."""
    failures: int = 0
    last: str = ""
    """Id of the last failed instance, and the fleet's note about the instance's end."""
    pause_s: float = 0.0
    """Pause before the next launch attempt, or 0 while launches are not stopped."""
    stopped_s: float = 0.0
    retry_s: float = 0.0


class LaunchBreaker:
    """Counter of failed launches that limits further launches."""

    def __init__(self, clock: Clock, settings: ManagerSettings, has_reported: Callable[[str], bool]) -> None:
        """`has_reported` returns whether an instance's worker has ever sent a heartbeat."""
        self._clock = clock
        self._tries = settings.boot_tries
        self._pause_s = settings.boot_pause_s
        self._has_reported = has_reported
        self._pools: dict[str, _PoolLaunches] = {}

    def observe(self, views: Sequence[GroupView]) -> None:
        for view in views:
            pool = self._pools.setdefault(view.pool.name, _PoolLaunches())
            for instance in view.instances:
                self._observe_instance(view.pool.name, pool, instance)
            for instance_id in pool.booting.keys() - {instance.id for instance in view.instances}:
                del pool.booting[instance_id]

    def _observe_instance(self, name: str, pool: _PoolLaunches, instance: Instance) -> None:
        if instance.state is LifecycleState.PENDING and not self._has_reported(instance.id):
            pool.booting.setdefault(instance.id, self._clock.monotonic_s())
        elif instance.state not in _ENDED or self._has_reported(instance.id):
            if pool.booting.pop(instance.id, None) is not None:
                if pool.pause_s:
                    log.warning("pool %s starts instances again, and scaling continues", name, extra={"pool": name})
                pool.failures, pool.pause_s, pool.last = 0, 0.0, ""
        elif instance.id in pool.booting and not (instance.healthy and instance.note.startswith("terminated")):
            # The instance counts as a failed launch, because no program requested the instance's end.
            self._on_failure(name, pool, instance, pool.booting.pop(instance.id))

    def _on_failure(self, name: str, pool: _PoolLaunches, instance: Instance, since_s: float) -> None:
        now_s = self._clock.monotonic_s()
        pool.failures += 1
        pool.last = f"{instance.id}: {instance.note.rstrip('.')}"
        if pool.failures < self._tries or not self._pause_s:
            return
        if not pool.pause_s:
            pool.pause_s, pool.stopped_s = self._pause_s, now_s
        elif since_s >= pool.retry_s:
            pool.pause_s = doubled_s(pool.pause_s, MAX_PAUSE_S)
        else:
            return  # the instance was launched before the pause ended, so it was not the permitted launch
        pool.retry_s = now_s + pool.pause_s
        log.warning("%s", self.trouble(name), extra={"pool": name})

    def limit(self, view: GroupView) -> int | None:
        """Return the group's maximum desired capacity, or None if launches are not stopped."""
        pool = self._pools.get(view.pool.name)
        if pool is None or not pool.pause_s:
            return None
        # Instances launched together with failed instances may be healthy, because a Spot interruption may end only
        # some booting instances.
        running = sum(
            instance.state is LifecycleState.IN_SERVICE
            or pool.booting.get(instance.id, pool.stopped_s) < pool.stopped_s
            for instance in view.instances
        )
        trial = int(self._clock.monotonic_s() >= pool.retry_s)
        return max(view.pool.min_size, min(view.pool.max_size, running + trial))

    def retry_now(self, name: str) -> None:
        """End the pause of the pool's launches at a user's request."""
        if pool := self._pools.get(name):
            pool.retry_s = min(pool.retry_s, self._clock.monotonic_s())

    def trouble(self, name: str) -> str:
        """Return a phrase about failed launches of the pool, or "" while the breaker does not stop launches."""
        pool = self._pools.get(name)
        if pool is None or pool.failures < self._tries:
            return ""
        text = (
            f"the last {pool.failures} instances of pool {name} ended before their worker had "
            f"reported, the last was {pool.last}"
        )
        if not pool.pause_s:
            return f"{text}; its group keeps trying"
        left_s = pool.retry_s - self._clock.monotonic_s()
        when = f"the next is tried in {left_s:.0f} s" if left_s > 0 else "another is being tried"
        return f"{text}; launching is stopped, {when}"

    def stopped(self) -> dict[str, str]:
        """Return the pools whose launches are stopped, with the reason of each stop."""
        return {name: self.trouble(name) for name, pool in self._pools.items() if pool.pause_s}


def capacity_for(backlog: Backlog, pool: Pool, drain_target_s: float) -> tuple[int, int]:
    """Return the desired capacity for a backlog, and the capacity that drains the backlog in time."""
    if not backlog.tasks:
        return pool.min_size, 0
    gpus = max(1, pool.gpus)
    needed = math.ceil(max(backlog.seconds / pool.slots, backlog.gpu_s / gpus) / drain_target_s)
    # The number of tasks limits the desired capacity, because an instance without a task would be idle. The capacity is
    # at least one instance, even if the only task is short.
    useful = math.ceil(max(backlog.tasks / pool.slots, backlog.gpu_tasks / gpus))
    return max(pool.min_size, min(pool.max_size, max(1, min(needed, useful)))), needed


def desired_capacity(backlog: Backlog, view: GroupView, drain_target_s: float) -> tuple[int, str]:
    """Return the desired capacity for a backlog, and the reason for the capacity."""
    pool = view.pool
    desired, needed = capacity_for(backlog, pool, drain_target_s)
    if not backlog.tasks:
        return desired, "an empty backlog"
    work = f"a backlog of {count(backlog.tasks, 'task')} ({backlog.seconds:.1f} s of work)"
    gpus = f" and {count(pool.gpus, 'GPU')}" if backlog.gpu_tasks else ""
    return desired, (
        f"{work} that drains in {drain_target_s:g} s on {count(needed, 'instance')} of "
        f"{count(pool.slots, 'slot')}{gpus}, limits "
        f"{pool.min_size}-{pool.max_size}"
    )


@dataclass(frozen=True, slots=True)
class MinimumCapacity:
    count: int
    reason: str


class Autoscaler(Part):
    """Autoscaler that applies the scaling policy to every pool at each tick. `caps` limit launches by cost."""

    def __init__(self, context: Context, caps: CostCaps | None = None) -> None:
        super().__init__(context)
        self._caps = caps
        self._shrunk_s: dict[str, float] = {}
        self._idle_since_s: dict[str, float] = {}
        self.launch_breaker = LaunchBreaker(context.ports.clock, context.settings, context.registry.has_reported)
        self.user_capacity: dict[str, int] = {}
        """Capacity that a user has set, by pool. The scaling policy does not change a user's capacity."""
        self._reduced: set[str] = set()
        """Pools whose desired capacity is below the user's capacity, because launches fail."""
        self.minimum_capacity: Callable[[GroupView], MinimumCapacity | None] = lambda _: None
        """Function that returns a pool's minimum capacity for work that is due soon."""

    def backlog(self, pool: str) -> Backlog:
        """Return the remaining work in a pool of all running jobs, as far as limits of shares allow the work."""
        return self._context.fair_share.limit_backlog(pool, self._lives.backlog(pool, self._clock.monotonic_s()))

    async def scale(self, view: GroupView) -> None:
        pool = view.pool.name
        await self.protect_the_busy(view)
        if pool in self.user_capacity:
            await self._hold_user_capacity(view, self.user_capacity[pool])
            return
        backlog = self.backlog(pool)
        desired, why = desired_capacity(backlog, view, self._settings.drain_target_s)
        if (minimum_capacity := self.minimum_capacity(view)) and minimum_capacity.count > desired:
            desired, why = minimum_capacity.count, minimum_capacity.reason
        now_s = self._clock.monotonic_s()
        if backlog.tasks:
            self._idle_since_s.pop(pool, None)
        if self._caps:
            desired, why = self._caps.limit_launches(view, desired, why)
        limit = self.launch_breaker.limit(view)
        if limit is not None and (view.desired > limit or desired > limit):
            # The launch breaker's limit takes effect without a cooldown, because the group replaces each Pending
            # instance that fails.
            await self.set_desired(view, limit, self.launch_breaker.trouble(pool))
            return
        if desired > view.desired:
            await self.set_desired(view, desired, why)
        elif desired < view.desired and self._may_shrink(pool, backlog, now_s):
            await self._shrink(view, desired, why)
            self._shrunk_s[pool] = now_s

    async def set_desired(self, view: GroupView, desired: int, why: str) -> None:
        await self._fleet.set_desired(view.pool.name, desired, cause=why)
        if desired != view.desired:
            self._record_decision(view, desired, why)

    def _record_decision(self, view: GroupView, desired: int, why: str) -> None:
        pool, before = view.pool.name, view.desired
        if self._recorder:
            self._recorder.record_decision(view, desired, why, self.backlog(pool))
        self._counts.count_decision(pool, before, desired)
        log.info("desired capacity %d, before %d: %s", desired, before, why, extra={"pool": pool})

    async def _hold_user_capacity(self, view: GroupView, capacity: int) -> None:
        """Set the capacity of a user, or a lower capacity while launches fail."""
        pool = view.pool.name
        limit = self.launch_breaker.limit(view)
        target = max(view.pool.min_size, min(view.pool.max_size, capacity))
        if limit is not None and min(limit, target) != view.desired:
            self._reduced.add(pool)
            await self.set_desired(view, min(limit, target), self.launch_breaker.trouble(pool))
        elif limit is None and pool in self._reduced:
            self._reduced.discard(pool)
            await self.set_desired(view, target, "instances start again")

    def _may_shrink(self, pool: str, backlog: Backlog, now_s: float) -> bool:
        if not backlog.tasks:
            return now_s - self._idle_since_s.setdefault(pool, now_s) >= self._settings.idle_s
        return now_s - self._shrunk_s.setdefault(pool, now_s) >= self._settings.cooldown_in_s

    async def _shrink(self, view: GroupView, desired: int, why: str) -> None:
        """Terminate only idle instances (promise I5), and lower the desired capacity by the number of Pending
        instances."""
        alive = {i.id for i in view.instances if i.state is LifecycleState.IN_SERVICE}
        before, surplus = view, view.desired - desired
        pool = view.pool.name
        idle = [i for i in self._registry.idle(pool) if i in alive][:surplus]
        if idle:
            await self._fleet.terminate(pool, idle, decrement=True, cause=why)
            view = replace(view, desired=view.desired - len(idle))
            self._record_decision(before, view.desired, why)
        pending = sum(i.state is LifecycleState.PENDING for i in view.instances)
        rest = min(surplus - len(idle), pending)
        if rest > 0:
            await self.set_desired(view, view.desired - rest, why)

    async def protect_the_busy(self, view: GroupView) -> None:
        """Set scale-in protection for busy instances. The autoscaler protects busy instances before a group shrinks
        (promise I5)."""
        pool = view.pool.name
        alive = [i for i in view.instances if i.state is LifecycleState.IN_SERVICE]
        busy = frozenset(self._registry.busy(pool))
        # The comparison uses the scale-in protection that the group reports, because another manager may have changed
        # it.
        for on in (True, False):
            if ids := sorted(i.id for i in alive if (i.id in busy) is on and i.protected is not on):
                await self._fleet.protect(pool, ids, on=on)


MAX_PLANNING_S = 600.0
"""Maximum time after the start of a scheduled run for which the prewarmed capacity stays while the run's job is
planned."""
MAX_PEAKS = 5
"""Number of recent runs of a schedule whose peak capacity determines the prewarmed capacity."""
_ALIVE = (LifecycleState.PENDING, LifecycleState.IN_SERVICE)


class Prewarm(Part):
    """Minimum capacity of pools before schedules are due. The autoscaler calls `Prewarm` for each pool at each tick."""

    def __init__(self, context: Context, scheduler: Scheduler, caps: CostCaps | None) -> None:
        super().__init__(context)
        self._scheduler = scheduler
        self._caps = caps

    def __call__(self, view: GroupView) -> MinimumCapacity | None:
        """Return the pool's current minimum capacity, or None if no schedule is due soon."""
        minimum_capacities = [
            self._for_schedule(view, schedule) for schedule in self._scheduler.store.schedules.values()
        ]
        return max((c for c in minimum_capacities if c), key=lambda c: c.count, default=None)

    def _for_schedule(self, view: GroupView, schedule: Schedule) -> MinimumCapacity | None:
        definition = schedule.definition
        if not definition.prewarm_s:
            return None
        due_s = self._due_s(schedule)
        template = self._scheduler.store.cached_template(definition.template)
        if due_s is None or template is None:
            return None
        if all(stage.pool != view.pool.name for stage in template.roots()):
            return None
        count, how = self._count(schedule, template, view)
        most = min(count, view.pool.max_size)
        when = due_times.text_of_time(due_s, definition.when.tz)
        why = f"schedule {schedule.name} is due at {when}: {how}"
        if most < count:
            why += f", of which its limit leaves {most}"
        paid = self._affordable(schedule, template, view, most, due_s)
        if paid < most:
            why += f", of which a cap on cost pays for {paid}"
        return MinimumCapacity(paid, why) if paid else None

    def _due_s(self, schedule: Schedule) -> float | None:
        """Return the schedule's due time for which the fleet must be ready now, or None without such a due time."""
        now_s = self._clock.now_s()
        run = schedule.running
        if run and not run.asked and not self._scheduler.has_begun(run):
            started_s = run.started_s or 0.0  # the scaling policy does not know the work of the run's job yet
            if started_s - run.due_s <= ON_TIME_S and now_s - started_s <= MAX_PLANNING_S:
                return run.due_s
        next_s = self._scheduler.next_s(schedule)
        # The tolerance `ON_TIME_S` covers the time between the due time and the scheduler's decision about the run.
        if next_s is not None and -ON_TIME_S <= next_s - now_s <= schedule.definition.prewarm_s:
            return next_s
        return None

    def _count(self, schedule: Schedule, template: JobDef, view: GroupView) -> tuple[int, str]:
        """Return the number of instances to prewarm, and the reason for the number."""
        pool = view.pool.name
        if schedule.definition.capacity is not None:
            return schedule.definition.capacity, f"{schedule.definition.capacity} as it asks for"
        ended = [run for run in schedule.runs if run.state is RunState.ENDED]
        peaks = [dict(run.peak)[pool] for run in ended if pool in dict(run.peak)][-MAX_PEAKS:]
        if peaks:
            return max(peaks), f"{max(peaks)}, which its last runs used at their peak"
        tasks = next((run.tasks for run in reversed(ended) if run.tasks is not None), None)
        tasks = _known_tasks(template) if tasks is None else tasks
        if tasks is None:
            return 1, "1, since nothing is known of its size"
        slots = max(s.slots for s in template.roots() if s.pool == pool)
        gpus = max(s.gpus for s in template.roots() if s.pool == pool)
        work_s = tasks * UNKNOWN_TASK_S
        backlog = Backlog(slots * work_s, tasks * slots, gpus * work_s, tasks * gpus)
        count, _ = desired_capacity(backlog, view, self._settings.drain_target_s)
        return count, f"{count}, for its {tasks} tasks"

    def _affordable(self, schedule: Schedule, template: JobDef, view: GroupView, count: int, due_s: float) -> int:
        """Return the number of instances, at most `count`, that the cost caps cover until the due time."""
        if self._caps is None:
            return count
        caps, prewarm_s = self._caps, schedule.definition.prewarm_s
        if template.max_cost_usd is not None:
            launch_usd, _ = caps.warm_usd(view.pool, prewarm_s)
            count = affordable(count, 0, template.max_cost_usd, launch_usd, 0.0)
        left_usd = caps.remaining_usd()
        if left_usd is not None:
            still_s = max(0.0, due_s - self._clock.now_s())
            existing = sum(instance.state in _ALIVE for instance in view.instances)
            count = affordable(count, existing, left_usd, *caps.warm_usd(view.pool, still_s))
        return count


def affordable(count: int, existing: int, left_usd: float, launch_usd: float, hold_usd: float) -> int:
    """Return the number of instances, at most `count`, that `left_usd` covers. A launch costs `launch_usd`, and each of
    the `existing` instances costs `hold_usd`."""
    reused = min(count, existing)
    if hold_usd > 0 and reused * hold_usd > left_usd:
        return int(max(0.0, left_usd) / hold_usd)
    if launch_usd <= 0:
        return count if left_usd >= 0 else reused
    return reused + min(count - reused, int(max(0.0, left_usd - reused * hold_usd) / launch_usd + 1e-9))


def _known_tasks(template: JobDef) -> int | None:
    """Return the number of tasks of the template's first stages, or None if the number is unknown."""
    raw = template.input
    if raw is None:
        return template.items
    whole = raw.split is SplitBy.FILE and not any(key.endswith("/") for key in raw.keys)
    return len(raw.keys) if whole else None
