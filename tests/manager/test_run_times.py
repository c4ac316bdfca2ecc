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


def _live() -> LiveJob:
    job = JobDef(JobId("j"), "j", (StageDef(MAP), StageDef(SUM, (MAP,))), 0.0)
    return LiveJob(JobRecord(job, JobState.RUNNABLE), {s.name: StageRecord(StageCounts(s.name)) for s in job.stages})


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


def test_one_outlier_in_a_hundred_does_not_count() -> None:
    assert visibility_timeouts.expected_run_s([1.0] * 99 + [500.0]) == 1.0


@pytest.mark.parametrize(
    ("run_s", "held_s", "expected_s"),
    [(None, 20.0, 60.0), (300.0, 20.0, 340.0), (1e6, 20.0, 480.0), (5.0, 100.0, 60.0), (1e6, 43_000.0, 200.0)],
)
def test_an_extension_covers_the_rest_of_the_run(run_s: float | None, held_s: float, expected_s: float) -> None:
    assert visibility_timeouts.extension_s(run_s, held_s, 60.0) == pytest.approx(expected_s)


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
