"""The function why(), which returns one line for every situation of a job, the most specific reason first."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.job_definition import Condition, Dependency, StageDef
from batchlab.core.model import Bundle, Control, JobId, JobState, Market, Pool, StageCounts, TaskSet
from batchlab.server.wait_reasons import why
from tests.support.server.waiting_jobs import (
    BUSY_ELSEWHERE,
    CPU,
    CRASHES,
    DEAD,
    DONE,
    JOB,
    MAP,
    MONO_S,
    NOW_S,
    PENDING,
    QUEUED,
    STAGES,
    SUM,
    UP,
    Situation,
    bundle,
    instance,
    other,
    worker,
)

AFTER_B = Dependency(JobId("b"))
UNPLANNED = (StageCounts(MAP), StageCounts(SUM))

SITUATIONS: dict[str, tuple[Situation, Sequence[str]]] = {
    "succeeded": (
        Situation(JobState.SUCCEEDED, counts=[StageCounts(MAP, planned=3, succeeded=3)]),
        ["ended SUCCEEDED", "3 tasks succeeded"],
    ),
    "succeeded in spite of failures": (
        Situation(JobState.SUCCEEDED, counts=[StageCounts(MAP, planned=3, succeeded=2, failed=1)]),
        ["2 tasks succeeded", "1 task failed, as the failure policy of the job allows"],
    ),
    "failed": (
        Situation(JobState.FAILED, reason="1 task failed (task 3:\n  ValueError)"),
        ["ended FAILED: 1 task failed (task 3: ValueError)."],
    ),
    "not adopted yet": (Situation(conducted=False), ["The manager will load the job soon"]),
    "scheduled": (
        Situation(JobState.SCHEDULED, start_at_s=NOW_S + 7500),
        ["scheduled for 2023-11-15 00:18:20 UTC, in 2 h 5 min"],
    ),
    "scheduled and due": (Situation(JobState.SCHEDULED, start_at_s=NOW_S - 1), ["starts at the manager's next tick"]),
    "waiting for a job": (
        Situation(JobState.PENDING, counts=UNPLANNED, after=[AFTER_B], others=[other("b")]),
        ["The job waits for job b, which is RUNNING (0% of its tasks have ended)."],
    ),
    "waiting for the end of jobs": (
        Situation(
            JobState.PENDING,
            counts=UNPLANNED,
            after=[replace(AFTER_B, condition=Condition.ENDED), *(Dependency(JobId(name)) for name in "cdef")],
            others=[other("b")],
        ),
        [
            "waits for 5 jobs: the end of job b, which is RUNNING (0% of its tasks have ended); job c, whose state",
            "; job d, whose state the manager will read soon; and 2 more.",
        ],
    ),
    "paused": (
        Situation(JobState.PAUSED, Control.PAUSE, out=QUEUED, workers={"w-1": worker("w-1", bundle())}),
        ["A user has paused the job", "0 of 10 tasks", "1 bundle that had begun", "job resume job-1"],
    ),
    "being cancelled": (
        Situation(control=Control.CANCEL, out=QUEUED),
        ["being canceled. Its workers notice within 1 s"],
    ),
    "being sealed": (
        Situation(control=Control.CANCEL, out=QUEUED, forbidden=True),
        ["being canceled. The manager will record 1 outstanding bundle as canceled"],
    ),
    "planning its input": (
        Situation(JobState.PENDING, counts=[StageCounts(MAP), StageCounts(SUM)]),
        ["plans the input: stage map gets 2 keys of raw data, split by file"],
    ),
    "planning a gather": (Situation(counts=DONE), ["plans stage sum from 10 results of map"]),
    "pool gone": (
        Situation(stages=(StageDef(MAP, handler="m:f", pool="gpu"), STAGES[1])),
        ["Stage map runs in pool gpu, but this grid only has the pools default"],
    ),
    "instances too small": (
        Situation(stages=(StageDef(MAP, handler="m:f", slots=8), STAGES[1])),
        ["needs 8 slots per task", "pool default has 2"],
    ),
    "too few GPUs": (
        Situation(stages=(StageDef(MAP, handler="m:f", gpus=2), STAGES[1])),
        ["Stage map needs 2 GPUs per task, but an instance of pool default has 0"],
    ),
    "max of zero": (
        Situation(out=QUEUED, pool=Pool("default", max_size=0)),
        ["waits for capacity: pool default has a maximum of 0", "grid scale default --max"],
    ),
    "held at zero": (
        Situation(out=QUEUED, held={"default": 0}),
        ["a user has set pool default to 0 instances", "grid scale default --auto"],
    ),
    "no instance asked for": (
        Situation(out=QUEUED),
        ["pool default has 0 of max 4 instances in service", "autoscaler decides every 1 s"],
    ),
    "launch is next": (
        Situation(out=QUEUED, desired=2, activities=CRASHES[2:]),
        [
            "desired capacity is 2, and the group will launch instances soon",
            "last scaling activity was: Setting desired capacity to 1, because policy",
        ],
    ),
    "booting": (
        Situation(out=QUEUED, desired=1, instances=[PENDING]),
        ["0 of max 4 instances in service. The group has launched 1 instance, the first one 9 s ago"],
    ),
    "crash loop": (
        Situation(out=QUEUED, instances=[DEAD, PENDING], activities=CRASHES),
        [
            "workers of pool default repeatedly end before they are ready: exit 1",
            "The instance log of w-1",
            "1 more instance",
        ],
    ),
    "no more launched": (
        Situation(out=QUEUED, activities=CRASHES, stopped={"default": "the last 3 did not"}),
        ["waits for capacity: the last 3 did not. ", "`batchlab grid scale default --auto`"],
    ),
    "one crash": (
        Situation(out=QUEUED, instances=[DEAD], activities=CRASHES[1:]),
        ["a worker of pool default ended before it was ready: exit 1"],
    ),
    "crash loop, long ago": (
        Situation(out=QUEUED, activities=CRASHES),
        ["workers of pool default do not start: 3 instances in a row ended: exit 1"],
    ),
    "mended crash loop": (
        Situation(out=QUEUED, instances=[DEAD], activities=[UP, *CRASHES]),
        ["0 of max 4 instances in service"],
    ),
    "no reports yet": (
        Situation(out=QUEUED, instances=[instance("w-1")]),
        ["1 bundle of the job waits in pool default. 1 instance of the pool has started, but has not sent a"],
    ),
    "on the way": (
        Situation(out=QUEUED, instances=[instance("w-1")], workers={"w-1": worker("w-1")}),
        ["1 bundle of the job is on the way to 1 worker", "for 3 s", "no worker reports it for 90 s"],
    ),
    "outranked": (
        Situation(
            left=TaskSet.span(0, 10),
            instances=[instance("w-1")],
            workers={"w-1": worker("w-1")},
            others=[other(name, 5) for name in "abcd"],
        ),
        ["4 jobs of higher priority come first in pool default: a, b, c and 1 more"],
    ),
    "all slots busy": (
        Situation(out=QUEUED, instances=[instance("w-1")], workers={"w-1": BUSY_ELSEWHERE}, others=[other("b")]),
        ["All slots of pool default are busy with 1 other job: b", "1 bundle of this job"],
    ),
    "sharing": (
        Situation(
            left=TaskSet.span(0, 10), instances=[instance("w-1")], workers={"w-1": worker("w-1")}, others=[other("b")]
        ),
        ["10 tasks of stage map wait for pool default, which 1 other job also uses: b"],
    ),
    "about to be cut": (
        Situation(left=TaskSet.span(0, 10), instances=[instance("w-1")]),
        ["10 tasks of stage map wait for pool default. ", "sends the next bundles within 1 s"],
    ),
    "backoff": (
        Situation(out=[(bundle(JOB, 1, 2), -12.0), (bundle(JOB, 7), -40.0)], instances=[instance("w-1")]),
        ["3 tasks wait for their retries, the next in 12 s"],
    ),
    "backoff of the last task before a gather": (
        Situation(counts=[StageCounts(MAP, planned=10, succeeded=9), StageCounts(SUM)], out=[(bundle(), -4.0)]),
        ["1 task waits for its retry, the next in 4 s", "Stage sum waits for stage map (9 of 10 tasks ended)"],
    ),
    "running": (
        Situation(
            JobState.RUNNING,
            out=[(bundle(JOB, 0, 1), 0.5), (bundle(JOB, 4), -3.0)],
            instances=[instance("w-1")],
            workers={"w-1": worker("w-1", bundle(JOB, 0, 1))},
        ),
        [
            "runs 2 tasks in 1 bundle on 1 worker",
            "The oldest bundle (stage map, w-1) has run for 14 s",
            "Its messages have a visibility timeout of 30 s until 5 bundles of the stage have ended",
            "0 of 10 tasks planned so far have ended",
            "1 task waits for its retry, the next in 3 s",
            "Stage sum waits for stage map",
        ],
    ),
    "backend down": (
        Situation(trouble="S3 does not answer.", counts=[StageCounts(MAP), StageCounts(SUM)]),
        ["The manager cannot continue the job and retries: S3 does not answer."],
    ),
    "ticks fail": (
        Situation(out=QUEUED, tick_trouble="Docker does not answer"),
        ["cannot continue the job and retries: Docker does not answer"],
    ),
    "queues down": (
        Situation(out=QUEUED, workers={"w-1": worker("w-1", bundle())}, outage=(NOW_S - 42, "Queue 'events' is away.")),
        [
            "since 22:12:38 UTC (42 s), because a service does not answer: Queue 'events' is away. The job continues",
            "1 bundle that had begun",
        ],
    ),
    "bucket down while tasks run": (
        Situation(out=QUEUED, workers={"w-1": worker("w-1", bundle())}, trouble="Object 'jobs/a' cannot be reached."),
        ["runs 1 task", "The manager cannot continue the job and retries: Object 'jobs/a' cannot be reached."],
    ),
    "closing": (
        Situation(counts=[*DONE[:1], StageCounts(SUM, planned=1, succeeded=1)]),
        ["All 11 tasks of the job have ended", "records the end of the job"],
    ),
    "between bundles": (
        Situation(instances=[instance("w-1")]),
        ["0 of 10 tasks planned so far have ended, and no bundle is outstanding"],
    ),
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_the_answer_names_the_reason(name: str) -> None:
    """Every situation has a reason."""
    situation, expected = SITUATIONS[name]
    answer = why(situation.facts())
    assert [text for text in expected if text not in answer] == [], answer
    assert "\n" not in answer


def test_no_two_situations_share_an_answer() -> None:
    answers = [why(situation.facts()) for situation, _ in SITUATIONS.values()]
    assert len(set(answers)) == len(answers)


def test_the_oldest_running_bundle_is_named() -> None:
    young, old = bundle(JOB, 1), bundle(JOB, 2)
    situation = Situation(
        out=[(young, 0.0), (old, 0.0)],
        instances=[instance("w-1"), instance("w-2")],
        workers={"w-1": worker("w-1", young, since_s=MONO_S - 5), "w-2": worker("w-2", old, since_s=MONO_S - 4000)},
    )
    answer = why(situation.facts())
    assert "w-2) has run for 66 min" in answer
    assert f"`batchlab job logs {JOB} --follow` shows the output" in answer
    situation.workers = {"w-1": worker("w-1", young, since_s=MONO_S - 5)}
    assert "--follow" not in why(situation.facts())


def test_a_bundle_that_two_workers_run_counts_once() -> None:
    """A duplicate delivery must not look like progress."""
    one = bundle(JOB, 1, 2, 3)
    workers = {name: worker(name, one) for name in ("w-1", "w-2")}
    answer = why(Situation(out=[(one, 0.0)], workers=workers).facts())
    assert "runs 3 tasks in 1 bundle on 1 worker" in answer


def test_the_learned_visibility_timeout_has_its_basis() -> None:
    one = bundle(JOB, 1)
    facts = Situation(out=[(one, 0.0)], workers={"w-1": worker("w-1", one)}).facts()
    assert facts.live is not None
    facts.live.run_times_s[MAP] = deque([45.0] * 20)
    expected = "a visibility timeout of up to 65 s, because 95% of the last 20 bundles took at most 45.0 s a task."
    assert expected in why(facts)


def test_a_new_leader_names_the_mean_in_the_ledger() -> None:
    one = bundle(JOB, 1)
    counts = [StageCounts(MAP, planned=100, succeeded=50, run_s=0.5), StageCounts(SUM)]
    facts = Situation(out=[(one, 0.0)], counts=counts, workers={"w-1": worker("w-1", one)}).facts()
    assert facts.live is not None
    facts.live.learn_run_times()
    text = why(facts)
    assert "because the ledger has a mean run time of 10 ms a task." in text
    assert "Half of the last" not in text, "no bundle has ended under this leader"
    facts.live.run_times_s[MAP] = deque([0.02])
    assert "the mean run time in the ledger and the times of the last 1 bundle suggest at most 20 ms a task" in why(
        facts
    )


_some: Mapping[str, st.SearchStrategy[Any]] = {
    "state": st.sampled_from(JobState),
    "control": st.sampled_from(Control),
    "reason": st.sampled_from(["", "x failed"]),
    "counts": st.sampled_from(
        [
            (StageCounts(MAP), StageCounts(SUM)),
            (StageCounts(MAP, planned=10), StageCounts(SUM)),
            (StageCounts(MAP, planned=10, succeeded=4, failed=1), StageCounts(SUM)),
            (StageCounts(MAP, planned=0), StageCounts(SUM)),
            (*DONE[:1], StageCounts(SUM, planned=1)),
            (*DONE[:1], StageCounts(SUM, planned=1, cancelled=1)),
        ]
    ),
    "left": st.sampled_from([TaskSet(), TaskSet.span(3, 10)]),
    "start_at_s": st.sampled_from([None, NOW_S - 1, NOW_S + 1e6]),
    "out": st.lists(
        st.sampled_from([(bundle(), 3.0), (bundle(JOB, 4), -9.0), (bundle(JOB, 0, stage=SUM), 1e6)]), max_size=3
    ),
    "pool": st.sampled_from([CPU, Pool("default", max_size=0), Pool("gpu"), Pool("default")]),
    "desired": st.integers(0, 4),
    "instances": st.lists(st.sampled_from([instance("w-1"), PENDING, DEAD]), max_size=3),
    "workers": st.sampled_from([{}, {"w-1": worker("w-1")}, {"w-1": worker("w-1", bundle())}, {"w-1": BUSY_ELSEWHERE}]),
    "held": st.sampled_from([{}, {"default": 0}, {"default": 2}]),
    "activities": st.sampled_from([[], CRASHES, [UP, *CRASHES]]),
    "others": st.sampled_from([[], [other("b")], [other("b", 5), other("c")]]),
    "conducted": st.booleans(),
    "forbidden": st.booleans(),
    "trouble": st.sampled_from(["", "S3 is down"]),
    "outage": st.sampled_from([None, (NOW_S - 1, "SQS is down")]),
}


@given(st.fixed_dictionaries(dict(_some)).map(lambda chosen: Situation(**chosen)))
def test_wait_reason_always_has_one_line(situation: Situation) -> None:
    """For random situations too, the answer has one line and is never "unknown"."""
    answer = why(situation.facts())
    assert answer.endswith(".")
    assert "\n" not in answer
    assert "unknown" not in answer.lower()


@pytest.mark.parametrize(("tasks", "verb"), [(1, "waits for its retry"), (2, "wait for their retries")])
def test_singular_and_plural_texts(tasks: int, verb: str) -> None:
    make: Callable[[int], Bundle] = lambda n: bundle(JOB, *range(n))  # noqa: E731 - a fixture's worth
    assert verb in why(Situation(out=[(make(tasks), -5.0)]).facts())


# --- Additional facts ----------------------------------------------------------------------------

WAITS = Situation(out=QUEUED, instances=[instance("w-1")], workers={"w-1": worker("w-1")})
RUNS = Situation(out=QUEUED, instances=[instance("w-1")], workers={"w-1": worker("w-1", bundle())})
ENDED = Situation(JobState.FAILED, reason="2 tasks failed")


def beside(situation: Situation, **more: Any) -> str:
    """Return the part of the answer after the reason."""
    facts = situation.facts()
    alone, whole = why(facts), why(replace(facts, **more))
    assert whole.startswith(alone)
    return whole.removeprefix(alone)


def test_delayed_manager_is_a_reason() -> None:
    told = beside(WAITS, lag_s=75.0)
    assert told.startswith(" Also, the manager is 75 s behind")
    assert "`bundle`" in told
    assert beside(WAITS, lag_s=3.0) == ""
    assert beside(ENDED, lag_s=75.0) == ""


def test_recent_warnings_of_the_log_are_shown() -> None:
    warning = (NOW_S - 12.0, "the bundle is given back:\nthe bucket is away.")
    told = beside(WAITS, warning=warning)
    assert told.startswith(" Also, the manager logged this warning about the job 12 s ago: ")
    assert told.endswith("the bundle is given back: the bucket is away.")
    assert beside(RUNS, warning=warning) == "", "it runs: nobody need act on that"
    assert beside(WAITS, warning=(NOW_S - 3600.0, "old")) == ""


def test_undelivered_notification_is_shown_for_any_job() -> None:
    for situation in (WAITS, RUNS, ENDED):
        told = beside(situation, undelivered="a notification of it to x has failed 3 times")
        assert told.endswith("3 times. `batchlab notify log` shows the attempts.")


def test_bundles_with_speculative_copies_are_named() -> None:
    """The answer names the instance of the copy, and not the instance of the original run."""
    straggler = bundle()
    workers = {"w-1": worker("w-1", straggler), "w-2": worker("w-2", straggler)}
    instances = [instance("w-1"), instance("w-2")]
    facts = Situation(out=QUEUED, instances=instances, workers=workers).facts()
    assert "speculative copy" not in why(facts)
    (outstanding,) = facts.outstanding.values()
    outstanding.copied_from = workers["w-1"].beat.worker
    assert "1 bundle runs far longer than others and has a speculative copy on w-2." in why(facts)


def with_times(bundles_s: Sequence[float], succeeded: int, market: Market = Market.ON_DEMAND) -> str:
    """Return the notes about a job whose first stage has bundles with these mean task times."""
    up = instance("w-1")
    up = replace(up, machine=replace(up.machine, market=market))
    counts = [StageCounts(MAP, planned=100, succeeded=succeeded), StageCounts(SUM)]
    situation = replace(RUNS, counts=counts, instances=[up])
    facts = situation.facts()
    plain = why(facts)
    assert facts.live is not None
    facts.live.run_times_s[MAP] = deque(bundles_s)
    return why(facts).removeprefix(plain.partition("Its messages")[0]).partition(" Also, ")[2]


def test_task_sizes_are_judged_during_a_first_run() -> None:
    told = with_times([0.02] * 6, 20)
    assert told.startswith("tasks of map are tiny. Half of the last 6 bundles took a mean task time of at most 20 ms")
    assert "`bundle`" in told
    assert with_times([0.02] * 6, 19) == "", "too few tasks"
    assert with_times([0.02] * 4, 20) == "", "too few bundles"
    assert with_times([1.0] * 6, 20) == ""


def test_one_slow_bundle_does_not_make_a_stage_long() -> None:
    assert with_times([30.0] * 9 + [50_000.0], 30, Market.SPOT) == ""
    told = with_times([700.0] * 9 + [30.0], 30, Market.SPOT)
    assert told.startswith("tasks of map are long for Spot. ")
    assert "pool default has Spot Instances" in told
    assert with_times([700.0] * 9, 30) == ""
    assert "12 h of SQS" in with_times([45_000.0] * 9, 30)


def test_an_instance_that_reports_spot_counts_as_spot() -> None:
    facts = replace(RUNS.facts(), spot={"w-1": None})
    assert facts.uses_spot("default")
    assert not replace(facts, spot=()).uses_spot("default")
    assert not facts.uses_spot("other")
