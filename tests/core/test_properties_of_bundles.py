"""The tasks of a stage in bundles. Each task is in exactly one bundle at a time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.job_definition import InputDef, JobDef, SplitBy, StageDef
from batchlab.core.model import Bundle, Failure, FailureKind, JobId, Outcome, Ran, StageName, TaskSet
from batchlab.core.protocol import json_format, object_keys, settlement
from batchlab.core.protocol.object_keys import CommitKey
from batchlab.core.retry_rule import RetryRule
from tests.support.properties import PROPERTY, SLOW

ONE, TWO = StageName("one"), StageName("two")
ATTEMPTS = 3
KEY = CommitKey("0f" * 16)
JOB = JobDef(
    JobId("j-0123456789"),
    "j",
    (
        StageDef(ONE, handler="m:f", retry=RetryRule(attempts=ATTEMPTS)),
        StageDef(TWO, after=(ONE,), handler="m:g", retry=RetryRule(attempts=ATTEMPTS)),
    ),
    0.0,
    InputDef(("raw/j/0",), SplitBy.ITEMS, 1),
)

MEANS = st.none() | st.floats(1e-7, 100.0)
FIXED = st.none() | st.integers(1, 10**30)


@PROPERTY
@given(st.integers(0, 10**7), st.integers(0, 10**4), MEANS, FIXED, st.integers(0, 200))
def test_wave_takes_at_most_the_available_tasks(
    left: int, slots: int, mean_s: float | None, fixed: int | None, room: int
) -> None:
    sizes = settlement.wave(left, slots, mean_s, fixed, room)
    assert len(sizes) <= room
    assert all(1 <= size <= settlement.CAP for size in sizes)
    assert sum(sizes) <= left
    assert sizes or not left or not room


@PROPERTY
@given(st.integers(0, 5000), st.integers(1, 16), MEANS, FIXED, st.lists(st.integers(1, 9)))
def test_the_cuts_of_a_stage_cover_each_task_once(
    planned: int, slots: int, mean_s: float | None, fixed: int | None, rooms: list[int]
) -> None:
    left, bundles = TaskSet.span(0, planned), []
    while left:
        room = rooms.pop() if rooms else 50
        for size in settlement.wave(len(left), slots, mean_s, fixed, room):
            tasks, left = left.split_at(size)
            bundles.append(Bundle(JOB.id, ONE, tasks))
    assert [task for bundle in bundles for task in bundle.tasks] == list(range(planned))
    assert len({bundle.id for bundle in bundles}) == len(bundles)


@dataclass
class Course:
    """The outcomes that hypothesis draws for the bundles of a stage."""

    data: st.DataObject
    outcomes: list[Outcome] = field(default_factory=list)

    def run(self, bundle: Bundle) -> list[Bundle]:
        """Draw an outcome of the bundle, and return its follow-ups."""
        draw = self.data.draw
        fate = draw(st.sampled_from(["runs", "runs", "runs", "loses its worker", "poisoned"]))
        if fate == "poisoned":
            outcome = settlement.poisoned(bundle, "it", execution="x", worker="w", now_s=1.0)
        elif fate == "loses its worker" and len(bundle.tasks) > 1:
            outcome = settlement.bisect(bundle, execution="x", worker="w", now_s=1.0)
        else:
            tasks = list(bundle.tasks)
            done = draw(st.integers(1, len(tasks)))
            ran = [
                Ran(task, 0.1, task)
                if draw(st.booleans())
                else Ran(task, 0.1, failure=Failure(task, FailureKind.EXCEPTION, "no"))
                for task in tasks[:done]
            ]
            outcome = settlement.settle(JOB, bundle, ran, execution="x", worker="w", started_s=0.0, ended_s=1.0)
        self.outcomes.append(outcome)
        return [follow.bundle for follow in outcome.follows]


@SLOW
@given(st.integers(1, 12), st.integers(1, 5), st.data())
def test_each_task_ends_once_on_any_path(planned: int, size: int, data: st.DataObject) -> None:
    """Invariants I1 and I2 hold for two stages with splits, retries, lost workers, and poison tasks."""
    waiting = [
        Bundle(JOB.id, ONE, TaskSet.span(start, min(start + size, planned))) for start in range(0, planned, size)
    ]
    course = Course(data)
    while waiting:
        waiting += course.run(waiting.pop(data.draw(st.integers(0, len(waiting) - 1))))

    ends: dict[StageName, Counter[int]] = {ONE: Counter(), TWO: Counter()}
    good: dict[StageName, set[int]] = {ONE: set(), TWO: set()}
    for outcome in course.outcomes:
        ended = ends[outcome.bundle.stage]
        ended.update(outcome.succeeded)
        ended.update(failure.task for failure in outcome.failed if failure.final)
        good[outcome.bundle.stage] |= set(outcome.succeeded)
        assert outcome.bundle.attempt <= ATTEMPTS
    assert ends[ONE] == Counter(range(planned))
    assert ends[TWO] == Counter(good[ONE])

    keys = [object_keys.outcome(outcome.bundle, KEY) for outcome in course.outcomes]
    assert len(set(keys)) == len(keys), "two bundles would commit under one key"
    for outcome in course.outcomes:
        again = json_format.outcome_from_json(
            json_format.loads(json_format.to_bytes(json_format.outcome_to_json(outcome)))
        )
        assert again == outcome
