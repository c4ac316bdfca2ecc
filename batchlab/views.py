"""What the API shows, as typed dicts that the manager fills and its clients read.

Invariant: pure and cheap to import. No validation library is needed to read a view, and a view is
a function of the facts handed in.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from typing_extensions import TypedDict  # pydantic refuses the standard one before Python 3.12

from batchlab.errors import UsageError
from batchlab.protocol import naming, wire

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from batchlab.jobdef import JobDef, StageDef
    from batchlab.manager.autoscaler import Backlog
    from batchlab.manager.live import LiveJob, Seen
    from batchlab.model import Activity, Failure, GroupView, Instance, Outcome
    from batchlab.ports import BundleRecord, Depth, JobRecord, StageRecord

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


class StageView(TypedDict):
    """A stage's counters. `running` counts tasks of bundles that workers say they run."""

    name: str
    pool: str
    planned: int | None
    succeeded: int
    failed: int
    cancelled: int
    running: int
    retried: int
    run_s: float
    mean_s: float | None
    first_start_s: float | None
    last_end_s: float | None


class JobView(TypedDict):
    """A job. `version` differs as soon as anything else in here does; 0 once it has ended."""

    id: str
    name: str
    state: str
    reason: str
    round: int
    priority: int
    tags: dict[str, str]
    submitted_s: float
    started_s: float | None
    ended_s: float | None
    version: int
    stages: list[StageView]


class JobsView(TypedDict):
    jobs: list[JobView]


class WhyView(TypedDict):
    why: str


class OutcomeView(TypedDict):
    """One folded outcome. `tasks` are the ranges of those that succeeded in it, whose values are
    in the object at `key`; `failed` counts those that failed for good. `outcome` is that object's
    content, where the manager has it at hand."""

    seq: int
    stage: str
    bundle: str
    key: str
    tasks: list[tuple[int, int]]
    failed: int
    outcome: Any


class OutcomesView(TypedDict):
    """`ended`: nothing follows these, because the job has ended."""

    outcomes: list[OutcomeView]
    ended: bool


class FailureView(TypedDict):
    stage: str
    task: int
    attempt: int
    kind: str
    reason: str
    error: str
    traceback: str
    exit_code: int | None


class FailuresView(TypedDict):
    failures: list[FailureView]


class LogView(TypedDict):
    """What one attempt of a task printed."""

    stage: str
    task: int
    attempt: int
    text: str


class LogsView(TypedDict):
    logs: list[LogView]


class InstanceView(TypedDict):
    """`worker` is None until the instance's worker has reported; `busy` counts the bundles it
    runs, `held` all that it has received. `type` and `zone` are empty where machines do not
    differ."""

    id: str
    state: str
    healthy: bool
    protected: bool
    launched_s: float
    note: str
    type: str
    zone: str
    market: str
    worker: str | None
    busy: int
    held: int


class PoolView(TypedDict):
    """`trouble` says why its instances do not come up, where they do not."""

    name: str
    min: int
    max: int
    desired: int
    slots: int
    backlog_tasks: int
    backlog_s: float
    held_by_hand: bool
    trouble: str
    instances: list[InstanceView]


class QueueView(TypedDict):
    name: str
    visible: int
    in_flight: int
    delayed: int


class GridView(TypedDict):
    """`settings` are the manager's, by name, most of them seconds."""

    backend: str
    leader: bool
    owner: str
    settings: dict[str, float]
    pools: list[PoolView]
    queues: list[QueueView]


class ActivityView(TypedDict):
    """`ended_s` is None while it is in progress."""

    id: int
    pool: str
    at_s: float
    ended_s: float | None
    description: str
    cause: str
    status: str


class ActivitiesView(TypedDict):
    activities: list[ActivityView]


class HealthView(TypedDict):
    status: str
    version: str
    leader: bool


class RebuiltView(TypedDict):
    """How many jobs the ledger was made of."""

    jobs: int


class ProblemView(TypedDict):
    """Every error: one sentence, and what to do."""

    error: str
    remedy: str


# --- Jobs ----------------------------------------------------------------------------------------


def job_view(
    record: JobRecord,
    stages: Sequence[StageRecord],
    live: LiveJob | None = None,
    workers: Iterable[Seen] = (),
) -> JobView:
    """A job, with its version and running tasks where it is `live`."""
    job = record.job
    running = running_tasks(live, workers) if live else {}
    starts = [s.counts.first_start_s for s in stages if s.counts.first_start_s is not None]
    return {
        "id": job.id,
        "name": job.name,
        "state": record.state.value,
        "reason": record.reason,
        "round": record.round,
        "priority": job.priority,
        "tags": dict(job.tags),
        "submitted_s": job.submitted_s,
        "started_s": min(starts) if starts else None,
        "ended_s": record.ended_s,
        "version": live.version if live and not record.state.ended else 0,
        "stages": [_stage_view(job, s, running.get(s.counts.stage, 0)) for s in stages],
    }


def _stage_view(job: JobDef, stage: StageRecord, running: int) -> StageView:
    counts = stage.counts
    return {
        "name": counts.stage,
        "pool": job.stage(counts.stage).pool,
        "planned": counts.planned,
        "succeeded": counts.succeeded,
        "failed": counts.failed,
        "cancelled": counts.cancelled,
        "running": running,
        "retried": counts.retried,
        "run_s": counts.run_s,
        "mean_s": counts.mean_s,
        "first_start_s": counts.first_start_s,
        "last_end_s": counts.last_end_s,
    }


def running_tasks(live: LiveJob, workers: Iterable[Seen]) -> Mapping[str, int]:
    """Tasks by stage of those bundles that beats say are running, each bundle once."""
    bundles = {
        (one.stage, one.bundle)
        for seen in workers
        for one in seen.beat.held
        if one.running and one.job == live.id
    }
    found: dict[str, int] = {}
    for stage, bundle in bundles:
        # One that has come to its outcome since the beat is outstanding no more.
        if one := live.outstanding.get(stage, {}).get(bundle):
            found[stage] = found.get(stage, 0) + len(one.bundle.tasks)
    return found


def outcome_view(record: BundleRecord, outcome: Outcome | None = None) -> OutcomeView:
    """A folded bundle; ValueError where it is only planned."""
    if record.completion is None or record.seq is None:
        raise ValueError(f"bundle {record.bundle.id} has no outcome")
    return {
        "seq": record.seq,
        "stage": record.bundle.stage,
        "bundle": record.bundle.id,
        "key": naming.outcome(record.bundle),
        "tasks": list(record.completion.succeeded.ranges),
        "failed": len(record.completion.failed),
        "outcome": wire.outcome_to_json(outcome) if outcome else None,
    }


def failure_view(outcome: Outcome, failure: Failure) -> FailureView:
    return {
        "stage": outcome.bundle.stage,
        "task": failure.task,
        "attempt": outcome.bundle.attempt,
        "kind": failure.kind.value,
        "reason": failure.reason,
        "error": failure.error,
        "traceback": failure.traceback,
        "exit_code": failure.exit_code,
    }


def log_view(outcome: Outcome, task: int, text: bytes) -> LogView:
    return {
        "stage": outcome.bundle.stage,
        "task": task,
        "attempt": outcome.bundle.attempt,
        "text": text.decode(errors="replace"),
    }


# --- The grid ------------------------------------------------------------------------------------


def pool_view(
    view: GroupView,
    backlog: Backlog,
    workers: Mapping[str, Seen],
    *,
    held: bool,
    trouble: str = "",
) -> PoolView:
    """A pool's group, its work and its workers."""
    pool = view.pool
    return {
        "name": pool.name,
        "min": pool.min_size,
        "max": pool.max_size,
        "desired": view.desired,
        "slots": pool.slots,
        "backlog_tasks": backlog.tasks,
        "backlog_s": backlog.seconds,
        "held_by_hand": held,
        "trouble": trouble,
        "instances": [_instance_view(i, workers.get(i.id)) for i in view.instances],
    }


def _instance_view(instance: Instance, seen: Seen | None) -> InstanceView:
    return {
        "id": instance.id,
        "state": instance.state.value,
        "healthy": instance.healthy,
        "protected": instance.protected,
        "launched_s": instance.launched_s,
        "note": instance.note,
        "type": instance.machine.type,
        "zone": instance.machine.zone,
        "market": instance.machine.market.value,
        "worker": seen.beat.worker if seen else None,
        "busy": seen.beat.busy if seen else 0,
        "held": len(seen.beat.held) if seen else 0,
    }


def queue_view(name: str, depth: Depth) -> QueueView:
    return {
        "name": name,
        "visible": depth.visible,
        "in_flight": depth.in_flight,
        "delayed": depth.delayed,
    }


def activity_view(activity: Activity) -> ActivityView:
    return {
        "id": activity.id,
        "pool": activity.pool,
        "at_s": activity.at_s,
        "ended_s": activity.ended_s,
        "description": activity.description,
        "cause": activity.cause,
        "status": activity.status,
    }


# --- Admission -----------------------------------------------------------------------------------


def admit(job: JobDef, pools: Mapping[str, int]) -> None:
    """UsageError where the job could never run in a grid whose `pools` have so many slots."""
    if not job.stages:
        raise UsageError(f"Job {job.name} has no stages.", remedy="Give it at least one.")
    for text in (job.id, *(stage.name for stage in job.stages)):
        # They become parts of object keys.
        if not _NAME.fullmatch(text):
            raise UsageError(
                f"{text!r} cannot name a job or a stage.",
                remedy="Use letters, digits, - and _, beginning with a letter or digit.",
            )
    earlier: set[str] = set()
    for stage in job.stages:
        _admit_stage(stage, earlier)
        _admit_to_pool(stage, pools)
        earlier.add(stage.name)


def _admit_stage(stage: StageDef, earlier: set[str]) -> None:
    if stage.name in earlier:
        raise UsageError(
            f"Two stages are named {stage.name!r}.", remedy="Give each a name of its own."
        )
    for upstream in stage.after:
        if upstream not in earlier:
            raise UsageError(
                f"Stage {stage.name} comes after {upstream!r}, which is no stage before it.",
                remedy="List the stages in an order in which they can run.",
            )
    if (stage.handler is None) != bool(stage.command):
        raise UsageError(
            f"Stage {stage.name} must have either a handler or a command.",
            remedy="Give it exactly one of the two.",
        )
    if stage.bundle is not None and stage.bundle < 1:
        raise UsageError(
            f"Stage {stage.name} asks for bundles of {stage.bundle} tasks.",
            remedy="Write 1 or more, or leave it out.",
        )


def _admit_to_pool(stage: StageDef, pools: Mapping[str, int]) -> None:
    if stage.pool not in pools:
        raise UsageError(
            f"Stage {stage.name} names the pool {stage.pool!r}, which this grid does not have.",
            remedy=f"Its pools are {', '.join(sorted(pools))}.",
        )
    if not 1 <= stage.slots <= pools[stage.pool]:
        raise UsageError(
            f"Stage {stage.name} asks for {stage.slots} slots per task, but an instance of pool "
            f"{stage.pool!r} has {pools[stage.pool]}.",
            remedy="Ask for as many at the most, or name a pool with larger instances.",
        )
