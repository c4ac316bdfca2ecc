"""The ledger as a Protocol: a projection of the bucket, each call of which is one transaction.

Invariants: every call may be repeated. Every change names the round of the job that it is for, so
a call of a manager that has stood still changes nothing of a later round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from batchlab.jobdef import JobDef
from batchlab.model import (
    Completion,
    Control,
    JobId,
    JobState,
    StageName,
)
from batchlab.ports.rows import (
    BundleRecord,
    Cut,
    Folded,
    JobRecord,
    JobRows,
    Lease,
    Past,
    Reopening,
    Written,
)


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

    async def move_job(self, job: JobId, state: JobState, *, round: int) -> bool:
        """Change state by the table of moves. Return False where the table has no such arrow, where
        nothing changes, and where the job is in another round."""

    async def set_control(self, job: JobId, control: Control, *, round: int) -> bool:
        """Record the word of the control object. Return whether the row has that control now.

        The call changes nothing where the job is in another round or has ended (its control is
        RUN then), and a cancellation is final within its round.
        """

    async def rows(self, job: JobId) -> JobRows:
        """The job with its stages; NotFound."""

    async def add_cut(self, cut: Cut) -> Written:
        """Record a cut and its bundles as planned, which makes a job RUNNABLE that was SUBMITTED
        or PENDING; a cut that is known, or older than one that is, changes nothing.

        A stage whose `plan_round` is older than the cut's takes the cut's round. A cut of another
        round than the job's changes nothing.
        """

    async def set_planned(
        self, job: JobId, stage: StageName, planned: int, *, round: int
    ) -> Written:
        """Set a stage's number of planned tasks where it is not known yet (chained stages), and
        where the job is in that round."""

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
