"""Views of the API, built from the manager's data.

Invariant: the functions are pure and depend only on their arguments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchlab.core.protocol import json_format, object_keys
from batchlab.core.protocol.settlement import fingerprint
from batchlab.worker import task_log

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from batchlab.core.api_types import (
        ActivityView,
        FailureView,
        InstanceView,
        JobView,
        LogView,
        OutcomeView,
        PoolView,
        QueueView,
        StageView,
        TailView,
    )
    from batchlab.core.job_definition import JobDef
    from batchlab.core.model import Activity, Failure, GroupView, Instance, Outcome
    from batchlab.core.ports import BundleRecord, Depth, JobRecord, StageRecord
    from batchlab.core.protocol.messages import Tail
    from batchlab.core.protocol.object_keys import CommitKey
    from batchlab.jobs.attempts import Attempt
    from batchlab.manager.state import Backlog, LiveJob, WorkerStatus


# --- Jobs ----------------------------------------------------------------------------------------


def job_view(
    record: JobRecord,
    stages: Sequence[StageRecord],
    live: LiveJob | None = None,
    workers: Iterable[WorkerStatus] = (),
    report: str = "",
) -> JobView:
    """Return the view of a job. A `live` job has a version and running tasks."""
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
        "report": report,
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


def running_tasks(live: LiveJob, workers: Iterable[WorkerStatus]) -> Mapping[str, int]:
    """Return the number of running tasks by stage, according to the heartbeats. Each bundle counts
    once."""
    bundles = {
        (one.stage, one.bundle)
        for worker_status in workers
        for one in worker_status.beat.held
        if one.running and one.job == live.id
    }
    found: dict[str, int] = {}
    for stage, bundle in bundles:
        # A bundle whose outcome arrived after the heartbeat is no longer outstanding.
        if one := live.outstanding.get(stage, {}).get(bundle):
            found[stage] = found.get(stage, 0) + len(one.bundle.tasks)
    return found


def outcome_view(record: BundleRecord, key: CommitKey, outcome: Outcome | None = None) -> OutcomeView:
    """Return the view of a folded bundle. `key` is the commit key of its job. Raise ValueError if
    the bundle is only planned."""
    if record.completion is None or record.seq is None:
        raise ValueError(f"bundle {record.bundle.id} has no outcome")
    return {
        "seq": record.seq,
        "stage": record.bundle.stage,
        "bundle": record.bundle.id,
        "key": object_keys.outcome(record.bundle, key),
        "tasks": list(record.completion.succeeded.ranges),
        "failed": len(record.completion.failed),
        "outcome": json_format.outcome_to_json(outcome) if outcome else None,
    }


def failure_view(seq: int, outcome: Outcome, failure: Failure) -> FailureView:
    """Return the view of one failure in the outcome with this seq."""
    return {
        "seq": seq,
        "stage": outcome.bundle.stage,
        "task": failure.task,
        "attempt": outcome.bundle.attempt,
        "kind": failure.kind.value,
        "reason": failure.reason,
        "error": failure.error,
        "traceback": failure.traceback,
        "exit_code": failure.exit_code,
        "fingerprint": fingerprint(failure),
    }


def log_view(attempt: Attempt, text: bytes, stored: bool = True) -> LogView:
    outcome = attempt.outcome
    return {
        "stage": outcome.bundle.stage,
        "task": attempt.task,
        "attempt": outcome.bundle.attempt,
        "round": outcome.bundle.round,
        "execution": outcome.execution,
        "state": attempt.state,
        "ended_s": outcome.ended_s,
        "stored": stored,
        "text": task_log.text(text),
    }


def tail_view(tail: Tail) -> TailView:
    return {
        "stage": tail.stage,
        "task": tail.task,
        "attempt": tail.attempt,
        "round": tail.round,
        "execution": tail.execution,
        "start": tail.start,
        "stop": tail.stop,
        "text": tail.text,
    }


# --- The grid ------------------------------------------------------------------------------------


def pool_view(
    view: GroupView, backlog: Backlog, workers: Mapping[str, WorkerStatus], *, held: bool, trouble: str = ""
) -> PoolView:
    """Return the view of a pool: its group, its work, and its workers."""
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


def _instance_view(instance: Instance, seen: WorkerStatus | None) -> InstanceView:
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
    return {"name": name, "visible": depth.visible, "in_flight": depth.in_flight, "delayed": depth.delayed}


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
