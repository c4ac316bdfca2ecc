"""Protocol of the ledger, its rows, and the changes that it applies to them.

The ledger is a projection of the bucket that people and the planner read.

Invariants: each call is one transaction and may be repeated. A change names the round of the job,
so a late call of a paused manager does not change a later round. The values are frozen. They follow
from the bucket alone, so a rebuilt ledger has equal rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, overload

from batchlab.core.job_definition import JobDef
from batchlab.core.model import Bundle, Completion, Control, JobId, JobState, StageCounts, StageName, TaskSet


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

    `plan_round` is the round of the plan that defines its tasks. `cut_seq` numbers the cuts of that
    round, and is -1 before the first. `left` are the tasks that are not cut yet.
    """

    counts: StageCounts
    plan_round: int = 0
    cut_seq: int = -1
    left: TaskSet = TaskSet()


@dataclass(frozen=True, slots=True)
class BundleRecord:
    """A bundle's row. `completion` is None while the bundle is planned. `seq` is the order of
    folds."""

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

    `replan` is true if the stage's plan itself is void (a gather). Then `planned` is unknown again,
    and no listing shows the stage's earlier bundles.
    """

    stage: StageName
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    replan: bool = False


@dataclass(frozen=True, slots=True)
class Ending:
    """End of a round of a job. `closed` has the number of tasks of each stage that were never
    planned."""

    state: JobState
    reason: str
    ended_s: float
    closed: Mapping[StageName, int]


@dataclass(frozen=True, slots=True)
class Round:
    """One round of a job, as the bucket describes it.

    `planned` are the chained stages whose number of tasks follows from the first cuts of the round.
    `casualties` has one mapping for each completion.
    """

    reopened: Sequence[Reopening]
    cuts: Sequence[Cut]
    planned: Mapping[StageName, int]
    completions: Sequence[Completion]
    casualties: Sequence[Mapping[StageName, int]]
    ending: Ending | None


@dataclass(frozen=True, slots=True)
class Past:
    """Everything that the bucket contains about a job: its first state, and its rounds."""

    job: JobDef
    state: JobState
    rounds: Sequence[Round]
    control: Control


@dataclass(frozen=True, slots=True)
class JobRows:
    """The row of a job and the rows of its stages, in order, at one moment.

    `stamp` distinguishes writes that leave equal rows. It is internal to the ledger, so it is not
    compared.
    """

    job: JobRecord
    stages: tuple[StageRecord, ...]
    stamp: str | int = field(default="", compare=False, repr=False)

    def is_version(self, other: JobRows | None) -> bool:
        """Return whether the ledger has not changed the job between the two reads."""
        return other is not None and self == other and self.stamp == other.stamp


@dataclass(frozen=True, slots=True)
class Written:
    """Result of a change of a job: the rows after the change, and whether it changed them."""

    rows: JobRows
    is_new: bool

    def has_control(self, change: SetControl) -> bool:
        """Return whether the job has the control of the change.

        The job must be in the round of the change and must not have ended. A repeated change is new
        only once, so `is_new` does not answer this.
        """
        job = self.rows.job
        return job.round == change.round and not job.state.ended and job.control is change.control


@dataclass(frozen=True, slots=True)
class Folded:
    """Result of a `Fold`: which completions were new, and the rows of their jobs after it.

    A new completion at position i has the seq `first_seq` + i. No other completion has a seq
    between `first_seq` and the last of these.
    """

    new: Sequence[bool]
    first_seq: int
    jobs: Mapping[JobId, JobRows]


# --- Changes --------------------------------------------------------------------------------------


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
    """Record the word of the job's control object.

    The change is ignored if the job is in another round or has ended. A cancellation is final
    within its round.
    """

    job_id: JobId
    control: Control
    round: int


@dataclass(frozen=True, slots=True)
class AddCut:
    """Record a cut and its bundles as planned. A SUBMITTED or PENDING job becomes RUNNABLE.

    A cut is ignored if it is known, older than a known one, or of another round than the job. A
    stage whose `plan_round` is older than the cut takes the round of the cut.
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

    The tasks that `ending.closed` counts for each stage are counted as canceled. A stage without a
    plan gets that count as its planned tasks.
    """

    job_id: JobId
    ending: Ending
    round: int


@dataclass(frozen=True, slots=True)
class Fold:
    """Fold completions, each exactly once even if it arrives several times.

    A waiting job becomes RUNNING. The completion is added to the counters of the bundle's stage.
    `casualties` has one mapping for each completion. Its counts are added to `cancelled` of these
    stages. The `follows` of a completion become planned bundles, unless they are already folded.
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

    A lease has expired if an observer sees it unchanged for its whole duration. The observer
    measures the duration on its own clock, so clocks need not agree. `beat` never starts again, so
    if a renewal adds more than 1, another owner may have held the lease in between.
    """

    owner: str
    beat: int


class Ledger(Protocol):
    """Rows of jobs, stages, and bundles, and the leases of managers.

    Readers see whole transactions. The ledger does not store single tasks, because the outcomes
    contain them. A change returns the rows that it leaves, which saves the caller a read.
    """

    @overload
    async def apply(self, change: Fold) -> Folded: ...

    @overload
    async def apply(self, change: JobChange) -> Written:
        """Apply the change, unless it was applied before.

        Raise NotFound if the job or a stage does not exist.
        """

    async def job(self, job: JobId) -> JobRecord:
        """Return one job. Raise NotFound if it does not exist."""

    async def jobs(self, *, active: bool = False, limit: int = 100, before: str | None = None) -> Sequence[JobRecord]:
        """Return jobs, newest first by (submitted_s, id). `active` excludes jobs that have ended.

        `before` is the id of the last job of the previous page. Raise NotFound if it does not
        exist.
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

        `done` selects folded (True) or planned bundles (False). `after_seq` selects completions
        that were folded after that one. `failed` selects bundles with failed tasks.
        """

    async def lease(self, name: str, owner: str, *, over: Lease | None = None) -> Lease:
        """Take the lease if it is free, or renew it if `owner` holds it. Return the resulting
        lease.

        If the lease is still equal to `over`, which the caller read earlier, `owner` takes it over.
        """

    async def release(self, name: str, owner: str) -> None:
        """Release the lease if the owner holds it. Its beat continues from there."""

    async def restore(self, past: Past, *, over: JobRows | None) -> bool:
        """Replace all rows of a job by the state in the bucket.

        `over` are the rows that `rows` returned before the bucket was read, None if the job did not
        exist. Return False and change nothing if the job has changed since.
        """

    async def forget(self, jobs: Sequence[JobId] | None = None) -> None:
        """Delete these jobs, or all jobs. Leases stay."""

    async def close(self) -> None:
        """Release connections."""
