"""The expansion of a scenario to its jobs, which is equal for equal seeds and faster if compressed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.errors import UsageError
from batchlab.core.model import Pool, TaskSet
from batchlab.core.retry_rule import RetryRule
from batchlab.scenarios.model import expansion
from batchlab.scenarios.model.arrivals import FixedTimes, OnOff, Poisson
from batchlab.scenarios.model.distributions import Constant, Exponential, Lognormal
from batchlab.scenarios.model.expansion import compress_scenario, expand
from batchlab.scenarios.model.values import (
    Expectation,
    Fault,
    FaultName,
    Job,
    JobTemplate,
    Policy,
    PoolPlan,
    Prewarm,
    Scenario,
    StageTemplate,
)
from tests.support.properties import PROPERTY

CLAIMS = JobTemplate(
    "claims",
    (
        StageTemplate("parse", Lognormal(4.0, 0.8), retry=RetryRule(backoff_s=2.0), fails=0.3),
        StageTemplate("sum", Constant(5.0), after=("parse",), gather="*"),
    ),
    Lognormal(200.0, 0.6),
    tenant="payer-a",
    deadline_s=3600.0,
)
MEDIA = JobTemplate("media", (StageTemplate("encode", Exponential(60.0), poison=2),), Constant(3))
SCENARIO = Scenario(
    "monday",
    "",
    {"claims": CLAIMS, "media": MEDIA},
    (
        Poisson(template="claims", per_hour=30, until_s=8 * 3600.0),
        FixedTimes(template="media", moments=((0.0, 2), (600.0, 1))),
        OnOff(template="media", per_hour=60, on_s=600.0, off_s=1800.0, until_s=7200.0),
    ),
    (PoolPlan(Pool("default", 0, 40, 4, boot_s=90.0), spot=0.5),),
    seed=7,
    policy=Policy(600.0, None, 60.0),
    prewarm=(Prewarm("default", 10, 3600.0, 7200.0),),
    faults=(Fault(FaultName.KILL, 1800.0, for_s=60.0, notice_s=120.0, rate=0.5),),
    expect=(
        Expectation("makespan", most=32_400.0),
        Expectation("again", least=10.0),
        Expectation("cost", most=12.0),
        Expectation("late", most=0.0),
    ),
)


def test_jobs_are_sorted_by_arrival_with_index_size_and_tenant() -> None:
    jobs = expand(SCENARIO).jobs
    assert [job.index for job in jobs] == list(range(len(jobs)))
    assert [job.due_s for job in jobs] == sorted(job.due_s for job in jobs)
    assert {job.template.name for job in jobs} == {"claims", "media"}
    assert {job.tenant for job in jobs if job.template is CLAIMS} == {"payer-a"}
    assert {job.tasks for job in jobs if job.template is MEDIA} == {3}
    assert len({job.tasks for job in jobs if job.template is CLAIMS}) > 50
    assert len({job.id for job in jobs}) == len(jobs)


def test_jobs_depend_only_on_the_seed() -> None:
    assert expand(SCENARIO) == expand(SCENARIO, seed=7)
    assert expand(SCENARIO, seed=8).jobs != expand(SCENARIO).jobs
    other = {job.id for job in expand(SCENARIO, seed=8).jobs}
    assert not other & {job.id for job in expand(SCENARIO).jobs}


def test_job_ids_depend_on_the_trace_file() -> None:
    ids = {job.id for job in expand(SCENARIO).jobs}
    assert not ids & {job.id for job in expand(replace(SCENARIO, digest="other")).jobs}
    assert not ids & {job.id for job in expand(compress_scenario(SCENARIO, 60)).jobs}


def test_a_second_source_changes_nothing_in_what_the_first_sends() -> None:
    def sent(scenario: Scenario) -> list[tuple[float, int]]:
        return [(j.due_s, j.tasks) for j in expand(scenario).jobs if j.template is CLAIMS]

    alone = replace(SCENARIO, arrivals=SCENARIO.arrivals[:1])
    assert sent(alone) == sent(SCENARIO)
    assert len(sent(alone)) > 100


def test_arrival_of_an_unknown_job_lists_the_known_ones() -> None:
    wrong = replace(SCENARIO, arrivals=(FixedTimes(template="claim", moments=((0.0, 1),)),))
    with pytest.raises(UsageError, match="names the job 'claim'") as caught:
        expand(wrong)
    assert "claims, media" in caught.value.remedy


def test_too_many_jobs_are_a_slip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expansion, "MAX_JOBS", 1000)
    flood = replace(SCENARIO, arrivals=(FixedTimes(template="media", moments=((0.0, 1001),)),))
    some = replace(SCENARIO, arrivals=(FixedTimes(template="media", moments=((0.0, 1000),)),))
    assert len(expand(some).jobs) == 1000
    with pytest.raises(UsageError, match="more than 1,000 jobs"):
        expand(flood)


def test_compressed_divides_every_time_and_nothing_else() -> None:
    fast = compress_scenario(SCENARIO, 60)
    assert fast.compressed == 60
    parse, total = fast.jobs["claims"].stages
    assert (parse.task_s, total.task_s) == (Lognormal(4.0 / 60, 0.8), Constant(5.0 / 60))
    assert (parse.fails, parse.retry.backoff_s, parse.retry.max_backoff_s) == (0.3, 2 / 60, 15.0)
    assert fast.jobs["claims"].deadline_s == 60.0
    assert fast.jobs["claims"].tasks == CLAIMS.tasks
    assert fast.pools[0] == PoolPlan(Pool("default", 0, 40, 4, boot_s=1.5), spot=0.5)
    assert fast.policy == Policy(10.0, None, 1.0)
    assert fast.prewarm == (Prewarm("default", 10, 60.0, 120.0),)
    assert fast.faults == (Fault(FaultName.KILL, 30.0, for_s=1.0, notice_s=2.0, rate=0.5),)
    assert fast.expect == (
        Expectation("makespan", most=540.0),
        Expectation("again", least=10 / 60),
        Expectation("cost", most=12.0),
        Expectation("late", most=0.0),
    )
    with pytest.raises(UsageError, match="cannot be compressed 0-fold"):
        compress_scenario(SCENARIO, 0)


@PROPERTY
@given(st.floats(0.01, 1000.0), st.floats(0.5, 20.0))
def test_a_compressed_scenario_has_the_same_jobs_and_tasks_sooner(first: float, then: float) -> None:
    plain = expand(SCENARIO).jobs
    fast = expand(compress_scenario(compress_scenario(SCENARIO, first), then)).jobs
    assert len(fast) == len(plain)
    k = first * then
    for slow, quick in zip(plain, fast, strict=True):
        assert quick.due_s * k == pytest.approx(slow.due_s, rel=1e-9)
        assert (quick.tasks, quick.template.name) == (slow.tasks, slow.template.name)
    slow, quick = plain[0], fast[0]
    for stage, quick_stage in zip(slow.template.stages, quick.template.stages, strict=True):
        assert expansion.task_s(7, quick, quick_stage, 1) * k == pytest.approx(
            expansion.task_s(7, slow, stage, 1), rel=1e-9
        )


def job(template: JobTemplate = CLAIMS, task_s: float | None = None) -> Job:
    return Job(3, "x-3", template, 0.0, 1000, task_s=task_s)


INDICES = st.sets(st.integers(0, 3000), max_size=600).map(TaskSet.from_indices)


@PROPERTY
@given(st.integers(-(2**70), 2**70), INDICES, st.integers(1, 5))
def test_many_tasks_at_once_are_what_each_is_alone(seed: int, tasks: TaskSet, attempt: int) -> None:
    for template, one in ((CLAIMS, 0), (CLAIMS, 1), (MEDIA, 0)):
        stage = template.stages[one]
        assert expansion.task_times_s(seed, job(), stage, tasks) == [
            expansion.task_s(seed, job(), stage, task) for task in tasks
        ]
        assert expansion.failing_tasks(seed, job(), stage, tasks, attempt) == {
            task for task in tasks if expansion.attempt_fails(seed, job(), stage, task, attempt)
        }


def test_the_traces_time_is_that_of_root_tasks_only() -> None:
    parse, total = CLAIMS.stages
    assert expansion.task_s(1, job(task_s=9.0), parse, 0) == 9.0
    assert expansion.task_times_s(1, job(task_s=9.0), parse, TaskSet.span(0, 3)) == [9.0] * 3
    assert expansion.task_s(1, job(task_s=9.0), total, 0) == 5.0


def test_the_share_that_fails_is_as_declared_and_each_attempt_is_new() -> None:
    parse = CLAIMS.stages[0]
    every = TaskSet.span(0, 100_000)
    first, second = (expansion.failing_tasks(7, job(), parse, every, attempt) for attempt in (1, 2))
    # Three standard deviations of a share of 0.3 in 100,000 are 0.0044.
    assert len(first) / 100_000 == pytest.approx(0.3, abs=0.0044)
    assert len(first & second) / 100_000 == pytest.approx(0.09, abs=0.0028)
    assert expansion.failing_tasks(7, job(), CLAIMS.stages[1], every, 1) == frozenset()


def test_first_tasks_are_the_poisonous_ones() -> None:
    encode = MEDIA.stages[0]
    assert [expansion.kills_worker(job(MEDIA), encode, task) for task in range(4)] == [True, True, False, False]
    assert not expansion.kills_worker(job(), CLAIMS.stages[0], 0)
