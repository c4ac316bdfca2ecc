"""Protocols of the ports: clock, ids, objects, queues, fleet, launcher, notices, and ledger.

A port takes and returns plain data and does not contain policy. Differences between backends are expressed as
capabilities, and never as methods that raise errors. All times are in seconds unless a name states another unit. Epoch
times come from the Clock.

The ledger is a projection of the bucket. People and the planner read the ledger. Each call of the ledger is one
transaction and may be repeated. A change of the ledger names the round of the job, so a late call of a paused manager
does not change a later round. The rows of the ledger are derived from the bucket alone, so a rebuilt ledger has the
same rows.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol, overload, runtime_checkable

from batchlab.core.job_definition import JobDef
from batchlab.core.model import (
    Activity,
    Bundle,
    Completion,
    Control,
    GroupView,
    Instance,
    JobId,
    JobState,
    Machine,
    Pool,
    ScheduledEnd,
    StageCounts,
    StageName,
    TaskSet,
)

MAX_MESSAGE_BYTES = 256 * 1024
MAX_BATCH = 10
MAX_DELAY_S = 900.0
MAX_WAIT_S = 20.0


class Clock(Protocol):
    """Source of the time. Use `asyncio.sleep` to wait, because the simulator runs `asyncio.sleep` in virtual time."""

    def now_s(self) -> float:
        """Return seconds since the epoch. The epoch time may jump, so do not measure durations with `now_s`."""

    def monotonic_s(self) -> float:
        """Return seconds since an arbitrary start. The monotonic time never goes back."""


class Ids(Protocol):
    """Source of new ids that are not derived from other ids."""

    def fresh(self, kind: str) -> str:
        """Return a short id such as `w-3f9c2a`, unique in the grid. `kind` is the prefix of the id."""


# --- Objects (S3) --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object in a listing, with its `size` in bytes."""

    key: str
    size: int
    etag: str


class Objects(Protocol):
    """A bucket with read-after-write consistency. Object keys are UTF-8, `/`-separated, and without `..`."""

    async def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Store `data` and return its ETag.

        With `if_absent`, raise AlreadyExists if the object exists. With `if_match`, raise AlreadyExists if the object's
        ETag differs from `if_match`. An adapter that repeats a conditional put must recognize its own earlier write. An
        adapter that cannot recognize its own earlier write raises AlreadyExists, and the caller reads the object.
        """

    async def get(self, key: str, *, limit: int | None = None) -> bytes:
        """Return the content of the object. Raise NotFound if the object does not exist.

        If the object has more than `limit` bytes, raise TooLarge before the content is read.
        """

    async def get_range(self, key: str, start: int, stop: int) -> bytes:
        """Return the bytes of the object from `start` up to but not including `stop`, or to the end of the object."""

    async def get_if_changed(self, key: str, etag: str | None, *, limit: int | None = None) -> tuple[bytes, str] | None:
        """Return the object's content and ETag, or None if the ETag is still `etag`.

        Raise NotFound if the object does not exist. If the object has more than `limit` bytes, raise TooLarge before
        the content is read.
        """

    async def head(self, key: str) -> ObjectInfo | None:
        """Return the size and the ETag of the object, or None if the object does not exist."""

    def list(self, prefix: str, *, after: str = "") -> AsyncIterator[Sequence[ObjectInfo]]:
        """Yield pages of objects under `prefix` with keys greater than `after`, in key order."""

    async def delete(self, keys: Sequence[str]) -> None:
        """Delete the objects with the keys `keys`, and ignore keys without an object."""

    async def upload(self, key: str, path: Path, *, if_absent: bool = False) -> int:
        """Store a local file, in parts if the file is large, and return the size of the file in bytes.

        With `if_absent`, raise AlreadyExists if the object exists.
        """

    async def download(self, key: str, path: Path) -> int:
        """Write the object to a local file, and return the size of the object in bytes.

        Raise NotFound if the object does not exist.
        """


class LocalFiles(Protocol):
    """Objects of a bucket that are local files. A program can read the files in place."""

    def path(self, key: str) -> Path | None:
        """Return the path of the object's file, or None if the object does not exist."""

    def make_folder(self, key: str) -> None:
        """Create the folder of the object's file, so that the writer of the object need not create the folder."""


# --- Queue (SQS) ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message to send. `delay_s` is at most 900 seconds."""

    body: str
    delay_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Message:
    """A received message.

    `receive_count` includes the current receive, so `receive_count` is 1 when a message is received for the first time.
    """

    id: str
    body: str
    receipt: str
    receive_count: int
    sent_s: float
    """Time at which the message was sent, in epoch seconds."""
    first_received_s: float


@dataclass(frozen=True, slots=True)
class QueueSpec:
    """Target configuration of a queue. After `max_receives` receives, a message moves to the queue `dead_letters`."""

    name: str
    visibility_s: float = 30.0
    retention_s: float = 1_209_600.0
    dead_letters: str | None = None
    max_receives: int = 10


@dataclass(frozen=True, slots=True)
class Depth:
    """Approximate counts of a queue's messages, as SQS reports them."""

    visible: int
    in_flight: int
    delayed: int


class Queue(Protocol):
    """Queues by name, with the semantics of SQS standard queues.

    Messages arrive at least once and in any order. A call with more than 10 entries or 256 KiB raises TooLarge.
    `delete` and `change_visibility` either ignore an expired receipt or return it as refused, depending on the backend.
    """

    async def ensure(self, spec: QueueSpec) -> None:
        """Create the queue, or change its attributes to `spec`. The queue `dead_letters` must exist."""

    async def send(self, queue: str, messages: Sequence[Outgoing]) -> None:
        """Send up to 10 messages. If the call raises an exception, some of the messages may have been sent."""

    async def receive(
        self, queue: str, *, max_messages: int = 10, wait_s: float = 20.0, visibility_s: float | None = None
    ) -> Sequence[Message]:
        """Receive up to `max_messages` (≤ 10), and wait up to `wait_s` seconds (≤ 20) for the first message."""

    async def delete(self, queue: str, receipts: Sequence[str]) -> Sequence[str]:
        """Delete up to 10 messages, and return the receipts that were refused."""

    async def change_visibility(self, queue: str, changes: Sequence[tuple[str, float]]) -> Sequence[str]:
        """Set up to 10 visibility timeouts, given as (receipt, seconds from now), and return the refused receipts."""

    async def depth(self, queue: str) -> Depth:
        """Return approximate counts of the queue's messages."""

    async def purge(self, queue: str) -> None:
        """Delete every message of the queue."""

    async def remove(self, queue: str) -> None:
        """Delete the queue with its messages, if the queue exists."""


@runtime_checkable
class DirectQueue(Queue, Protocol):
    """Queues of a backend on one machine, where a sender sees waiting receivers."""

    def is_awaited(self, queue: str) -> bool:
        """Return whether a receiver waits for a message of the queue at the moment, as far as known."""

    async def close(self) -> None:
        """Close the queues, after which no method may be called."""


class Replies(Protocol):
    """Replies of workers to clients on the same machine.

    A reply may be lost. Every reply is also in an event of the worker, and its outcome is in the bucket.
    """

    def send(self, name: str, text: str) -> bool:
        """Send a text to the client that waits at `name`, without waiting. Return False if no client waits."""


class ReplyInbox(Protocol):
    """Place where one client waits for replies."""

    @property
    def name(self) -> str:
        """Name of the inbox, which the client sends to the worker."""

    async def receive(self, wait_s: float) -> Sequence[str]:
        """Return the texts that have arrived, or wait up to `wait_s` seconds for the first text."""

    def close(self) -> Sequence[str]:
        """Remove the inbox, and return the texts that have arrived. Later sends to the inbox return False."""


# --- Fleet (Auto Scaling group) ------------------------------------------------------------------


KEEP_TERMINATED_S = 60.0
"""Time for which a fleet still lists an instance that is Terminated."""


class Fleet(Protocol):
    """Auto Scaling groups, one for each pool. Desired capacity stays within [min, max] (I5)."""

    is_managed_service: bool
    """Whether a service performs scheduled actions without a manager, and instances outlive the managers."""

    async def ensure(self, pool: Pool) -> None:
        """Create the pool's Auto Scaling group, or change the limits of the group."""

    async def describe(self) -> Sequence[GroupView]:
        """Return every group with its instances.

        Instances that became Terminated less than `KEEP_TERMINATED_S` ago are included.
        """

    async def set_desired(self, pool: str, desired: int, *, cause: str) -> None:
        """Set the desired capacity of a pool. Raise Refused if `desired` is outside the pool's [min, max]."""

    async def terminate(self, pool: str, instances: Sequence[str], *, decrement: bool, cause: str) -> None:
        """Terminate the instances gracefully.

        With `decrement`, reduce the desired capacity by the number of instances.
        """

    async def protect(self, pool: str, instances: Sequence[str], *, on: bool) -> None:
        """Set the scale-in protection of the instances."""

    async def ready(self, instance: str) -> None:
        """Report the first heartbeat of the instance's worker, which changes the instance from Pending to InService."""

    async def set_health(self, instance: str, *, healthy: bool, cause: str) -> None:
        """Report an instance's health. The group replaces an unhealthy instance."""

    async def activities(self, pool: str | None = None, *, limit: int = 50) -> Sequence[Activity]:
        """Return scaling activities with their causes, from new to old."""

    async def schedule_end(self, pool: str, after_s: float | None) -> ScheduledEnd:
        """Schedule the end of the pool's fleet in `after_s` seconds, in place of an earlier schedule.

        The scheduled action sets the group's limits and its desired capacity to 0. Instances with scale-in protection
        stay. A managed service performs the action without a manager. With None, remove the scheduled action.
        """

    async def tick(self) -> Sequence[Instance]:
        """Move every group one step toward the group's desired capacity.

        Return the instances that were found dead since the last call.

        The adapter of a managed service only looks for dead instances, because the service itself reaches the desired
        capacity. `Instance.note` is the cause of the instance's end ("exit 1"). `Instance.note` begins with
        "terminated" if the group ended the instance.
        """


ANY_MACHINE = Machine()

KEEP_ENDED_S = 600.0
"""Time for which a launcher reports the end of an instance. A fleet reads the launcher's list every few seconds."""


class Launcher(Protocol):
    """Launcher of instances: processes, containers, or coroutines of the simulator."""

    async def launch(self, pool: Pool, instance: str, machine: Machine = ANY_MACHINE) -> None:
        """Start a worker with the instance id `instance`.

        Launchers that have several types of machines start the worker on `machine`. Raise AlreadyExists if the instance
        id was used in the last `KEEP_ENDED_S`. Raise BackendError if the instance cannot be started."""

    async def terminate(self, instance: str, *, grace_s: float) -> None:
        """Ask the instance to drain (SIGTERM), and kill it after `grace_s`, without waiting for its end.

        If `terminate` is called again for an instance, the earlier deadline holds. Unknown and ended instances are
        ignored."""

    async def running(self) -> Mapping[str, str | None]:
        """Return every instance until `KEEP_ENDED_S` after its end.

        The value for an instance is None while the instance runs, and the cause of its end ("exit 1") after its end.
        """


@dataclass(frozen=True, slots=True)
class Notice:
    """Notice that the platform will terminate the instance.

    `why` is the reason of the termination in words. `by_s` is the latest time of the termination in epoch seconds, or
    None if that time is unknown.
    """

    why: str
    by_s: float | None = None


class Notices(Protocol):
    """Source of the platform's termination notices to an instance.

    A notice is either a Spot interruption or the target lifecycle state Terminated.
    """

    async def notice(self) -> Notice | None:
        """Return the current notice, or None if the platform has not sent a notice. Raise BackendError if the notice
        cannot be read.
        """


# --- Ledger ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class JobRecord:
    """The ledger's row of a job. `round` counts the user's retries."""

    job: JobDef
    state: JobState
    reason: str = ""
    control: Control = Control.RUN
    round: int = 0
    ended_s: float | None = None


@dataclass(frozen=True, slots=True)
class StageRecord:
    """The ledger's row of a stage: its counters, and the progress of cutting its tasks into bundles.

    `plan_round` is the round of the plan that defines the stage's tasks. `cut_seq` is the number of the last cut in
    `plan_round`, and is -1 before the first cut. `left` are the tasks of the stage that are not cut into bundles yet.
    """

    counts: StageCounts
    plan_round: int = 0
    cut_seq: int = -1
    left: TaskSet = TaskSet()

    @property
    def may_have_outstanding_bundles(self) -> bool:
        """Return False if no task of the stage has been cut.

        A bundle may be outstanding although all cut tasks have ended, because the event of a split or failed bundle may
        arrive after the events of its follow-ups.
        """
        return self.counts.terminal > 0 or self.counts.planned != len(self.left)


@dataclass(frozen=True, slots=True)
class BundleRecord:
    """The ledger's row of a bundle.

    `completion` is None until the bundle's completion is folded. `seq` gives the order in which completions were
    folded.
    """

    bundle: Bundle
    completion: Completion | None = None
    seq: int | None = None


TaskRanges = Sequence[Sequence[int]]
"""Sorted ranges of tasks: the first task of each range, and the task after the last task."""


class BundleResult(NamedTuple):
    """The part of a folded bundle's row that lists and timelines need.

    A BundleResult is created faster than a BundleRecord. `retried` is the number of failed attempts that are retried.
    """

    seq: int
    stage: StageName
    tasks: TaskRanges
    attempt: int
    round: int
    worker: str
    started_s: float
    ended_s: float
    succeeded: TaskRanges
    failed: TaskRanges
    cancelled: TaskRanges
    retried: int

    @classmethod
    def of(cls, record: BundleRecord) -> BundleResult:
        """Return the result in the row of a bundle. Raise ValueError if the bundle is not folded."""
        bundle, done = record.bundle, record.completion
        if done is None or record.seq is None:
            raise ValueError(f"bundle {bundle.id} does not have a result")
        return cls(
            record.seq,
            bundle.stage,
            bundle.tasks.ranges,
            bundle.attempt,
            bundle.round,
            done.worker,
            done.started_s,
            done.ended_s,
            done.succeeded.ranges,
            done.failed.ranges,
            done.cancelled.ranges,
            done.retried,
        )


@dataclass(frozen=True, slots=True)
class Cut:
    """Bundles that a planner committed: the content of one plan/cuts object."""

    job: JobId
    stage: StageName
    round: int
    seq: int
    bundles: tuple[Bundle, ...]
    left: TaskSet
    planned: int | None = None
    """Number of tasks of the stage, set in the stage's first cut."""
    at_s: float | None = field(default=None, compare=False)
    """Time of the cut for reports, or None if the cut came with the job's submission."""


@dataclass(frozen=True, slots=True)
class Reopening:
    """Counts that a `job retry` subtracts from a stage's counters before the stage runs again.

    `replan` is true if the stage's plan is no longer valid, as for a gather. With `replan`, the stage's `planned`
    becomes None, and listings omit the stage's earlier bundles.
    """

    stage: StageName
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    replan: bool = False


@dataclass(frozen=True, slots=True)
class Ending:
    """End of a round of a job. `closed` has, for each stage, the number of tasks that were never planned."""

    state: JobState
    reason: str
    ended_s: float
    closed: Mapping[StageName, int]


@dataclass(frozen=True, slots=True)
class Round:
    """One round of a job, as the bucket describes it.

    `planned` has the number of tasks of the chained stages that is known from the round's first cuts. `casualties` has
    one mapping for each completion, from later stages to the number of their tasks that cannot run.
    """

    reopened: Sequence[Reopening]
    cuts: Sequence[Cut]
    planned: Mapping[StageName, int]
    completions: Sequence[Completion]
    casualties: Sequence[Mapping[StageName, int]]
    ending: Ending | None


@dataclass(frozen=True, slots=True)
class JobHistory:
    """Everything that the bucket contains about a job: its first state, and its rounds."""

    job: JobDef
    state: JobState
    rounds: Sequence[Round]
    control: Control


@dataclass(frozen=True, slots=True)
class JobRows:
    """The row of a job and the rows of its stages, in order, at one moment.

    `stamp` distinguishes two writes after which the rows are equal. `stamp` is internal to the ledger, so comparisons
    ignore it. Only `Ledger.rows` returns rows with a stamp.
    """

    job: JobRecord
    stages: tuple[StageRecord, ...]
    stamp: str | int = field(default="", compare=False, repr=False)

    @property
    def id(self) -> JobId:
        return self.job.job.id

    def is_version(self, other: JobRows | None) -> bool:
        """Return whether the job's rows in the ledger did not change between the read of `other` and the read of this
        JobRows.
        """
        return other is not None and self == other and self.stamp == other.stamp


@dataclass(frozen=True, slots=True)
class ChangeResult:
    """Result of a change of a job: the job's rows after the change, and whether the change modified them."""

    rows: JobRows
    is_new: bool

    def has_control(self, change: SetControl) -> bool:
        """Return whether the job has the control command that the change sets.

        The job must be in the round of the change and must not have ended. `is_new` is false for a repeated change, so
        `is_new` cannot be used instead.
        """
        job = self.rows.job
        return job.round == change.round and not job.state.ended and job.control is change.control


@dataclass(frozen=True, slots=True)
class FoldResult:
    """Result of a `Fold`: the new completions, and the rows of their jobs after the fold.

    A new completion at position i has the seq `first_seq` + i. The seqs of the new completions of one fold are
    contiguous.
    """

    new: Sequence[bool]
    first_seq: int
    jobs: Mapping[JobId, JobRows]


@dataclass(frozen=True, slots=True)
class AddJob:
    """Insert a job with its stages, and with its first cut if the first cut is known.

    If a job with the same id or token exists, its rows stay unchanged.
    """

    job: JobDef
    state: JobState
    cut: Cut | None = None

    @property
    def job_id(self) -> JobId:
        return self.job.id


@dataclass(frozen=True, slots=True)
class MoveJob:
    """Change the state of a job if `may_move` allows the change and the job is in round `round`."""

    job_id: JobId
    state: JobState
    round: int


@dataclass(frozen=True, slots=True)
class SetControl:
    """Record in the ledger the command that the job's control object has.

    The command is ignored if the job is in another round or has ended. A cancellation is final within its round.
    """

    job_id: JobId
    control: Control
    round: int


@dataclass(frozen=True, slots=True)
class AddCut:
    """Record a cut and its bundles as planned. A SUBMITTED or PENDING job becomes RUNNABLE.

    A cut is ignored if the ledger already has the cut or a later cut of the stage, or if the job is in another round. A
    stage whose `plan_round` is older than the cut takes the round of the cut.
    """

    cut: Cut

    @property
    def job_id(self) -> JobId:
        return self.cut.job


@dataclass(frozen=True, slots=True)
class SetPlanned:
    """Set the number of planned tasks of a chained stage.

    SetPlanned is ignored if the stage's number of tasks is known or the job is in another round.
    """

    job_id: JobId
    stage: StageName
    planned: int
    round: int


@dataclass(frozen=True, slots=True)
class Reopen:
    """Begin round `round` of a job that ended without success, unless the job has already begun round `round`."""

    job_id: JobId
    round: int
    stages: Sequence[Reopening]


@dataclass(frozen=True, slots=True)
class Finish:
    """End the job if the job is in round `round` and has not ended.

    The ledger counts the tasks in `ending.closed` as canceled. The number of a stage in `ending.closed` becomes the
    number of its planned tasks if the stage does not have a plan.
    """

    job_id: JobId
    ending: Ending
    round: int


@dataclass(frozen=True, slots=True)
class Fold:
    """Fold completions into the ledger, and fold each completion exactly once even if it arrives several times.

    A folded completion changes a waiting job to RUNNING, and is added to the counters of the bundle's stage.
    `casualties` has one mapping of stages to counts for each completion. Each count is added to the `cancelled` counter
    of its stage. The `follows` of a completion become planned bundles, unless their own completions are already folded.
    """

    completions: Sequence[Completion]
    casualties: Sequence[Mapping[StageName, int]]


JobChange = AddJob | MoveJob | SetControl | AddCut | SetPlanned | Reopen | Finish
"""A change of the rows of one job.

Every change names a round of the job, so a late call of a former leader does not change a later round.
"""
Change = JobChange | Fold


@dataclass(frozen=True, slots=True)
class Lease:
    """State of a lease. Every renewal adds 1 to `beat`.

    A lease has expired if an observer sees that the lease stays unchanged for its whole duration. The observer of a
    lease measures the duration on its own clock, so the clocks of two machines may differ. `beat` never decreases. If a
    renewal finds that `beat` grew by more than 1, another owner may have held the lease in between.
    """

    owner: str
    beat: int


class Ledger(Protocol):
    """Rows of jobs, stages, and bundles, and the leases of managers.

    Readers of the ledger see whole transactions. The ledger does not store single tasks, because the outcomes contain
    them. A change of the ledger returns the resulting rows, which saves the caller a read.
    """

    @overload
    async def apply(self, change: Fold) -> FoldResult: ...

    @overload
    async def apply(self, change: JobChange) -> ChangeResult:
        """Apply the change unless the change was applied before.

        Raise NotFound if the job or one of its stages does not exist.
        """

    async def job(self, job: JobId) -> JobRecord:
        """Return the row of one job. Raise NotFound if the job does not exist."""

    async def jobs(self, *, active: bool = False, limit: int = 100, before: str | None = None) -> Sequence[JobRows]:
        """Return jobs with their stages, sorted by (submitted_s, id) in descending order. With `active`, exclude jobs
        that have ended.

        `before` is the id of the last job of the previous page. Raise NotFound if the job `before` does not exist. The
        rows of a page have no stamp, so `restore` does not accept them.
        """

    async def rows(self, job: JobId) -> JobRows:
        """Return the job with its stages. Raise NotFound if the job does not exist."""

    async def bundles(
        self,
        *jobs: JobId,
        stage: StageName | None = None,
        done: bool | None = None,
        after_seq: int | None = None,
        failed: bool = False,
        limit: int | None = None,
    ) -> Sequence[BundleRecord]:
        """Return bundles of the jobs in the order (seq, stage, id), with planned bundles last. The order of the planned
        bundles of several jobs is undefined.

        `done` selects folded (True) or planned bundles (False). `after_seq` selects bundles whose completions have a
        greater seq. `failed` selects bundles with failed tasks.
        """

    async def results(self, job: JobId, *, after_seq: int, limit: int) -> Sequence[BundleResult]:
        """Return the results of the job's folded bundles with a seq above `after_seq`, in the order of their seqs."""

    async def lease(self, name: str, owner: str, *, over: Lease | None = None) -> Lease:
        """Take the lease if it is free, or renew the lease if `owner` holds it, and return the resulting lease.

        `over` is a lease that the caller read earlier. If the lease is still equal to `over`, `owner` takes over the
        lease.
        """

    async def release(self, name: str, owner: str) -> None:
        """Release the lease if `owner` holds the lease. The next owner continues the lease's `beat` from its last
        value.
        """

    async def restore(self, past: JobHistory, *, over: JobRows | None) -> bool:
        """Replace all rows of a job with the job's state in the bucket.

        `over` is the result of `rows` from before the bucket was read, or None if the job did not exist. If the job has
        changed since `over` was read, return False and change nothing.
        """

    async def forget(self, jobs: Sequence[JobId] | None = None) -> None:
        """Delete the rows of the jobs in `jobs`, or of all jobs, and keep the leases."""

    async def close(self) -> None:
        """Release the connections of the ledger."""
