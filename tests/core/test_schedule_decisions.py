"""Decisions about due times as pure functions, and stored schedules."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from batchlab.core import schedules
from batchlab.core.errors import BackendError, Refused
from batchlab.core.schedules import MAX_RUNS, Definition, Missed, Overlap, RunState, Schedule, ScheduledRun, When
from batchlab.manager.autoscaler import affordable

BEGIN_S = datetime(2026, 3, 2, 9, 30, tzinfo=UTC).timestamp()
MINUTE, HOUR = 60.0, 3600.0


def schedule(cron: str = "0 * * * *", **changes: object) -> Schedule:
    made = replace(Definition("nightly", "nightly", When(cron), "grid/templates/t.json"), **changes)  # type: ignore[arg-type]
    return Schedule(made, 1, BEGIN_S, BEGIN_S)


def states(made: Schedule) -> list[str]:
    return [f"{datetime.fromtimestamp(r.due_s, UTC):%H:%M} {r.state.value}" for r in made.runs]


def ended(made: Schedule) -> Schedule:
    """Return the schedule with each waiting or running run marked as done."""
    for run in made.unfinished:
        made = made.with_run(replace(run, state=RunState.ENDED, result="SUCCEEDED"))
    return made


def test_nothing_due_changes_nothing() -> None:
    made = schedule()
    assert schedules.decide_due_times(made, BEGIN_S + 29 * MINUTE) is made
    after = schedules.decide_due_times(made, BEGIN_S + 30 * MINUTE)
    assert states(after) == ["10:00 waiting"]
    assert schedules.decide_due_times(after, BEGIN_S + 31 * MINUTE) is after


def test_late_by_a_minute_is_on_time_and_by_more_is_missed() -> None:
    made = schedule(missed=Missed.SKIP)
    assert states(schedules.decide_due_times(made, BEGIN_S + 31 * MINUTE)) == ["10:00 waiting"]
    assert states(schedules.decide_due_times(made, BEGIN_S + 31 * MINUTE + 1)) == ["10:00 skipped"]


def test_at_most_100_missed_runs_start_and_the_rest_is_reported() -> None:
    made = schedule("* * * * *", missed=Missed.RUN_ALL)
    after = schedules.decide_due_times(made, BEGIN_S + 100 * HOUR + 30)
    waiting = [run for run in after.runs if run.state is RunState.WAITING]
    assert len(waiting) == schedules.MAX_MISSED
    assert waiting[-1].due_s == BEGIN_S + 100 * HOUR
    assert waiting[0].reason.startswith("more than 99 due times were missed")


def test_run_once_uses_the_latest_run_that_is_on_time() -> None:
    after = schedules.decide_due_times(schedule(), BEGIN_S + 3 * HOUR + 30 * MINUTE + 5)
    assert states(after) == ["13:00 waiting"]
    assert "3 due times were missed" in after.runs[0].reason


def test_number_of_waiting_runs_is_bounded() -> None:
    made = schedule("* * * * *", overlap=Overlap.QUEUE)
    for minute in range(schedules.MAX_WAITING + 3):
        made = schedules.decide_due_times(made, BEGIN_S + (minute + 1) * MINUTE)
    states_ = [run.state for run in made.runs]
    assert states_.count(RunState.WAITING) == schedules.MAX_WAITING
    assert made.runs[-1].reason == "100 runs already wait for the previous run"


def test_a_schedule_remembers_so_many_runs_and_all_that_have_not_ended() -> None:
    made = schedule("* * * * *", overlap=Overlap.QUEUE)
    made = schedules.decide_due_times(made, BEGIN_S + MINUTE)
    first = made.runs[0]
    for minute in range(1, MAX_RUNS + 10):
        made = schedules.decide_due_times(made, BEGIN_S + (minute + 1) * MINUTE)
        made = made.with_run(replace(made.runs[-1], state=RunState.ENDED))
    assert len(made.runs) == MAX_RUNS + 1
    assert made.runs[0] == first


def test_a_clock_set_back_brings_back_what_was_skipped_and_not_what_has_run() -> None:
    made = schedule(missed=Missed.SKIP)
    made = schedules.decide_due_times(made, BEGIN_S + 30 * MINUTE)
    run = schedules.startable(made)
    assert run
    made = ended(schedules.start(made, run, BEGIN_S + 30 * MINUTE))
    made = schedules.decide_due_times(made, BEGIN_S + 90 * MINUTE + 61)  # 11:00 is skipped because a clock is ahead
    assert states(made) == ["10:00 ended", "11:00 skipped"]
    back = schedules.decide_due_times(made, BEGIN_S + 20 * MINUTE)
    assert back.through_s == BEGIN_S + 20 * MINUTE
    again = schedules.decide_due_times(schedules.decide_due_times(back, BEGIN_S + 30 * MINUTE), BEGIN_S + 90 * MINUTE)
    assert states(again) == ["10:00 ended", "11:00 waiting"]


def test_manual_run_follows_the_overlap_policy() -> None:
    made = schedules.decide_due_times(schedule(), BEGIN_S + 30 * MINUTE)
    with pytest.raises(Refused, match="has not ended"):
        schedules.by_hand(made, "mine", BEGIN_S + 31 * MINUTE)
    queued = replace(made, definition=replace(made.definition, overlap=Overlap.QUEUE))
    assert len(schedules.by_hand(queued, "mine", BEGIN_S + 31 * MINUTE).unfinished) == 2
    replacing = replace(made, definition=replace(made.definition, overlap=Overlap.REPLACE))
    after = schedules.by_hand(replacing, "mine", BEGIN_S + 31 * MINUTE)
    assert [run.state for run in after.runs] == [RunState.SKIPPED, RunState.WAITING]


def test_paused_schedule_starts_only_manual_runs() -> None:
    made = replace(schedule(), paused=True)
    assert schedules.decide_due_times(made, BEGIN_S + 10 * HOUR) is made
    run = schedules.startable(schedules.by_hand(made, "mine", BEGIN_S))
    assert run
    assert run.asked == "mine"


def test_stored_schedule_round_trips() -> None:
    made = schedules.decide_due_times(schedule(overlap=Overlap.QUEUE, missed_within_s=5.0), BEGIN_S + HOUR)
    run = replace(made.runs[0], state=RunState.ENDED, result="FAILED", peak=(("default", 3),), tasks=7)
    made = made.with_run(run).with_run(ScheduledRun(1.0, "t", RunState.WAITING, 2.0, asked="mine"))
    assert schedules.from_bytes(schedules.to_bytes(made)) == made
    assert json.loads(schedules.to_bytes(made))["v"] == 1
    # An earlier release reads only version 1. It would drop the dependencies of the schedule or of a run.
    for dependent in (
        replace(made, definition=replace(made.definition, after=("other",))),
        made.with_run(replace(made.runs[0], after=("other-1:ended",))),
    ):
        assert json.loads(schedules.to_bytes(dependent))["v"] == 2
        assert schedules.from_bytes(schedules.to_bytes(dependent)) == dependent
    with pytest.raises(BackendError):
        schedules.from_bytes(b'{"v": 99}')


def test_an_object_written_when_the_digest_was_called_otherwise_is_read() -> None:
    made = schedule(source="job.yaml", source_digest="d")
    doc = json.loads(schedules.to_bytes(made))
    doc["definition"]["fingerprint"] = doc["definition"].pop("source_digest")
    assert schedules.from_bytes(json.dumps(doc).encode()) == made


@pytest.mark.parametrize(
    ("count", "there", "left", "launch", "hold", "paid"),
    [
        (6, 0, 1.0, 0.1, 0.05, 6),
        (6, 0, 0.35, 0.1, 0.05, 3),
        (6, 4, 0.35, 0.1, 0.05, 5),
        (6, 4, 0.1, 0.1, 0.05, 2),
        (6, 4, -1.0, 0.1, 0.05, 0),
        (6, 2, 0.0, 0.0, 0.0, 6),
        (2, 6, 0.1, 0.1, 0.05, 2),
    ],
)
def test_a_warm_fleet_is_as_large_as_the_cap_pays_for(
    count: int, there: int, left: float, launch: float, hold: float, paid: int
) -> None:
    assert affordable(count, there, left, launch, hold) == paid
