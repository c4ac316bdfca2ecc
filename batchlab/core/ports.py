"""Protocols of the ports: clock, ids, objects, queues, fleet, launcher, notices, and ledger.

A port takes and returns plain data and contains no policy. Differences between backends are capabilities, never methods
that raise. All times are seconds unless a name states another unit. Epoch times come from the Clock.

The ledger is a projection of the bucket that people and the planner read. Each call of it is one transaction and may be
repeated. A change names the round of the job, so a late call of a paused manager does not change a later round. The
values follow from the bucket alone, so a rebuilt ledger has equal rows.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, overload

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
    StageCounts,
    StageName,
    TaskSet,
)

MAX_MESSAGE_BYTES = 256 * 1024
MAX_BATCH = 10
MAX_DELAY_S = 900.0
MAX_VISIBILITY_S = 43_200.0
MAX_WAIT_S = 20.0


class Clock(Protocol):
    """Source of the time. To wait, use `asyncio.sleep`, which is virtual in the simulator."""

    def now_s(self) -> float:
        """Return seconds since the epoch. They may jump, so do not measure durations with them."""

    def monotonic_s(self) -> float:
        """Return seconds since an arbitrary start. They never go back."""


class Ids(Protocol):
    """Source of new identifiers, for things whose ids are not derived from others."""

    def fresh(self, kind: str) -> str:
        """Return a short id such as `w-3f9c2a`, unique in the grid. `kind` is its prefix."""


# --- Objects (S3) --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object in a listing. `size` is in bytes."""

    key: str
    size: int
    etag: str


class Objects(Protocol):
    """A bucket with read-after-write consistency. Keys are UTF-8, `/`-separated, without `..`."""

    async def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Store `data` and return its ETag.

        With `if_absent`, raise AlreadyExists if the object exists. With `if_match`, raise AlreadyExists if its ETag is
        another one. An adapter that repeats such a put must recognize its own earlier write. If it cannot, it raises
        AlreadyExists, and the caller reads the object.
        """

    async def get(self, key: str, *, limit: int | None = None) -> bytes:
        """Return the object. Raise NotFound if it does not exist.

        Raise TooLarge, before the content is read, if it has more than `limit` bytes.
        """

    async def get_range(self, key: str, start: int, stop: int) -> bytes:
        """Return the bytes from `start` up to `stop`, exclusive, or to the end of the object."""

    async def get_if_changed(self, key: str, etag: str | None) -> tuple[bytes, str] | None:
        """Return content and ETag, or None if the ETag is still `etag`. Raise NotFound if the object does not exist."""

    async def head(self, key: str) -> ObjectInfo | None:
        """Return size and ETag of the object, or None if it does not exist."""

    def list(self, prefix: str, *, after: str = "") -> AsyncIterator[Sequence[ObjectInfo]]:
        """Yield pages of objects under `prefix` with keys greater than `after`, in key order."""

    async def delete(self, keys: Sequence[str]) -> None:
        """Delete these objects, and ignore those that do not exist."""

    async def upload(self, key: str, path: Path, *, if_absent: bool = False) -> int:
        """Store a local file, in parts if it is large, and return its size in bytes.

        With `if_absent`, raise AlreadyExists if the object exists.
        """

    async def download(self, key: str, path: Path) -> int:
        """Write the object to a local file, and return its size in bytes.

        Raise NotFound if the object does not exist.
        """


class LocalFiles(Protocol):
    """Objects of a bucket that are files of this machine, so that a program can read them in place."""

    def path(self, key: str) -> Path | None:
        """Return the path of the object's file, or None if the object does not exist."""


# --- Queue (SQS) ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message to send. `delay_s` is at most 900."""

    body: str
    delay_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Message:
    """A received message. `receive_count` counts this receive, so it is 1 the first time."""

    id: str
    body: str
    receipt: str
    receive_count: int
    sent_s: float
    """Time at which it was sent, in epoch seconds."""
    first_received_s: float


@dataclass(frozen=True, slots=True)
class QueueSpec:
    """Target configuration of a queue. After `max_receives`, a message moves to `dead_letters`."""

    name: str
    visibility_s: float = 30.0
    retention_s: float = 1_209_600.0
    dead_letters: str | None = None
    max_receives: int = 10


@dataclass(frozen=True, slots=True)
class Depth:
    """Approximate counts of messages, as SQS returns them."""

    visible: int
    in_flight: int
    delayed: int


class Queue(Protocol):
    """Queues by name, with the semantics of SQS standard queues.

    Messages arrive at least once and in any order. A call takes at most 10 entries and 256 KiB. Otherwise, it raises
    TooLarge. `delete` and `change_visibility` either ignore an expired receipt or return it as refused. A caller must
    not rely on either.
    """

    async def ensure(self, spec: QueueSpec) -> None:
        """Create the queue, or change its attributes to `spec`. `dead_letters` must exist."""

    async def send(self, queue: str, messages: Sequence[Outgoing]) -> None:
        """Send up to 10 messages. After an exception, some may have been sent."""

    async def receive(
        self, queue: str, *, max_messages: int = 10, wait_s: float = 20.0, visibility_s: float | None = None
    ) -> Sequence[Message]:
        """Receive up to `max_messages` (≤ 10), and wait up to `wait_s` (≤ 20) for the first."""

    async def delete(self, queue: str, receipts: Sequence[str]) -> Sequence[str]:
        """Delete up to 10 messages, and return the receipts that were refused."""

    async def change_visibility(self, queue: str, changes: Sequence[tuple[str, float]]) -> Sequence[str]:
        """Set up to 10 visibility timeouts, as (receipt, seconds from now). Return the refused receipts."""

    async def depth(self, queue: str) -> Depth:
        """Return approximate counts of the queue's messages."""

    async def purge(self, queue: str) -> None:
        """Delete every message."""

    async def remove(self, queue: str) -> None:
        """Delete the queue with its messages, if it exists."""


# --- Fleet (Auto Scaling group) ------------------------------------------------------------------


KEEP_TERMINATED_S = 60.0
"""Time for which a fleet still lists an instance that is Terminated."""


class Fleet(Protocol):
    """Auto Scaling groups, one for each pool. Desired capacity stays within [min, max] (I5)."""

    async def ensure(self, pool: Pool) -> None:
        """Create the pool's group, or change its limits."""

    async def describe(self) -> Sequence[GroupView]:
        """Return every group with its instances. They include those that became Terminated less
        than `KEEP_TERMINATED_S` ago."""

    async def set_desired(self, pool: str, desired: int, *, cause: str) -> None:
        """Set the desired capacity. Raise Refused if it is outside [min, max]."""

    async def terminate(self, pool: str, instances: Sequence[str], *, decrement: bool, cause: str) -> None:
        """Terminate the instances gracefully. With `decrement`, desired capacity falls as well."""

    async def protect(self, pool: str, instances: Sequence[str], *, on: bool) -> None:
        """Set scale-in protection."""

    async def ready(self, instance: str) -> None:
        """Report the first heartbeat of the instance's worker: Pending becomes InService."""

    async def set_health(self, instance: str, *, healthy: bool, cause: str) -> None:
        """Report an instance's health. The group replaces an unhealthy instance."""

    async def activities(self, pool: str | None = None, *, limit: int = 50) -> Sequence[Activity]:
        """Return scaling activities with their causes, newest first."""

    async def tick(self) -> Sequence[Instance]:
        """Converge one step, and return the instances found dead since the last call.

        A managed service converges by itself, and its adapter only compares. `Instance.note` is the cause of the end
        ("exit -9"). It begins with "terminated" if the group ended the instance.
        """


ANY_MACHINE = Machine()

KEEP_ENDED_S = 600.0
"""Time for which a launcher reports the end of an instance. A fleet asks every few seconds."""


class Launcher(Protocol):
    """Launcher of instances: processes, containers, or coroutines of the simulator."""

    async def launch(self, pool: Pool, instance: str, machine: Machine = ANY_MACHINE) -> None:
        """Start a worker with the instance id `instance`.

        Launchers that have several types of machines start it on `machine`. Raise AlreadyExists if the id was used in
        the last `KEEP_ENDED_S`, and BackendError if the instance cannot be started."""

    async def terminate(self, instance: str, *, grace_s: float) -> None:
        """Ask the instance to drain (SIGTERM), and kill it after `grace_s`. Return at once.

        If the call is repeated, the earlier deadline holds. Unknown and ended instances are ignored."""

    async def running(self) -> Mapping[str, str | None]:
        """Return every instance until `KEEP_ENDED_S` after its end.

        The value is None while the instance runs, and then the cause of its end ("exit -9").
        """


@dataclass(frozen=True, slots=True)
class Notice:
    """Notice that the platform will terminate this instance.

    `why` is the reason in words. `by_s` is the latest time in epoch seconds, or None if it is unknown.
    """

    why: str
    by_s: float | None = None


class Notices(Protocol):
    """Source of the platform's notices to an instance.

    A notice is a Spot interruption, or Terminated as the target lifecycle state.
    """

    async def notice(self) -> Notice | None:
        """Return the current notice, or None if there is none. Raise BackendError if this fails."""


# --- Ledger ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job's row. `round` counts the user's retries."""

    job: JobDef
    state: JobState
    reason: str = ""
    control: Control = Control.RUN
    round: int = 0
    ended_s: float | None = None


@dataclass(frozen=True, slots=True)
class StageRecord:
    """A stage's row: its counters, and the part of its plan that is cut into bundles.

    `plan_round` is the round of the plan that defines its tasks. `cut_seq` numbers the cuts of that round, and is -1
    before the first. `left` are the tasks that are not cut yet.
    """

    counts: StageCounts
    plan_round: int = 0
    cut_seq: int = -1
    left: TaskSet = TaskSet()


@dataclass(frozen=True, slots=True)
class BundleRecord:
    """A bundle's row. `completion` is None while the bundle is planned. `seq` is the order of folds."""

    bundle: Bundle
    completion: Completion | None = None
    seq: int | None = None


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
    """Number of tasks of the stage, set in its first cut."""
    at_s: float | None = field(default=None, compare=False)
    """Time of the decision, for reports. None if the cut came with the job's submission."""


@dataclass(frozen=True, slots=True)
class Reopening:
    """Counts that a `job retry` takes back from a stage before the stage runs again.

    `replan` is true if the stage's plan itself is void (a gather). Then `planned` is unknown again, and no listing
    shows the stage's earlier bundles.
    """

    stage: StageName
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    replan: bool = False


@dataclass(frozen=True, slots=True)
class Ending:
    """End of a round of a job. `closed` has the number of tasks of each stage that were never planned."""

    state: JobState
    reason: str
    ended_s: float
    closed: Mapping[StageName, int]


@dataclass(frozen=True, slots=True)
class Round:
    """One round of a job, as the bucket describes it.

    `planned` are the chained stages whose number of tasks follows from the first cuts of the round. `casualties` has
    one mapping for each completion.
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

    `stamp` distinguishes writes that leave equal rows. It is internal to the ledger, so it is not compared.
    """

    job: JobRecord
    stages: tuple[StageRecord, ...]
    stamp: str | int = field(default="", compare=False, repr=False)

    def is_version(self, other: JobRows | None) -> bool:
        """Return whether the ledger has not changed the job between the two reads."""
        return other is not None and self == other and self.stamp == other.stamp


@dataclass(frozen=True, slots=True)
class ChangeResult:
    """Result of a change of a job: the rows after the change, and whether it changed them."""

    rows: JobRows
    is_new: bool

    def has_control(self, change: SetControl) -> bool:
        """Return whether the job has the control of the change.

        The job must be in the round of the change and must not have ended. A repeated change is new only once, so
        `is_new` does not answer this.
        """
        job = self.rows.job
        return job.round == change.round and not job.state.ended and job.control is change.control


@dataclass(frozen=True, slots=True)
class FoldResult:
    """Result of a `Fold`: which completions were new, and the rows of their jobs after it.

    A new completion at position i has the seq `first_seq` + i. No other completion has a seq between `first_seq` and
    the last of these.
    """

    new: Sequence[bool]
    first_seq: int
    jobs: Mapping[JobId, JobRows]


@dataclass(frozen=True, slots=True)
class AddJob:
    """Insert a job with its stages, and with its first cut if that is known.

    A job with the same id or token leaves the existing rows unchanged.
    """

    job: JobDef
    state: JobState
    cut: Cut | None = None

    @property
    def job_id(self) -> JobId:
        return self.job.id


@dataclass(frozen=True, slots=True)
class MoveJob:
    """Change the state of a job, if `may_move` allows it and the job is in that round."""

    job_id: JobId
    state: JobState
    round: int


@dataclass(frozen=True, slots=True)
class SetControl:
    """Record the command in the job's control object.

    The change is ignored if the job is in another round or has ended. A cancellation is final within its round.
    """

    job_id: JobId
    control: Control
    round: int


@dataclass(frozen=True, slots=True)
class AddCut:
    """Record a cut and its bundles as planned. A SUBMITTED or PENDING job becomes RUNNABLE.

    A cut is ignored if it is known, older than a known one, or of another round than the job. A stage whose
    `plan_round` is older than the cut takes the round of the cut.
    """

    cut: Cut

    @property
    def job_id(self) -> JobId:
        return self.cut.job


@dataclass(frozen=True, slots=True)
class SetPlanned:
    """Set the number of planned tasks of a chained stage.

    The change is ignored if the number is known or the job is in another round.
    """

    job_id: JobId
    stage: StageName
    planned: int
    round: int


@dataclass(frozen=True, slots=True)
class Reopen:
    """Begin round `round` of a job that ended without success, unless that round has begun."""

    job_id: JobId
    round: int
    stages: Sequence[Reopening]


@dataclass(frozen=True, slots=True)
class Finish:
    """End the job if it is in round `round` and has not ended.

    The tasks that `ending.closed` counts for each stage are counted as canceled. A stage without a plan gets that count
    as its planned tasks.
    """

    job_id: JobId
    ending: Ending
    round: int


@dataclass(frozen=True, slots=True)
class Fold:
    """Fold completions, each exactly once even if it arrives several times.

    A waiting job becomes RUNNING. The completion is added to the counters of the bundle's stage. `casualties` has one
    mapping for each completion. Its counts are added to `cancelled` of these stages. The `follows` of a completion
    become planned bundles, unless they are already folded.
    """

    completions: Sequence[Completion]
    casualties: Sequence[Mapping[StageName, int]]


JobChange = AddJob | MoveJob | SetControl | AddCut | SetPlanned | Reopen | Finish
"""A change of one job. Its effect depends on the round of the job. A late call of a former leader
therefore does not change a later round."""
Change = JobChange | Fold


@dataclass(frozen=True, slots=True)
class Lease:
    """State of a lease. Every renewal adds 1 to `beat`.

    A lease has expired if an observer sees it unchanged for its whole duration. The observer measures the duration on
    its own clock, so clocks need not agree. `beat` never starts again, so if a renewal adds more than 1, another owner
    may have held the lease in between.
    """

    owner: str
    beat: int


class Ledger(Protocol):
    """Rows of jobs, stages, and bundles, and the leases of managers.

    Readers see whole transactions. The ledger does not store single tasks, because the outcomes contain them. A change
    returns the rows that it leaves, which saves the caller a read.
    """

    @overload
    async def apply(self, change: Fold) -> FoldResult: ...

    @overload
    async def apply(self, change: JobChange) -> ChangeResult:
        """Apply the change, unless it was applied before. Raise NotFound if the job or a stage does not exist."""

    async def job(self, job: JobId) -> JobRecord:
        """Return one job. Raise NotFound if it does not exist."""

    async def jobs(self, *, active: bool = False, limit: int = 100, before: str | None = None) -> Sequence[JobRecord]:
        """Return jobs, newest first by (submitted_s, id). `active` excludes jobs that have ended.

        `before` is the id of the last job of the previous page. Raise NotFound if it does not exist.
        """

    async def rows(self, job: JobId) -> JobRows:
        """Return the job with its stages. Raise NotFound if it does not exist."""

    async def bundles(
        self,
        job: JobId,
        *,
        stage: StageName | None = None,
        done: bool | None = None,
        after_seq: int | None = None,
        failed: bool = False,
        limit: int | None = None,
    ) -> Sequence[BundleRecord]:
        """Return bundles in the order (seq, stage, id), planned ones last.

        `done` selects folded (True) or planned bundles (False). `after_seq` selects completions that were folded after
        that one. `failed` selects bundles with failed tasks.
        """

    async def lease(self, name: str, owner: str, *, over: Lease | None = None) -> Lease:
        """Take the lease if it is free, or renew it if `owner` holds it. Return the resulting lease.

        If the lease is still equal to `over`, which the caller read earlier, `owner` takes it over.
        """

    async def release(self, name: str, owner: str) -> None:
        """Release the lease if the owner holds it. Its beat continues from there."""

    async def restore(self, past: JobHistory, *, over: JobRows | None) -> bool:
        """Replace all rows of a job by the state in the bucket.

        `over` are the rows that `rows` returned before the bucket was read, None if the job did not exist. Return False
        and change nothing if the job has changed since.
        """

    async def forget(self, jobs: Sequence[JobId] | None = None) -> None:
        """Delete these jobs, or all jobs. Leases stay."""

    async def close(self) -> None:
        """Release connections."""
