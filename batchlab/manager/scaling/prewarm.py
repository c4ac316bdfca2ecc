"""Prewarming: the minimum capacity of a pool before a schedule is due.

Invariant: the policy may exceed this minimum. It ends when the policy knows the job's work, or no
job starts at the due time. Cost caps must pay for it in advance.
"""

from __future__ import annotations

from batchlab.core.job_definition import JobDef, SplitBy
from batchlab.core.model import GroupView, LifecycleState
from batchlab.core.ports import Clock
from batchlab.core.schedules import due_times
from batchlab.core.schedules.decisions import ON_TIME_S
from batchlab.core.schedules.model import Run, RunState, Schedule
from batchlab.manager.cost_caps import CostCaps
from batchlab.manager.scaling.autoscaler import Backlog, MinimumCapacity, desired_capacity
from batchlab.manager.scheduler import Scheduler
from batchlab.manager.settings import ManagerSettings
from batchlab.manager.state import UNKNOWN_TASK_S

LONGEST_S = 600.0
"""A job that takes longer to plan gets more capacity from the policy only."""
LAST = 5
"""Recent runs whose peaks count."""
_THERE = (LifecycleState.PENDING, LifecycleState.IN_SERVICE)


class Prewarm:
    """Called by the autoscaler at each tick. Uses no port."""

    def __init__(
        self,
        clock: Clock,
        settings: ManagerSettings,
        scheduler: Scheduler,
        caps: CostCaps | None,
    ) -> None:
        self._clock = clock
        self._settings = settings
        self._scheduler = scheduler
        self._caps = caps

    def __call__(self, view: GroupView) -> MinimumCapacity | None:
        """Return the pool's minimum capacity now, or None if nothing is due soon."""
        found = [self._of(view, one) for one in self._scheduler.store.schedules.values()]
        return max((one for one in found if one), key=lambda one: one.count, default=None)

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

    def _paid(
        self, schedule: Schedule, template: JobDef, view: GroupView, count: int, due_s: float
    ) -> int:
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
            there = sum(one.state in _THERE for one in view.instances)
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
