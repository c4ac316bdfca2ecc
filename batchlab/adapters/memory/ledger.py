"""The Ledger port in plain memory, for the simulator.

Invariant: what a call does is what `book` says, checked before anything is changed; so a call that
raises has changed nothing. It answers as SqlLedger does, which the contract suite holds it to.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import overload

from batchlab.adapters import ledger_projection
from batchlab.adapters.ledger_dump import dumped
from batchlab.adapters.ledger_projection import Book, Key, Known, Row
from batchlab.core.errors import NotFound
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

_NOBODY = ""
_NOTHING = -1


@dataclass(slots=True)
class _Shelf:
    """A job: its book, and its bundles. `known` are all of them, `folded` those that are done, in
    the order of their seqs, and `planned` the others."""

    book: Book
    known: Known = field(default_factory=dict)
    folded: list[Row] = field(default_factory=list)
    planned: dict[Key, Row] = field(default_factory=dict)

    def put(self, rows: Iterable[Row]) -> None:
        """Keep what a write has made of bundles."""
        for row in rows:
            if row.completion is None:
                self.planned[row.key] = row
                continue
            before = self.planned.pop(row.key, None)
            # Of a plan that may be void by now: the moment it came counts.
            at = before.at if before else row.at
            self.folded.append(Row(row.stage, row.id, at, None, row.completion, row.seq))

    def done(self, after_seq: int, stage: StageName | None, failed: bool) -> Iterator[Row]:
        for n in range(bisect_right(self.folded, after_seq, key=_seq), len(self.folded)):
            row = self.folded[n]
            if failed and not (row.completion and row.completion.failed):
                continue
            if stage in (None, row.stage) and not self.book.is_void(row):
                yield row

    def waiting(self, stage: StageName | None) -> Iterator[Row]:
        for _, row in sorted(self.planned.items()):
            if stage in (None, row.stage) and not self.book.is_void(row):
                yield row


def _rows(book: Book) -> JobRows:
    return book.rows(book.at)


def _seq(row: Row) -> int:
    return _NOTHING if row.seq is None else row.seq


class SimLedger:
    """See ports.Ledger. It ends with its process. NotFound where a job or stage to change is not
    there, as from SqlLedger; completions keep their run time as it was given, not in microseconds.
    """

    def __init__(self) -> None:
        self._shelves: dict[JobId, _Shelf] = {}
        self._active: dict[JobId, None] = {}
        self._tokens: dict[str, JobId] = {}
        self._leases: dict[str, Lease] = {}
        self._writes = 0
        self._last_seq = 0

    def _shelf(self, job: JobId) -> _Shelf:
        try:
            return self._shelves[job]
        except KeyError as error:
            raise NotFound(f"The ledger has no job {job}.") from error

    def _note(self, book: Book) -> None:
        if book.state.ended:
            self._active.pop(book.job.id, None)
        else:
            self._active[book.job.id] = None

    # --- Changes ---------------------------------------------------------------------------------

    @overload
    async def apply(self, change: Fold) -> Folded: ...

    @overload
    async def apply(self, change: JobChange) -> Written: ...

    async def apply(self, change: Fold | JobChange) -> Folded | Written:
        """See ports.Ledger. A fold raises NotFound before it folds any completion."""
        if isinstance(change, Fold):
            return self._fold(change)
        if isinstance(change, AddJob):
            return self._add_job(change)
        return self._change(self._shelf(change.job_id), change)

    def _add_job(self, change: AddJob) -> Written:
        job = change.job
        there = job.id if job.id in self._shelves else self._tokens.get(job.token)
        if there is not None:
            return Written(_rows(self._shelves[there].book), is_new=False)
        book, rows = ledger_projection.begin(job, change.state, change.cut)
        return Written(_rows(self._install(book, rows).book), is_new=True)

    def _change(self, shelf: _Shelf, change: JobChange) -> Written:
        book = shelf.book
        if isinstance(change, AddCut):
            for bundle in change.cut.bundles:
                book.stage(bundle.stage)
        before, book.at = book.at, self._writes + 1
        rows = ledger_projection.apply(book, change, shelf.known)
        self._noted(shelf, before, rows)
        return Written(_rows(book), rows is not None)

    def _noted(self, shelf: _Shelf, before: int, rows: Iterable[Row] | None) -> None:
        """Keep the bundles of a change, or undo its count if it had no effect."""
        if rows is None:
            shelf.book.at = before
            return
        shelf.put(rows)
        self._writes = shelf.book.at
        self._note(shelf.book)

    def _fold(self, change: Fold) -> Folded:
        completions = change.completions
        if not completions:
            return Folded([], 0, {})
        places: dict[JobId, list[int]] = {}
        for place, c in enumerate(completions):
            book = self._shelf(c.bundle.job).book
            for bundle in (c.bundle, *(f.bundle for f in c.follows)):
                book.stage(bundle.stage)
            places.setdefault(c.bundle.job, []).append(place)
        first = self._last_seq + 1
        self._last_seq += len(completions)
        new = [False] * len(completions)
        rows: dict[JobId, JobRows] = {}
        for job, mine in places.items():
            shelf = self._shelves[job]
            which = self._fold_job(
                shelf, [(first + i, completions[i], change.casualties[i]) for i in mine]
            )
            rows[job] = _rows(shelf.book)
            for place, is_new in zip(mine, which, strict=True):
                new[place] = is_new
        return Folded(new, first, rows)

    def _fold_job(
        self, shelf: _Shelf, numbered: Sequence[tuple[int, Completion, Mapping[StageName, int]]]
    ) -> Sequence[bool]:
        book = shelf.book
        before, state = book.at, book.state
        book.at = self._writes + 1
        new, rows = ledger_projection.fold(book, numbered, shelf.known)
        self._noted(shelf, before, rows if any(new) or book.state is not state else None)
        return new

    def _install(self, book: Book, rows: Iterable[Row]) -> _Shelf:
        shelf = self._shelves[book.job.id] = _Shelf(book)
        shelf.put(rows)
        shelf.folded.sort(key=_seq)
        shelf.known = dict.fromkeys(shelf.planned, False) | {row.key: True for row in shelf.folded}
        if book.job.token:
            self._tokens[book.job.token] = book.job.id
        self._writes += 1
        book.at = self._writes
        self._note(book)
        return shelf

    # --- Reads -----------------------------------------------------------------------------------

    async def job(self, job: JobId) -> JobRecord:
        return self._shelf(job).book.rows().job

    async def jobs(
        self, *, active: bool = False, limit: int = 100, before: str | None = None
    ) -> Sequence[JobRecord]:
        """Also raises NotFound where `before` is not there any more."""
        last = self._place(JobId(before)) if before is not None else None
        places = sorted(map(self._place, self._active if active else self._shelves), reverse=True)
        older = (job for at_s, job in places if last is None or (at_s, job) < last)
        return [self._shelves[job].book.rows().job for job in islice(older, limit)]

    def _place(self, job: JobId) -> tuple[float, JobId]:
        return self._shelf(job).book.job.submitted_s, job

    async def rows(self, job: JobId) -> JobRows:
        return _rows(self._shelf(job).book)

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
        shelf = self._shelves.get(job)
        if shelf is None:
            return []
        found: list[Row] = []
        if done is not False:
            after = _NOTHING if after_seq is None else after_seq
            found += islice(shelf.done(after, stage, failed), limit)
        if done is not True and after_seq is None and not failed:
            found += shelf.waiting(stage)
        return [row.record(shelf.book.last_seq) for row in found[:limit]]

    # --- The rest --------------------------------------------------------------------------------

    async def lease(self, name: str, owner: str, *, over: Lease | None = None) -> Lease:
        stands = self._leases.get(name, Lease(_NOBODY, 0))
        if stands.owner in (owner, _NOBODY) or stands == over:
            stands = self._leases[name] = Lease(owner, stands.beat + 1)
        return stands

    async def release(self, name: str, owner: str) -> None:
        stands = self._leases.get(name)
        if stands is not None and stands.owner == owner:
            self._leases[name] = Lease(_NOBODY, stands.beat + 1)

    async def restore(self, past: Past, *, over: JobRows | None) -> bool:
        """Also raises NotFound where another job has its token."""
        job = past.job.id
        shelf = self._shelves.get(job)
        if (over is not None) if shelf is None else not _rows(shelf.book).is_version(over):
            return False
        if self._tokens.get(past.job.token, job) != job:
            raise NotFound(f"The ledger has no job {job}.")
        await self.forget([job])
        book, rows = ledger_projection.relive(past, self._last_seq + 1)
        self._last_seq += sum(len(one.completions) for one in past.rounds)
        self._install(book, rows)
        return True

    async def forget(self, jobs: Sequence[JobId] | None = None) -> None:
        for job in list(self._shelves) if jobs is None else jobs:
            shelf = self._shelves.pop(job, None)
            if shelf is not None:
                self._active.pop(job, None)
                self._tokens.pop(shelf.book.job.token, None)

    async def dump(self) -> dict[str, Json]:
        """As SqlLedger's, and equal to that of one which has seen the same."""
        return dumped((s.book, [*s.folded, *s.planned.values()]) for s in self._shelves.values())

    async def close(self) -> None:
        """Nothing to release."""
