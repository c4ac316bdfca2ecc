"""A schedule and its runs: frozen, pure, and as they are written in the bucket.

Invariant: a run is named by its schedule and its due time, so whoever decides on that due time
names the same run, and the job of the same token.
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
"""Runs of which a schedule remembers what came of them, beside those that have not ended."""


class Missed(StrEnum):
    """What becomes of due times at which no manager was there to see them."""

    RUN_ONCE = "run-once"
    RUN_ALL = "run-all"
    SKIP = "skip"


class Overlap(StrEnum):
    """What becomes of a due time while the run before has not ended."""

    SKIP = "skip"
    QUEUE = "queue"
    REPLACE = "replace"


class RunState(StrEnum):
    """WAITING runs have been decided on, and have no job yet; RUNNING ones have one, or get it."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"
    SKIPPED = "skipped"

    @property
    def over(self) -> bool:
        return self in (RunState.ENDED, RunState.SKIPPED)


@dataclass(frozen=True, slots=True)
class When:
    """Either `cron` in `zone`, or once at `at_s` (epoch seconds)."""

    cron: str = ""
    zone: str = "UTC"
    at_s: float | None = None

    @property
    def tz(self) -> ZoneInfo:
        return due_times.zone_of(self.zone)

    def next_after(self, after_s: float) -> float | None:
        """The first due time after `after_s`, None where there is none."""
        if self.at_s is not None:
            return self.at_s if self.at_s > after_s else None
        return due_times.next_after(self.cron, self.tz, after_s)

    def latest(self, after_s: float, until_s: float, most: int) -> tuple[list[float], bool]:
        """The last due times in (after_s, until_s], at most so many; whether there were more."""
        if self.at_s is not None:
            return ([self.at_s] if after_s < self.at_s <= until_s else []), False
        return due_times.latest(self.cron, self.tz, after_s, until_s, most)


@dataclass(frozen=True, slots=True)
class Definition:
    """What a user asks for. Spans are seconds.

    `template` is the key of the job's definition, whose name is `job`. A run that was missed by
    more than `missed_within_s` is not made up for; None sets no limit. `capacity` is how many
    instances are had `prewarm_s` before a due time; None asks the last runs. The job's parameter
    `due_param`, where it is named, gets the due time. `source` is the job file, and `source_digest`
    that of what it was when it was added.
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
    """One due time, and what came of it. Epoch seconds.

    `token` is the client token of its job. `asked` is the token of the request, where a person has
    asked for it. `result` is how its job ended, `peak` how many instances of each pool worked for
    it at once, `tasks` how many its first stages had.
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
    """A schedule as it stands. Each due time up to `through_s` has been decided on. `generation`
    tells it from one of the same name that was removed before it; `runs` are in the order in which
    they were decided on. `number` counts the changes before it: no two contents of its object are
    equal, so a late write over an earlier one is refused by its ETag."""

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
        """The next due time to be decided on; None where there is none, or it is not to be."""
        if self.paused or self.removed:
            return None
        return self.definition.when.next_after(self.through_s)

    def with_run(self, run: Run) -> Schedule:
        """With this run in the place of the one of the same token, or as the last one."""
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
    """The client token of the run that is due then."""
    return f"schedule/{schedule.name}/{schedule.generation}/{due_times.iso(due_s)}"


def token_by_hand(schedule: Schedule, asked: str) -> str:
    """The client token of the run that a person's request asks for."""
    return f"schedule/{schedule.name}/{schedule.generation}/by-hand/{asked}"


def job_of(schedule: Schedule, run: Run, template: JobDef, now_s: float) -> JobDef:
    """The job of a run. It depends on nothing but the template, the run's name and its due time,
    `submitted_s` apart."""
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


# --- As objects ----------------------------------------------------------------------------------

_RENAMED = {"fingerprint": "source_digest"}
"""What fields were called in objects that were written before."""


def to_bytes(schedule: Schedule) -> bytes:
    """The content of a schedule's object."""
    return json_format.to_bytes({"v": json_format.VERSION, **_schedule_to_json(schedule)})


def from_bytes(data: bytes) -> Schedule:
    """Return the schedule in an object; TooNew if a later batchlab has written it, Malformed if it
    cannot be read."""
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
