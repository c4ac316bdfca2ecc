"""Expected run times of a stage, and the visibility timeouts that follow from them."""

from __future__ import annotations

import pytest

from batchlab.core import visibility_timeouts
from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Bundle, Completion, JobId, JobState, StageCounts, StageName, TaskSet
from batchlab.core.ports import JobRecord, StageRecord
from batchlab.core.protocol.messages import TaskMessage, read_task_message, task_message
from batchlab.manager.state import LiveJob

MAP, SUM = StageName("map"), StageName("sum")
NONE = TaskSet.span(0, 0)


def _live(succeeded: int = 0, run_s: float = 0.0) -> LiveJob:
    job = JobDef(JobId("j"), "j", (StageDef(MAP), StageDef(SUM, (MAP,))), 0.0)
    stages = {s.name: StageRecord(StageCounts(s.name)) for s in job.stages}
    stages[MAP] = StageRecord(StageCounts(MAP, 100, succeeded, run_s=run_s))
    return LiveJob(JobRecord(job, JobState.RUNNABLE), stages)


def _finish(live: LiveJob, n: int, run_s: float, now_s: float, *, failed: bool = False) -> None:
    tasks = TaskSet.span(n, n + 1)
    bundle = Bundle(live.id, MAP, tasks)
    live.add_outstanding([(bundle, 0.0)])
    good, bad = (NONE, tasks) if failed else (tasks, NONE)
    live.record_pace(Completion(bundle, "w", 0.0, now_s, good, bad, NONE, run_s), now_s)
    live.remove_outstanding(bundle)


def test_four_outcomes_are_too_few() -> None:
    live = _live()
    for n in range(4):
        _finish(live, n, 3.0, 10.0)
    assert live.expected_s(MAP) == {}
    _finish(live, 4, 3.0, 10.0)
    assert live.expected_s(MAP) == {MAP: 3.0}


def test_a_worker_cannot_claim_more_time_than_the_manager_waited() -> None:
    live = _live()
    for n in range(5):
        _finish(live, n, 1e6, 10.0)
    assert live.expected_s(MAP) == {MAP: 10.0}


def test_failed_tasks_are_not_measured() -> None:
    live = _live()
    for n in range(9):
        _finish(live, n, 0.0, 10.0, failed=True)
    assert live.expected_s(MAP) == {}


def test_a_new_leader_begins_with_the_mean_in_the_ledger() -> None:
    few, enough = _live(4, 120.0), _live(5, 150.0)
    for live in (few, enough):
        live.learn_run_times()
    assert few.expected_s(MAP) == {}
    assert enough.expected_s(MAP) == {MAP: 30.0}
    assert enough.expected_s(SUM) == {}


def test_a_bundle_that_ran_under_an_earlier_leader_is_measured() -> None:
    """The new leader has waited for the bundle for 10 s only, and believes the mean of the earlier bundles."""
    live = _live(5, 150.0)
    live.learn_run_times()
    for n, run_s in enumerate((28.0, 1e6, 4.0)):
        _finish(live, n, run_s, 10.0)
    assert live.samples_s(MAP) == [30.0] * 5 + [28.0, 30.0, 4.0]
    assert list(live.run_times_s[MAP]) == [28.0, 30.0, 4.0], "the mean in the ledger is not a bundle"
    for n in range(3, 100):
        _finish(live, n, 4.0, 10.0)
    assert 30.0 in live.samples_s(MAP)[:2]
    assert len(live.samples_s(MAP)) == 100


def test_one_outlier_in_a_hundred_does_not_count() -> None:
    assert visibility_timeouts.expected_run_s([1.0] * 99 + [500.0]) == 1.0


@pytest.mark.parametrize(
    ("run_s", "held_s", "expected_s"),
    [(None, 20.0, 60.0), (300.0, 20.0, 340.0), (1e6, 20.0, 480.0), (5.0, 100.0, 60.0), (1e6, 43_000.0, 200.0)],
)
def test_an_extension_covers_the_rest_of_the_run(run_s: float | None, held_s: float, expected_s: float) -> None:
    assert visibility_timeouts.extension_s(run_s, held_s, 60.0) == pytest.approx(expected_s)


@pytest.mark.parametrize(
    ("run_s", "visibility_s", "count"),
    [
        (10.0, 60.0, 0),
        (20.0, 60.0, 0),
        (25.0, 60.0, 1),
        (300.0, 60.0, 1),
        (600.0, 60.0, 2),
        (3_600.0, 60.0, 9),
        (6.0, 6.0, 1),
        (0.0, 60.0, 0),
    ],
)
def test_the_extensions_of_an_expected_run_are_counted(run_s: float, visibility_s: float, count: int) -> None:
    assert visibility_timeouts.extensions(run_s, visibility_s) == count


def test_a_run_above_the_maximum_of_sqs_has_proportional_extensions() -> None:
    day, two = (visibility_timeouts.extensions(days * 86_400.0, 60.0) for days in (1, 2))
    assert two == pytest.approx(2 * day)
    assert day > 200


def test_messages_of_short_bundles_return_earlier() -> None:
    assert visibility_timeouts.receive_s(10.0, 60.0) == 30.0
    assert visibility_timeouts.receive_s(11.0, 60.0) == 60.0
    assert visibility_timeouts.receive_s(None, 60.0) == 60.0
    assert visibility_timeouts.receive_s(1.0, 6.0) == 6.0


def test_a_message_has_the_run_time_of_its_bundle() -> None:
    message = TaskMessage(Bundle(JobId("j"), MAP, TaskSet.span(0, 4)), expected_s={MAP: 2.5, SUM: 9.0})
    assert read_task_message(task_message(message)) == message
    assert message.run_s == 10.0
    assert TaskMessage(message.bundle).run_s is None
