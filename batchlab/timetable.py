"""What the API shows of schedules, as typed dicts that the manager fills and its clients read.

Invariant: pure and cheap to import, as views.py is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import TypedDict  # pydantic refuses the standard one before Python 3.12

from batchlab.schedule import times

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchlab.schedule.model import Run, Schedule


class RunView(TypedDict):
    """A due time and what came of it; `due` is it in the schedule's zone. `state` is waiting,
    running, ended or skipped, `result` how its job ended. `tasks` is None where nobody saw it."""

    due_s: float
    due: str
    by_hand: bool
    state: str
    result: str
    reason: str
    job: str | None
    started_s: float | None
    ended_s: float | None
    peak: dict[str, int]
    tasks: int | None


class ScheduleView(TypedDict):
    """A schedule with its runs, newest first. `state` is active, paused or done: nothing is due any
    more. Either `cron` or `at_s` is set. `next` is the next due time in its zone."""

    name: str
    job: str
    state: str
    cron: str
    timezone: str
    at_s: float | None
    next_s: float | None
    next: str
    missed: str
    missed_within_s: float | None
    overlap: str
    prewarm_s: float
    capacity: int | None
    due_param: str
    source: str
    source_digest: str
    input: list[str]
    added_s: float
    runs: list[RunView]


class SchedulesView(TypedDict):
    """`notes` say what was missed when this manager began to lead, and what became of it."""

    schedules: list[ScheduleView]
    notes: list[str]


class DueView(TypedDict):
    """A due time: epoch seconds, in the schedule's zone, in UTC."""

    at_s: float
    local: str
    utc: str


class ComingView(TypedDict):
    times: list[DueView]


def schedule_view(schedule: Schedule, *, runs: int, input: Sequence[str] = ()) -> ScheduleView:  # noqa: A002 - the view's own word
    """A schedule with the last `runs` of its runs; `input` are the prefixes listed at each run."""
    definition = schedule.definition
    when, next_s = definition.when, schedule.next_s()
    state = "paused" if schedule.paused else "done" if next_s is None else "active"
    return {
        "name": definition.name,
        "job": definition.job,
        "state": state,
        "cron": when.cron,
        "timezone": when.zone,
        "at_s": when.at_s,
        "next_s": next_s,
        "next": "" if next_s is None else times.iso(next_s, when.tz),
        "missed": definition.missed.value,
        "missed_within_s": definition.missed_within_s,
        "overlap": definition.overlap.value,
        "prewarm_s": definition.prewarm_s,
        "capacity": definition.capacity,
        "due_param": definition.due_param,
        "source": definition.source,
        "source_digest": definition.source_digest,
        "input": list(input),
        "added_s": schedule.added_s,
        "runs": [run_view(schedule, run) for run in reversed(schedule.runs[-runs:])],
    }


def run_view(schedule: Schedule, run: Run) -> RunView:
    return {
        "due_s": run.due_s,
        "due": times.iso(run.due_s, schedule.definition.when.tz),
        "by_hand": bool(run.asked),
        "state": run.state.value,
        "result": run.result,
        "reason": run.reason,
        "job": run.job,
        "started_s": run.started_s,
        "ended_s": run.ended_s,
        "peak": dict(run.peak),
        "tasks": run.tasks,
    }


def coming(schedule: Schedule, now_s: float, count: int) -> list[DueView]:
    """The next due times, were it not paused."""
    when = schedule.definition.when
    found: list[DueView] = []
    due_s = when.next_after(max(now_s, schedule.through_s))
    while due_s is not None and len(found) < count:
        found.append({"at_s": due_s, "local": times.iso(due_s, when.tz), "utc": times.iso(due_s)})
        due_s = when.next_after(due_s)
    return found
