"""Folds completions into the ledger and brings the live jobs up to date with it.

Invariant: the ledger decides which completions are new, once, in one transaction; memory only
follows it. Events may come twice, late, in any order, or not at all (see the reconciler).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from batchlab.errors import NotFound
from batchlab.jobdef import JobDef
from batchlab.manager.live import LiveJob, Ports, move
from batchlab.model import Completion, Control, JobId, JobState
from batchlab.protocol import settle

log = logging.getLogger(__name__)

_WAITING = (JobState.SUBMITTED, JobState.PENDING, JobState.RUNNABLE, JobState.STARTING)


class Folder:
    """Completions in, ledger and live jobs out."""

    def __init__(self, ports: Ports, lives: Mapping[JobId, LiveJob]) -> None:
        self._ports = ports
        self._lives = lives

    async def fold(self, completions: Sequence[Completion]) -> None:
        """Fold these; the jobs they belong to are poked."""
        known: list[tuple[Completion, JobDef]] = []
        for one in completions:
            job = await self._job(one.bundle.job)
            if job is None:
                continue
            stages = {stage.name for stage in job.stages}
            if not stages.issuperset({one.bundle.stage, *(f.bundle.stage for f in one.follows)}):
                # The ledger would refuse it, and with it all that came in the same batch.
                log.error("dropped a completion of a stage that job %s does not have", job.id)
                continue
            known.append((one, job))
            live = self._lives.get(job.id)
            # Before it is counted: a stage must not seem to have come to its end by this.
            if live is not None and one.cancelled and live.record.control is not Control.CANCEL:
                live.doubtful = True
        if not known:
            return
        new = await self._ports.ledger.fold(
            [one for one, _ in known], [settle.casualties(job, one) for one, job in known]
        )
        now_s = self._ports.clock.monotonic_s()
        touched: dict[JobId, LiveJob] = {}
        for (one, _), is_new in zip(known, new, strict=True):
            live = self._lives.get(one.bundle.job)
            if live is not None:
                touched[live.id] = live
                # Or not new, but to us: the ledger's first answer was lost, and we asked again.
                if is_new or one.bundle.id in live.outstanding.get(one.bundle.stage, {}):
                    live.expect((f.bundle, now_s + f.delay_s) for f in one.follows)
        # In a second pass: a follow's own completion may have come in the same batch. One that
        # came in an earlier batch stays expected until the reconciler finds its outcome.
        for one, _ in known:
            if live := self._lives.get(one.bundle.job):
                live.settled(one.bundle)
        for live in touched.values():
            await self._started(live)
            await self.refresh(live)
            live.poke.set()

    async def refresh(self, live: LiveJob) -> None:
        """Read the job and its stages from the ledger again."""
        before = None
        # Who has changed the record meanwhile knows more than what was read: a cancellation would
        # be forgotten.
        while live.record is not before:
            before = live.record
            record = await self._ports.ledger.job(live.id)
            stages = await self._ports.ledger.stages(live.id)
        # Together: somebody who looks in between must not see an ended job with old counters.
        live.record = record
        live.stages = {s.counts.stage: s for s in stages}
        if record.round > live.round:
            live.ended.set()  # what was conducted here has ended, and a retry has begun the next
        live.changed()

    async def _started(self, live: LiveJob) -> None:
        if live.record.state in _WAITING:
            await move(self._ports, live, JobState.RUNNING)

    async def _job(self, job: JobId) -> JobDef | None:
        live = self._lives.get(job)
        if live:
            return live.job
        try:
            return (await self._ports.ledger.job(job)).job
        except NotFound:
            return None  # of a job that was removed: nobody is waiting for it
