"""Writes of completions and job changes to the ledger, and updates of live jobs from the ledger.

Invariant: the ledger decides once, in one transaction, which completions are new. The manager updates live jobs from
the ledger. Events may arrive twice, late, or in any order, and the reconciler recovers lost events.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from batchlab.core.errors import NotFound
from batchlab.core.job_definition import JobDef
from batchlab.core.model import BundleId, Completion, Control, JobId, StageName
from batchlab.core.ports import BundleRecord, Fold, FoldResult, JobChange, JobRecord, JobRows
from batchlab.core.protocol import settlement
from batchlab.manager.context import Context, Part
from batchlab.manager.state import LiveJob, RetainedOutcome, Superseded

log = logging.getLogger(__name__)


BundleKey = tuple[JobId, StageName, BundleId]
OutcomesByBundle = Mapping[BundleKey, RetainedOutcome]
Traces = Mapping[BundleKey, str]
"""Trace contexts (`traceparent` values) of completions, by bundle."""
EMPTY: Mapping[BundleKey, Any] = MappingProxyType({})


class LedgerWriter(Part):
    def __init__(self, context: Context, restore: Callable[[JobId], Awaitable[JobDef | None]]) -> None:
        """`restore` restores a job that the ledger does not have."""
        super().__init__(context)
        self._restore = restore
        self._next_seq = 0
        """Expected sequence number of the next completion. The number is wrong if another manager has folded
        completions."""

    async def fold(
        self, completions: Sequence[Completion], whole: OutcomesByBundle = EMPTY, traces: Traces = EMPTY
    ) -> None:
        """Fold completions, and wake the jobs of the completions. `whole` has the outcomes that events contained with
        all their values."""
        accepted = await self._accept(completions)
        if not accepted:
            return
        lives = (self._lives.get(completion.bundle.job) for completion, _ in accepted)
        before = {live.id: live.record for live in lives if live}
        begun_s = self._clock.now_s() if traces else 0.0
        folded = await self._ledger.apply(
            Fold(
                [completion for completion, _ in accepted],
                [settlement.casualties(job, completion) for completion, job in accepted],
            )
        )
        for (completion, job), is_new in zip(accepted, folded.new, strict=True):
            if is_new:
                self._counts.count_fold(job.stage(completion.bundle.stage), completion)
                self._registry.authors.add(completion.worker)
            else:
                self._counts.repeated += 1
        if traces:
            self._trace([completion for completion, _ in accepted], traces, begun_s)
        touched = self._update_lives([completion for completion, _ in accepted], folded, whole)
        for live in touched:
            await self._update_rows(live, before.get(live.id), folded.jobs[live.id])
            live.wake.set()
        if self._context.fair_share.policy:
            self._context.fair_share.wake({job.stage(done.bundle.stage).pool for done, job in accepted})

    def _trace(self, folded: Sequence[Completion], traces: Traces, begun_s: float) -> None:
        now_s = self._clock.now_s()
        for completion in folded:
            bundle = completion.bundle
            if parent := traces.get((bundle.job, bundle.stage, bundle.id)):
                at = self._tracer.record("fold", parent, bundle, start_s=begun_s, end_s=now_s)
                if live := self._lives.get(bundle.job):
                    live.trace(bundle.stage, at)

    async def _accept(self, completions: Sequence[Completion]) -> list[tuple[Completion, JobDef]]:
        """Return the completions that the ledger accepts, with their jobs."""
        accepted: list[tuple[Completion, JobDef]] = []
        names = dict.fromkeys(completion.bundle.job for completion in completions)
        jobs = {name: await self.job(name) for name in names}
        for completion in completions:
            job = jobs[completion.bundle.job]
            if job is None:
                continue
            if not settlement.fits(job, completion.bundle, completion.follows):
                # The completion is dropped, because the ledger would refuse the completion together with the rest of
                # its batch.
                about = {"job": job.id, "bundle": completion.bundle.id}
                log.error("dropped a completion of a stage that the job does not have", extra=about)
                continue
            accepted.append((completion, job))
            live = self._lives.get(job.id)
            # The flag is set before the fold, because the coordinator must read the control object before it ends the
            # job.
            if live is not None and completion.cancelled and live.record.control is not Control.CANCEL:
                live.must_read_control = True
                live.mark()
        return accepted

    def _update_lives(
        self, completions: Sequence[Completion], folded: FoldResult, whole: OutcomesByBundle
    ) -> list[LiveJob]:
        """Update the outstanding bundles and recent outcomes of live jobs, and return the updated jobs."""
        if folded.first_seq != self._next_seq:
            # Another leader has folded completions, or the response of an earlier fold was lost.
            for every in self._lives.values():
                every.forget_outcomes(folded.first_seq - 1)
        self._next_seq = folded.first_seq + len(completions)
        now_s = self._clock.monotonic_s()
        touched: dict[JobId, LiveJob] = {}
        used: set[BundleKey] = set()
        for n, completion in enumerate(completions):
            live = self._lives.get(completion.bundle.job)
            if live is not None:
                touched[live.id] = live
                live.folds += 1
                if folded.new[n]:
                    live.record_pace(completion, now_s)
                    record = BundleRecord(completion.bundle, completion, folded.first_seq + n)
                    key = (live.id, completion.bundle.stage, completion.bundle.id)
                    live.retain(record, whole.get(key))
                elif self._recorder:
                    self._recorder.record_repeated_outcome(live.id, completion.bundle.stage)
                # A repeated completion may be new to this manager, because the response of an earlier fold was lost.
                if folded.new[n] or completion.bundle.id in live.outstanding.get(completion.bundle.stage, {}):
                    # The same completion may be twice in the batch.
                    if (key := (live.id, completion.bundle.stage, completion.bundle.id)) not in used:
                        used.add(key)
                        self._context.fair_share.add_use(live.job, completion)
                    follows = [
                        (follow.bundle, now_s + settlement.delay_s(live.job, follow))
                        for follow in completion.follows
                        if (follow.bundle.stage, follow.bundle.id) not in live.early_bundles
                    ]
                    live.add_outstanding(follows)
                    live.delay((bundle, due_s) for bundle, due_s in follows if due_s > now_s)
        # Completed bundles are removed in a second loop, because the completion of a follow-up may be in the same
        # batch.
        for completion in completions:
            live = self._lives.get(completion.bundle.job)
            if live is not None:
                live.remove_outstanding(completion.bundle, completion.worker)
        return list(touched.values())

    async def write(self, live: LiveJob, change: JobChange) -> bool:
        """Apply the change to the ledger, copy the job's rows to memory, and return whether the change was new. Raise
        Superseded if the job is in a later round."""
        before = live.record
        written = await self._ledger.apply(change)
        await self._update_rows(live, before, written.rows)
        if live.record.round > live.round:
            raise Superseded(live)
        return written.is_new

    async def refresh(self, live: LiveJob) -> None:
        """Read the job and its stages from the ledger again. Raise Superseded if the job is in a later round."""
        before = live.record
        await self._update_rows(live, before, await self._ledger.rows(live.id))
        if live.record.round > live.round:
            raise Superseded(live)

    async def _update_rows(self, live: LiveJob, before: JobRecord | None, rows: JobRows) -> None:
        """Copy the ledger's rows of a job to memory. `before` is the job's record at the time of the request for the
        rows."""
        # If the record has changed since the request, the rows may be old, and old rows would overwrite a cancellation.
        while live.record is not before:
            before = live.record
            rows = await self._ledger.rows(live.id)
        if rows.job.round > live.round:
            live.end()  # a retry has begun the job's next round
        live.update_rows(rows)

    async def job(self, job: JobId) -> JobDef | None:
        """Return the job, or None if the job does not exist. If the ledger does not have the job, restore the job from
        the bucket."""
        live = self._lives.get(job)
        if live:
            return live.job
        try:
            return (await self._ledger.job(job)).job
        except NotFound:
            return await self._restore(job)
