"""The Ledger port in memory, for the simulator and for forecasts.

Invariant: a ledger call makes all checks before its first change, so a call that raises an error changes nothing. The
contract suite compares the answers of the memory ledger with the answers of SqlLedger. `dumped` returns rows in the
form of `SqlLedger.dump`, so that tests can compare ledgers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from operator import itemgetter
from typing import overload

from batchlab.core import ledger_projection
from batchlab.core.errors import NotFound
from batchlab.core.ledger_projection import BundleRow, Key, Known, Projection
from batchlab.core.model import JobId, Json, StageName
from batchlab.core.ports import (
    AddJob,
    BundleRecord,
    BundleResult,
    ChangeResult,
    Fold,
    FoldResult,
    JobChange,
    JobHistory,
    JobRecord,
    JobRows,
    Lease,
)
from batchlab.core.protocol import json_format


def dump_rows(jobs: Iterable[tuple[Projection, Iterable[BundleRow]]]) -> dict[str, Json]:
    """Return the rows of the given jobs with their stages and bundles, sorted."""
    jobs_, stages, bundles = [], [], []
    for projection, rows in jobs:
        jobs_.append(_job(projection))
        stages += _stages(projection)
        bundles += [_bundle(projection, row) for row in rows]
    return {
        "jobs": sorted(jobs_, key=itemgetter("id")),
        "stages": sorted(stages, key=itemgetter("job", "stage")),
        "bundles": sorted(bundles, key=itemgetter("job", "stage", "id")),
    }


def _job(projection: Projection) -> dict[str, Json]:
    return {
        "id": projection.job.id,
        "token": projection.job.token or None,
        "submitted_s": projection.job.submitted_s,
        "spec": json_format.loads(json_format.dumps(json_format.job_to_json(projection.job))),
        "state": projection.state.value,
        "reason": projection.reason,
        "control": projection.control.value,
        "round": projection.round,
        "ended_s": projection.ended_s,
    }


def _stages(projection: Projection) -> list[dict[str, Json]]:
    return [
        {
            "job": projection.job.id,
            "stage": name,
            "position": position,
            "planned": stage.planned,
            "succeeded": stage.succeeded,
            "failed": stage.failed,
            "cancelled": stage.cancelled,
            "retried": stage.retried,
            "run_us": stage.run_us,
            "first_start_s": stage.first_start_s,
            "last_end_s": stage.last_end_s,
            "plan_round": stage.plan_round,
            "cut_seq": stage.cut_seq,
            "uncut": json_format.tasks_to_json(stage.uncut),
        }
        for position, (name, stage) in enumerate(projection.stages.items())
    ]


def _bundle(projection: Projection, row: BundleRow) -> dict[str, Json]:
    record = row.record(projection.last_seq)
    done = record.completion
    return {
        "job": projection.job.id,
        "stage": row.stage,
        "id": row.id,
        "seq": done is not None,
        "failed": len(done.failed) if done else 0,
        "void": int(projection.is_void(row)),
        "body": json_format.completion_to_json(done) if done else json_format.bundle_to_json(record.bundle),
    }


_NO_OWNER = ""
_NO_SEQ = -1


@dataclass(slots=True)
class _Job:
    """Rows of one job in the ledger. `stamp` is the number of the last write that had an effect.

    `known` contains every bundle of the job. `folded` contains the done bundles in the order of their seqs, and
    `planned` contains the bundles that are not done.
    """

    projection: Projection
    stamp: int = 0
    known: Known = field(default_factory=dict)
    folded: list[BundleRow] = field(default_factory=list)
    planned: dict[Key, BundleRow] = field(default_factory=dict)

    @property
    def rows(self) -> JobRows:
        return self.projection.rows(self.stamp)

    def put(self, rows: Iterable[BundleRow]) -> None:
        """Store the rows of bundles that a change wrote."""
        for row in rows:
            if row.completion is None:
                self.planned[row.key] = row
                continue
            before = self.planned.pop(row.key, None)
            # The plan of the bundle may be void at the time of this write, so `at` is the number of the write that
            # added the bundle.
            at = before.at if before else row.at
            self.folded.append(BundleRow(row.stage, row.id, at, None, row.completion, row.seq))

    def done_bundles(self, after_seq: int, stage: StageName | None, failed: bool) -> Iterator[BundleRow]:
        for n in range(bisect_right(self.folded, after_seq, key=_seq), len(self.folded)):
            row = self.folded[n]
            if failed and not (row.completion and row.completion.failed):
                continue
            if stage in (None, row.stage) and not self.projection.is_void(row):
                yield row

    def waiting(self, stage: StageName | None) -> Iterator[BundleRow]:
        for _, row in sorted(self.planned.items()):
            if stage in (None, row.stage) and not self.projection.is_void(row):
                yield row


def _seq(row: BundleRow) -> int:
    return _NO_SEQ if row.seq is None else row.seq


class SimLedger:
    """The Ledger port in memory. The rows of the memory ledger are lost when its process ends.

    The memory ledger does not round the run time of a completion, while SqlLedger rounds the run time to microseconds.
    """

    def __init__(self) -> None:
        self._jobs: dict[JobId, _Job] = {}
        self._active: dict[JobId, None] = {}
        self._tokens: dict[str, JobId] = {}
        self._leases: dict[str, Lease] = {}
        self._writes = 0
        self._last_seq = 0

    def _job(self, job: JobId) -> _Job:
        try:
            return self._jobs[job]
        except KeyError as error:
            raise NotFound(f"The ledger does not have a job {job}.") from error

    # --- Changes ---------------------------------------------------------------------------------

    @overload
    async def apply(self, change: Fold) -> FoldResult: ...

    @overload
    async def apply(self, change: JobChange) -> ChangeResult: ...

    async def apply(self, change: Fold | JobChange) -> FoldResult | ChangeResult:
        """Apply the change to its jobs. A fold raises NotFound before it folds any completion."""
        if isinstance(change, Fold):
            return self._fold(change)
        if isinstance(change, AddJob):
            return self._add_job(change)
        job = self._job(change.job_id)
        job.projection.at = self._writes + 1
        rows = ledger_projection.apply(job.projection, change, job.known)
        self._end_write(job, rows)
        return ChangeResult(job.rows, rows is not None)

    def _add_job(self, change: AddJob) -> ChangeResult:
        job = change.job
        existing = job.id if job.id in self._jobs else self._tokens.get(job.token)
        if existing is not None:
            return ChangeResult(self._jobs[existing].rows, is_new=False)
        return ChangeResult(self._install(*ledger_projection.begin(change)).rows, is_new=True)

    def _fold(self, change: Fold) -> FoldResult:
        count = len(change.completions)
        if not count:
            return FoldResult([], 0, {})
        positions = ledger_projection.positions_by_job(change)
        jobs = {name: self._job(name) for name in positions}
        ledger_projection.check_stages({name: job.projection for name, job in jobs.items()}, change)
        first = self._last_seq + 1
        self._last_seq += count
        new = [False] * count
        for name, job in jobs.items():
            job.projection.at = self._writes + 1
            fresh, rows = ledger_projection.fold(job.projection, change, positions[name], job.known, first_seq=first)
            self._end_write(job, rows)
            for position in fresh:
                new[position] = True
        return FoldResult(new, first, {name: job.rows for name, job in jobs.items()})

    def _end_write(self, job: _Job, rows: Iterable[BundleRow] | None) -> None:
        """Store the bundles of a write, and count the write if the write had an effect."""
        if rows is not None:
            job.put(rows)
            self._count_write(job)

    def _count_write(self, job: _Job) -> None:
        self._writes += 1
        job.stamp = self._writes
        name = job.projection.job.id
        if job.projection.state.ended:
            self._active.pop(name, None)
        else:
            self._active[name] = None

    def _install(self, projection: Projection, rows: Iterable[BundleRow]) -> _Job:
        job = self._jobs[projection.job.id] = _Job(projection)
        job.put(rows)
        job.folded.sort(key=_seq)
        job.known = dict.fromkeys(job.planned, False) | {row.key: True for row in job.folded}
        if projection.job.token:
            self._tokens[projection.job.token] = projection.job.id
        self._count_write(job)
        return job

    # --- Reads -----------------------------------------------------------------------------------

    async def job(self, job: JobId) -> JobRecord:
        return self._job(job).rows.job

    async def jobs(self, *, active: bool = False, limit: int = 100, before: str | None = None) -> Sequence[JobRows]:
        last = self._order(JobId(before)) if before is not None else None
        orders = sorted(map(self._order, self._active if active else self._jobs), reverse=True)
        older = (job for at_s, job in orders if last is None or (at_s, job) < last)
        return [self._jobs[job].projection.rows() for job in islice(older, limit)]

    def _order(self, job: JobId) -> tuple[float, JobId]:
        return self._job(job).projection.job.submitted_s, job

    async def rows(self, job: JobId) -> JobRows:
        return self._job(job).rows

    async def bundles(
        self,
        *jobs: JobId,
        stage: StageName | None = None,
        done: bool | None = None,
        after_seq: int | None = None,
        failed: bool = False,
        limit: int | None = None,
    ) -> Sequence[BundleRecord]:
        found = [self._jobs[job] for job in jobs if job in self._jobs]
        records: list[BundleRecord] = []
        if done is not False:
            after = _NO_SEQ if after_seq is None else after_seq
            folded = ((row, job) for job in found for row in job.done_bundles(after, stage, failed))
            ordered = folded if len(found) == 1 else sorted(folded, key=lambda pair: _seq(pair[0]))
            records += [row.record(job.projection.last_seq) for row, job in islice(ordered, limit)]
        if done is not True and after_seq is None and not failed:
            records += [row.record(job.projection.last_seq) for job in found for row in job.waiting(stage)]
        return records[:limit]

    async def results(self, job: JobId, *, after_seq: int, limit: int) -> Sequence[BundleResult]:
        rows = await self.bundles(job, done=True, after_seq=after_seq, limit=limit)
        return [BundleResult.of(row) for row in rows]

    # --- Leases ----------------------------------------------------------------------------------

    async def lease(self, name: str, owner: str, *, over: Lease | None = None) -> Lease:
        lease = self._leases.get(name, Lease(_NO_OWNER, 0))
        if lease.owner in (owner, _NO_OWNER) or lease == over:
            lease = self._leases[name] = Lease(owner, lease.beat + 1)
        return lease

    async def release(self, name: str, owner: str) -> None:
        lease = self._leases.get(name)
        if lease is not None and lease.owner == owner:
            self._leases[name] = Lease(_NO_OWNER, lease.beat + 1)

    # --- Whole jobs ------------------------------------------------------------------------------

    async def restore(self, past: JobHistory, *, over: JobRows | None) -> bool:
        """Restore a job with its rows. Raise NotFound if another job has the client token of the job."""
        name = past.job.id
        job = self._jobs.get(name)
        if (over is not None) if job is None else not job.rows.is_version(over):
            return False
        if self._tokens.get(past.job.token, name) != name:
            raise NotFound(f"The ledger does not have a job {name}.")
        restored = ledger_projection.restore(past, self._last_seq + 1)
        await self.forget([name])
        self._last_seq += sum(len(part.completions) for part in past.rounds)
        self._install(*restored)
        return True

    async def forget(self, jobs: Sequence[JobId] | None = None) -> None:
        for name in list(self._jobs) if jobs is None else jobs:
            job = self._jobs.pop(name, None)
            if job is not None:
                self._active.pop(name, None)
                self._tokens.pop(job.projection.job.token, None)

    async def dump(self) -> dict[str, Json]:
        """Return all rows in the form of `SqlLedger.dump`."""
        return dump_rows((j.projection, [*j.folded, *j.planned.values()]) for j in self._jobs.values())

    async def close(self) -> None:
        """Do nothing, because the memory ledger does not hold connections or files."""
