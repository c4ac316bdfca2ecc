"""The five ports, and the two seams inside the worker and the fleet, as Protocols.

A port takes and returns plain data and knows no policy. A difference between backends is a fact
in a capability record, never a method that raises. All times are seconds unless a name says
otherwise; epoch times come from the Clock.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from batchlab.jobdef import JobDef
from batchlab.model import (
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
    """Time from outside. Waiting is `asyncio.sleep`, which the simulator's loop makes virtual."""

    def now_s(self) -> float:
        """Seconds since the epoch; may jump, so never subtract two of them to measure."""

    def monotonic_s(self) -> float:
        """Seconds from an arbitrary start; never goes back."""


class Ids(Protocol):
    """Fresh identifiers from outside, for the few things that are not derived."""

    def fresh(self, kind: str) -> str:
        """A short id such as `w-3f9c2a`, unique within the grid. `kind` is its prefix."""


# --- Objects (S3) --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object in a listing; `size` in bytes."""

    key: str
    size: int
    etag: str


class Objects(Protocol):
    """A bucket. Read-after-write consistent; keys are UTF-8, `/`-separated, without `..`."""

    async def put(
        self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None
    ) -> str:
        """Store `data`, return its ETag.

        With `if_absent` (S3: `If-None-Match: *`) raises AlreadyExists where the key is taken. An
        adapter that retries such a put by itself must recognise its own earlier write and not
        raise for it; where it cannot tell, AlreadyExists is right, and the caller reads.
        """

    async def get(self, key: str) -> bytes:
        """The whole object; NotFound where there is none."""

    async def get_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes `start` up to but not including `stop`, cut off at the end of the object."""

    async def get_if_changed(self, key: str, etag: str | None) -> tuple[bytes, str] | None:
        """Content and ETag, None while the ETag is still `etag`; NotFound where there is none."""

    async def head(self, key: str) -> ObjectInfo | None:
        """Facts about one object, None where there is none."""

    def list(self, prefix: str, *, after: str = "") -> AsyncIterator[Sequence[ObjectInfo]]:
        """Pages of objects under `prefix`, in key order, with keys greater than `after`."""

    async def delete(self, keys: Sequence[str]) -> None:
        """Remove these; a key that is not there is no error."""

    async def upload(self, key: str, path: Path) -> int:
        """Store a local file by streaming (multipart), return its size in bytes."""

    async def download(self, key: str, path: Path) -> int:
        """Fetch into a local file by streaming, return its size in bytes; NotFound as `get`."""

    def local_path(self, key: str) -> Path | None:
        """Where the object lies as a file that may be read in place, None where it does not."""


# --- Queue (SQS) ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message to send; `delay_s` is at most 900."""

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
    """Epoch seconds at which it was sent."""
    first_received_s: float


@dataclass(frozen=True, slots=True)
class QueueSpec:
    """A queue as it should be. `max_receives` moves a message to `dead_letters` beyond it."""

    name: str
    visibility_s: float = 30.0
    retention_s: float = 1_209_600.0
    dead_letters: str | None = None
    max_receives: int = 10


@dataclass(frozen=True, slots=True)
class Depth:
    """Approximate counts, as SQS gives them."""

    visible: int
    in_flight: int
    delayed: int


class Queue(Protocol):
    """Queues addressed by name, with the semantics of SQS standard queues: at least once, any
    order, at most 10 entries a call and 256 KiB a call; more is TooLarge.

    A receipt that is no longer ours: `delete` and `change_visibility` skip it silently or return
    it in their answer, as the service does; a caller must not rely on either.
    """

    async def ensure(self, spec: QueueSpec) -> None:
        """Create it, or bring its attributes to `spec`. `dead_letters` must exist already."""

    async def send(self, queue: str, messages: Sequence[Outgoing]) -> None:
        """Send up to 10. All or an exception; after one, some may have been sent."""

    async def receive(
        self,
        queue: str,
        *,
        max_messages: int = 10,
        wait_s: float = 20.0,
        visibility_s: float | None = None,
    ) -> Sequence[Message]:
        """Up to `max_messages` (≤ 10), waiting up to `wait_s` (≤ 20) for the first."""

    async def delete(self, queue: str, receipts: Sequence[str]) -> Sequence[str]:
        """Delete up to 10; returns those receipts that were refused."""

    async def change_visibility(
        self, queue: str, changes: Sequence[tuple[str, float]]
    ) -> Sequence[str]:
        """Set (receipt, seconds from now) for up to 10; returns the receipts that were refused."""

    async def depth(self, queue: str) -> Depth:
        """Approximate counts."""

    async def purge(self, queue: str) -> None:
        """Drop every message."""

    async def remove(self, queue: str) -> None:
        """Delete the queue with its messages; no error where there is none."""


# --- Fleet (Auto Scaling group) ------------------------------------------------------------------


class Fleet(Protocol):
    """Auto Scaling groups, one per pool. I5 is kept here: never outside [min, max]."""

    async def ensure(self, pool: Pool) -> None:
        """Create the pool's group, or change its limits."""

    async def describe(self) -> Sequence[GroupView]:
        """Every group with its instances, those Terminated within the last minute included."""

    async def set_desired(self, pool: str, desired: int, *, cause: str) -> None:
        """Set desired capacity; Refused outside [min, max]."""

    async def terminate(
        self, pool: str, instances: Sequence[str], *, decrement: bool, cause: str
    ) -> None:
        """Terminate named instances gracefully, with `decrement` lowering desired capacity."""

    async def protect(self, pool: str, instances: Sequence[str], *, on: bool) -> None:
        """Set scale-in protection."""

    async def ready(self, instance: str) -> None:
        """The instance's worker has given its first sign of life: Pending becomes InService."""

    async def set_health(self, instance: str, *, healthy: bool, cause: str) -> None:
        """Report an instance's health; an unhealthy one is replaced."""

    async def activities(self, pool: str | None = None, *, limit: int = 50) -> Sequence[Activity]:
        """Scaling activities with their causes, newest first."""

    async def tick(self) -> Sequence[Instance]:
        """Converge one step; returns the instances found dead since the last call.

        A managed service converges by itself; its adapter only compares. `Instance.note` says how
        one died ("exit -9"), and begins with "terminated" where the group itself ended it.
        """


ANY_MACHINE = Machine()


class Launcher(Protocol):
    """How an instance comes to be: a process, a container, a coroutine in the simulator."""

    async def launch(self, pool: Pool, instance: str, machine: Machine = ANY_MACHINE) -> None:
        """Start a worker that knows itself as `instance`; where machines differ, on such a one."""

    async def terminate(self, instance: str, *, grace_s: float) -> None:
        """Ask it to drain (SIGTERM), kill it after `grace_s`; returns at once."""

    async def running(self) -> Mapping[str, str | None]:
        """Every instance known: None while it lives, else how it ended ("exit -9")."""


@dataclass(frozen=True, slots=True)
class Notice:
    """That this instance will be taken away: `why` in words, at the latest `by_s` (seconds of the
    epoch; None where nobody says when)."""

    why: str
    by_s: float | None = None


class Notices(Protocol):
    """What the platform tells an instance about its own end: a Spot interruption, a lifecycle
    state that is Terminated."""

    async def notice(self) -> Notice | None:
        """The notice that stands, None while the instance may go on; BackendError where nobody
        can be asked."""


# --- Ledger (analytics store) --------------------------------------------------------------------


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
    """A stage's row: its counters, and how far its plan has been cut into bundles.

    `plan_round` is the round whose plan its tasks come from; `cut_seq` numbers the cuts of that
    round, -1 before the first; `left` are the tasks not yet cut.
    """

    counts: StageCounts
    plan_round: int = 0
    cut_seq: int = -1
    left: TaskSet = TaskSet()


@dataclass(frozen=True, slots=True)
class BundleRecord:
    """A bundle's row: planned while `completion` is None. `seq` orders completions as folded."""

    bundle: Bundle
    completion: Completion | None = None
    seq: int | None = None


@dataclass(frozen=True, slots=True)
class Cut:
    """Bundles that a planner committed to, the content of one plan/cuts object."""

    job: JobId
    stage: StageName
    round: int
    seq: int
    bundles: tuple[Bundle, ...]
    left: TaskSet
    planned: int | None = None
    """Set in a stage's first cut: its number of tasks."""
    at_s: float | None = field(default=None, compare=False)
    """When it was decided, for reports; None where the job's submission decided it too."""


@dataclass(frozen=True, slots=True)
class Reopening:
    """What one `job retry` takes back from a stage's counters before it runs again.

    `replan` says that the stage's plan itself is void (a gather), so `planned` is unknown again,
    and that its bundles so far appear in no listing any more.
    """

    stage: StageName
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    replan: bool = False


@dataclass(frozen=True, slots=True)
class Ending:
    """How a round of a job ended; `closed` tasks of each stage never came to be."""

    state: JobState
    reason: str
    ended_s: float
    closed: Mapping[StageName, int]


@dataclass(frozen=True, slots=True)
class Round:
    """What one round of a job has come to, as far as the bucket says.

    `planned` are the chained stages whose number of tasks its first cuts say; `casualties` belong
    to the completions, one each.
    """

    reopened: Sequence[Reopening]
    cuts: Sequence[Cut]
    planned: Mapping[StageName, int]
    completions: Sequence[Completion]
    casualties: Sequence[Mapping[StageName, int]]
    ending: Ending | None


@dataclass(frozen=True, slots=True)
class Past:
    """All that the bucket says of a job: `state` is how it began, `rounds` what followed."""

    job: JobDef
    state: JobState
    rounds: Sequence[Round]
    control: Control


@dataclass(frozen=True, slots=True)
class JobRows:
    """A job's row and those of its stages, in order, as of one moment."""

    job: JobRecord
    stages: tuple[StageRecord, ...]


@dataclass(frozen=True, slots=True)
class Written:
    """What a write came to: the rows after it, and whether it has changed them."""

    rows: JobRows
    is_new: bool


@dataclass(frozen=True, slots=True)
class Folded:
    """What folding came to: which completions were new, and the rows of their jobs after it.

    The i-th completion, where it was new, has the seq `first_seq` + i; nobody else has any between.
    """

    new: Sequence[bool]
    first_seq: int
    jobs: Mapping[JobId, JobRows]


@dataclass(frozen=True, slots=True)
class Lease:
    """A lease as it stands: every renewal adds 1 to `beat`. One that is seen unchanged for as long
    as it lasts has run out, by the watch of whoever sees it; no two clocks have to agree. `beat`
    never starts again, so an owner whose renewal adds more than 1 may not have been the only one.
    """

    owner: str
    beat: int


class Ledger(Protocol):
    """The projection of the bucket that people and the planner read.

    Every method is one transaction and may be repeated: what is already there is left alone.
    Readers see whole transactions. Facts about single tasks are not here but in the outcomes.
    Writes on the way of every bundle answer with the rows they leave, which saves reading them.
    """

    async def add_job(self, job: JobDef, *, state: JobState, cut: Cut | None = None) -> Written:
        """Insert the job with its stages, and its first cut where that is known; an existing id
        or token leaves the existing rows."""

    async def job(self, job: JobId) -> JobRecord:
        """One job; NotFound."""

    async def jobs(
        self, *, active: bool = False, limit: int = 100, before: str | None = None
    ) -> Sequence[JobRecord]:
        """Newest first by (submitted_s, id); `active` leaves out jobs that have ended; `before`
        is the id of the last row of the previous page."""

    async def move_job(self, job: JobId, state: JobState, *, reason: str = "") -> bool:
        """Change state by the table of moves; False where it has no such arrow (or no change)."""

    async def set_control(self, job: JobId, control: Control) -> None:
        """Record what the control object says; nothing is asked of a job that has ended, whatever
        that says: there the call changes nothing, and the control is RUN."""

    async def rows(self, job: JobId) -> JobRows:
        """The job with its stages; NotFound."""

    async def add_cut(self, cut: Cut) -> Written:
        """Record a cut and its bundles as planned, which makes a job RUNNABLE that was SUBMITTED
        or PENDING; a cut that is known, or older than one that is, changes nothing.

        A stage whose `plan_round` is older than the cut's takes the cut's round.
        """

    async def set_planned(self, job: JobId, stage: StageName, planned: int) -> Written:
        """Set a stage's number of planned tasks where it is not known yet (chained stages)."""

    async def fold(
        self, completions: Sequence[Completion], casualties: Sequence[Mapping[StageName, int]]
    ) -> Folded:
        """Fold outcomes, each exactly once however often it comes. A job that waited is RUNNING.

        Counters of the bundle's stage grow by what it says, those named in the completion's
        `casualties` grow in `cancelled`, and its `follows` become planned bundles (a follow that
        has been folded already stays done).
        """

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
        """Bundles in the order (seq, stage, id); planned ones last. `done` True or False filters;
        `after_seq` gives completions folded after that one; `failed` only those with failed
        tasks."""

    async def reopen(self, job: JobId, round: int, stages: Sequence[Reopening]) -> bool:
        """Begin round `round` of a job that has ended; False where that round has begun before."""

    async def finish(
        self,
        job: JobId,
        state: JobState,
        *,
        round: int,
        reason: str,
        ended_s: float,
        closed: Mapping[StageName, int],
    ) -> Written:
        """End the job: `closed` tasks of each stage never came to be and count as cancelled (a
        stage without a plan gets planned = closed). Changes nothing where it has ended before."""

    async def lease(self, name: str, owner: str, *, over: Lease | None = None) -> Lease:
        """Take the lease where it is free, renew it where it is ours, or take it over where it
        still stands as `over`, seen earlier. Answers how it stands now, ours or not."""

    async def release(self, name: str, owner: str) -> None:
        """Give the lease back if it is ours; its beat goes on from there."""

    async def version(self, job: JobId) -> str:
        """What is known of the job, in a word that changes with it; "" where nothing is."""

    async def restore(self, past: Past, *, over: str) -> bool:
        """Put what the bucket says of a job in the place of all that is known of it; False, and
        nothing is changed, where the job's version is not `over` any more."""

    async def forget(self, jobs: Sequence[JobId] | None = None) -> None:
        """Forget these jobs, or every one; leases stay."""

    async def close(self) -> None:
        """Release connections."""
