"""The Ledger port on Amazon SimpleDB.

Invariant: a ledger call changes a job in one transaction (see `items`), and may be repeated. SimpleDB calls block, so
the ledger makes SimpleDB calls in threads. Writing calls run one at a time, in the order of the calls. The items of the
leases and of the counter of sequence numbers are changed conditionally.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeVar, overload

from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.adapters.clock import ReadWriteThreads
from batchlab.adapters.memory.ledger import dump_rows
from batchlab.adapters.simpledb.domain import Item, Store
from batchlab.adapters.simpledb.items import BundleItems, JobItem, JobItems, unique
from batchlab.core import ledger_projection
from batchlab.core.errors import NotFound, Throttled
from batchlab.core.ledger_projection import Projection
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

_BLOCK = 1000
_STAMP = "v"


class Leases:
    """Leases of the Ledger port (see `ports.Ledger.lease`). Calls of this class block their thread.

    A released lease keeps its item, so the lease's renewal counter `beat` never repeats a value.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def take(self, name: str, owner: str, over: Lease | None) -> Lease:
        while True:
            item = self._store.get(_name(name))
            current = _lease(item)
            if current and current.owner != owner and current != over:
                return current
            lease = Lease(owner, 1 + (int(item["beat"]) if item else 0))
            pairs = [(_STAMP, unique()), ("owner", owner), ("beat", str(lease.beat))]
            pairs.append(("free", "no"))
            if self._store.put_if(_name(name), pairs, _STAMP, item[_STAMP] if item else None):
                return lease

    def give_back(self, name: str, owner: str) -> None:
        while True:
            item = self._store.get(_name(name))
            current = _lease(item)
            if item is None or current is None or current.owner != owner:
                return
            pairs = [(_STAMP, unique()), ("free", "yes")]
            if self._store.put_if(_name(name), pairs, _STAMP, item[_STAMP]):
                return


def _name(lease: str) -> str:
    return f"lease/{lease}"


def _lease(item: Item | None) -> Lease | None:
    """Return the lease of an item, or None if the lease is free."""
    if item is None or item["free"] == "yes":
        return None
    return Lease(item["owner"], int(item["beat"]))


class SequenceNumbers:
    """Increasing sequence numbers, each returned to only one of all processes. Only one thread may use a
    SequenceNumbers object.

    Sequence numbers are reserved in blocks, so most calls of `take` do not send a request.
    """

    _NAME = "counter/seq"

    def __init__(self, store: Store) -> None:
        self._store = store
        self._next, self._end = 0, 0

    def take(self, count: int, *, above: int) -> int:
        """Return the first of `count` successive numbers that are all greater than `above`."""
        if self._next <= above or self._next + count > self._end:
            self._fetch(max(count, _BLOCK), above)
        first = self._next
        self._next += count
        return first

    def _fetch(self, count: int, above: int) -> None:
        while True:
            item = self._store.get(self._NAME)
            start = max(int(item["next"]) if item else 1, above + 1)
            pairs = [(_STAMP, unique()), ("next", str(start + count))]
            if self._store.put_if(self._NAME, pairs, _STAMP, item[_STAMP] if item else None):
                self._next, self._end = start, start + count
                return


T = TypeVar("T")

_TRIES = 50
_RETRY_S = 0.01


def open_simpledb(endpoint: Endpoint, domain: str) -> SimpleDbLedger:
    """Return the ledger in the SimpleDB domain `domain`. The domain must exist and belong to this grid.

    The ledger connects at the first call. Raise UsageError if the region does not have SimpleDB.
    """
    return SimpleDbLedger(endpoint, domain)


class SimpleDbLedger:
    """The Ledger port over one SimpleDB domain.

    A fold and `forget` change several jobs one after the other. Every call except a fold and `forget` is one
    transaction.

    Every call raises Unreachable if SimpleDB does not answer, and Throttled if SimpleDB asks to retry later. A call
    raises NotFound if a job or stage to change does not exist, and TooLarge for a name or a bundle that does not fit.
    Any other failure raises BackendError, for example a missing or a full domain.
    """

    def __init__(self, endpoint: Endpoint, domain: str) -> None:
        self._store = Store(endpoint, domain, connections=2 * (1 + ReadWriteThreads.READERS))
        self._heads, self._rows = JobItems(self._store), BundleItems(self._store)
        self._leases, self._numbers = Leases(self._store), SequenceNumbers(self._store)
        self._run = ReadWriteThreads()
        # Leases have their own threads, because a restore may take minutes, while a lease is renewed every few seconds.
        self._run_lease = ReadWriteThreads()

    # --- Jobs ------------------------------------------------------------------------------------

    @overload
    async def apply(self, change: Fold) -> FoldResult: ...

    @overload
    async def apply(self, change: JobChange) -> ChangeResult: ...

    async def apply(self, change: Fold | JobChange) -> FoldResult | ChangeResult:
        """Apply the change to its jobs. A fold raises NotFound before it folds any completion.

        A fold changes several jobs one after the other. If another process writes to a later job of the fold meanwhile,
        the fold raises Throttled. After Throttled, the caller repeats the fold, and the completions of the earlier jobs
        are then not new.
        """
        if isinstance(change, Fold):
            if not change.completions:
                return FoldResult([], 0, {})
            return await self._write(lambda: self._fold(change))
        if isinstance(change, AddJob):
            return await self._write(lambda: self._add_job(change))
        return await self._write(lambda: self._change(change))

    def _add_job(self, change: AddJob) -> ChangeResult:
        job = change.job
        for _ in _tries():
            head = self._heads.get(job.id)
            if head and head.projection:
                return ChangeResult(_rows_of(head), is_new=False)
            # The job's item is read before the token is claimed, because a process that takes over the token then
            # changes the job's item.
            other = self._heads.claim(job.token, job.id) if job.token else None
            if other:
                return ChangeResult(other.rows(), is_new=False)
            projection, rows = ledger_projection.begin(change)
            if self._heads.install(job.id, head, projection, rows):
                return ChangeResult(projection.rows(), is_new=True)
        raise _busy(job.id)

    def _change(self, change: JobChange) -> ChangeResult:
        job = change.job_id
        for _ in _tries():
            head = self._head(job)
            projection = _next(head)
            rows = ledger_projection.apply(projection, change, {})
            if rows is None:
                return ChangeResult(_rows_of(head), is_new=False)
            if rows:
                # Only a new cut must read which bundles of the cut already exist.
                known = self._rows.known(head.gen, [row.key for row in rows])
                rows = [row for row in rows if row.key not in known]
            if self._heads.commit(head, projection, rows):
                return ChangeResult(projection.rows(), is_new=True)
        raise _busy(job)

    def _fold(self, change: Fold) -> FoldResult:
        positions = ledger_projection.positions_by_job(change)
        heads = {job: self._head(job) for job in positions}
        ledger_projection.check_stages({job: _projection_of(heads[job]) for job in heads}, change)
        count = len(change.completions)
        for _ in _tries():
            newest = max(_projection_of(head).last_seq for head in heads.values())
            first = self._numbers.take(count, above=newest)
            new = [False] * count
            rows: dict[JobId, JobRows] = {}
            for job, head in heads.items():
                folded = self._fold_job(head, change, positions[job], first)
                if folded is None:
                    break
                for position in folded[0]:
                    new[position] = True
                rows[job] = folded[1]
            else:
                return FoldResult(new, first, rows)
            if rows:
                raise _busy(job)
            heads = {job: self._head(job) for job in heads}
        raise _busy(job)

    def _fold_job(
        self, head: JobItem, change: Fold, positions: Sequence[int], first: int
    ) -> tuple[list[int], JobRows] | None:
        """Fold the completions of one job. Return the positions of the new completions and the job's rows.

        Return None if another process has folded later seqs of the job.
        """
        job = _projection_of(head).job.id
        keys = ledger_projection.keys_of(change, positions)
        uncertain: list[int] = []
        for _ in _tries():
            if uncertain and self._has(head, first + positions[0], first + positions[-1]):
                return uncertain, _rows_of(head)
            projection = _next(head)
            if projection.last_seq >= first:
                return None
            known = self._rows.known(head.gen, keys)
            new, rows = ledger_projection.fold(projection, change, positions, known, first_seq=first)
            if rows is None:
                return new, _rows_of(head)
            is_done = self._heads.commit(head, projection, rows)
            if is_done:
                return new, projection.rows()
            uncertain = new if is_done is None else []
            head = self._head(job)
        raise _busy(job)

    def _has(self, head: JobItem, first: int, last: int) -> bool:
        """Return whether a completion of the job has a seq from `first` to `last`."""
        bundle_rows = self._rows.folded_bundles(
            head.gen, _projection_of(head), stage=None, after=first - 1, failed=False, page=1
        )
        row = next(bundle_rows, None)
        return row is not None and row.seq is not None and row.seq <= last

    def _head(self, job: JobId, *, settle: bool = True) -> JobItem:
        head = self._heads.get(job, settle=settle)
        if head is None or head.projection is None:
            raise NotFound(f"The ledger does not have a job {job}.")
        return head

    # --- Reads -----------------------------------------------------------------------------------

    async def job(self, job: JobId) -> JobRecord:
        return (await self.rows(job)).job

    async def jobs(self, *, active: bool = False, limit: int = 100, before: str | None = None) -> Sequence[JobRows]:
        def page() -> list[JobRows]:
            last = None
            if before is not None:
                last = _projection_of(self._head(JobId(before), settle=False)).job
            projections = self._heads.newest(active=active, limit=limit, before=last)
            return [projection.rows() for projection in projections]

        return await self._read(page)

    async def rows(self, job: JobId) -> JobRows:
        return await self._read(lambda: _rows_of(self._head(job, settle=False)))

    async def bundles(
        self,
        *jobs: JobId,
        stage: StageName | None = None,
        done: bool | None = None,
        after_seq: int | None = None,
        failed: bool = False,
        limit: int | None = None,
    ) -> Sequence[BundleRecord]:
        def read(job: JobId) -> list[BundleRecord]:
            head = self._heads.get(job)
            if head is None or head.projection is None:
                return []
            gen, projection = head.gen, head.projection
            bundle_records: list[BundleRecord] = []
            if done is not False:
                after = -1 if after_seq is None else after_seq
                page = 2500 if limit is None else limit
                for row in self._rows.folded_bundles(
                    gen, projection, stage=stage, after=after, failed=failed, page=page
                ):
                    if len(bundle_records) == limit:
                        break
                    bundle_records.append(row.record(projection.last_seq))
            if done is not True and after_seq is None and not failed and len(bundle_records) != limit:
                planned = self._rows.planned_bundles(gen, projection, stage=stage)
                bundle_records += [row.record(projection.last_seq) for row in planned]
            return bundle_records[:limit]

        records = [record for job in jobs for record in await self._read(partial(read, job))]
        if len(jobs) > 1:
            records.sort(key=lambda record: math.inf if record.seq is None else record.seq)
        return records[:limit]

    async def results(self, job: JobId, *, after_seq: int, limit: int) -> Sequence[BundleResult]:
        rows = await self.bundles(job, done=True, after_seq=after_seq, limit=limit)
        return [BundleResult.of(row) for row in rows]

    # --- The rest --------------------------------------------------------------------------------

    async def lease(self, name: str, owner: str, *, over: Lease | None = None) -> Lease:
        return await self._run_lease(lambda: self._leases.take(name, owner, over), writes=True, quick=True)

    async def release(self, name: str, owner: str) -> None:
        await self._run_lease(lambda: self._leases.give_back(name, owner), writes=True, quick=True)

    async def restore(self, past: JobHistory, *, over: JobRows | None) -> bool:
        return await self._write(lambda: self._restore(past, over))

    def _restore(self, past: JobHistory, over: JobRows | None) -> bool:
        job = past.job
        head = self._heads.get(job.id)
        if not (_rows_of(head).is_version(over) if head and head.projection else over is None):
            return False
        if job.token:
            self._heads.claim(job.token, job.id)
        count = sum(len(part.completions) for part in past.rounds)
        newest = head.projection.last_seq if head and head.projection else -1
        first = self._numbers.take(count, above=newest)
        projection, rows = ledger_projection.restore(past, first)
        return self._heads.install(job.id, head, projection, rows)

    async def forget(self, jobs: Sequence[JobId] | None = None) -> None:
        def forget() -> None:
            if jobs is not None:
                for job in jobs:
                    self._heads.forget(job)
                return
            for name in self._heads.names():
                self._heads.forget(JobId(name.removeprefix("job/")))
            self._heads.sweep_lost()

        await self._write(forget)

    async def dump(self) -> dict[str, Json]:
        """Return all rows in the form of `SqlLedger.dump`."""
        return await self._read(self._dump)

    def _dump(self) -> dict[str, Json]:
        heads = (self._heads.get(JobId(n.removeprefix("job/"))) for n in self._heads.names())
        # The dump reads jobs one at a time. The bundles of a job are read as of the job's item.
        return dump_rows((h.projection, self._rows.all(h.gen, h.projection)) for h in heads if h and h.projection)

    async def close(self) -> None:
        """Wait for running calls and close the connections. After `close`, no call may follow."""
        await self._run_lease.close(lambda: None)
        await self._run.close(self._store.close)

    # --- Transactions ----------------------------------------------------------------------------

    async def _read(self, call: Callable[[], T]) -> T:
        return await self._run(call, writes=False, quick=False)

    async def _write(self, call: Callable[[], T]) -> T:
        return await self._run(call, writes=True, quick=False)


def _tries() -> Iterable[int]:
    """Yield the number of each try, with a wait between two tries."""
    for n in range(_TRIES):
        yield n
        time.sleep(_RETRY_S * min(n + 1, 10))


def _projection_of(head: JobItem) -> Projection:
    assert head.projection is not None
    return head.projection


def _rows_of(head: JobItem) -> JobRows:
    return _projection_of(head).rows(head.stamp)


def _next(head: JobItem) -> Projection:
    """Return a copy of the job for its next write."""
    projection = _projection_of(head).copy()
    projection.at += 1
    return projection


def _busy(job: JobId) -> Throttled:
    return Throttled(f"Other processes write to job {job} all the time.")
