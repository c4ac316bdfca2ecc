"""Random worlds with a schedule, in which each due time runs once, and a test that the check can fail."""

from __future__ import annotations

from dataclasses import replace

import pytest

from batchlab.core import schedules
from batchlab.core.schedules import Schedule, ScheduledRun
from batchlab.sim import trial
from batchlab.sim.actors import Violated
from batchlab.sim.faults import Weather

WHOLE = 14
"""A seed whose schedule is due each minute and runs all missed times."""


@pytest.mark.parametrize("seed", [1, 9, 31])
def test_schedule_keeps_its_promise_under_any_faults(seed: int) -> None:
    trial.run(seed, trial.TIMED, sql=False)


def test_a_world_with_a_schedule_is_a_function_of_its_seed() -> None:
    digests = {trial.run(1, trial.TIMED, logged=True, sql=False).digest for _ in range(2)}
    assert len(digests) == 1
    assert digests != {trial.run(1, trial.ALL, logged=True, sql=False).digest}


def test_a_due_time_that_is_lost_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    decide, seen = schedules.decide_due_times, 0

    def losing(schedule: Schedule, now_s: float) -> Schedule:
        nonlocal seen
        after = decide(schedule, now_s)
        seen += after is not schedule
        lost = after is not schedule and seen == 2
        return replace(schedule, through_s=after.through_s) if lost else after

    monkeypatch.setattr(schedules, "decide_due_times", losing)
    with pytest.raises(Violated, match="nothing has run at"):
        trial.run(WHOLE, Weather(timed=True), sql=False)


def test_a_run_at_no_due_time_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    started = schedules.start

    def astray(schedule: Schedule, run: ScheduledRun, now_s: float) -> Schedule:
        wrong = replace(run, token=f"{run.token[:-2]}7Z")
        runs = tuple(wrong if one.token == run.token else one for one in schedule.runs)
        return started(replace(schedule, runs=runs), wrong, now_s)

    monkeypatch.setattr(schedules, "start", astray)
    with pytest.raises(Violated, match="was due at"):
        trial.run(WHOLE, Weather(timed=True), sql=False)
