"""Sums of live jobs by pool, compared with a recount, and the clock of silent bundles."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Bundle, Control, JobId, JobState, StageCounts, StageName, TaskSet
from batchlab.core.ports import JobRecord, JobRows, StageRecord
from batchlab.manager.live_jobs import LiveJobs, Rotation
from batchlab.manager.reconciler import SilenceClock
from batchlab.manager.state import LiveJob

POOLS = ("small", "large")
STAGES = (StageDef(StageName("map"), pool="small"), StageDef(StageName("sum"), pool="large", slots=2))


def _live(n: int, priority: int = 0, share: str = "") -> LiveJob:
    job = JobDef(JobId(f"j{n}"), "j", STAGES, 0.0, priority=priority, share=share)
    stages = {stage.name: StageRecord(StageCounts(stage.name)) for stage in STAGES}
    return LiveJob(JobRecord(job, JobState.RUNNABLE), stages)


def _change(live: LiveJob, rng: random.Random) -> None:
    """Change the job as the manager does."""
    stage = rng.choice(STAGES)
    record = live.stages[stage.name]
    match rng.randrange(6):
        case 0:
            planned = rng.choice((None, 0, 3, 10))
            done = rng.randint(0, planned or 0)
            counts = StageCounts(stage.name, planned, succeeded=done, run_s=done * rng.random())
            changed = replace(record, counts=counts, left=TaskSet.span(done, planned or 0))
            rows = [changed if s.counts.stage == stage.name else s for s in live.stages.values()]
            live.update_rows(JobRows(live.record, tuple(rows)))
        case 1:
            live.record = replace(live.record, control=rng.choice((Control.RUN, Control.PAUSE)))
            live.notify()
        case 2:
            live.record = replace(live.record, state=rng.choice((JobState.RUNNABLE, JobState.RUNNING)))
            live.notify()
        case 3:
            n = rng.randrange(20)
            live.add_outstanding([(Bundle(live.id, stage.name, TaskSet.span(n, n + 1)), 0.0)])
        case 4:
            for outstanding in live.all_outstanding()[:2]:
                live.remove_outstanding(outstanding.bundle)
        case _:
            live.began_s.setdefault(stage.name, 1.0)
            live.notify()


def _recount(lives: LiveJobs, pool: str, now_s: float) -> tuple[int, int, float]:
    bundles, tasks, seconds = 0, 0, 0.0
    for live in lives.values():
        bundles += live.outstanding_in(pool)
        for stage in live.job.stages:
            counts = live.stages[stage.name].counts
            if stage.pool == pool and counts.planned is not None and live.record.control is Control.RUN:
                remaining = counts.planned - counts.terminal
                tasks += remaining * stage.slots
                seconds += remaining * live.task_s(stage, now_s)
    return bundles, tasks, seconds


@pytest.mark.parametrize("seed", range(20))
def test_sums_equal_a_recount_of_all_jobs(seed: int) -> None:
    rng = random.Random(seed)
    lives, count = LiveJobs(), 0
    for step in range(300):
        if rng.random() < 0.1 or not lives:
            count += 1
            live = _live(count, rng.randrange(3))
            lives[live.id] = live
        elif rng.random() < 0.05:
            del lives[rng.choice(list(lives))]
        else:
            _change(rng.choice(list(lives.values())), rng)
        for pool in POOLS if step % 3 == 0 else ():
            now_s = 10.0 + step
            bundles, tasks, seconds = _recount(lives, pool, now_s)
            work, backlog = lives.pool(pool), lives.backlog(pool, now_s)
            assert (work.bundles, backlog.tasks) == (bundles, tasks)
            assert backlog.seconds == pytest.approx(seconds, abs=1e-3)
            assert work.working.keys() == {live.id for live in lives.values() if live.has_work(pool)}
            uncut = {live.id for live in lives.values() if live.has_uncut_tasks(pool)}
            uncut -= {live.id for live in lives.values() if live.record.control is not Control.RUN}
            assert {j for by in work.uncut.values() for jobs in by.values() for j in jobs} == uncut
    lives.clear()
    assert all(lives.pool(pool).bundles == 0 and not lives.pool(pool).working for pool in POOLS)


def test_only_jobs_with_room_in_the_window_are_ready() -> None:
    lives = LiveJobs(_live(n, priority=n // 3) for n in range(6))
    for live in lives.values():
        record = live.stages[StageName("map")]
        map_record = replace(record, counts=replace(record.counts, planned=9), left=TaskSet.span(0, 9))
        live.update_rows(JobRows(live.record, (map_record, live.stages[StageName("sum")])))
    full = lives[JobId("j4")]
    full.add_outstanding((Bundle(full.id, StageName("map"), TaskSet.span(n, n + 1)), 0.0) for n in range(2))
    assert [live.id for live in lives.pool("small").ready(window=7)] == ["j3", "j5"]


def test_a_waiting_job_gets_only_the_steps_of_the_resync() -> None:
    lives = LiveJobs(_live(n) for n in range(1000))
    for live in lives.values():
        counts = StageCounts(StageName("map"), 1)
        rows = (StageRecord(counts), StageRecord(StageCounts(StageName("sum"), 0)))
        live.update_rows(JobRows(live.record, rows))
        live.add_outstanding([(Bundle(live.id, StageName("map"), TaskSet.span(0, 1)), 0.0)])
    steps = [len(lives.needing_step({"small": 10, "large": 10}, now_s)) for now_s in range(11)]
    assert steps[1:] == [4] * 10


def test_a_journal_has_each_change_once_and_no_removed_job() -> None:
    lives = LiveJobs([_live(1), _live(2)])
    journal = lives.journal()
    lives.refresh()
    journal.clear()
    lives[JobId("j1")].notify()
    lives.refresh()
    assert list(journal.changed) == ["j1"]
    del lives[JobId("j1")]
    assert (list(journal.changed), list(journal.removed)) == ([], ["j1"])
    lives[JobId("j1")] = _live(1)
    assert list(journal.removed) == []


def test_a_rotation_visits_each_job_once_in_its_period() -> None:
    lives, rotation = LiveJobs(_live(n) for n in range(100)), Rotation(period_s=50.0)
    seen = [job for now_s in range(51) for job in rotation.next(lives, now_s)]
    assert sorted(seen) == sorted(lives)


@pytest.mark.parametrize("seed", range(20))
def test_the_silence_of_a_bundle_excludes_time_with_an_infinite_limit(seed: int) -> None:
    rng = random.Random(seed)
    heard_s = [rng.uniform(0.0, 60.0) for _ in range(20)]
    clock, now_s, counted = SilenceClock(0.0), 0.0, [0.0] * len(heard_s)
    for _ in range(60):
        before_s, now_s = now_s, now_s + rng.uniform(0.1, 2.0)
        runs = rng.random() < 0.5
        clock.advance(now_s, runs=runs)
        for n, time_s in enumerate(heard_s):
            if runs:
                counted[n] += max(0.0, now_s - max(before_s, time_s))
            assert clock.at(now_s) - clock.at(time_s) == pytest.approx(counted[n])


def test_the_silence_of_a_job_that_was_adopted_again_does_not_count() -> None:
    """Another manager has led in between, so the job has a new object with new bundles."""
    lives, clock = LiveJobs([_live(1)]), SilenceClock(0.0)
    bundle = Bundle(JobId("j1"), StageName("map"), TaskSet.span(0, 1))
    lives[JobId("j1")].add_outstanding([(bundle, 0.0)])
    lives.clear()
    lives[JobId("j1")] = _live(1)
    lives[JobId("j1")].add_outstanding([(bundle, 50.0)])
    for live, outstanding in lives.take_sent():
        clock.add(live, outstanding)
    clock.advance(100.0, runs=True)
    assert clock.take_silent(lives, 60.0) == []
    clock.advance(120.0, runs=True)
    assert [live for live, _ in clock.take_silent(lives, 60.0)] == [lives[JobId("j1")]]


def test_ended_bundles_leave_the_heap_while_the_clock_stands_still() -> None:
    lives, clock = LiveJobs([_live(1)]), SilenceClock(0.0)
    live = lives[JobId("j1")]
    for n in range(5000):
        bundle = Bundle(live.id, StageName("map"), TaskSet.span(n, n + 1))
        live.add_outstanding([(bundle, 0.0)])
        live.remove_outstanding(bundle)
    for sent in lives.take_sent():
        clock.add(*sent)
    clock.remove_stale(lives, lives.pool("small").bundles)
    assert not clock._checks


def test_the_sums_of_a_share_end_with_its_last_job() -> None:
    lives = LiveJobs()
    lives.divide_by_share(is_divided=True)
    for n in range(50):
        live = _live(n, share=f"s{n % 10}")
        lives[live.id] = live
    assert {pool: len(lives.shares(pool, 0.0)) for pool in POOLS} == dict.fromkeys(POOLS, 10)
    for n in range(45):
        del lives[JobId(f"j{n}")]
    assert {pool: sorted(lives.shares(pool, 0.0)) for pool in POOLS} == {
        pool: [f"s{n}" for n in range(5, 10)] for pool in POOLS
    }
    lives.clear()
    assert {pool: lives.shares(pool, 0.0) for pool in POOLS} == {pool: {} for pool in POOLS}
