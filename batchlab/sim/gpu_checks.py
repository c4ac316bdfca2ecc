"""Checks of the GPUs of a simulated grid.

Invariant: the record of the used GPUs comes from the starts and the ends of tasks, and not from a worker's own list of
free GPUs. The record of the outstanding bundles comes from the commits in the bucket.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any

from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Control, JobState, Pool, StageName
from batchlab.core.ports import Cut
from batchlab.core.text import count
from batchlab.sim.actors import Actor
from batchlab.sim.event_log import Name, name_of_bundle

PROMISE = "gpu"

LED_S = 60.0
"""Seconds of undisturbed leadership after which a manager counts all outstanding bundles."""

CONFIRM_S = 5.0
"""Seconds after which the bucket contains a pause that the manager knew at the time of a cut."""

LAG_S = 120.0
"""Seconds for which the desired capacity of a pool may be below the capacity that its GPU tasks need."""


@dataclass(slots=True)
class GpuChecks:
    """Checks that a GPU has one running task, that no GPU is lost, and that the manager counts GPUs.

    A killed worker needs no entry at its end, because its instance ends with its GPUs.
    """

    check: Callable[[bool, str, str], None]
    jobs: Mapping[str, JobDef]
    is_live: Callable[[str], bool]
    """Function that returns whether a job may run."""
    live_since_s: Callable[[str], float]
    context: Context
    """Context of timers that expire even while a process is frozen."""
    starts: int = 0
    """Number of tasks that have started with GPUs."""
    pools: dict[str, Pool] = field(default_factory=dict)
    """Pools whose instances have GPUs."""
    max_size: Callable[[str], int] = lambda _: 0
    """Function that returns the present maximum size of a pool, which a user may have raised."""
    _workers: dict[Actor, Pool] = field(default_factory=dict)
    _used: dict[Actor, set[int]] = field(default_factory=dict)
    _outstanding: dict[Name, None] = field(default_factory=dict)
    """Bundles of cuts that are not committed, except follow-ups of outcomes. The manager learns of follow-ups late."""
    _lags: dict[tuple[Actor, str], float] = field(default_factory=dict)
    """Time since which the desired capacity of a pool is too low, by manager and pool."""

    # --- Workers ---------------------------------------------------------------------------------

    def on_boot(self, actor: Actor, pool: Pool) -> None:
        self._workers[actor] = pool
        self._used[actor] = set()

    def on_start(self, actor: Actor | None, stage: StageDef, gpus: Sequence[int]) -> None:
        """Check that a task gets as many GPUs as its stage needs, and only GPUs that no running task uses."""
        facts = f"a task of stage {stage.name}, which needs {count(stage.gpus, 'GPU')}, gets the GPUs {list(gpus)}"
        self.check(len(set(gpus)) == len(gpus) == stage.gpus, PROMISE, facts)
        if actor is None or not gpus:
            return
        exists = actor in self._workers and all(0 <= gpu < self._workers[actor].gpus for gpu in gpus)
        self.check(exists, PROMISE, f"{actor.name} does not have the GPUs {list(gpus)}")
        used = self._used.setdefault(actor, set())
        self.check(used.isdisjoint(gpus), PROMISE, f"{actor.name} gives the GPUs {list(gpus)} to a second task")
        used.update(gpus)
        self.starts += 1

    def on_end(self, actor: Actor | None, gpus: Sequence[int]) -> None:
        if actor is not None:
            self._used.get(actor, set()).difference_update(gpus)

    def check_free(self, actor: Actor, free: Sequence[int]) -> None:
        """Check that a worker without messages has all of its GPUs."""
        total = self._workers[actor].gpus if actor in self._workers else 0
        facts = f"{actor.name} holds no message, and only the GPUs {list(free)} of {total} are free"
        self.check(list(free) == list(range(total)), PROMISE, facts)

    # --- Managers --------------------------------------------------------------------------------

    def on_cut(self, cut: Cut, now_s: float, since_s: float) -> None:
        """Check that a manager that has led since `since_s` sends only bundles that the GPUs of the pool can run."""
        if cut.job not in self.jobs:
            return
        stage = self.jobs[cut.job].stage(cut.stage)
        if not stage.gpus or stage.pool not in self.pools:
            return
        self._outstanding |= dict.fromkeys(map(name_of_bundle, cut.bundles))
        pool, used = self.pools[stage.pool], 0
        jobs: set[str] = set()
        for job, name, _ in self._outstanding:
            other = self.jobs[job].stage(StageName(name))
            if other.gpus and other.pool == pool.name and self.is_live(job):
                used += other.gpus
                jobs.add(job)
        most = max(pool.max_size, self.max_size(pool.name)) * pool.gpus
        if cut.bundles and now_s - since_s > LED_S and used > most:
            facts = f"after {len(cut.bundles)} bundles of {cut.job}, the bundles need {count(used, 'GPU')} of {most}"
            loop = asyncio.get_running_loop()
            loop.call_later(CONFIRM_S, self._confirm, jobs, now_s, facts, context=self.context)

    def _confirm(self, jobs: set[str], cut_s: float, facts: str) -> None:
        """Fail, unless one of the jobs was paused, had ended, or was just resumed at the time of the cut.

        The manager knows of a pause before the bucket does.
        """
        self.check(not all(self.is_live(job) and self.live_since_s(job) < cut_s - 1.0 for job in jobs), PROMISE, facts)

    def on_commit(self, name: Name) -> None:
        self._outstanding.pop(name, None)

    def on_job_end(self, job: str) -> None:
        self._outstanding = {name: None for name in self._outstanding if name[0] != job}

    def check_capacity(self, actor: Actor, context: Any, autoscaler: Any, now_s: float) -> None:
        """Check that the desired capacity of each pool follows the tasks with GPUs, unless a user has set the capacity
        or launches fail."""
        for name, view in context.groups.items():
            pool = view.pool
            is_free = name not in autoscaler.user_capacity and autoscaler.launch_breaker.limit(view) is None
            least = min(pool.max_size, _instances(context.lives, pool, context.settings.drain_target_s))
            if not is_free or view.desired >= least:
                self._lags.pop((actor, name), None)
                continue
            lag_s = now_s - self._lags.setdefault((actor, name), now_s)
            facts = f"pool {name} has the desired capacity {view.desired}, and its GPU tasks need {least} instances"
            self.check(lag_s <= LAG_S, PROMISE, facts)


def _instances(lives: Any, pool: Pool, drain_target_s: float) -> int:
    """Return the number of instances that the remaining measured tasks with GPUs need."""
    if not pool.gpus:
        return 0
    gpus, gpu_s = 0, 0.0
    for live in lives.values():
        runs = live.record.control is Control.RUN and not live.must_wait and not live.is_held
        if not runs or live.record.state is not JobState.RUNNING:
            continue
        for stage in live.job.stages:
            counts = live.stages[stage.name].counts
            if stage.pool == pool.name and stage.gpus and counts.planned is not None and counts.mean_s is not None:
                remaining = max(0, counts.planned - counts.terminal)
                gpus += remaining * stage.gpus
                gpu_s += remaining * stage.gpus * counts.mean_s
    return min(math.ceil(gpus / pool.gpus), math.ceil(gpu_s / pool.gpus / drain_target_s))
