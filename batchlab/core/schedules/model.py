"""Schedules and their runs as frozen, pure values, and their format in the bucket.

Invariant: a run is identified by its schedule and its due time. So every manager that decides a due
time creates the same run, and the job with the same token.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any
from zoneinfo import ZoneInfo

from batchlab.core.errors import Malformed
from batchlab.core.job_definition import JobDef
from batchlab.core.model import JobId, Json
from batchlab.core.protocol import json_format, object_keys
from batchlab.core.protocol.field_checks import UNREADABLE, figure, fitted, flag, listed, whole
from batchlab.core.schedules import due_times

KEPT = 50
"""Number of runs in a schedule, in addition to the runs that have not ended."""


class Missed(StrEnum):
    """Policies for due times that were missed because no manager was running."""

    RUN_ONCE = "run-once"
    RUN_ALL = "run-all"
    SKIP = "skip"


class Overlap(StrEnum):
    """Policies for a due time while the previous run has not ended."""

    SKIP = "skip"
    QUEUE = "queue"
    REPLACE = "replace"


class RunState(StrEnum):
    """States of a run. A WAITING run is decided but does not have a job yet. A RUNNING one has or
    gets a job."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"
    SKIPPED = "skipped"

    @property
    def over(self) -> bool:
        return self in (RunState.ENDED, RunState.SKIPPED)


@dataclass(frozen=True, slots=True)
class When:
    """Time of a schedule: either `cron` in `zone`, or once at `at_s` (epoch seconds)."""

    cron: str = ""
    zone: str = "UTC"
    at_s: float | None = None

    @property
    def tz(self) -> ZoneInfo:
        return due_times.zone_of(self.zone)

    def next_after(self, after_s: float) -> float | None:
        """Return the first due time after `after_s`, or None."""
        if self.at_s is not None:
            return self.at_s if self.at_s > after_s else None
        return due_times.next_after(self.cron, self.tz, after_s)

    def latest(self, after_s: float, until_s: float, most: int) -> tuple[list[float], bool]:
        """Return the last due times in (after_s, until_s], at most `most`, and whether there are
        more."""
        if self.at_s is not None:
            return ([self.at_s] if after_s < self.at_s <= until_s else []), False
        return due_times.latest(self.cron, self.tz, after_s, until_s, most)


@dataclass(frozen=True, slots=True)
class Definition:
    """Definition of a schedule, as its user wrote it. Durations are in seconds.

    `template` is the key of the job's definition, and `job` its name. A run that was missed by more
    than `missed_within_s` is not made up for. None sets no limit. `capacity` is the number of
    instances to have `prewarm_s` before a due time. With None, it follows from the last runs. The
    job's parameter `due_param`, if any, gets the due time. `source` is the job file, and
    `source_digest` is the digest of its content when the schedule was added.
    """

    name: str
    job: str
    when: When
    template: str
    missed: Missed = Missed.RUN_ONCE
    missed_within_s: float | None = None
    overlap: Overlap = Overlap.SKIP
    prewarm_s: float = 0.0
    capacity: int | None = None
    due_param: str = ""
    source: str = ""
    source_digest: str = ""


@dataclass(frozen=True, slots=True)
class Run:
    """One due time and its result. Times are epoch seconds.

    `token` is the client token of its job. `asked` is the token of the request if a user requested
    the run. `result` is the final state of its job. `peak` is the maximum number of instances of
    each pool that worked for the job at once. `tasks` is the number of tasks in its first stages.
    """

    due_s: float
    token: str
    state: RunState
    decided_s: float
    job: JobId | None = None
    reason: str = ""
    started_s: float | None = None
    ended_s: float | None = None
    result: str = ""
    asked: str = ""
    peak: tuple[tuple[str, int], ...] = ()
    tasks: int | None = None


@dataclass(frozen=True, slots=True)
class Schedule:
    """State of a schedule.

    Each due time up to `through_s` is decided. `generation` distinguishes the schedule from a
    removed one with the same name. `runs` are in the order of their decisions. `number` counts the
    earlier changes. So all contents of the object differ, and a conditional write that is late
    fails because of its ETag.
    """

    definition: Definition
    generation: int
    added_s: float
    through_s: float
    paused: bool = False
    removed: bool = False
    runs: tuple[Run, ...] = ()
    number: int = field(default=0, compare=False)

    @property
    def name(self) -> str:
        return self.definition.name

    @property
    def unfinished(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if not run.state.over)

    @property
    def running(self) -> Run | None:
        return next((run for run in self.runs if run.state is RunState.RUNNING), None)

    def next_s(self) -> float | None:
        """Return the next due time to decide. None if there is none, or if it is paused or
        removed."""
        if self.paused or self.removed:
            return None
        return self.definition.when.next_after(self.through_s)

    def with_run(self, run: Run) -> Schedule:
        """Return the schedule with this run. It replaces the run with the same token or is the last
        one."""
        runs = list(self.runs)
        for i, one in enumerate(runs):
            if one.token == run.token:
                runs[i] = run
                break
        else:
            runs.append(run)
        over = [one for one in runs if one.state.over]
        dropped = {one.token for one in over[: max(0, len(over) - KEPT)]}
        return replace(self, runs=tuple(one for one in runs if one.token not in dropped))


def token_of(schedule: Schedule, due_s: float) -> str:
    """Return the client token of the run at that due time."""
    return f"schedule/{schedule.name}/{schedule.generation}/{due_times.iso(due_s)}"


def token_by_hand(schedule: Schedule, asked: str) -> str:
    """Return the client token of the run that a user requested."""
    return f"schedule/{schedule.name}/{schedule.generation}/by-hand/{asked}"


def job_of(schedule: Schedule, run: Run, template: JobDef, now_s: float) -> JobDef:
    """Return the job of a run.

    Except for `submitted_s`, it depends only on the template, the run's name, and its due time.
    """
    definition = schedule.definition
    due = due_times.iso(run.due_s, definition.when.tz)
    params = template.params
    if definition.due_param:
        params = tuple((k, due if k == definition.due_param else v) for k, v in params)
    own = {"schedule": definition.name, "due": due}
    return replace(
        template,
        id=object_keys.job_id(template.name, run.token),
        token=run.token,
        params=params,
        tags=tuple((own | dict(template.tags)).items()),
        submitted_s=now_s,
        start_at_s=None,
    )


# --- Stored format --------------------------------------------------------------------------------

_RENAMED = {"fingerprint": "source_digest"}
"""Names of fields in objects of earlier releases, with their current names."""


def to_bytes(schedule: Schedule) -> bytes:
    """Return the content of a schedule's object."""
    return json_format.to_bytes({"v": json_format.VERSION, **_schedule_to_json(schedule)})


def from_bytes(data: bytes) -> Schedule:
    """Return the schedule in an object.

    Raise TooNew if a later batchlab wrote it, and Malformed if it cannot be read.
    """
    doc = json_format.loads(data)
    try:
        schedule = Schedule(
            _definition_from_json(doc["definition"]),
            whole(doc["generation"]),
            figure(doc["added_s"]),
            figure(doc["through_s"]),
            flag(doc["paused"]),
            flag(doc["removed"]),
            tuple([_run_from_json(one) for one in listed(doc["runs"])]),
            whole(doc.get("number", 0)),
        )
    except UNREADABLE as error:
        raise Malformed(f"A schedule cannot be read: {json_format.brief(error)}.") from error
    return schedule


def _definition_from_json(doc: dict[str, Any]) -> Definition:
    return fitted(
        Definition(
            **{
                **{_RENAMED.get(name, name): value for name, value in doc.items()},
                "when": fitted(When(**doc["when"])),
                "missed": Missed(doc["missed"]),
                "overlap": Overlap(doc["overlap"]),
            }
        )
    )


def _schedule_to_json(schedule: Schedule) -> dict[str, Json]:
    definition, when = schedule.definition, schedule.definition.when
    return {
        "definition": {
            **json_format.fields(definition),
            "when": json_format.fields(when),
        },
        "generation": schedule.generation,
        "added_s": schedule.added_s,
        "through_s": schedule.through_s,
        "paused": schedule.paused,
        "removed": schedule.removed,
        "runs": [
            {name: value for name, value in json_format.fields(one).items() if value is not None}
            for one in schedule.runs
        ],
        "number": schedule.number,
    }


def _run_from_json(doc: dict[str, Any]) -> Run:
    peak = tuple((pool, count) for pool, count in doc.get("peak", ()))
    return fitted(Run(**{**doc, "state": RunState(doc["state"]), "peak": peak}))
