"""How much of a stage is cut into bundles now, and of what sizes.

Invariant: a function of what is in memory. What it decides counts only once it is committed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Bundle, Control, JobId, JobState, Json, StageCounts, TaskSet
from batchlab.core.ports import Clock, Cut, JobRecord, StageRecord
from batchlab.core.pricing.cap import Budget
from batchlab.core.protocol import bundle_size, spec_object
from batchlab.manager.settings import WINDOW
from batchlab.manager.state import LiveJob, in_pool


class Cutter:
    """Cuts for every job; `slots_of` gives the slots that a pool has or can soon have."""

    def __init__(
        self,
        clock: Clock,
        lives: Mapping[JobId, LiveJob],
        slots_of: Mapping[str, int],
        window: int = WINDOW,
    ) -> None:
        """`window` is how many bundles per slot are kept outstanding."""
        self._clock = clock
        self._lives = lives
        self._slots_of = slots_of
        self._window = window

    def opening(self, job: JobDef, items: Sequence[Json]) -> spec_object.Opening:
        """What a job with these items begins with, put in one object with its definition."""
        waits = job.start_at_s is not None and job.start_at_s > self._clock.now_s()
        # Under a cap it is first to be known what is left of that.
        if waits or len(job.roots()) != 1 or job.max_cost_usd is not None:
            return spec_object.Opening(items)
        (stage,) = job.roots()
        stages = {s.name: StageRecord(StageCounts(s.name)) for s in job.stages}
        live = LiveJob(JobRecord(job, JobState.SUBMITTED), stages)
        bundles, left = self.wave(live, stage, TaskSet.span(0, len(items)), 0)
        return spec_object.Opening(items, Cut(job.id, stage.name, 0, 0, bundles, left, len(items)))

    def wave(
        self, live: LiveJob, stage: StageDef, left: TaskSet, round_: int
    ) -> tuple[tuple[Bundle, ...], TaskSet]:
        """The bundles of the next cut, as far as there is room, and the tasks left after it."""
        if not left:
            return (), left  # whether there is room takes a look at every other job
        pace_s = live.pace_s(stage.name)
        sizes = bundle_size.wave(
            len(left),
            max(1, self._slots_of.get(stage.pool, 1) // stage.slots),
            pace_s,
            stage.bundle,
            self._room(live, stage),
        )
        if live.budget:
            sizes = _paid(live, stage, live.budget, sizes)
        bundles: list[Bundle] = []
        for size in sizes:
            tasks, left = left.take(size)
            bundles.append(Bundle(live.id, stage.name, tasks, round=round_))
        return tuple(bundles), left

    def _room(self, live: LiveJob, stage: StageDef) -> int:
        """Bundles of this stage that may be sent now.

        Jobs of the highest priority with something to cut share the window evenly; others wait.
        """
        if live.is_held:
            return 0
        pool = stage.pool
        slots, mine = self._slots_of.get(pool, 1), in_pool({live.id: live}, pool)
        window = self._window * slots + 1

        def worth(room: int) -> int:
            # A cut costs the same however many bundles it has; one for every slot, unless there is
            # nothing left behind those that run.
            return room if room >= slots or mine <= slots else 0

        # There may be very many others, and they only make the room smaller.
        room, peers = window - mine, 1
        if worth(room) <= 0:
            return 0
        for rival in self._rivals(live, pool):
            if rival.job.priority > live.job.priority:
                return 0
            peers += 1
            room = max(1, window // peers) - mine
            if worth(room) <= 0:
                return 0
        if peers == 1:
            room = min(room, window - in_pool(self._unpaused(), pool))
        return worth(room)

    def _rivals(self, live: LiveJob, pool: str) -> Iterator[LiveJob]:
        """Other jobs with something to cut in the pool, of no lower priority."""
        least = live.job.priority
        for one in self._lives.values():
            if one.job.priority >= least and one is not live and one.is_left(pool) and _runs(one):
                yield one

    def _unpaused(self) -> Mapping[JobId, LiveJob]:
        """Jobs whose outstanding bundles are with workers, or on their way: workers drop those of
        a paused one, which would take up the window for as long as it is paused."""
        return {
            job: live
            for job, live in self._lives.items()
            if live.record.control is not Control.PAUSE
        }


def _paid(live: LiveJob, stage: StageDef, budget: Budget, sizes: list[int]) -> list[int]:
    """Those of the bundles that a cap on cost leaves room for."""
    mean_s = live.stages[stage.name].counts.mean_s
    if mean_s is not None:
        return budget.afford(sizes, stage.pool, mean_s * stage.slots)
    longest_s = math.inf if stage.timeout_s is None else stage.timeout_s
    return budget.probe(sizes, stage.pool, longest_s * stage.slots, live.cut_tasks(stage.name))


def _runs(live: LiveJob) -> bool:
    """Whether it may cut now: what a cap holds back keeps nobody else waiting."""
    runs = live.record.control is Control.RUN and live.record.state is not JobState.SCHEDULED
    return runs and not live.is_held
