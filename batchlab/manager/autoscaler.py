"""Scaling policy: desired capacity from seconds of backlog, the same on every backend.

Desired capacity is backlog seconds ÷ (drain target × slots), within the pool's limits. Scale-out is
immediate. Scale-in waits for a cooldown, decides once at a time, and names idle instances. An idle
pool shrinks to its minimum size. Each decision has a reason.

The launch breaker stops launches in a pool whose instances do not start. An Auto Scaling group
replaces failed instances forever, and every launch is billed. After consecutive launches that ended
before their worker reported, the pool keeps its running and booting instances. One more instance is
tried after a pause, and each pause is twice as long as the one before. The first instance that
starts ends the stop.

Prewarming: the minimum capacity of a pool before a schedule is due.

Invariant: the policy may exceed this minimum. It ends when the policy knows the job's work, or no
job starts at the due time. Cost caps must pay for it in advance.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from batchlab.core import due_times
from batchlab.core.job_definition import JobDef, SplitBy
from batchlab.core.model import Control, GroupView, Instance, JobId, JobState, LifecycleState
from batchlab.core.port_retries import doubled_s
from batchlab.core.ports import Clock
from batchlab.core.schedules import ON_TIME_S, Run, RunState, Schedule
from batchlab.core.text import count
from batchlab.manager.cost_caps import CostCaps
from batchlab.manager.counters import Counters
from batchlab.manager.scheduler import Scheduler
from batchlab.manager.state import UNKNOWN_TASK_S, LiveJob, ManagerSettings, Ports
from batchlab.manager.worker_registry import WorkerRegistry

log = logging.getLogger(__name__)

LONGEST_PAUSE_S = 1800.0
_ENDED = (LifecycleState.TERMINATING, LifecycleState.TERMINATED)


@dataclass(slots=True)
class _PoolLaunches:
    """Launches of one pool."""

    booting: dict[str, float] = field(default_factory=dict)
    """Pending instances without a report, with the monotonic time when they were first seen."""
    failures: int = 0
    """Consecutive failures."""
    last: str = ""
    """The last failed instance and the note about its end."""
    pause_s: float = 0.0
    """Pause before the next attempt, 0 while launches are not stopped."""
    stopped_s: float = 0.0
    """Monotonic time when launches were stopped."""
    retry_s: float = 0.0
    """Monotonic time of the next attempt."""


class LaunchBreaker:
    """Counts failed launches, and limits further launches."""

    def __init__(self, clock: Clock, settings: ManagerSettings, has_reported: Callable[[str], bool]) -> None:
        """`has_reported` returns whether an instance's worker has ever sent a beat."""
        self._clock = clock
        self._tries = settings.boot_tries
        self._pause_s = settings.boot_pause_s
        self._has_reported = has_reported
        self._pools: dict[str, _PoolLaunches] = {}

    def observe(self, views: Sequence[GroupView]) -> None:
        """Update which instances have started or failed."""
        for view in views:
            pool = self._pools.setdefault(view.pool.name, _PoolLaunches())
            for instance in view.instances:
                self._look_at(view.pool.name, pool, instance)
            there = {instance.id for instance in view.instances}
            for gone in pool.booting.keys() - there:
                del pool.booting[gone]

    def _look_at(self, name: str, pool: _PoolLaunches, instance: Instance) -> None:
        if instance.state is LifecycleState.PENDING and not self._has_reported(instance.id):
            pool.booting.setdefault(instance.id, self._clock.monotonic_s())
        elif instance.state not in _ENDED or self._has_reported(instance.id):
            if pool.booting.pop(instance.id, None) is not None:
                self._came_up(name, pool)
        elif instance.id in pool.booting and not _was_requested(instance):
            self._failed(name, pool, instance, pool.booting.pop(instance.id))

    def _came_up(self, name: str, pool: _PoolLaunches) -> None:
        if pool.pause_s:
            log.warning("pool %s starts instances again, and scaling continues", name, extra={"pool": name})
        pool.failures, pool.pause_s, pool.last = 0, 0.0, ""

    def _failed(self, name: str, pool: _PoolLaunches, instance: Instance, since_s: float) -> None:
        now_s = self._clock.monotonic_s()
        pool.failures += 1
        pool.last = f"{instance.id}: {instance.note.rstrip('.')}"
        if pool.failures < self._tries or not self._pause_s:
            return
        if not pool.pause_s:
            pool.pause_s, pool.stopped_s = self._pause_s, now_s
        elif since_s >= pool.retry_s:
            pool.pause_s = doubled_s(pool.pause_s, LONGEST_PAUSE_S)
        else:
            return  # launched before the stop, so it was not an attempt
        pool.retry_s = now_s + pool.pause_s
        log.warning("%s", self.trouble(name), extra={"pool": name})

    def most(self, view: GroupView) -> int | None:
        """Return the limit of desired capacity, or None if launches are not stopped."""
        pool = self._pools.get(view.pool.name)
        if pool is None or not pool.pause_s:
            return None
        # Instances launched together with the failed ones may be healthy: a Spot interruption may
        # take only some instances that boot.
        kept = sum(
            instance.state is LifecycleState.IN_SERVICE
            or pool.booting.get(instance.id, pool.stopped_s) < pool.stopped_s
            for instance in view.instances
        )
        trial = int(self._clock.monotonic_s() >= pool.retry_s)
        return max(view.pool.min_size, min(view.pool.max_size, kept + trial))

    def try_now(self, name: str) -> None:
        """End the pause, because a user says that the problem is fixed."""
        if pool := self._pools.get(name):
            pool.retry_s = min(pool.retry_s, self._clock.monotonic_s())

    def trouble(self, name: str) -> str:
        """Return a clause about failed launches of the pool, or ""."""
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
        """Return why launches are stopped, by pool."""
        return {name: self.trouble(name) for name, pool in self._pools.items() if pool.pause_s}


def _was_requested(instance: Instance) -> bool:
    """Return whether the end of the instance was requested."""
    return instance.healthy and instance.note.startswith("terminated")


@dataclass(frozen=True, slots=True)
class Backlog:
    """Remaining work of a pool: `seconds` of task time × slots, in `tasks` tasks that can run in
    parallel."""

    seconds: float = 0.0
    tasks: int = 0


def desired_capacity(backlog: Backlog, view: GroupView, drain_target_s: float) -> tuple[int, str]:
    """Return the desired capacity for a backlog, and the reason."""
    pool = view.pool
    if not backlog.tasks:
        return pool.min_size, "there is no backlog"
    needed = math.ceil(backlog.seconds / (drain_target_s * pool.slots))
    # More instances than tasks would idle. One task needs one instance, however short it is.
    useful = math.ceil(backlog.tasks / pool.slots)
    desired = max(pool.min_size, min(pool.max_size, max(1, min(needed, useful))))
    work = f"a backlog of {count(backlog.tasks, 'task')} ({backlog.seconds:.1f} s of work)"
    return desired, (
        f"{work} drains in {drain_target_s:g} s on {count(needed, 'instance')} of "
        f"{count(pool.slots, 'slot')}, limits "
        f"{pool.min_size}-{pool.max_size}"
    )


@dataclass(frozen=True, slots=True)
class MinimumCapacity:
    """Minimum capacity of a pool before its work arrives, and the reason."""

    count: int
    why: str


class Autoscaler:
    """Applies the policy to every pool at each tick."""

    def __init__(
        self,
        ports: Ports,
        settings: ManagerSettings,
        lives: Mapping[JobId, LiveJob],
        registry: WorkerRegistry,
        caps: CostCaps | None = None,
        on_decision: Callable[[GroupView, int, str, Backlog], None] = lambda *_: None,
        counts: Counters | None = None,
    ) -> None:
        """`caps` limit launches by cost. `on_decision` is called for each change of desired
        capacity with the group before it, the new capacity, the reason, and the backlog."""
        self._counts = counts or Counters()
        self._ports = ports
        self._settings = settings
        self._lives = lives
        self._registry = registry
        self._caps = caps
        self._on_decision = on_decision
        self._shrunk_s: dict[str, float] = {}
        self._idle_since_s: dict[str, float] = {}
        self.launch_breaker = LaunchBreaker(ports.clock, settings, registry.has_reported)
        self.held: dict[str, int] = {}
        """Capacity set by a user, by pool. The policy does not change it."""
        self._short: set[str] = set()
        """Pools with a user's capacity that have fewer instances now, because launches fail."""
        self.minimum_capacity: Callable[[GroupView], MinimumCapacity | None] = lambda _: None
        """Returns the minimum capacity for work that is due soon."""

    def backlog(self, pool: str) -> Backlog:
        """Return the remaining work of all running jobs in a pool."""
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
                    # A capped job finishes only the bundles that are cut. While its task duration
                    # is unknown, it gets no capacity for more.
                    left = min(left, live.cut_tasks(stage.name))
                seconds += left * live.task_s(stage, now_s)
                tasks += left * stage.slots
        return Backlog(seconds, tasks)

    async def scale(self, view: GroupView) -> None:
        """Adjust a pool's group to its backlog."""
        pool = view.pool.name
        await self.protect_the_busy(view)
        if pool in self.held:
            await self._keep(view, self.held[pool])
            return
        backlog = self.backlog(pool)
        desired, why = desired_capacity(backlog, view, self._settings.drain_target_s)
        if (minimum_capacity := self.minimum_capacity(view)) and minimum_capacity.count > desired:
            desired, why = minimum_capacity.count, minimum_capacity.why
        now_s = self._ports.clock.monotonic_s()
        if backlog.tasks:
            self._idle_since_s.pop(pool, None)
        if self._caps:
            desired, why = self._caps.launches(view, desired, why)
        most = self.launch_breaker.most(view)
        if most is not None and (view.desired > most or desired > most):
            # At once, because Pending instances will fail and be replaced.
            await self.decide(view, most, self.launch_breaker.trouble(pool))
            return
        if desired > view.desired:
            await self.decide(view, desired, why)
        elif desired < view.desired and self._may_shrink(pool, backlog, now_s):
            await self._shrink(view, desired, why)
            self._shrunk_s[pool] = now_s

    async def decide(self, view: GroupView, desired: int, why: str) -> None:
        """Set desired capacity, and report a change."""
        await self._ports.fleet.set_desired(view.pool.name, desired, cause=why)
        if desired != view.desired:
            self._decided(view, desired, why)

    def _decided(self, view: GroupView, desired: int, why: str) -> None:
        pool, before = view.pool.name, view.desired
        self._on_decision(view, desired, why, self.backlog(pool))
        self._counts.decided(pool, before, desired)
        log.info("desired capacity %d, before %d: %s", desired, before, why, extra={"pool": pool})

    async def _keep(self, view: GroupView, by_hand: int) -> None:
        """Keep a user's capacity, but limit it while launches fail."""
        pool = view.pool.name
        limits, most = view.pool, self.launch_breaker.most(view)
        target = max(limits.min_size, min(limits.max_size, by_hand))
        if most is not None and min(most, target) != view.desired:
            self._short.add(pool)
            await self.decide(view, min(most, target), self.launch_breaker.trouble(pool))
        elif most is None and pool in self._short:
            self._short.discard(pool)
            await self.decide(view, target, "instances start again")

    def _may_shrink(self, pool: str, backlog: Backlog, now_s: float) -> bool:
        if not backlog.tasks:
            since_s = self._idle_since_s.setdefault(pool, now_s)
            return now_s - since_s >= self._settings.idle_s
        last_s = self._shrunk_s.setdefault(pool, now_s)
        return now_s - last_s >= self._settings.cooldown_in_s

    async def _shrink(self, view: GroupView, desired: int, why: str) -> None:
        """Terminate idle instances, never a busy one (I5). A lower desired capacity
        removes Pending instances."""
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
        """Set scale-in protection for busy instances. Must run before a group shrinks (I5)."""
        pool = view.pool.name
        alive = [i for i in view.instances if i.state is LifecycleState.IN_SERVICE]
        busy = frozenset(self._registry.busy(pool))
        # The group's state counts, because another manager may have led in between.
        if on := sorted(i.id for i in alive if i.id in busy and not i.protected):
            await self._ports.fleet.protect(pool, on, on=True)
        if off := sorted(i.id for i in alive if i.id not in busy and i.protected):
            await self._ports.fleet.protect(pool, off, on=False)


LONGEST_S = 600.0
"""A job that takes longer to plan gets more capacity from the policy only."""
LAST = 5
"""Recent runs whose peaks count."""
_THERE = (LifecycleState.PENDING, LifecycleState.IN_SERVICE)


class Prewarm:
    """Called by the autoscaler at each tick. Uses no port."""

    def __init__(self, clock: Clock, settings: ManagerSettings, scheduler: Scheduler, caps: CostCaps | None) -> None:
        self._clock = clock
        self._settings = settings
        self._scheduler = scheduler
        self._caps = caps

    def __call__(self, view: GroupView) -> MinimumCapacity | None:
        """Return the pool's minimum capacity now, or None if nothing is due soon."""
        minimum_capacities = [self._of(view, schedule) for schedule in self._scheduler.store.schedules.values()]
        return max((one for one in minimum_capacities if one), key=lambda one: one.count, default=None)

    def _of(self, view: GroupView, schedule: Schedule) -> MinimumCapacity | None:
        definition = schedule.definition
        if not definition.prewarm_s:
            return None
        due_s = self._due_s(schedule)
        template = self._scheduler.store.known_template(definition.template)
        if due_s is None or template is None:
            return None
        if all(stage.pool != view.pool.name for stage in template.roots()):
            return None
        count, how = self._count(schedule, template, view)
        most = min(count, view.pool.max_size)
        when = due_times.shown(due_s, definition.when.tz)
        why = f"schedule {schedule.name} is due at {when}: {how}"
        if most < count:
            why += f", of which its limit leaves {most}"
        paid = self._paid(schedule, template, view, most, due_s)
        if paid < most:
            why += f", of which a cap on cost pays for {paid}"
        return MinimumCapacity(paid, why) if paid else None

    def _due_s(self, schedule: Schedule) -> float | None:
        """Return the due time that the fleet must be ready for, or None."""
        now_s = self._clock.now_s()
        run = schedule.running
        if run and self._begins(run, now_s):
            return run.due_s
        next_s = self._scheduler.next_s(schedule)
        # Shortly after the due time, the scheduler may not have decided on it yet.
        if next_s is not None and -ON_TIME_S <= next_s - now_s <= schedule.definition.prewarm_s:
            return next_s
        return None

    def _begins(self, run: Run, now_s: float) -> bool:
        """Return whether the run's job started on time, and the policy does not know its work
        yet."""
        started_s = run.started_s or 0.0
        is_due = not run.asked and started_s - run.due_s <= ON_TIME_S
        return is_due and now_s - started_s <= LONGEST_S and not self._scheduler.has_begun(run)

    def _count(self, schedule: Schedule, template: JobDef, view: GroupView) -> tuple[int, str]:
        """Return the number of instances, and the reason."""
        pool = view.pool.name
        if schedule.definition.capacity is not None:
            return schedule.definition.capacity, f"{schedule.definition.capacity} as it asks for"
        ended = [run for run in schedule.runs if run.state is RunState.ENDED]
        peaks = [dict(run.peak)[pool] for run in ended if pool in dict(run.peak)][-LAST:]
        if peaks:
            return max(peaks), f"{max(peaks)}, which its last runs used at their peak"
        tasks = next((run.tasks for run in reversed(ended) if run.tasks is not None), None)
        tasks = _known_tasks(template) if tasks is None else tasks
        if tasks is None:
            return 1, "1, since nothing is known of its size"
        slots = max(s.slots for s in template.roots() if s.pool == pool)
        backlog = Backlog(tasks * slots * UNKNOWN_TASK_S, tasks * slots)
        count, _ = desired_capacity(backlog, view, self._settings.drain_target_s)
        return count, f"{count}, for its {tasks} tasks"

    def _paid(self, schedule: Schedule, template: JobDef, view: GroupView, count: int, due_s: float) -> int:
        """Return how many of the instances the cost caps pay for until the due time."""
        if self._caps is None:
            return count
        caps, prewarm_s = self._caps, schedule.definition.prewarm_s
        if template.max_cost_usd is not None:
            launch_usd, _ = caps.warm_usd(view.pool, prewarm_s)
            count = affordable(count, 0, template.max_cost_usd, launch_usd, 0.0)
        left_usd = caps.left_usd()
        if left_usd is not None:
            still_s = max(0.0, due_s - self._clock.now_s())
            there = sum(instance.state in _THERE for instance in view.instances)
            count = affordable(count, there, left_usd, *caps.warm_usd(view.pool, still_s))
        return count


def affordable(count: int, there: int, left_usd: float, launch_usd: float, hold_usd: float) -> int:
    """Return how many of `count` instances `left_usd` pays for, if `there` of them exist. A launch
    costs `launch_usd`, and keeping an instance costs `hold_usd`."""
    kept = min(count, there)
    if hold_usd > 0 and kept * hold_usd > left_usd:
        return int(max(0.0, left_usd) / hold_usd)
    more = count - kept
    if launch_usd <= 0:
        return count if left_usd >= 0 else kept
    return kept + min(more, int(max(0.0, left_usd - kept * hold_usd) / launch_usd + 1e-9))


def _known_tasks(template: JobDef) -> int | None:
    """Return the number of tasks of the first stage, or None if unknown."""
    raw = template.input
    if raw is None:
        return template.items
    whole = raw.split is SplitBy.FILE and not any(key.endswith("/") for key in raw.keys)
    return len(raw.keys) if whole else None
