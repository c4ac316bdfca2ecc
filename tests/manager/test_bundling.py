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
from batchlab.manager.state import LiveJob, Ports
from tests.support.contract.queue_worlds import LoopClock

STAGE = StageDef(StageName("a"), handler="m:f")


class _Lives(dict[JobId, LiveJob]):
    """A table of jobs that counts the passes over all jobs."""

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


def _bundler(lives: dict[JobId, LiveJob], slots: int) -> Bundler:
    ports = cast(Ports, Mock(clock=LoopClock()))
    return Bundler(Context(ports, lives=lives, slots={"default": slots}))


def test_a_job_with_nothing_left_to_cut_looks_at_no_other_job() -> None:
    """A grid may have thousands of running jobs, and each one is advanced at every tick."""
    lives = _Lives({one.id: one for one in map(_live, range(100))})
    bundler = _bundler(lives, 4)
    first = lives[JobId("j0")]
    assert bundler.wave(first, STAGE, TaskSet(), 0) == ((), TaskSet())
    assert lives.looks == 0
    bundles, left = bundler.wave(first, STAGE, TaskSet.span(0, 5), 0)
    assert sum(len(bundle.tasks) for bundle in bundles) + len(left) == 5
    assert bundles
    assert lives.looks > 0


def test_paused_job_does_not_occupy_the_window() -> None:
    """The workers drop its bundles, which stay outstanding while the job is paused."""
    lives = {one.id: one for one in map(_live, range(2))}
    bundler = _bundler(lives, 2)
    first, second = lives.values()
    tasks = TaskSet.span(0, 5)
    one = replace(STAGE, bundle=1)
    out = [Bundle(first.id, STAGE.name, TaskSet.span(n, n + 1)) for n in range(50)]
    first.add_outstanding((bundle, 0.0) for bundle in out)
    assert bundler.wave(second, one, tasks, 0) == ((), tasks)
    first.record = replace(first.record, control=Control.PAUSE)
    assert bundler.wave(second, one, tasks, 0)[0]
