"""Views of the API, built from the manager's data.

Invariant: the functions in the module are pure, so their results depend only on their arguments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from batchlab.core.model import JobState
from batchlab.core.protocol import json_format, object_keys
from batchlab.core.protocol.settlement import fingerprint
from batchlab.core.users import owner_name
from batchlab.manager.state import running_bundles
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


def state_of(record: JobRecord, is_running: bool) -> JobState:
    """Return the state of a job. `is_running` means that a worker runs a task of the job.

    The ledger does not have the state RUNNING before the end of the job's first bundle.
    """
    waits = record.state in (JobState.RUNNABLE, JobState.STARTING)
    return JobState.RUNNING if waits and is_running else record.state


def job_view(
    record: JobRecord,
    stages: Sequence[StageRecord],
    live: LiveJob | None = None,
    workers: Iterable[WorkerStatus] = (),
    report: str = "",
) -> JobView:
    """Return the view of a job. If `live` is given, the view has a version and the number of running tasks."""
    job = record.job
    running = running_tasks(live, workers) if live else {}
    is_active = live is not None and not record.state.ended
    starts = [s.counts.first_start_s for s in stages if s.counts.first_start_s is not None]
    return {
        "id": job.id,
        "name": job.name,
        "owner": owner_name(job.owner),
        "state": state_of(record, bool(running)).value,
        "reason": record.reason,
        "round": record.round,
        "priority": job.priority,
        "share": job.share,
        "tags": dict(job.tags),
        "after": [{"job": other.job, "condition": other.condition.value} for other in job.after],
        "submitted_s": job.submitted_s,
        "started_s": min(starts) if starts else None,
        "ended_s": record.ended_s,
        "version": live.version if live and is_active else 0,
        "stages": [_stage_view(job, s, running.get(s.counts.stage, 0)) for s in stages],
        "report": report,
    }


def _pick(source: object, names: str) -> dict[str, Any]:
    """Return the attributes of `source` with the names in `names`, by name."""
    return {name: getattr(source, name) for name in names.split()}


def _stage_view(job: JobDef, stage: StageRecord, running: int) -> StageView:
    counts = stage.counts
    view = {
        "name": counts.stage,
        "pool": job.stage(counts.stage).pool,
        "after": list(job.stage(counts.stage).after),
        **_pick(counts, "planned succeeded failed cancelled"),
        "running": running,
        **_pick(counts, "retried run_s mean_s first_start_s last_end_s"),
        "gpus": job.stage(counts.stage).gpus,
    }
    return cast("StageView", view)


def running_tasks(live: LiveJob, workers: Iterable[WorkerStatus]) -> Mapping[str, int]:
    """Return the number of running tasks by stage, according to the heartbeats."""
    tasks: dict[str, int] = {}
    for bundle in running_bundles({live.id: live}, workers):
        tasks[bundle.stage] = tasks.get(bundle.stage, 0) + len(bundle.tasks)
    return tasks


def outcome_view(record: BundleRecord, key: CommitKey, outcome: Outcome | None = None) -> OutcomeView:
    """Return the view of a bundle that the ledger has folded.

    `key` is the commit key of the bundle's job. Raise ValueError if the bundle does not have an outcome.
    """
    if record.completion is None or record.seq is None:
        raise ValueError(f"bundle {record.bundle.id} does not have an outcome")
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
    """Return the view of one failure in the outcome with the seq `seq`."""
    view = {
        "seq": seq,
        "stage": outcome.bundle.stage,
        "task": failure.task,
        "attempt": outcome.bundle.attempt,
        "kind": failure.kind.value,
        **_pick(failure, "reason error traceback exit_code"),
        "fingerprint": fingerprint(failure),
    }
    return cast("FailureView", view)


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
    return cast("TailView", _pick(tail, "stage task attempt round execution start stop text"))


# --- The grid ------------------------------------------------------------------------------------


def pool_view(
    view: GroupView,
    backlog: Backlog,
    workers: Mapping[str, WorkerStatus],
    *,
    held: bool,
    image: str = "",
    trouble: str = "",
    ends_in_s: float | None = None,
    end_trouble: str = "",
) -> PoolView:
    """Return the view of a pool, which describes the pool's group, work, and workers."""
    pool = view.pool
    return {
        "name": pool.name,
        "min": pool.min_size,
        "max": pool.max_size,
        "desired": view.desired,
        "slots": pool.slots,
        "gpus": pool.gpus,
        "image": image,
        "backlog_tasks": backlog.tasks,
        "backlog_s": backlog.seconds,
        "held_by_hand": held,
        "trouble": trouble,
        "ends_in_s": ends_in_s,
        "end_trouble": end_trouble,
        "instances": [_instance_view(i, workers.get(i.id)) for i in view.instances],
    }


def _instance_view(instance: Instance, worker: WorkerStatus | None) -> InstanceView:
    view = {
        "id": instance.id,
        "state": instance.state.value,
        **_pick(instance, "healthy protected launched_s note"),
        **_pick(instance.machine, "type zone"),
        "market": instance.machine.market.value,
        "worker": worker.beat.worker if worker else None,
        "busy": worker.beat.busy if worker else 0,
        "held": len(worker.beat.held) if worker else 0,
        "busy_gpus": worker.beat.busy_gpus if worker else 0,
    }
    return cast("InstanceView", view)


def queue_view(name: str, depth: Depth) -> QueueView:
    return {"name": name, "visible": depth.visible, "in_flight": depth.in_flight, "delayed": depth.delayed}


def activity_view(activity: Activity) -> ActivityView:
    return cast("ActivityView", _pick(activity, "id pool at_s ended_s description cause status"))
