"""What the API shows, as typed dicts that the manager fills and its clients read.

Invariant: cheap to import, and nothing else is needed to read a view; viewing.py fills them.

What the API shows of notifications: typed dicts, filled by the manager, read by clients.

Invariant: as in views. An address is shown by its host alone, since its path may be a secret.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typing_extensions import TypedDict  # pydantic refuses the standard one before Python 3.12

if TYPE_CHECKING:
    from batchlab.core.notifications import Notification, Target
    from batchlab.manager.notifier import Notifier


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
    """A job. `version` differs as soon as anything else in here does; 0 once it has ended. `report`
    says why its performance data could not be written, where that is so."""

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
    report: str


class JobsView(TypedDict):
    jobs: list[JobView]


class WhyView(TypedDict):
    why: str


UNCOUNTED = 0
"""The seq of an outcome that is committed and not folded yet, before all others."""


class OutcomeView(TypedDict):
    """One folded outcome; in the answer to a submission one that is not folded yet, too, whose
    seq is 0. `tasks` are the ranges of those that succeeded in it, whose values are in the object
    at `key`; `failed` counts those that failed for good. `outcome` is that object's content, where
    the manager has it at hand."""

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
    """A task that failed for good, in the outcome `seq`; failures of one cause share their
    `fingerprint`."""

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
    """`next` is what to give as `after` for the next page, None where this is the last."""

    failures: list[FailureView]
    next: str | None


class FailureGroupView(TypedDict):
    """Failures with one fingerprint: how many tasks, and the first of them."""

    fingerprint: str
    stage: str
    count: int
    first: FailureView


class FailureGroupsView(TypedDict):
    """The largest group first. `is_whole` is false while only the first `read` failures of `failed`
    have been looked at: ask again."""

    groups: list[FailureGroupView]
    read: int
    failed: int
    is_whole: bool


class TaskView(TypedDict):
    """A task that has come to its end, as its outcome tells: `state` is succeeded, failed or
    cancelled, or retried where `seq` says an earlier outcome. `input` and `log` are text, cut off
    where they are long; `input_of` says which file the input is, or is a part of."""

    seq: int
    stage: str
    task: int
    attempt: int
    state: str
    worker: str
    started_s: float
    ended_s: float
    failure: FailureView | None
    input: str
    input_of: str
    is_input_cut: bool
    log: str
    is_log_cut: bool


class EtaView(TypedDict):
    """How long a job still takes, in seconds, as a band; None where nobody can say, and `text` why
    not. `unmeasured` stages come on top."""

    low_s: float | None
    high_s: float | None
    unmeasured: list[str]
    text: str


class LogView(TypedDict):
    """What one attempt of a task printed. `state` is SUCCEEDED, FAILED, RETRIED (it failed, and was
    tried again) or CANCELLED; `ended_s` is the end of its bundle. Where it is not `stored` yet,
    `text` says why."""

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
    """`seq` is that of the last outcome looked at, `ended` whether nothing follows: the job has
    ended, or the one task that was asked for."""

    logs: list[LogView]
    seq: int | None
    ended: bool


class TailView(TypedDict):
    """The end of what a running attempt has printed so far: bytes [start, stop) of its output."""

    stage: str
    task: int
    attempt: int
    round: int
    execution: str
    start: int
    stop: int
    text: str


class TailsView(TypedDict):
    """There is something new every `every_s` at the most."""

    tails: list[TailView]
    every_s: float


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
    """`settings` are the manager's, by name, most of them seconds. `unreadable` counts the messages
    and objects that it could not read."""

    backend: str
    leader: bool
    owner: str
    settings: dict[str, float]
    pools: list[PoolView]
    queues: list[QueueView]
    unreadable: int


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


class PoolCurve(TypedDict):
    """One value per moment: instances as desired and as they are, bundles that run, that wait in
    the pool's queue, and that are in flight."""

    name: str
    desired: list[int]
    in_service: list[int]
    pending: list[int]
    running: list[int]
    waiting: list[int]
    in_flight: list[int]


class HistoryView(TypedDict):
    """The fleet and its queues over the last while; every curve has a value for each of `at_s`."""

    at_s: list[float]
    pools: list[PoolCurve]


class SessionView(TypedDict):
    """A `code` that opens the web page once, within `valid_s`; `path` leads there. `name` is what
    it is asked for by."""

    code: str
    name: str
    path: str
    valid_s: float


class CodeView(TypedDict):
    """Whether the code of that name `waits` to be used."""

    name: str
    waits: bool


class HealthView(TypedDict):
    status: str
    version: str
    leader: bool


class UnreadableView(TypedDict):
    """An object that could not be read, and why."""

    key: str
    reason: str


class RebuiltView(TypedDict):
    """How many jobs the ledger was made of, and the objects that could not be read."""

    jobs: int
    unreadable: list[UnreadableView]


class ProblemView(TypedDict):
    """Every error: one sentence, and what to do."""

    error: str
    remedy: str


class TargetView(TypedDict):
    """Somebody who is told. `to` is where, without what may be a secret; `signed` says whether what
    is sent is; `job` is whose it is, "" where it is the grid's, which `jobs` may name or not.
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
    """`state` is pending, delivered or given up; `due_s` when the next try is, where it is pending;
    `error` what came of the last one."""

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
    """Those on their way first, then what came of the others, the newest first."""

    notifications: list[NotificationView]


class TestedView(TypedDict):
    """`error` is "" where the test was delivered."""

    target: str
    error: str


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


def notification_view(one: Notification) -> NotificationView:
    is_pending = one.state == "pending"
    return {
        "id": one.id,
        "moment": one.moment,
        "job": one.job,
        "target": one.target,
        "at_s": one.at_s,
        "state": one.state,
        "attempts": one.attempts,
        "due_s": one.due_s if is_pending else None,
        "ended_s": one.ended_s,
        "error": one.error,
    }


def log_view(notifying: Notifier, limit: int) -> NotificationsView:
    """The log as it is, of so many at the most."""
    every = [*notifying.book.pending.values(), *reversed(notifying.book.log)]
    return {"notifications": [notification_view(one) for one in every[:limit]]}
