"""Decisions about due times, as pure functions of a schedule and the time.

Invariant: each due time is decided once, in order, and the decision has a reason. If a clock is set
back, due times without a run come again. A due time never runs twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from batchlab.core.errors import Refused
from batchlab.core.protocol import object_keys
from batchlab.core.schedules import due_times
from batchlab.core.schedules.model import (
    Missed,
    Overlap,
    Run,
    RunState,
    Schedule,
    token_by_hand,
    token_of,
)

ON_TIME_S = 60.0
"""A due time that the manager sees later than this is missed."""
MOST_MISSED = 100
"""Maximum number of missed due times that are made up for. The latest ones are taken."""
MOST_WAITING = 100
"""Maximum number of runs that wait for the one before them. Further due times are skipped."""
SET_BACK_S = 60.0
"""If the clock is behind the last decided due time by more than this, it was set back."""


@dataclass(frozen=True, slots=True)
class _Fire:
    """A due time that will run. `late` ones are made up for, one after the other."""

    due_s: float
    why: str = ""
    late: bool = False


def lapse(schedule: Schedule, now_s: float) -> Schedule:
    """Decide all due times up to now. Return the schedule itself if there are none."""
    if schedule.paused or schedule.removed:
        return schedule
    schedule = _rewound(schedule, now_s)
    next_s = schedule.next_s()
    if next_s is None or next_s > now_s:
        return schedule
    found, more = schedule.definition.when.latest(schedule.through_s, now_s, MOST_MISSED)
    run_already = {run.due_s for run in schedule.runs if run.job and not run.asked}
    due = [one for one in found if one not in run_already]
    schedule = replace(schedule, through_s=found[-1])
    if not due:
        return schedule
    fires, skipped = _chosen(schedule, due, more, now_s)
    if skipped:
        schedule = schedule.with_run(skipped)
    for fire in fires:
        schedule = _overlapped(schedule, fire, now_s)
    return schedule


def _rewound(schedule: Schedule, now_s: float) -> Schedule:
    if schedule.through_s - now_s <= SET_BACK_S:
        return schedule
    at_s = schedule.definition.when.at_s
    if at_s is not None and any(run.due_s == at_s and run.job for run in schedule.runs):
        return schedule
    return replace(schedule, through_s=now_s)


def _chosen(
    schedule: Schedule, due: Sequence[float], more: bool, now_s: float
) -> tuple[list[_Fire], Run | None]:
    """Return the due times that will run, and a skipped run that stands for the others, if any."""
    definition = schedule.definition
    on_time = [_Fire(one) for one in due if now_s - one <= ON_TIME_S]
    missed = [one for one in due if now_s - one > ON_TIME_S]
    if not missed:
        return on_time, None
    within_s = definition.missed_within_s
    made_up = [one for one in missed if within_s is None or now_s - one <= within_s]
    told = f"{'more than ' if more else ''}{len(missed)} due time{'s' * (len(missed) > 1)}"
    were = f"{told} {'were' if len(missed) > 1 else 'was'} missed, since no manager was there"
    if definition.missed is Missed.SKIP:
        made_up, why = [], f"{were}; its policy is to skip what was missed"
    elif not made_up:
        why = f"{were}; all of it longer ago than it makes up for"
    elif definition.missed is Missed.RUN_ONCE:
        if on_time:
            # The latest due time of all is the one that runs once.
            return [replace(on_time[0], why=f"{were}; this one is on time"), *on_time[1:]], None
        return [_Fire(made_up[-1], f"{were}; it is the latest of them")], None
    else:
        why = f"{were}; {len(made_up)} of them are made up for, one after the other"
    if made_up:
        late = [_Fire(one, why, late=True) for one in made_up]
        return [*late, *(replace(one, late=True) for one in on_time)], None
    if on_time:
        return [replace(on_time[0], why=why), *on_time[1:]], None
    latest = missed[-1]
    token = token_of(schedule, latest)
    return [], Run(latest, token, RunState.SKIPPED, now_s, reason=why)


def _overlapped(schedule: Schedule, fire: _Fire, now_s: float) -> Schedule:
    """Return the schedule with the run added, either waiting or skipped because of an unfinished
    run."""
    run = Run(fire.due_s, token_of(schedule, fire.due_s), RunState.WAITING, now_s, reason=fire.why)
    unfinished, overlap = schedule.unfinished, schedule.definition.overlap
    waiting = [one for one in unfinished if one.state is RunState.WAITING]
    if not unfinished:
        return schedule.with_run(run)
    if overlap is Overlap.SKIP and not fire.late:
        before = named(schedule, unfinished[-1])
        return schedule.with_run(_skipped(run, now_s, f"{before} had not ended"))
    if overlap is Overlap.REPLACE:
        for one in waiting:
            why = f"{named(schedule, run)} took its place before it had begun"
            schedule = schedule.with_run(_skipped(one, now_s, why))
        return schedule.with_run(run)
    if len(waiting) >= MOST_WAITING:
        why = f"{len(waiting)} runs wait already for the one before them"
        return schedule.with_run(_skipped(run, now_s, why))
    return schedule.with_run(run)


def by_hand(schedule: Schedule, asked: str, now_s: float) -> Schedule:
    """Return the schedule with the run that a user requested. A repeated request changes nothing.

    Raise Refused if the previous run has not ended and the overlap policy is to skip.
    """
    if any(run.asked == asked for run in schedule.runs):
        return schedule
    unfinished, overlap = schedule.unfinished, schedule.definition.overlap
    waiting = [one for one in unfinished if one.state is RunState.WAITING]
    if unfinished and (overlap is Overlap.SKIP or len(waiting) >= MOST_WAITING):
        raise Refused(
            f"{named(schedule, unfinished[-1])} of schedule {schedule.name} has not ended.",
            remedy="Wait for its end, or cancel its job first.",
        )
    token = token_by_hand(schedule, asked)
    run = Run(now_s, token, RunState.WAITING, now_s, reason="asked for by hand", asked=asked)
    if overlap is Overlap.REPLACE:
        for one in waiting:
            why = "a run asked for by hand took its place before it had begun"
            schedule = schedule.with_run(_skipped(one, now_s, why))
    return schedule.with_run(run)


def startable(schedule: Schedule) -> Run | None:
    """Return the run that gets its job now, or None.

    A run starts only after the one before it has ended. In a paused schedule, only runs requested
    by a user start.
    """
    if schedule.removed or schedule.running:
        return None
    for run in schedule.runs:
        if run.state is RunState.WAITING and (run.asked or not schedule.paused):
            return run
    return None


def started(schedule: Schedule, run: Run, now_s: float) -> Schedule:
    """Return the schedule with the run marked as having its job.

    Once this is written, the job must be submitted.
    """
    job = object_keys.job_id(schedule.definition.job, run.token)
    return schedule.with_run(replace(run, state=RunState.RUNNING, job=job, started_s=now_s))


def skipped(schedule: Schedule, run: Run, now_s: float, why: str) -> Schedule:
    """Return the schedule with the run marked as skipped."""
    return schedule.with_run(_skipped(run, now_s, why))


def replaced(schedule: Schedule) -> Run | None:
    """Return the run whose job is to be canceled because another run waits, or None."""
    if schedule.removed or schedule.definition.overlap is not Overlap.REPLACE:
        return None
    waits = any(
        one.state is RunState.WAITING and (one.asked or not schedule.paused)
        for one in schedule.runs
    )
    return schedule.running if waits else None


def settled(schedule: Schedule, now_s: float) -> Schedule:
    """Return the schedule with all due times up to now decided and not run.

    So due times of a paused schedule do not run later.
    """
    schedule = _rewound(schedule, now_s)
    return replace(schedule, through_s=max(now_s, schedule.through_s))


def removed(schedule: Schedule, now_s: float) -> Schedule:
    """Return the schedule marked as removed, as the bucket stores it. Waiting runs are skipped."""
    for run in schedule.unfinished:
        if run.state is RunState.WAITING:
            schedule = skipped(schedule, run, now_s, "its schedule was removed")
    return replace(schedule, removed=True)


def named(schedule: Schedule, run: Run) -> str:
    """Return the name of a run for a sentence, such as `the run of 2026-03-29 03:00:00 CEST`."""
    if run.asked:
        return f"a run asked for by hand at {_at(schedule, run)}"
    return f"the run of {_at(schedule, run)}"


def _at(schedule: Schedule, run: Run) -> str:
    return due_times.shown(run.due_s, schedule.definition.when.tz)


def _skipped(run: Run, now_s: float, why: str) -> Run:
    told = f"{run.reason}; {why}" if run.reason else why
    return replace(run, state=RunState.SKIPPED, reason=told, ended_s=now_s)
