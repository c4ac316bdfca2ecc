"""The limit on the number of cut bundles of a job, and the cost of computing it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import cast
from unittest.mock import Mock

from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Bundle, Control, JobId, JobState, StageCounts, StageName, TaskSet
from batchlab.core.ports import JobRecord, StageRecord
from batchlab.manager.bundling import Bundler
from batchlab.manager.context import Context
from batchlab.manager.live_jobs import LiveJobs
from batchlab.manager.state import LiveJob, Ports
from tests.support.contract.queue_worlds import LoopClock

STAGE = StageDef(StageName("a"), handler="m:f")


class _Lives(LiveJobs):
    """Live jobs with a count of the iterations over all jobs."""

    looks = 0

    def __iter__(self) -> Iterator[JobId]:
        self.looks += 1
        return super().__iter__()

    def values(self):  # type: ignore[no-untyped-def]
        self.looks += 1
        return super().values()


def _live(n: int) -> LiveJob:
    job = JobDef(JobId(f"j{n}"), "j", (STAGE,), 0.0, items=5)
    return LiveJob(JobRecord(job, JobState.RUNNING), {STAGE.name: StageRecord(StageCounts(STAGE.name, 5))})


def _bundler(lives: LiveJobs, slots: int) -> Bundler:
    ports = cast(Ports, Mock(clock=LoopClock()))
    return Bundler(Context(ports, lives=lives, slots={"default": slots}))


def test_the_next_cut_of_a_job_does_not_read_other_jobs() -> None:
    lives = _Lives(map(_live, range(100)))
    bundler = _bundler(lives, 4)
    first = lives[JobId("j0")]
    assert bundler.wave(first, STAGE, TaskSet(), 0) == ((), TaskSet())
    bundles, left = bundler.wave(first, STAGE, TaskSet.span(0, 5), 0)
    assert sum(len(bundle.tasks) for bundle in bundles) + len(left) == 5
    assert bundles
    assert lives.looks == 0


def test_paused_job_does_not_occupy_the_window() -> None:
    """The workers drop its bundles, which stay outstanding while the job is paused."""
    lives = LiveJobs(map(_live, range(2)))
    bundler = _bundler(lives, 2)
    first, second = lives.values()
    tasks = TaskSet.span(0, 5)
    one = replace(STAGE, bundle=1)
    out = [Bundle(first.id, STAGE.name, TaskSet.span(n, n + 1)) for n in range(50)]
    first.add_outstanding((bundle, 0.0) for bundle in out)
    assert bundler.wave(second, one, tasks, 0) == ((), tasks)
    first.record = replace(first.record, control=Control.PAUSE)
    first.notify()
    assert bundler.wave(second, one, tasks, 0)[0]
