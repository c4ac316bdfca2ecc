"""The Ledger port on Amazon SimpleDB.

Invariant: what a call changes of one job, it changes at once (see `heads`), and it may be repeated.
The calls block, so they run in threads: those that write one at a time, in the order they are made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar, overload

from batchlab.adapters import ledger_projection
from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.adapters.ledger_dump import dumped
from batchlab.adapters.ledger_projection import Book, Known
from batchlab.adapters.simpledb.bundle_items import Rows
from batchlab.adapters.simpledb.domain import Store
from batchlab.adapters.simpledb.job_items import Head, Heads, heads_of
from batchlab.adapters.simpledb.leases import Leases, Numbers
from batchlab.adapters.threads import Threads
from batchlab.core.errors import NotFound, Throttled
from batchlab.core.model import Completion, JobId, Json, StageName
from batchlab.core.ports import (
    AddCut,
    AddJob,
    BundleRecord,
    Fold,
    Folded,
    JobChange,
    JobRecord,
    JobRows,
    Lease,
    Past,
    Written,
)

T = TypeVar("T")

_TRIES = 50
_AGAIN_S = 0.01


def open_simpledb(endpoint: Endpoint, domain: str) -> SimpleDbLedger:
    """The ledger in this SimpleDB domain, which must exist, and be this grid's own. Connects at the
    first call; UsageError for a region in which there is no SimpleDB."""
    return SimpleDbLedger(endpoint, domain)


class SimpleDbLedger:
    """See ports.Ledger.

    `fold` and `forget` change several jobs one after the other; everything else is one transaction.
    Every call raises Unreachable or Throttled where SimpleDB does not answer or asks to come back
    later, NotFound where a job or stage to change is not there, TooLarge for a name or a bundle
    that it cannot hold, and BackendError for anything else: no such domain, or one that is full.
    """

    def __init__(self, endpoint: Endpoint, domain: str) -> None:
        self._store = Store(endpoint, domain, connections=2 * (1 + Threads.READERS))
        self._heads, self._rows = Heads(self._store), Rows(self._store)
        self._leases, self._numbers = Leases(self._store), Numbers(self._store)
        self._run = Threads()
        # A restoration may take minutes, and a lease is renewed every few seconds.
        self._run_lease = Threads()

    # --- Jobs ------------------------------------------------------------------------------------

    @overload
    async def apply(self, change: Fold) -> Folded: ...

    @overload
    async def apply(self, change: JobChange) -> Written: ...

    async def apply(self, change: Fold | JobChange) -> Folded | Written:
        """See ports.Ledger. A fold raises NotFound before it folds any completion.

        A fold changes several jobs one after the other. If another process writes to a later one
        meanwhile, it raises Throttled. The caller repeats the call, and the completions of the
        earlier jobs are not new then.
        """
        if isinstance(change, Fold):
            if not change.completions:
                return Folded([], 0, {})
            return await self._write(lambda: self._fold(change.completions, change.casualties))
        if isinstance(change, AddJob):
            return await self._write(lambda: self._add_job(change))
        return await self._write(lambda: self._change(change))

    def _add_job(self, change: AddJob) -> Written:
        job = change.job
        for _ in _tries():
            head = self._heads.get(job.id)
            if head and head.book:
                return Written(_rows_of(head), is_new=False)
            # After the item was read: who takes the token from us changes that item afterwards.
            other = self._heads.claim(job.token, job.id) if job.token else None
            if other:
                return Written(other.rows(), is_new=False)
            book, rows = ledger_projection.begin(job, change.state, change.cut)
            if self._heads.install(job.id, head, book, rows):
                return Written(book.rows(), is_new=True)
        raise _busy(job.id)

    def _change(self, change: JobChange) -> Written:
        job = change.job_id
        for _ in _tries():
            head = self._head(job)
            book = _copy(_book_of(head))
            book.at += 1
            rows = ledger_projection.apply(book, change, {})
            if rows is None:
                return Written(_rows_of(head), is_new=False)
            if isinstance(change, AddCut) and rows:
                # Only a new cut needs to know which of its bundles exist.
                book = _copy(_book_of(head))
                book.at += 1
                known = self._rows.known(head.gen, [row.key for row in rows])
                rows = ledger_projection.apply(book, change, known) or []
            if self._heads.commit(head, book, rows):
                return Written(book.rows(), is_new=True)
        raise _busy(job)

    async def job(self, job: JobId) -> JobRecord:
        return (await self.rows(job)).job

    async def jobs(
        self, *, active: bool = False, limit: int = 100, before: str | None = None
    ) -> Sequence[JobRecord]:
        """Also raises NotFound where `before` is not there any more."""

        def page() -> list[JobRecord]:
            last = None
            if before is not None:
                last = _book_of(self._head(JobId(before), settle=False)).job
            found = self._heads.newest(active=active, limit=limit, before=last)
            return [book.rows().job for book in found]

        return await self._read(page)

    async def rows(self, job: JobId) -> JobRows:
        return await self._read(lambda: _rows_of(self._head(job, settle=False)))

    # --- Stages and bundles ----------------------------------------------------------------------

    def _fold(
        self, completions: Sequence[Completion], casualties: Sequence[Mapping[StageName, int]]
    ) -> Folded:
        heads: dict[JobId, Head] = {}
        for job, head in heads_of(self._heads, (c.bundle.job for c in completions)):
            if head is None or head.book is None:
                raise _no_job(job)
            heads[job] = head
        for c in completions:
            for bundle in (c.bundle, *(f.bundle for f in c.follows)):
                _book_of(heads[c.bundle.job]).stage(bundle.stage)
        for _ in _tries():
            newest = max(_book_of(head).last_seq for head in heads.values())
            first = self._numbers.take(len(completions), above=newest)
            new = [False] * len(completions)
            rows: dict[JobId, JobRows] = {}
            for job, head in heads.items():
                mine = [
                    (i, (first + i, c, lost))
                    for i, (c, lost) in enumerate(zip(completions, casualties, strict=True))
                    if c.bundle.job == job
                ]
                came = self._fold_job(job, head, first, [one for _, one in mine])
                if came is None:
                    break
                for (i, _), is_new in zip(mine, came[0], strict=True):
                    new[i] = is_new
                rows[job] = came[1]
            else:
                return Folded(new, first, rows)
            if rows:
                raise _busy(job)
            heads = {job: self._head(job) for job in heads}
        raise _busy(job)

    def _fold_job(
        self,
        job: JobId,
        head: Head,
        first: int,
        mine: Sequence[tuple[int, Completion, Mapping[StageName, int]]],
    ) -> tuple[list[bool], JobRows] | None:
        """Which were new, and the job's rows; None where somebody has folded later seqs."""
        keys = ledger_projection.touched(c for _, c, _ in mine)
        doubtful: list[bool] | None = None
        for _ in _tries():
            if doubtful and self._has(head, [seq for seq, _, _ in mine]):
                return doubtful, _book_of(head).rows()
            book = _copy(_book_of(head))
            if book.last_seq >= first:
                return None
            book.at += 1
            before = book.state
            known: Known = self._rows.known(head.gen, keys)
            new, rows = ledger_projection.fold(book, mine, known)
            if not any(new) and book.state is before:
                return new, _book_of(head).rows()
            is_done = self._heads.commit(head, book, rows)
            if is_done:
                return new, book.rows()
            doubtful = new if is_done is None else None
            head = self._head(job)
        raise _busy(job)

    def _has(self, head: Head, seqs: Sequence[int]) -> bool:
        """Whether something was folded under one of these seqs, which are in order and nobody
        else's."""
        found = self._rows.folded(
            head.gen, _book_of(head), stage=None, after=seqs[0] - 1, failed=False, page=1
        )
        row = next(found, None)
        return row is not None and row.seq is not None and row.seq <= seqs[-1]

    def _head(self, job: JobId, *, settle: bool = True) -> Head:
        head = self._heads.get(job, settle=settle)
        if head is None or head.book is None:
            raise _no_job(job)
        return head

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
        def read() -> list[BundleRecord]:
            head = self._heads.get(job)
            if head is None or head.book is None:
                return []
            gen, book = head.gen, head.book
            found: list[BundleRecord] = []
            if done is not False:
                after = -1 if after_seq is None else after_seq
                page = 2500 if limit is None else limit
                for row in self._rows.folded(
                    gen, book, stage=stage, after=after, failed=failed, page=page
                ):
                    if len(found) == limit:
                        break
                    found.append(row.record(book.last_seq))
            if done is not True and after_seq is None and not failed and len(found) != limit:
                planned = self._rows.planned(gen, book, stage=stage)
                found += [row.record(book.last_seq) for row in planned]
            return found[:limit]

        return await self._read(read)

    # --- The rest --------------------------------------------------------------------------------

    async def lease(self, name: str, owner: str, *, over: Lease | None = None) -> Lease:
        return await self._run_lease(
            lambda: self._leases.take(name, owner, over), writes=True, quick=True
        )

    async def release(self, name: str, owner: str) -> None:
        await self._run_lease(lambda: self._leases.give_back(name, owner), writes=True, quick=True)

    async def restore(self, past: Past, *, over: JobRows | None) -> bool:
        return await self._write(lambda: self._restore(past, over))

    def _restore(self, past: Past, over: JobRows | None) -> bool:
        job = past.job
        head = self._heads.get(job.id)
        if not (_rows_of(head).is_version(over) if head and head.book else over is None):
            return False
        if job.token:
            self._heads.claim(job.token, job.id)
        count = sum(len(one.completions) for one in past.rounds)
        newest = head.book.last_seq if head and head.book else -1
        first = self._numbers.take(count, above=newest)
        book, rows = ledger_projection.relive(past, first)
        return self._heads.install(job.id, head, book, rows)

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
        """As SqlLedger's, and equal to that of one which has seen the same."""
        return await self._read(self._dump)

    def _dump(self) -> dict[str, Json]:
        heads = (self._heads.get(JobId(n.removeprefix("job/"))) for n in self._heads.names())
        # One job after the other, each with its bundles as of its head.
        return dumped((h.book, self._rows.all(h.gen, h.book)) for h in heads if h and h.book)

    async def close(self) -> None:
        """Waits for calls that are under way; no other call may follow."""
        await self._run_lease.close(lambda: None)
        await self._run.close(self._store.close)

    # --- Transactions ----------------------------------------------------------------------------

    async def _read(self, call: Callable[[], T]) -> T:
        return await self._run(call, writes=False, quick=False)

    async def _write(self, call: Callable[[], T]) -> T:
        return await self._run(call, writes=True, quick=False)


def _tries() -> Iterable[int]:
    """For what is tried until nobody else was faster."""
    for n in range(_TRIES):
        yield n
        time.sleep(_AGAIN_S * min(n + 1, 10))


def _book_of(head: Head) -> Book:
    assert head.book is not None
    return head.book


def _rows_of(head: Head) -> JobRows:
    return _book_of(head).rows(head.stamp)


def _copy(book: Book) -> Book:
    return Book.from_json(book.job, book.to_json())


def _no_job(job: JobId) -> NotFound:
    return NotFound(f"The ledger has no job {job}.")


def _busy(job: JobId) -> Throttled:
    return Throttled(f"Somebody else writes to job {job} all the time.")
