"""Computation of the number and the sizes of the bundles in the next cut of a stage.

Invariant: the computed bundles depend only on data in memory, and take effect only when the coordinator commits the
cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Bundle, JobState, Json, StageCounts, TaskSet
from batchlab.core.ports import Cut, JobRecord, StageRecord
from batchlab.core.pricing.usage import Budget
from batchlab.core.protocol import commit_keys, settlement
from batchlab.manager.context import Part
from batchlab.manager.state import LiveJob


class Bundler(Part):
    def opening(self, job: JobDef, items: Sequence[Json]) -> commit_keys.Opening:
        """Return the items and first bundles that are stored in one object with the job's definition."""
        waits = job.after or (job.start_at_s is not None and job.start_at_s > self._clock.now_s())
        # The opening of a job with a cost cap does not contain a cut, because the job's remaining budget is not known
        # yet. With a fair-share policy, the places of the job's share are known only after the job is accepted.
        has_policy = self._context.fair_share.policy is not None
        # The free GPUs of a pool are also known only after the jobs before this job are accepted.
        has_gpus = any(stage.gpus for stage in job.stages)
        if waits or len(job.roots()) != 1 or job.max_cost_usd is not None or has_policy or has_gpus:
            return commit_keys.Opening(items)
        (stage,) = job.roots()
        stages = {s.name: StageRecord(StageCounts(s.name)) for s in job.stages}
        live = LiveJob(JobRecord(job, JobState.SUBMITTED), stages)
        bundles, uncut = self.wave(live, stage, TaskSet.span(0, len(items)), 0)
        return commit_keys.Opening(items, Cut(job.id, stage.name, 0, 0, bundles, uncut, len(items)))

    def wave(self, live: LiveJob, stage: StageDef, uncut: TaskSet, round_: int) -> tuple[tuple[Bundle, ...], TaskSet]:
        """Return the bundles of the next cut, and the tasks that remain after the cut."""
        if not uncut:
            return (), uncut
        pace_s = live.pace_s(stage.name)
        sizes = settlement.wave(
            len(uncut), self._context.parallel_tasks(stage), pace_s, stage.bundle, self._room(live, stage, len(uncut))
        )
        if live.budget:
            sizes = _affordable_sizes(live, stage, live.budget, sizes)
        bundles: list[Bundle] = []
        for size in sizes:
            tasks, uncut = uncut.split_at(size)
            bundles.append(Bundle(live.id, stage.name, tasks, round=round_))
        return tuple(bundles), uncut

    def _room(self, live: LiveJob, stage: StageDef, tasks: int) -> int:
        """Return the number of bundles of the stage that may be sent now. The stage has `tasks` uncut tasks.

        The window is the maximum number of outstanding bundles in a pool. With a fair-share policy, the shares divide
        the window. Without a policy, the jobs of the highest priority with uncut tasks share the window evenly, and
        jobs of lower priority wait. A stage with GPUs never gets more bundles than the GPUs of the pool can run,
        because a bundle that waits for a GPU holds a place of its worker.
        """
        if live.is_held:
            return 0
        if self._context.fair_share.policy:
            room = self._context.fair_share.room(live, stage, tasks)
        else:
            room = self._room_without_policy(live, stage)
        return min(room, max(0, self._context.free_gpus(stage.pool)) // stage.gpus) if stage.gpus else room

    def _room_without_policy(self, live: LiveJob, stage: StageDef) -> int:
        pool = stage.pool
        slots, outstanding = self._context.slots.get(pool, 1), live.outstanding_in(pool)
        window = self._context.window(pool)
        work = self._lives.pool(pool)
        priority = live.job.priority
        if work.has_higher(priority):
            return 0
        is_counted = live.id in work.uncut.get(priority, {}).get(outstanding, ())
        peers = work.peers(priority) + (not is_counted)
        # Bundles of paused jobs must not fill the window, because workers delete the messages of these bundles.
        active = max(outstanding, work.active_bundles)
        room = window - active if peers == 1 else max(1, window // peers) - outstanding
        # A cut has at least one bundle for every slot, because a cut costs the same for any number of bundles. A
        # smaller cut is worth its cost if no bundle waits behind the running bundles.
        return room if room >= slots or outstanding <= slots else 0


def _affordable_sizes(live: LiveJob, stage: StageDef, budget: Budget, sizes: list[int]) -> list[int]:
    mean_s = live.stages[stage.name].counts.mean_s
    if mean_s is not None:
        return budget.afford(sizes, stage.pool, mean_s * stage.slots)
    longest_s = math.inf if stage.timeout_s is None else stage.timeout_s
    return budget.probe(sizes, stage.pool, longest_s * stage.slots, live.cut_tasks(stage.name))
