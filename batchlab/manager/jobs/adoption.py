"""Which jobs a manager conducts: those that are new, taken over from a leader, or re-opened.

Invariant: every job that has not ended is conducted once, by one task; neither an outage nor a bug
that one job meets takes it, or another job, out of that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial

from batchlab.core import logs
from batchlab.core.errors import (
    BackendError,
    Malformed,
    NotFound,
    Throttled,
    TooNew,
    Unreachable,
    UsageError,
)
from batchlab.core.job_definition import JobDef
from batchlab.core.model import JobId, JobState
from batchlab.core.ports import AddCut, BundleRecord, Cut, JobRecord, Written
from batchlab.core.protocol import json_format, object_keys, settlement
from batchlab.core.retry import heed_cancellation
from batchlab.core.tracing import trace_of
from batchlab.manager.events.quarantine import Quarantine, UnreadableObject
from batchlab.manager.jobs import admission
from batchlab.manager.jobs.delayed_jobs import Starts
from batchlab.manager.jobs.job_coordinator import Conductor
from batchlab.manager.jobs.retries import cuts_of_round
from batchlab.manager.recording.recorder import Recorder
from batchlab.manager.repair.rebuild import restore
from batchlab.manager.settings import ManagerSettings
from batchlab.manager.state import LiveJob, Ports, Superseded, all_jobs
from batchlab.manager.usage.spending import Spending

log = logging.getLogger(__name__)


class Adoption:
    """One manager's; what it conducts is in `lives`."""

    def __init__(
        self,
        ports: Ports,
        settings: ManagerSettings,
        lives: dict[JobId, LiveJob],
        conductor: Conductor,
        starts: Starts,
        spending: Spending | None,
        recorder: Recorder | None,
        admit: Callable[[JobDef], None],
        quarantine: Quarantine,
    ) -> None:
        """`admit` raises UsageError for a job that this grid does not take."""
        self._admit = admit
        self._quarantine = quarantine
        self._ports = ports
        self._settings = settings
        self._lives = lives
        self._conductor = conductor
        self._starts = starts
        self._spending = spending
        self._recorder = recorder
        self.group: asyncio.TaskGroup | None = None
        """In which jobs are conducted, None while this manager does not lead."""
        self.asked_s = 0.0
        """Monotonic; when the ledger was last asked for jobs that nobody conducts."""

    async def adopt_active(self) -> None:
        """Conduct every job that has not ended."""
        self.asked_s = self._ports.clock.monotonic_s()
        async for record in all_jobs(self._ports, active=True):
            if record.job.id in self._lives:
                continue
            rows = await self._ports.ledger.rows(record.job.id)
            try:
                await self.adopt(Written(rows, is_new=False))
            except (Malformed, TooNew, NotFound) as error:
                # The other jobs must not wait for this one, which is tried again later.
                key = object_keys.committed(record.job.id)
                self._quarantine.object(key, error, record.job.id, "object")

    async def adopt(self, found: Written, *, beside: bool = False) -> LiveJob:
        """Conduct a job: new, taken over from the leader before us, or re-opened; `beside` folds,
        where these are not held up meanwhile."""
        ledger, rows = self._ports.ledger, found.rows
        job = rows.job.job
        # A retry is two steps in the ledger; the leader before us may have died between them.
        cuts, unreadable = await self._cuts(rows.job)
        for cut in cuts:
            rows = (await ledger.apply(AddCut(cut))).rows
        planned: Sequence[BundleRecord] = ()
        if not found.is_new:
            planned = await ledger.bundles(job.id, done=False)
            if beside:
                # After these: what is folded in between is then waited for in vain, and looked for;
                # the other way round the counters would miss it, and nobody would wait for it.
                rows = await ledger.rows(job.id)
        if rows.job.state is JobState.SCHEDULED:
            self._starts.see(job)
        # From the clock, or a watcher of the manager before us would take our news for old.
        live = LiveJob(
            rows.job,
            {s.counts.stage: s for s in rows.stages},
            version=int(self._ports.clock.now_s() * 1000),
            doubtful=not found.is_new,
            unreadable=unreadable,
            retried_s=min((cut.at_s for cut in cuts if cut.at_s is not None), default=None),
            known_after=0 if found.is_new else None,
        )
        if not found.is_new:
            # What a crashed leader planned but did not send is looked for well before `silence_s`.
            heard_s = self._ports.clock.monotonic_s() - 0.75 * self._settings.silence_s
            # A retry is not silent while it waits for the end of its backoff.
            now_s = self._ports.clock.now_s()
            live.expect(
                (r.bundle, heard_s + settlement.wait_s(job, r.bundle, now_s)) for r in planned
            )
        if self._spending:
            await self._spending.open(live, is_new=found.is_new)
        if self._recorder:
            self._recorder.adopt(live)
        known = self._lives.get(job.id)
        # Two submissions with one token came at once; or a retry came so soon after the job's end
        # that the round before has not been taken off yet: then the new one takes its place.
        if known and not known.ended.is_set() and known.round >= live.round:
            return known
        self._lives[job.id] = live
        if self._spending:
            self._spending.refill()
        if self.group is not None:
            live.conducting = self.group.create_task(self._conduct(live), name=f"job {job.id}")
        return live

    async def _cuts(self, record: JobRecord) -> tuple[Sequence[Cut], UnreadableObject | None]:
        """Return the cuts of the retry that began the round, or the error of its object."""
        try:
            return await cuts_of_round(self._ports, record), None
        except UnreadableObject as error:
            return (), error
        except NotFound as error:
            key = object_keys.retry(record.job.id, record.round)
            return (), UnreadableObject(key, error.message)

    async def restored(self, job: JobId, *, beside: bool = False) -> JobDef | None:
        """The job from the bucket, of which the ledger has nothing: who accepted it died on the
        way there, or somebody has taken the ledger away. None where the bucket has none that could
        be read, or one that this grid does not admit: a worker may name any job in an event."""
        if not admission.is_name(job):
            log.error("an event names a job that cannot exist")
            return None
        try:
            get = partial(self._ports.objects.get, object_keys.spec(job))
            self._admit(
                json_format.job_from_json(json_format.loads(await self._ports.patience(get)))
            )
            await restore(self._ports, job)
        except NotFound:
            return None
        except UnreadableObject as error:
            # It must not keep the completions of other jobs from being folded.
            self._quarantine.object(error.key, error, job, "object")
            return None
        except (Malformed, TooNew) as error:
            self._quarantine.object(object_keys.spec(job), error, job, "object")
            return None
        except (Throttled, Unreachable):
            raise
        except UsageError as error:
            log.error("job %s is not admitted: %s", job, error, extra={"job": job})
            return None
        except Exception:
            log.exception("job %s cannot be restored", job, extra={"job": job})
            return None
        log.warning("the ledger did not know job %s", job, extra={"job": job})
        rows = await self._ports.ledger.rows(job)
        if not rows.job.state.ended:
            await self.adopt(Written(rows, is_new=False), beside=beside)
        return rows.job.job

    async def begin_anew(self, live: LiveJob) -> None:
        """Restore a job from the bucket, since the ledger has counted what is not committed, and
        conduct it again."""
        await restore(self._ports, live.id)
        live.ended.set()  # what was conducted here
        rows = await self._ports.ledger.rows(live.id)
        await self.adopt(Written(rows, is_new=False), beside=True)

    async def _give_up(self, live: LiveJob, error: Malformed) -> None:
        """End a job that can never go on; try again later if the backend does not answer."""
        try:
            await self._conductor.give_up(live, error)
        except Superseded:
            live.end()
        except BackendError as later:
            heed_cancellation()
            log.warning("job %s waits for the backend: %s", live.id, later)
            await asyncio.sleep(self._settings.tick_s)

    async def _conduct(self, live: LiveJob) -> None:
        logs.note(job=live.id, trace=trace_of(live.job.trace))
        while not live.ended.is_set():
            try:
                await self._conductor.conduct(live)
            except Superseded as error:
                heed_cancellation()
                log.info("%s", error, extra={"job": live.id})
                live.end()
            except Malformed as error:
                heed_cancellation()
                log.error("job %s is given up: %s", live.id, error, extra={"job": live.id})
                live.trouble = str(error)
                await self._give_up(live, error)
            except BackendError as error:
                heed_cancellation()
                # Patience ran out. The job is not lost, only late: its state is in the bucket.
                log.warning("job %s waits for the backend: %s", live.id, error)
                live.trouble = str(error)
                await asyncio.sleep(self._settings.tick_s)
            except Exception as error:
                heed_cancellation()
                # A bug, met by one job's data: it must not take the other jobs with it.
                log.exception("job %s met a bug", live.id)
                live.trouble = f"an error inside the manager: {error!r}; see its log"
                await asyncio.sleep(self._settings.lease_ttl_s)
        if self._lives.get(live.id) is live:
            del self._lives[live.id]
            live.release_outcomes()
            self._starts.forget(live.id)

    async def drop_all(self) -> None:
        """Conduct no job any more."""
        conducting = [live.conducting for live in self._lives.values() if live.conducting]
        self._lives.clear()
        for task in conducting:
            task.cancel()
        await asyncio.gather(*conducting, return_exceptions=True)
