"""Jobs that have not ended, with sums of their work by pool.

Invariant: a tick does not read waiting jobs, except for the resync and for cost caps. Each change of a job marks the
job. The next read of a sum replaces the contributions of marked jobs, and does not read other jobs. The sums are exact,
because the estimated seconds of work are stored as whole microseconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heappop
from itertools import islice

from batchlab.core.fair_share import DEFAULT_SHARE, share_of
from batchlab.core.job_definition import StageDef
from batchlab.core.model import Bundle, Control, JobId, JobState, StageCounts, StageName
from batchlab.core.protocol import settlement
from batchlab.core.protocol.messages import HeldBundle
from batchlab.manager.state import UNKNOWN_TASK_S, Backlog, JobChanges, LiveJob, Outstanding

RESYNC_S = 300.0
"""Period of the resync in seconds. The resync gives each job a step even if the job was not marked."""

Jobs = dict[JobId, LiveJob]


@dataclass(slots=True)
class _Contribution:
    """Contribution of one job to the sums of one pool."""

    bundles: int = 0
    paused_bundles: int = 0
    tasks: int = 0
    work_us: int = 0
    uncut_tasks: int = 0
    """Planned tasks that may be cut and are not cut yet."""
    delayed_bundles: int = 0
    """Number of outstanding bundles that wait for their backoff, except bundles of a paused job. Without the sums by
    share, no bundle counts as delayed."""
    slots: int = 0
    """Slots of the outstanding bundles, except delayed bundles and bundles of a paused job."""
    sent_us: int = 0
    """Estimated slot time of the bundles that `slots` counts."""
    gpus: int = 0
    """GPUs of the outstanding bundles, except bundles of a paused job."""
    gpu_tasks: int = 0
    gpu_work_us: int = 0
    grows: bool = False
    """Whether a stage runs its first bundle and does not have a measured duration, so its estimate grows with time."""
    has_work: bool = False
    is_held: bool = False
    is_runnable: bool = False
    share: str = DEFAULT_SHARE
    priority: int | None = None
    """Priority of the job if the job has uncut tasks in the pool and may cut them, or None."""

    @property
    def bundles_in_use(self) -> int:
        """Return the number of outstanding bundles that use a place."""
        return self.bundles - self.delayed_bundles


@dataclass(slots=True)
class PoolWork:
    """Work of all live jobs in one pool."""

    jobs: int = 0
    """Number of jobs that the sums count."""
    bundles: int = 0
    """Number of outstanding bundles."""
    paused_bundles: int = 0
    """Number of outstanding bundles of paused jobs."""
    tasks: int = 0
    work_us: int = 0
    uncut_tasks: int = 0
    delayed_bundles: int = 0
    slots: int = 0
    sent_us: int = 0
    gpus: int = 0
    gpu_tasks: int = 0
    """Sum of the GPUs of all remaining tasks, as `tasks` is the sum of their slots."""
    gpu_work_us: int = 0
    growing: Jobs = field(default_factory=dict)
    """Jobs whose estimated work grows with time. The sums of tasks and of work do not include these jobs."""
    working: Jobs = field(default_factory=dict)
    """Jobs that have work for the pool's instances (see `LiveJob.has_work`)."""
    held: Jobs = field(default_factory=dict)
    """Jobs that a cost cap holds back."""
    runnable: Jobs = field(default_factory=dict)
    """Jobs in state RUNNABLE."""
    uncut: dict[int, dict[int, Jobs]] = field(default_factory=dict)
    """Jobs with uncut tasks that may cut them, by priority and by number of outstanding bundles in the pool."""

    @property
    def active_bundles(self) -> int:
        """Return the number of outstanding bundles of jobs that are not paused, except delayed bundles."""
        return self.bundles - self.paused_bundles - self.delayed_bundles

    def has_higher(self, priority: int) -> bool:
        """Return whether a job of a higher priority has uncut tasks."""
        return any(other > priority for other in self.uncut)

    def peers(self, priority: int) -> int:
        """Return the number of jobs of the priority with uncut tasks."""
        return sum(map(len, self.uncut.get(priority, {}).values()))

    def ready(self, window: int) -> list[LiveJob]:
        """Divide `window` evenly among the jobs of the highest priority with uncut tasks. Return the jobs with fewer
        outstanding bundles than their part."""
        if not self.uncut:
            return []
        by_bundles = self.uncut[max(self.uncut)]
        part = max(1, window // sum(map(len, by_bundles.values())))
        return [live for bundles, jobs in by_bundles.items() if bundles < part for live in jobs.values()]

    def first(self, number: int) -> list[LiveJob]:
        """Return at most `number` jobs of the highest priority with uncut tasks, the jobs with the fewest outstanding
        bundles first."""
        if not self.uncut:
            return []
        by_bundles = self.uncut[max(self.uncut)]
        jobs = (live for bundles in sorted(by_bundles) for live in by_bundles[bundles].values())
        return list(islice(jobs, max(0, number)))

    def add(self, live: LiveJob, part: _Contribution) -> None:
        self._count(part, 1)
        for is_member, members in self._sets(part):
            if is_member:
                members[live.id] = live
        if part.priority is not None:
            self.uncut.setdefault(part.priority, {}).setdefault(part.bundles_in_use, {})[live.id] = live

    def remove(self, job: JobId, part: _Contribution) -> None:
        self._count(part, -1)
        for is_member, members in self._sets(part):
            if is_member:
                del members[job]
        if part.priority is not None:
            by_bundles, bundles = self.uncut[part.priority], part.bundles_in_use
            del by_bundles[bundles][job]
            if not by_bundles[bundles]:
                del by_bundles[bundles]
            if not by_bundles:
                del self.uncut[part.priority]

    def _count(self, part: _Contribution, sign: int) -> None:
        self.jobs += sign
        self.bundles += sign * part.bundles
        self.paused_bundles += sign * part.paused_bundles
        self.uncut_tasks += sign * part.uncut_tasks
        self.delayed_bundles += sign * part.delayed_bundles
        self.slots += sign * part.slots
        self.sent_us += sign * part.sent_us
        self.gpus += sign * part.gpus
        if not part.grows:
            self.tasks += sign * part.tasks
            self.work_us += sign * part.work_us
            self.gpu_tasks += sign * part.gpu_tasks
            self.gpu_work_us += sign * part.gpu_work_us

    def _sets(self, part: _Contribution) -> Iterable[tuple[bool, Jobs]]:
        return (
            (part.grows, self.growing),
            (part.has_work, self.working),
            (part.is_held, self.held),
            (part.is_runnable, self.runnable),
        )


@dataclass(slots=True)
class Journal:
    """Changes of the live jobs since the reader's last call of `clear`."""

    changed: Jobs = field(default_factory=dict)
    """New jobs and jobs with a change. A job that was removed is not in `changed`."""
    removed: Jobs = field(default_factory=dict)
    """Removed jobs that are not live now."""

    def clear(self) -> None:
        self.changed.clear()
        self.removed.clear()


class Rotation:
    """Iterator over all jobs in small groups. Each job is returned once in about `period_s`."""

    def __init__(self, period_s: float, min_jobs: int = 0) -> None:
        self._period_s = period_s
        self._min_jobs = min_jobs
        """Minimum number of jobs of a group."""
        self._last_s: float | None = None
        self._rest: Iterator[JobId] = iter(())

    def next(self, jobs: Mapping[JobId, LiveJob], now_s: float) -> Jobs:
        """Return the next jobs. `now_s` is the monotonic time, from which the size of the group is calculated."""
        step_s = 0.0 if self._last_s is None else now_s - self._last_s
        self._last_s = now_s
        count = max(self._min_jobs, math.ceil(len(jobs) * step_s / self._period_s))
        if count >= len(jobs):
            return dict(jobs)
        names = list(islice(self._rest, count))
        if len(names) < count:
            self._rest = iter(list(jobs))
            names += islice(self._rest, count - len(names))
        return {job: jobs[job] for job in names if job in jobs}


class LiveJobs(dict[JobId, LiveJob]):
    """Live jobs by id, in the order of their adoption."""

    def __init__(self, lives: Iterable[LiveJob] = ()) -> None:
        super().__init__()
        self._changes = JobChanges()
        self._contributions: dict[JobId, dict[str, _Contribution]] = {}
        self._pools: dict[str, PoolWork] = {}
        self._shares: dict[str, dict[str, PoolWork]] | None = None
        """Work by pool and share, or None without a fair-share policy."""
        self._restless: Jobs = {}
        """Jobs that need a step at each tick."""
        self._capped: Jobs = {}
        self._dependents: dict[JobId, Jobs] = {}
        """Jobs with dependencies, by the job that each of them depends on."""
        self._journals: list[Journal] = []
        self._resync = Rotation(RESYNC_S)
        self.adopted = 0
        """Number of jobs that have been added, including ended jobs."""
        for live in lives:
            self[live.id] = live

    def __setitem__(self, job: JobId, live: LiveJob) -> None:
        before = self.get(job)
        if before is not None and before is not live:
            del self[job]
        super().__setitem__(job, live)
        self.adopted += 1
        live.number = self.adopted
        live.join(self._changes)
        for dependency in live.job.after:
            self._dependents.setdefault(dependency.job, {})[job] = live
        for journal in self._journals:
            journal.removed.pop(job, None)

    def __delitem__(self, job: JobId) -> None:
        live = self[job]
        super().__delitem__(job)
        for dependency in live.job.after:
            dependents = self._dependents[dependency.job]
            del dependents[job]
            if not dependents:
                del self._dependents[dependency.job]
        self._wake_dependents(job)
        live.join(JobChanges())
        self._changes.marked.pop(job, None)
        self._withdraw(job)
        for journal in self._journals:
            journal.changed.pop(job, None)
            journal.removed[job] = live

    def clear(self) -> None:
        for job in list(self):
            del self[job]

    def _wake_dependents(self, job: JobId) -> None:
        for live in self._dependents.get(job, {}).values():
            if live.waits_for:
                live.wake.set()

    def wake_waiting(self) -> None:
        """Wake the jobs that wait for a job that is not live, because another manager may have recorded its end."""
        for job in self._dependents.keys() - self.keys():
            self._wake_dependents(job)

    def journal(self) -> Journal:
        """Return a new journal. Its first changes are all present jobs."""
        journal = Journal(changed=dict(self))
        self._journals.append(journal)
        return journal

    def slots_of(self, held: HeldBundle) -> int:
        """Return the number of slots that a bundle in a heartbeat uses, or 1 for an unknown job or stage."""
        live = self.get(held.job)
        return next((s.slots for s in live.job.stages if s.name == held.stage), 1) if live else 1

    def expected_s(self, bundle: Bundle) -> Mapping[StageName, float]:
        """Return the expected run times for the message of a bundle (see `LiveJob.expected_s`)."""
        live = self.get(bundle.job)
        return live.expected_s(bundle.stage) if live else {}

    def take_sent(self) -> list[tuple[LiveJob, Outstanding]]:
        """Return the bundles that became outstanding since the last call."""
        sent, self._changes.sent = self._changes.sent, []
        return sent

    def pool(self, name: str) -> PoolWork:
        """Return the current work of all live jobs in the pool."""
        self.refresh()
        return self._pools.get(name) or PoolWork()

    def divide_by_share(self, *, is_divided: bool) -> None:
        """Begin or end the sums by share."""
        if is_divided is (self._shares is not None):
            return
        self.refresh()
        for job in list(self._contributions):
            self._withdraw(job)
            self[job].mark()
        self._shares = {} if is_divided else None

    def shares(self, name: str, now_s: float) -> dict[str, PoolWork]:
        """Return the current work of all live jobs in the pool, by share. The result is empty without the sums by
        share. `now_s` is the monotonic time."""
        self._end_delays(now_s)
        self.refresh()
        return {} if self._shares is None else self._shares.get(name, {})

    def backlog(self, name: str, now_s: float) -> Backlog:
        """Return the remaining work of all running jobs in the pool. `now_s` is the monotonic time."""
        return self.backlog_of(self.pool(name), name, now_s)

    def backlog_of(self, work: PoolWork, name: str, now_s: float) -> Backlog:
        """Return the remaining work that `work` counts in the pool. `now_s` is the monotonic time."""
        seconds, tasks = work.work_us / 1e6, work.tasks
        gpu_s, gpu_tasks = work.gpu_work_us / 1e6, work.gpu_tasks
        for live in work.growing.values():
            part = _contributions(live, now_s)[name]
            seconds += part.work_us / 1e6
            tasks += part.tasks
            gpu_s += part.gpu_work_us / 1e6
            gpu_tasks += part.gpu_tasks
        return Backlog(seconds, tasks, gpu_s, gpu_tasks)

    @property
    def has_caps(self) -> bool:
        """Return whether the definition of any live job has a cost cap."""
        self.refresh()
        return bool(self._capped)

    def may_cut(self, live: LiveJob, pool: str) -> bool:
        """Return whether the job has uncut tasks in the pool and may cut them."""
        self.refresh()
        part = self._contributions.get(live.id, {}).get(pool)
        return part is not None and part.priority is not None

    def needing_step(self, windows: dict[str, int], now_s: float) -> list[LiveJob]:
        """Return the jobs that need a step now: jobs with room for more bundles, jobs with a step at each tick, and the
        next jobs of the resync. `windows` has the number of outstanding bundles that each pool may have. `now_s` is the
        monotonic time."""
        self._end_delays(now_s)
        self.refresh()
        chosen: Jobs = dict(self._restless)
        for name, window in windows.items():
            if work := self._pools.get(name):
                chosen |= {live.id: live for live in work.ready(window)}
        chosen |= self._resync.next(self, now_s)
        return sorted(chosen.values(), key=lambda live: live.number)

    def _end_delays(self, now_s: float) -> None:
        delays = self._changes.delays
        while delays and delays[0][0] <= now_s:
            until_s, job, stage, bundle = heappop(delays)
            if live := self.get(job):
                live.end_delay(stage, bundle, until_s)

    def refresh(self) -> None:
        """Replace the contributions of the marked jobs."""
        marked = self._changes.marked
        for job in list(marked):
            live = marked.pop(job)
            self._withdraw(job)
            parts = self._contributions[job] = _contributions(live, counts_delays=self._shares is not None)
            for pool, part in parts.items():
                self._pools.setdefault(pool, PoolWork()).add(live, part)
                self._add_to_share(pool, live, part)
            if live.is_restless:
                self._restless[job] = live
            if live.job.max_cost_usd is not None:
                self._capped[job] = live
            for journal in self._journals:
                journal.changed[job] = live

    def _add_to_share(self, pool: str, live: LiveJob, part: _Contribution) -> None:
        if self._shares is not None:
            self._shares.setdefault(pool, {}).setdefault(part.share, PoolWork()).add(live, part)

    def _withdraw(self, job: JobId) -> None:
        for pool, part in self._contributions.pop(job, {}).items():
            self._pools[pool].remove(job, part)
            if self._shares is not None:
                works = self._shares[pool]
                works[part.share].remove(job, part)
                if not works[part.share].jobs:
                    del works[part.share]
        self._restless.pop(job, None)
        self._capped.pop(job, None)


def bundle_s(stage: StageDef, counts: StageCounts) -> float:
    """Return the estimated slot seconds of an outstanding bundle of the stage, which is a task or TARGET_S of shorter
    tasks."""
    return stage.slots * max(settlement.TARGET_S, UNKNOWN_TASK_S if counts.mean_s is None else counts.mean_s)


def _contributions(
    live: LiveJob, now_s: float | None = None, *, counts_delays: bool = False
) -> dict[str, _Contribution]:
    """Return the job's contributions by pool. Without the monotonic time `now_s`, a stage without a measurement counts
    `UNKNOWN_TASK_S` for each task. With `counts_delays`, delayed bundles are counted apart."""
    runs = live.record.control is Control.RUN and not live.must_wait
    parts: dict[str, _Contribution] = {}
    for stage in live.job.stages:
        part = parts.get(stage.pool)
        if part is None:
            bundles = live.outstanding_in(stage.pool)
            part = parts[stage.pool] = _Contribution(
                bundles,
                bundles if live.record.control is Control.PAUSE else 0,
                has_work=live.has_work(stage.pool),
                is_held=live.is_held,
                is_runnable=live.record.state is JobState.RUNNABLE,
                share=share_of(live.job),
                priority=live.job.priority if runs and not live.is_held and live.has_uncut_tasks(stage.pool) else None,
            )
        record = live.stages[stage.name]
        counts = record.counts
        if live.record.control is not Control.PAUSE and (sent := len(live.outstanding.get(stage.name, ()))):
            part.gpus += sent * stage.gpus
            if counts_delays:
                delayed = len(live.delayed.get(stage.name, ()))
                part.delayed_bundles += delayed
                sent -= delayed
            part.slots += sent * stage.slots
            part.sent_us += sent * round(bundle_s(stage, counts) * 1e6)
        if not runs or counts.planned is None:
            continue
        if part.priority is not None and record.left.ranges:
            part.uncut_tasks += len(record.left)
        remaining = max(0, counts.planned - counts.terminal)
        if live.is_held or (live.budget and counts.mean_s is None):
            # A job at its cost cap counts only with its outstanding bundles. A capped job whose task duration is
            # unknown also counts only with its outstanding bundles.
            remaining = min(remaining, live.cut_tasks(stage.name))
        if remaining:
            part.tasks += remaining * stage.slots
            began_s = live.began_s.get(stage.name, 0.0)
            task_s = live.task_s(stage, began_s if now_s is None else now_s)
            part.work_us += round(remaining * task_s * 1e6)
            if stage.gpus:
                part.gpu_tasks += remaining * stage.gpus
                part.gpu_work_us += round(remaining * task_s / stage.slots * stage.gpus * 1e6)
            part.grows |= counts.mean_s is None and stage.name in live.began_s
    return parts
