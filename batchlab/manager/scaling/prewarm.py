"""Capacity before a schedule is due: how many instances a pool is to have already, and why.

Invariant: it is a least, for the policy to go beyond; it ends when the policy knows of the job's
work, or no job comes of the due time; and a cap on cost pays for it beforehand or it is not had.
"""

from __future__ import annotations

from batchlab.core.job_definition import JobDef, SplitBy
from batchlab.core.model import GroupView, LifecycleState
from batchlab.core.ports import Clock
from batchlab.core.schedules import due_times
from batchlab.core.schedules.decisions import ON_TIME_S
from batchlab.core.schedules.model import Run, RunState, Schedule
from batchlab.manager.scaling.autoscaler import Backlog, Warmth, wanted
from batchlab.manager.schedules.scheduler import Scheduler
from batchlab.manager.settings import ManagerSettings
from batchlab.manager.state import UNKNOWN_TASK_S
from batchlab.manager.usage.caps import Caps

LONGEST_S = 600.0
"""A job that takes longer to be planned gets the rest of its capacity from the policy."""
LAST = 5
"""Runs whose peaks count."""
_THERE = (LifecycleState.PENDING, LifecycleState.IN_SERVICE)


class Prewarm:
    """Asked by the autoscaler at each tick; asks no port."""

    def __init__(
        self,
        clock: Clock,
        settings: ManagerSettings,
        scheduler: Scheduler,
        caps: Caps | None,
    ) -> None:
        self._clock = clock
        self._settings = settings
        self._scheduler = scheduler
        self._caps = caps

    def __call__(self, view: GroupView) -> Warmth | None:
        """What the pool is to have at the least now; None where nothing is due soon."""
        found = [self._of(view, one) for one in self._scheduler.shelf.schedules.values()]
        return max((one for one in found if one), key=lambda one: one.count, default=None)

    def _of(self, view: GroupView, schedule: Schedule) -> Warmth | None:
        definition = schedule.definition
        if not definition.prewarm_s:
            return None
        due_s = self._due_s(schedule)
        template = self._scheduler.shelf.known_template(definition.template)
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
        return Warmth(paid, why) if paid else None

    def _due_s(self, schedule: Schedule) -> float | None:
        """The due time that the fleet is to be warm for now."""
        now_s = self._clock.now_s()
        run = schedule.running
        if run and self._begins(run, now_s):
            return run.due_s
        next_s = self._scheduler.next_s(schedule)
        # A moment beyond it: whoever decides on it may not have looked yet.
        if next_s is not None and -ON_TIME_S <= next_s - now_s <= schedule.definition.prewarm_s:
            return next_s
        return None

    def _begins(self, run: Run, now_s: float) -> bool:
        """Whether its job has come on time, and the policy does not know of its work yet."""
        started_s = run.started_s or 0.0
        is_due = not run.asked and started_s - run.due_s <= ON_TIME_S
        return is_due and now_s - started_s <= LONGEST_S and not self._scheduler.has_begun(run)

    def _count(self, schedule: Schedule, template: JobDef, view: GroupView) -> tuple[int, str]:
        """How many instances, and how that is known."""
        pool = view.pool.name
        if schedule.definition.capacity is not None:
            return schedule.definition.capacity, f"{schedule.definition.capacity} as it asks for"
        ended = [run for run in schedule.runs if run.state is RunState.ENDED]
        peaks = [dict(run.peak)[pool] for run in ended if pool in dict(run.peak)][-LAST:]
        if peaks:
            return max(peaks), f"{max(peaks)}, which its last runs used at their peak"
        tasks = next((run.tasks for run in reversed(ended) if run.tasks is not None), None)
        tasks = _tasks(template) if tasks is None else tasks
        if tasks is None:
            return 1, "1, since nothing is known of its size"
        slots = max(s.slots for s in template.roots() if s.pool == pool)
        backlog = Backlog(tasks * slots * UNKNOWN_TASK_S, tasks * slots)
        count, _ = wanted(backlog, view, self._settings.drain_target_s)
        return count, f"{count}, for its {tasks} tasks"

    def _paid(
        self, schedule: Schedule, template: JobDef, view: GroupView, count: int, due_s: float
    ) -> int:
        """How many of them the caps pay for until it is due."""
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
    """How many of `count` instances `left_usd` pays for, `there` of them being there already:
    a launch costs `launch_usd`, keeping one that is there `hold_usd`."""
    kept = min(count, there)
    if hold_usd > 0 and kept * hold_usd > left_usd:
        return int(max(0.0, left_usd) / hold_usd)
    more = count - kept
    if launch_usd <= 0:
        return count if left_usd >= 0 else kept
    return kept + min(more, int(max(0.0, left_usd - kept * hold_usd) / launch_usd + 1e-9))


def _tasks(template: JobDef) -> int | None:
    """How many tasks its first stage will have, where that is known beforehand."""
    raw = template.input
    if raw is None:
        return template.items
    whole = raw.split is SplitBy.FILE and not any(key.endswith("/") for key in raw.keys)
    return len(raw.keys) if whole else None
