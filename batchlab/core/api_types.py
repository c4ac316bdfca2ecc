"""Typed dicts for the responses of the HTTP API: jobs, tasks, logs, the fleet, and notifications.

The manager creates the responses of the HTTP API, and clients read the responses.

Invariants: the module is cheap to import. A response contains only the host of a webhook's address, because the path of
the address may be a secret.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typing_extensions import TypedDict  # pydantic refuses typing.TypedDict before Python 3.12

if TYPE_CHECKING:
    from batchlab.core.model import Pool
    from batchlab.core.notifications import Notification, Target
    from batchlab.core.users import User
    from batchlab.manager.notifier import Notifier


class StageView(TypedDict):
    """Counters of a stage. `after` names the stages whose results the stage uses. `running` is the number of the
    stage's tasks in bundles that workers report as running. `gpus` is the number of GPUs of one task.
    """

    name: str
    pool: str
    after: list[str]
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
    gpus: int


class DependencyView(TypedDict):
    """A job that must have succeeded or ended before another job begins. `condition` is `succeeded` or `ended`."""

    job: str
    condition: str


class JobView(TypedDict):
    """State of a job.

    `share` is the job's share identifier, or "" for the default share.
    `version` changes whenever another field of the JobView changes, and is 0 once the job has ended. `report` is the
    reason why the manager could not write the job's performance data, or "" if the write did not fail. `owner` is the
    name of the user that submitted the job.
    """

    id: str
    name: str
    owner: str
    state: str
    reason: str
    round: int
    priority: int
    share: str
    tags: dict[str, str]
    after: list[DependencyView]
    submitted_s: float
    started_s: float | None
    ended_s: float | None
    version: int
    stages: list[StageView]
    report: str


class JobsView(TypedDict):
    jobs: list[JobView]


class WhyView(TypedDict):
    why: str


UNCOUNTED = 0
"""Value of `seq` for an outcome that is committed but not folded yet.

UNCOUNTED sorts before the `seq` of every folded outcome.
"""


class OutcomeView(TypedDict):
    """A folded outcome of a bundle.

    The response to a submission may also contain an outcome that is not folded yet. The `seq` of such an outcome is 0.
    `tasks` are the ranges of the bundle's tasks that succeeded. The object at `key` contains the results of the tasks
    in `tasks`. `failed` is the number of the bundle's tasks that failed and are not retried. `outcome` is the content
    of the object at `key` if the manager has the content in memory.
    """

    seq: int
    stage: str
    bundle: str
    key: str
    tasks: list[tuple[int, int]]
    failed: int
    outcome: Any


class CallsView(TypedDict):
    """Number of reported calls that the manager has added to the ledger."""

    added: int


class OutcomesView(TypedDict):
    """Outcomes of a job. `ended` is true if the job has ended and the response contains the job's last outcomes."""

    outcomes: list[OutcomeView]
    ended: bool


class FailureView(TypedDict):
    """Failure of a task, after which the task is not retried. `seq` is the number of the outcome that contains the
    failure.

    Failures with the same cause have the same `fingerprint`.
    """

    seq: int
    stage: str
    task: int
    attempt: int
    kind: str
    reason: str
    error: str
    traceback: str
    exit_code: int | None
    fingerprint: str


class FailuresView(TypedDict):
    """A page of a job's failures.

    `next` is the value of the parameter `after` in the request for the next page of failures. `next` is None on the
    last page.
    """

    failures: list[FailureView]
    next: str | None


class FailureGroupView(TypedDict):
    """Group of a job's failures with the same fingerprint.

    `count` is the number of failed tasks in the group, and `first` is the failure of the group's first task.
    """

    fingerprint: str
    stage: str
    count: int
    first: FailureView


class FailureGroupsView(TypedDict):
    """Groups of a job's failures, with the largest group first.

    `failed` is the number of the job's failures, and `read` is the number of failures that the manager has read so far.
    `is_whole` is false while `read` is smaller than `failed`. A client repeats the request for the groups until
    `is_whole` is true.
    """

    groups: list[FailureGroupView]
    read: int
    failed: int
    is_whole: bool


class TaskView(TypedDict):
    """A task, as described in the outcome of the task's bundle, or as the manager knows a task that has not ended.

    The `state` of a task is waiting, running, succeeded, failed, or cancelled. The `state` is retried if `seq` belongs
    to an earlier outcome of the task. `seq` is 0 if the task has not ended. `started_s` and `ended_s` are times of the
    task's bundle. `input` and `log` are the text of the task's input and log. The manager truncates a long input and a
    long log. The log of a running task is the latest output that its worker has stored. `input_of` is the name of the
    file that contains the task's input. `mended_sha256` is the SHA-256 of the task's mended input, or "" if the task
    has its first input. `cpu_s`, `memory_bytes` (the peak), `input_bytes`, and `output_bytes` are null if the attempt
    was too short to be measured. `run_s` is null if the attempt did not run.
    """

    seq: int
    stage: str
    task: int
    attempt: int
    state: str
    worker: str
    started_s: float | None
    ended_s: float | None
    run_s: float | None
    cpu_s: float | None
    memory_bytes: int | None
    input_bytes: int | None
    output_bytes: int | None
    failure: FailureView | None
    input: str
    input_of: str
    is_input_cut: bool
    mended_sha256: str
    log: str
    is_log_cut: bool


class TaskRowView(TypedDict):
    """A task in a list of tasks.

    The `state` of a task is waiting, running, succeeded, failed, or cancelled. `seq` is the number of the outcome with
    the task's result, or 0 without a result. `attempt` is 0 if no worker has received the task. `since_s` is the start
    of a running task's bundle. The figures are null if the attempt was too short to be measured. `input` is the name
    of the task's first input file, or "" if the name is unknown. `mended_sha256` is the SHA-256 of the task's mended
    input, or "" if the task has its first input.
    """

    seq: int
    stage: str
    task: int
    state: str
    attempt: int
    worker: str
    since_s: float | None
    run_s: float | None
    cpu_s: float | None
    memory_bytes: int | None
    input_bytes: int | None
    output_bytes: int | None
    input: str
    mended_sha256: str


class TasksView(TypedDict):
    """A page of a job's tasks, in the order of the stages and tasks.

    `next` is the value of the parameter `after` in the request for the next page, or None on the last page. A search
    for an input file may return a page with fewer tasks, because a request reads a limited number of outcomes.
    """

    tasks: list[TaskRowView]
    next: str | None


class BarView(TypedDict):
    """A bundle on a timeline, or the `bundles` that a worker started in a time bucket.

    The `state` of a bundle is running, succeeded, retried, failed, or cancelled. The state of a time bucket is the
    worst state of its bundles, and its `stage` and `bundle` are "", and its `attempt` is 0. `row` separates bundles
    that a worker runs at the same time.
    """

    stage: str
    bundle: str
    bundles: int
    tasks: int
    attempt: int
    state: str
    started_s: float
    ended_s: float
    row: int


class LaneView(TypedDict):
    """A worker on a timeline, with its bundles in at most `rows` rows."""

    worker: str
    rows: int
    bars: list[BarView]


class TimelineView(TypedDict):
    """Timeline of a job's bundles from `start_s` to `end_s` by worker, with the worker that started first at the top.

    `workers` is the number of all workers, of which `lanes` may contain only the first ones. `merged_s` is the duration
    of a time bucket, or 0 if every bundle has its own bar.
    """

    start_s: float
    end_s: float
    workers: int
    merged_s: float
    lanes: list[LaneView]


class EtaView(TypedDict):
    """Estimate of a job's remaining time in seconds, as a range from `low_s` to `high_s`.

    If the manager does not have an estimate, `low_s` and `high_s` are None, and `text` gives the reason. The range of
    the remaining time does not include the time of the stages in `unmeasured`.
    """

    low_s: float | None
    high_s: float | None
    unmeasured: list[str]
    text: str


class LogView(TypedDict):
    """Log of an attempt of a task.

    The `state` of the attempt is SUCCEEDED, FAILED, RETRIED, or CANCELLED. RETRIED means that the attempt failed and
    another attempt follows. `ended_s` is the time at which the attempt's bundle ended. If `stored` is false, the log is
    not stored yet, and `text` gives the reason.
    """

    stage: str
    task: int
    attempt: int
    round: int
    execution: str
    state: str
    ended_s: float
    stored: bool
    text: str


class LogsView(TypedDict):
    logs: list[LogView]


class NewLogsView(TypedDict):
    """Logs of a job's newly folded outcomes.

    `seq` is the number of the last outcome whose logs the manager has read. `ended` is true if the job or the requested
    task has ended and the response includes its last logs.
    """

    logs: list[LogView]
    seq: int | None
    ended: bool


class TailView(TypedDict):
    """Latest output of a running attempt. `text` contains the bytes [`start`, `stop`) of the attempt's output."""

    stage: str
    task: int
    attempt: int
    round: int
    execution: str
    start: int
    stop: int
    text: str


class TailsView(TypedDict):
    """Live logs of running tasks. A worker stores new output of a task at most once every `every_s` seconds."""

    tails: list[TailView]
    every_s: float


class InstanceView(TypedDict):
    """An instance of a pool.

    `worker` is None until the worker of the instance has sent a heartbeat. `busy` is the number of bundles that the
    worker of the instance runs, and `held` is the number of all bundles that the worker holds. `busy_gpus` is the
    number of GPUs that running tasks use. `type` and `zone` are empty if the backend does not have instance types.
    """

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
    busy_gpus: int


class PoolView(TypedDict):
    """A pool of instances. `trouble` is the reason why the instances do not start, or "" if the instances start.

    `slots` and `gpus` are the numbers of slots and GPUs of each instance. `image` is the container image of the pool's
    workers, or "" if the pool does not have an image of its own.

    `ends_in_s` is the number of seconds after which the group's scheduled action ends the pool unless a manager
    postpones the action, or None without such an action. `end_trouble` is the reason why the manager cannot change the
    scheduled action, or "".
    """

    name: str
    min: int
    max: int
    desired: int
    slots: int
    gpus: int
    image: str
    backlog_tasks: int
    backlog_s: float
    held_by_hand: bool
    trouble: str
    ends_in_s: float | None
    end_trouble: str
    instances: list[InstanceView]


def pool_of(view: PoolView) -> Pool:
    """Return the Pool in a response of the manager. A manager of an earlier release does not send GPUs and images."""
    from batchlab.core.model import Pool

    sizes = (view["min"], view["max"], view["slots"])
    return Pool(view["name"], *sizes, gpus=view.get("gpus", 0), image=view.get("image", ""))


class QueueView(TypedDict):
    name: str
    visible: int
    in_flight: int
    delayed: int


class GridView(TypedDict):
    """State of a grid.

    `settings` maps the name of each setting of the grid's manager to the value of the setting. Most values are in
    seconds. `unreadable` is the number of messages and objects that the manager could not read. `trouble` is a sentence
    about jobs that the ledger has lost, or "".
    """

    backend: str
    leader: bool
    owner: str
    settings: dict[str, float]
    pools: list[PoolView]
    queues: list[QueueView]
    unreadable: int
    trouble: str


class ActivityView(TypedDict):
    """A scaling activity of a pool. `ended_s` is None while the scaling activity is in progress."""

    id: int
    pool: str
    at_s: float
    ended_s: float | None
    description: str
    cause: str
    status: str


class ActivitiesView(TypedDict):
    activities: list[ActivityView]


class PoolCurve(TypedDict):
    """Curves of a pool over time. Each curve has one value for each time in `at_s` of the HistoryView.

    The curves of a pool show the desired and the actual number of instances, and the numbers of running, queued, and
    in-flight bundles.
    """

    name: str
    desired: list[int]
    in_service: list[int]
    pending: list[int]
    running: list[int]
    waiting: list[int]
    in_flight: list[int]


class HistoryView(TypedDict):
    """Recent history of the fleet and its queues. Each curve of a pool has one value for each time in `at_s`."""

    at_s: list[float]
    pools: list[PoolCurve]


class SessionView(TypedDict):
    """A one-time `code` that opens the web page at `path` within `valid_s` seconds.

    A client passes `name` in a request for the state of the one-time code.
    """

    code: str
    name: str
    path: str
    valid_s: float


class CodeView(TypedDict):
    """State of a one-time code. `waits` is true while the one-time code is unused."""

    name: str
    waits: bool


class HealthView(TypedDict):
    status: str
    version: str
    leader: bool


class UnreadableView(TypedDict):
    """An object that the manager could not read, and the reason why the manager could not read the object."""

    key: str
    reason: str


class DeletedView(TypedDict):
    """Result of the deletion of a job. `objects` is the number of deleted objects in the bucket."""

    id: str
    objects: int


class RebuiltView(TypedDict):
    """Result of a rebuild of the ledger.

    `jobs` is the number of jobs in the rebuilt ledger, and `unreadable` lists the objects that the manager could not
    read.
    """

    jobs: int
    unreadable: list[UnreadableView]


class ProblemView(TypedDict):
    """An error of a request. `error` is a sentence about the problem, and `remedy` is a sentence about the solution of
    the problem.
    """

    error: str
    remedy: str


class UserView(TypedDict):
    """A user of the grid. The `state` of a user is active, expired, or revoked. `created_by` is the user that added the
    user.
    """

    name: str
    role: str
    state: str
    created_s: float
    created_by: str
    expires_s: float | None
    revoked_s: float | None


class UsersView(TypedDict):
    users: list[UserView]


class NewUserView(TypedDict):
    """A new user and the token of the user."""

    user: UserView
    token: str


class AuditRecordView(TypedDict):
    """A request of a user.

    `action` is the command that makes the same request, such as `job cancel`. `object` names the changed job, pool,
    schedule, target, share, or user. The `outcome` is done, refused, failed, unknown, or allowed. A failed request was
    permitted, but the manager refused it. An unknown request got an error of the grid, and may have taken effect. In
    both cases, `reason` has the error. An allowed request has no answer yet, or the manager has ended meanwhile, or has
    an earlier release. `count` is the number of requests that the record stands for.
    """

    at_s: float
    user: str
    role: str
    action: str
    object: str
    outcome: str
    reason: str
    request: str
    count: int


class AuditView(TypedDict):
    """Audit records from new to old. `next` is the value of `before` for the next page, or null at the end."""

    records: list[AuditRecordView]
    next: str | None


class TargetView(TypedDict):
    """A notification target of the grid or of a job.

    `to` is the target's address without parts that may be secret. `signed` is true if the manager signs its messages to
    the target. `job` is the id of the job that the target belongs to, or "" for a target of the grid. `jobs` is true
    for a target of the grid that jobs may use.
    """

    name: str
    kind: str
    to: str
    on: list[str]
    signed: bool
    failures: int
    stuck_s: float
    job: str
    jobs: bool


class TargetsView(TypedDict):
    targets: list[TargetView]


class NotificationView(TypedDict):
    """A notification and the state of its delivery.

    The `state` of a notification is pending, delivered, or given up. `due_s` is the time of the next attempt to deliver
    a pending notification. `error` is the error of the last attempt to deliver the notification.
    """

    id: str
    moment: str
    job: str
    target: str
    at_s: float
    state: str
    attempts: int
    due_s: float | None
    ended_s: float | None
    error: str


class NotificationsView(TypedDict):
    """Notifications of the grid: first the pending notifications, then the finished notifications from new to old."""

    notifications: list[NotificationView]


class TestedView(TypedDict):
    """Result of a test notification. `error` is "" if the manager delivered the test notification."""

    target: str
    error: str


def user_view(user: User, now_s: float) -> UserView:
    return {
        "name": user.name,
        "role": user.role.value,
        "state": user.state(now_s),
        "created_s": user.created_s,
        "created_by": user.created_by,
        "expires_s": user.expires_s,
        "revoked_s": user.revoked_s,
    }


def target_view(target: Target) -> TargetView:
    return {
        "name": target.name,
        "kind": target.kind,
        "to": target.shown,
        "on": list(target.on),
        "signed": bool(target.secret),
        "failures": target.failures,
        "stuck_s": target.stuck_s,
        "job": target.job,
        "jobs": target.jobs,
    }


def notification_view(notification: Notification) -> NotificationView:
    is_pending = notification.state == "pending"
    return {
        "id": notification.id,
        "moment": notification.moment,
        "job": notification.job,
        "target": notification.target,
        "at_s": notification.at_s,
        "state": notification.state,
        "attempts": notification.attempts,
        "due_s": notification.due_s if is_pending else None,
        "ended_s": notification.ended_s,
        "error": notification.error,
    }


def log_view(notifying: Notifier, limit: int) -> NotificationsView:
    """Return at most `limit` pending and finished notifications."""
    every = [*notifying.outbox.pending.values(), *reversed(notifying.outbox.log)]
    return {"notifications": [notification_view(notification) for notification in every[:limit]]}
