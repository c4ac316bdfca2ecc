"""Schedules and their runs as frozen values, the decision about each due time, and the stored format of schedules.

Invariants: a run is identified by its schedule and its due time. Every manager that decides a due time therefore
creates the same run, and a job with the same client token. The due times of a schedule are decided once, in order, and
each decision has a reason. If a clock is set back, due times without a run are decided again. A due time never runs
twice. All functions of the module are pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from zoneinfo import ZoneInfo

from batchlab.core import due_times
from batchlab.core.errors import Malformed, Refused
from batchlab.core.job_definition import Condition, Dependency, JobDef
from batchlab.core.model import JobId, JobState
from batchlab.core.protocol import json_format, object_keys
from batchlab.core.protocol.field_checks import UNREADABLE, decode, figure, whole

MAX_RUNS = 50
"""Maximum number of ended runs that a schedule stores."""


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
    """States of a run.

    A WAITING run is decided but does not have a job yet. A RUNNING run has a job, or its job is about to be submitted.
    """

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
        """Return the first due time after `after_s`, or None if the schedule has no later due time."""
        if self.at_s is not None:
            return self.at_s if self.at_s > after_s else None
        return due_times.next_after(self.cron, self.tz, after_s)

    def latest(self, after_s: float, until_s: float, most: int) -> tuple[list[float], bool]:
        """Return at most `most` of the last due times in (after_s, until_s], and whether earlier due times were
        omitted.
        """
        if self.at_s is not None:
            return ([self.at_s] if after_s < self.at_s <= until_s else []), False
        return due_times.latest(self.cron, self.tz, after_s, until_s, most)


@dataclass(frozen=True, slots=True)
class Definition:
    """Definition of a schedule, as its user wrote it. All durations of the definition are in seconds.

    `template` is the key of the job's definition, and `job` is the job's name. A run that was missed by more than
    `missed_within_s` seconds does not run late. If `missed_within_s` is None, the lateness of missed runs is not
    limited. `capacity` is the number of instances that must be running `prewarm_s` before a due time. If `capacity` is
    None, the number of instances is derived from the last runs. If `due_param` is set, the due time is passed to the
    job as the parameter with that name. `source` is the job file, and `source_digest` is the digest of the job file's
    content when the schedule was added.
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
    after: tuple[str, ...] = ()
    """Other schedules whose latest runs must have succeeded before a run begins, such as `nightly`, or must have ended,
    such as `nightly:ended`."""

    @property
    def dependencies(self) -> tuple[Dependency, ...]:
        """Return `after` with schedule names in place of job ids."""
        return tuple(map(Dependency.parse, self.after))


@dataclass(frozen=True, slots=True)
class ScheduledRun:
    """One due time of a schedule and the result of its job. All times are in epoch seconds.

    `token` is the client token of the run's job. `asked` is the token of the request if a user requested the run.
    `result` is the final state of the run's job. `peak` is the maximum number of instances of each pool that worked for
    the job at once. `tasks` is the number of tasks in the job's root stages. `after` has the dependencies of the run's
    job.
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
    after: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Schedule:
    """State of a schedule.

    Every due time up to `through_s` has been decided. `generation` distinguishes the schedule from a removed schedule
    with the same name. `runs` are in the order of their decisions. `number` is the number of earlier changes. Because
    of `number`, two versions of a schedule's object always have different ETags, so a late conditional write fails.
    """

    definition: Definition
    generation: int
    added_s: float
    through_s: float
    paused: bool = False
    removed: bool = False
    runs: tuple[ScheduledRun, ...] = ()
    number: int = field(default=0, compare=False)

    @property
    def name(self) -> str:
        return self.definition.name

    @property
    def unfinished(self) -> tuple[ScheduledRun, ...]:
        return tuple(run for run in self.runs if not run.state.over)

    @property
    def running(self) -> ScheduledRun | None:
        return next((run for run in self.runs if run.state is RunState.RUNNING), None)

    def next_s(self) -> float | None:
        """Return the next due time to decide, or None if the schedule is paused, removed, or done."""
        if self.paused or self.removed:
            return None
        return self.definition.when.next_after(self.through_s)

    def with_run(self, run: ScheduledRun) -> Schedule:
        """Return the schedule with `run`. The run `run` replaces the run with the same token, or is appended."""
        runs = list(self.runs)
        for i, earlier in enumerate(runs):
            if earlier.token == run.token:
                runs[i] = run
                break
        else:
            runs.append(run)
        over = [earlier for earlier in runs if earlier.state.over]
        dropped = {earlier.token for earlier in over[: max(0, len(over) - MAX_RUNS)]}
        return replace(self, runs=tuple(earlier for earlier in runs if earlier.token not in dropped))


def token_of(schedule: Schedule, due_s: float) -> str:
    """Return the client token of the schedule's run at `due_s`."""
    return f"schedule/{schedule.name}/{schedule.generation}/{due_times.iso(due_s)}"


def token_by_hand(schedule: Schedule, asked: str) -> str:
    """Return the client token of the run that a user requested with the token `asked`."""
    return f"schedule/{schedule.name}/{schedule.generation}/by-hand/{asked}"


def job_of(schedule: Schedule, run: ScheduledRun, template: JobDef, now_s: float) -> JobDef:
    """Return the job of a run.

    Except for `submitted_s`, the job depends only on the template, the run's name, and the run's due time.
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
        after=tuple(map(Dependency.parse, run.after)),
    )


def dependencies_of(
    schedule: Schedule, run: ScheduledRun, others: Mapping[str, Schedule]
) -> tuple[Dependency, ...] | None:
    """Return the dependencies of a run that may start now: the latest runs of the other schedules up to the due time of
    the run. Return None while another schedule has not decided or started its run of the same time. A run that already
    meets its condition is left out."""
    found: list[Dependency] = []
    for dependency in schedule.definition.dependencies:
        other = others.get(dependency.job)
        if other is None:
            continue
        earlier = [one for one in other.runs if one.due_s <= run.due_s and one.state is not RunState.SKIPPED]
        next_s = other.next_s()
        is_late = next_s is not None and next_s <= run.due_s
        if is_late or (not other.paused and any(one.state is RunState.WAITING for one in earlier)):
            return None
        last = next((one for one in reversed(earlier) if one.job), None)
        if last is None or last.job is None:
            continue
        is_enough = dependency.condition is Condition.ENDED or last.result == JobState.SUCCEEDED
        if last.state is not RunState.ENDED or not is_enough:
            found.append(replace(dependency, job=last.job))
    return tuple(found)


def waiting_for(name: str, others: Iterable[Schedule]) -> list[str]:
    """Return the names of the schedules that wait for the schedule `name`, without removed schedules."""
    return sorted(
        other.name
        for other in others
        if not other.removed and any(dependency.job == name for dependency in other.definition.dependencies)
    )


# --- Stored format --------------------------------------------------------------------------------

_RENAMED = {"fingerprint": "source_digest"}
"""Map of field names in the stored schedules of earlier releases to the current field names."""


DEPENDENT_VERSION = 2
"""Version of the objects of schedules with dependencies. A manager of an earlier release would start a run at once, and
would drop the dependencies when it writes the object. Because of the version, it ignores the schedule."""


def to_bytes(schedule: Schedule) -> bytes:
    """Return the content of a schedule's object."""
    definition = schedule.definition
    fields = json_format.fields
    runs = [{name: value for name, value in fields(run).items() if value is not None} for run in schedule.runs]
    own = {"definition": {**fields(definition), "when": fields(definition.when)}, "runs": runs}
    has_dependencies = bool(definition.after) or any(run.after for run in schedule.runs)
    version = DEPENDENT_VERSION if has_dependencies else json_format.VERSION
    return json_format.to_bytes({"v": version, **fields(schedule), **own})


def from_bytes(data: bytes) -> Schedule:
    """Return the schedule in an object.

    Raise TooNew if a later batchlab wrote the object, and Malformed if the object cannot be read.
    """
    doc = json_format.loads(data, known=DEPENDENT_VERSION)
    try:
        definition = {_RENAMED.get(name, name): value for name, value in doc["definition"].items()}
        schedule = decode(Schedule, {**doc, "definition": definition})
        for count in (schedule.generation, schedule.number):
            whole(count)
        for time_s in (schedule.added_s, schedule.through_s):
            figure(time_s)
    except UNREADABLE as error:
        raise Malformed(f"A schedule cannot be read: {json_format.brief(error)}.") from error
    return schedule


ON_TIME_S = 60.0
"""Maximum lateness in seconds of a due time that counts as on time. A due time that the manager decides more than
ON_TIME_S late counts as missed.
"""
MAX_MISSED = 100
"""Maximum number of missed due times that run late.

If more than MAX_MISSED due times were missed, only the latest MAX_MISSED due times run.
"""
MAX_WAITING = 100
"""Maximum number of a schedule's waiting runs. The schedule skips due times while it has MAX_WAITING waiting runs."""
SET_BACK_S = 60.0
"""A clock counts as set back if it is more than SET_BACK_S seconds behind the last decided due time."""


@dataclass(frozen=True, slots=True)
class _DueRun:
    """Due time at which the schedule will start a run.

    A due time with `late` was missed or follows a missed due time. The runs of late due times start one after the
    other.
    """

    due_s: float
    why: str = ""
    late: bool = False


def decide_due_times(schedule: Schedule, now_s: float) -> Schedule:
    """Decide all due times of a schedule up to now. Return `schedule` itself if no due time needs a decision."""
    if schedule.paused or schedule.removed:
        return schedule
    schedule = _rewound(schedule, now_s)
    next_s = schedule.next_s()
    if next_s is None or next_s > now_s:
        return schedule
    times, more = schedule.definition.when.latest(schedule.through_s, now_s, MAX_MISSED)
    run_already = {run.due_s for run in schedule.runs if run.job and not run.asked}
    due = [due_s for due_s in times if due_s not in run_already]
    schedule = replace(schedule, through_s=times[-1])
    if not due:
        return schedule
    fires, skipped = _choose(schedule, due, more, now_s)
    if skipped:
        schedule = schedule.with_run(skipped)
    for fire in fires:
        schedule = _apply_overlap(schedule, fire, now_s)
    return schedule


def _rewound(schedule: Schedule, now_s: float) -> Schedule:
    if schedule.through_s - now_s <= SET_BACK_S:
        return schedule
    at_s = schedule.definition.when.at_s
    if at_s is not None and any(run.due_s == at_s and run.job for run in schedule.runs):
        return schedule
    return replace(schedule, through_s=now_s)


def _choose(
    schedule: Schedule, due: Sequence[float], more: bool, now_s: float
) -> tuple[list[_DueRun], ScheduledRun | None]:
    """Return the due times that will run, and one skipped run that represents all omitted due times, or None."""
    definition = schedule.definition
    on_time = [_DueRun(due_s) for due_s in due if now_s - due_s <= ON_TIME_S]
    missed = [due_s for due_s in due if now_s - due_s > ON_TIME_S]
    if not missed:
        return on_time, None
    within_s = definition.missed_within_s
    made_up = [due_s for due_s in missed if within_s is None or now_s - due_s <= within_s]
    times = f"{'more than ' if more else ''}{len(missed)} due time{'s' * (len(missed) > 1)}"
    were = f"{times} {'were' if len(missed) > 1 else 'was'} missed, because no manager was running"
    if definition.missed is Missed.SKIP:
        made_up, why = [], f"{were}; its policy is to skip missed runs"
    elif not made_up:
        why = f"{were}; all of them are older than its limit for missed runs"
    elif definition.missed is Missed.RUN_ONCE:
        if on_time:
            # With the policy RUN_ONCE, the run of the due time that is on time also covers the missed due times.
            return [replace(on_time[0], why=f"{were}; this one is on time"), *on_time[1:]], None
        return [_DueRun(made_up[-1], f"{were}; it is the latest of them")], None
    else:
        why = f"{were}; {len(made_up)} of them are made up for, one after the other"
    if made_up:
        late = [_DueRun(due_s, why, late=True) for due_s in made_up]
        return [*late, *(replace(due_s, late=True) for due_s in on_time)], None
    if on_time:
        return [replace(on_time[0], why=why), *on_time[1:]], None
    latest = missed[-1]
    token = token_of(schedule, latest)
    return [], ScheduledRun(latest, token, RunState.SKIPPED, now_s, reason=why)


def _apply_overlap(schedule: Schedule, fire: _DueRun, now_s: float) -> Schedule:
    """Return the schedule with a run for the due time. The run waits, or is skipped because of an unfinished run."""
    run = ScheduledRun(fire.due_s, token_of(schedule, fire.due_s), RunState.WAITING, now_s, reason=fire.why)
    unfinished, overlap = schedule.unfinished, schedule.definition.overlap
    waiting = [earlier for earlier in unfinished if earlier.state is RunState.WAITING]
    if not unfinished:
        return schedule.with_run(run)
    if overlap is Overlap.SKIP and not fire.late:
        before = check_name(schedule, unfinished[-1])
        return schedule.with_run(_skipped_run(run, now_s, f"{before} had not ended"))
    if overlap is Overlap.REPLACE:
        for earlier in waiting:
            why = f"{check_name(schedule, run)} replaced it before it began"
            schedule = schedule.with_run(_skipped_run(earlier, now_s, why))
        return schedule.with_run(run)
    if len(waiting) >= MAX_WAITING:
        why = f"{len(waiting)} runs already wait for the previous run"
        return schedule.with_run(_skipped_run(run, now_s, why))
    return schedule.with_run(run)


def by_hand(schedule: Schedule, asked: str, now_s: float) -> Schedule:
    """Return the schedule with the run that a user requested. A repeated request does not add another run.

    Raise Refused if the previous run has not ended and the overlap policy is SKIP.
    """
    if any(run.asked == asked for run in schedule.runs):
        return schedule
    unfinished, overlap = schedule.unfinished, schedule.definition.overlap
    waiting = [earlier for earlier in unfinished if earlier.state is RunState.WAITING]
    if unfinished and (overlap is Overlap.SKIP or len(waiting) >= MAX_WAITING):
        run_name = check_name(schedule, unfinished[-1])
        raise Refused(
            f"{run_name[:1].upper()}{run_name[1:]} of schedule {schedule.name} has not ended.",
            remedy="Wait for its end, or cancel its job first.",
        )
    token = token_by_hand(schedule, asked)
    run = ScheduledRun(now_s, token, RunState.WAITING, now_s, reason="asked for by hand", asked=asked)
    if overlap is Overlap.REPLACE:
        for earlier in waiting:
            why = "a run asked for by hand replaced it before it began"
            schedule = schedule.with_run(_skipped_run(earlier, now_s, why))
    return schedule.with_run(run)


def startable(schedule: Schedule) -> ScheduledRun | None:
    """Return the run whose job must be submitted now, or None if no run can start now.

    A run starts only after the previous run has ended. In a paused schedule, only runs requested by a user start.
    """
    if schedule.removed or schedule.running:
        return None
    for run in schedule.runs:
        if run.state is RunState.WAITING and (run.asked or not schedule.paused):
            return run
    return None


def start(schedule: Schedule, run: ScheduledRun, now_s: float) -> Schedule:
    """Return the schedule with the run marked as RUNNING.

    After a run is stored as RUNNING, its job must be submitted.
    """
    job = object_keys.job_id(schedule.definition.job, run.token)
    return schedule.with_run(replace(run, state=RunState.RUNNING, job=job, started_s=now_s))


def skip(schedule: Schedule, run: ScheduledRun, now_s: float, why: str) -> Schedule:
    """Return the schedule with the run marked as skipped."""
    return schedule.with_run(_skipped_run(run, now_s, why))


def replaced_run(schedule: Schedule) -> ScheduledRun | None:
    """Return the run whose job must be canceled because another run waits, or None if no job must be canceled."""
    if schedule.removed or schedule.definition.overlap is not Overlap.REPLACE:
        return None
    waits = any(run.state is RunState.WAITING and (run.asked or not schedule.paused) for run in schedule.runs)
    return schedule.running if waits else None


def settle(schedule: Schedule, now_s: float) -> Schedule:
    """Return the schedule with all due times up to now marked as decided, without new runs.

    The manager calls `settled` when a schedule is paused, resumed, or changed, so that its earlier due times do not run
    later.
    """
    schedule = _rewound(schedule, now_s)
    return replace(schedule, through_s=max(now_s, schedule.through_s))


def remove(schedule: Schedule, now_s: float) -> Schedule:
    """Return the schedule marked as removed, with its waiting runs skipped."""
    for run in schedule.unfinished:
        if run.state is RunState.WAITING:
            schedule = skip(schedule, run, now_s, "its schedule was removed")
    return replace(schedule, removed=True)


def check_name(schedule: Schedule, run: ScheduledRun) -> str:
    """Return the name of a run for a sentence, such as `the run of 2026-03-29 03:00:00 CEST`."""
    if run.asked:
        return f"a run asked for by hand at {_at(schedule, run)}"
    return f"the run of {_at(schedule, run)}"


def _at(schedule: Schedule, run: ScheduledRun) -> str:
    return due_times.text_of_time(run.due_s, schedule.definition.when.tz)


def _skipped_run(run: ScheduledRun, now_s: float, why: str) -> ScheduledRun:
    reason = f"{run.reason}; {why}" if run.reason else why
    return replace(run, state=RunState.SKIPPED, reason=reason, ended_s=now_s)
