"""The heart of the manager process: takes the lease, adopts live jobs, runs the loops.

Invariant: only the holder of the lease collects, plans and scales; and even two at once would do
no harm, since every decision is a conditional PUT and every fold counts once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

from batchlab import logs
from batchlab.costs.meter import Accounting
from batchlab.errors import BackendError, NotFound, Refused, Throttled, Unreachable
from batchlab.jobdef import JobDef
from batchlab.manager import admission
from batchlab.manager.autoscaler import Autoscaler
from batchlab.manager.collector import Collector, events_queue
from batchlab.manager.conductor import Conductor
from batchlab.manager.counts import Counts
from batchlab.manager.cutting import Cutter
from batchlab.manager.folding import Folder
from batchlab.manager.live import LiveJob, ManagerSettings, Ports, in_pool, move
from batchlab.manager.notifying import Notifying, Outlets
from batchlab.manager.prewarm import Prewarm
from batchlab.manager.rebuild import rebuild
from batchlab.manager.reconciler import Reconciler
from batchlab.manager.recorder import Recorder
from batchlab.manager.registry import Registry
from batchlab.manager.reporting import Reports
from batchlab.manager.requests import Requests
from batchlab.manager.retries import cuts_of_round
from batchlab.manager.schedule_requests import Schedules
from batchlab.manager.silence import Silence
from batchlab.manager.spending import Spending
from batchlab.manager.tails import Tails
from batchlab.model import Control, GroupView, JobId, JobState, LifecycleState, Pool
from batchlab.patience import patiently
from batchlab.ports import Depth, QueueSpec, Written
from batchlab.protocol import naming
from batchlab.tracing import NOBODY, Tracer, trace_of
from batchlab.waits import set_within

log = logging.getLogger(__name__)

LEASE = "leader"
LOOK_S = 1.0
IDLE_LOOK_S = 60.0
"""The queues are looked at so often only, the second while there is no job: each look is billed."""

LOST = (
    "the bucket has lost the job's objects: it was emptied, or what serves it came back without "
    "what it had kept, as LocalStack does after a restart; submit the job again"
)

SET_BACK_S = 60.0
"""A wall clock that is set back by more than this does not hold up what is scheduled."""

SOON = 8
"""Instances a pool is expected to have soon when it has none: sizes the first wave."""


class Manager:
    """One manager. `run` ends when it is cancelled or loses its lease."""

    def __init__(
        self,
        ports: Ports,
        settings: ManagerSettings,
        pools: Sequence[Pool],
        owner: str,
        accounting: Accounting | None = None,
        reports: Reports | None = None,
        counts: Counts | None = None,
        tracer: Tracer = NOBODY,
        outlets: Outlets | None = None,
        recent: logs.Recent | None = None,
        *,
        schedules: bool = False,
    ) -> None:
        """With `accounting` it counts what the grid uses, and keeps caps on the cost of that; with
        `reports` too it records what those need, and has them written. `counts` goes on from an
        earlier manager of the same process; with `outlets` it notifies. `recent` hears what is
        logged, for who asks why. With `schedules` it runs jobs when they are due."""
        self.recent = recent
        self.counts = counts = counts or Counts()
        ports = replace(ports, ledger=patiently(ports.ledger, ports.patience))
        self.ports = ports
        self.settings = settings
        self.pools = {pool.name: pool for pool in pools}
        self.owner = owner
        self.lives: dict[JobId, LiveJob] = {}
        self.depths: dict[str, Depth] = {}
        """Counts of each pool's tasks queue, as of the last look at it."""
        self.groups: dict[str, GroupView] = {}
        self.is_leader = asyncio.Event()
        self.has_led = False
        self.trouble = ""
        """Why the last tick was skipped."""
        self._slots: dict[str, int] = {p.name: _soon(p) for p in pools}
        self._hurry = asyncio.Event()
        self.registry = Registry(ports, self.lives)
        self._silence = Silence(ports, settings, self.registry)
        self.reports = reports or Reports()
        recorder = Recorder(ports, self.lives, self.registry) if reports and accounting else None
        self.recorder = recorder
        repeated = recorder.repeated if recorder else _unheard
        folder = Folder(ports, self.lives, repeated, counts, tracer)
        self.notifying = (
            Notifying(ports, self.lives, self.registry.workers, outlets, counts, self._caps_of)
            if outlets
            else None
        )
        on_end = self.notifying.ended if self.notifying else None
        cutter = Cutter(ports.clock, self.lives, self._slots, settings.window)
        self.conductor = Conductor(
            ports, settings, folder, cutter, self._on_plan, counts, tracer, on_end
        )
        self.tails = Tails(ports, settings)
        self.requests = Requests(
            ports, self.conductor, cutter, self.lives, self._adopt, counts, tracer
        )
        self.spending = (
            Spending(
                *(ports, settings, self.lives, self.registry, self.pools, accounting),
                recorder,
                self.reports.ended,
            )
            if accounting
            else None
        )
        self.autoscaler = Autoscaler(
            *(ports, settings, self.lives, self.registry, self.spending),
            recorder.decided if recorder else _unheard,
            counts,
        )
        self.scheduler: Schedules | None = None
        if schedules:
            shared = ports, settings, self.lives, self.admit, self.requests, self.registry
            self.scheduler = Schedules(*shared)
            prewarm = Prewarm(ports.clock, settings, self.scheduler, self.spending)
            self.autoscaler.warmth = prewarm
        self._adopted_s = 0.0
        """Monotonic; when the ledger was last asked for jobs that nobody conducts."""
        self._looked_s = -IDLE_LOOK_S
        """Monotonic; when the queues were last looked at."""
        self._due_s: dict[JobId, float] = {}
        """Monotonic; when each job that was first seen SCHEDULED is to start."""
        self._beat = 0
        """Of the lease, when it was last taken or renewed."""
        self._others_led = False
        """Somebody else has led since we began to, and is gone: what we know of jobs is old."""
        self._looked_back = False
        """For retries that an earlier leader did not finish."""
        self._quiet = asyncio.Lock()
        self._collector = Collector(
            *(ports, settings, self.lives, folder, self.registry, self._quiet),
            recorder.told if recorder else _unheard,
            counts,
        )
        self._reconciler = Reconciler(ports, settings, self.lives, folder, self.conductor)
        self._group: asyncio.TaskGroup | None = None

    def admit(self, job: JobDef) -> None:
        """UsageError where this grid does not take the job."""
        slots = {name: pool.slots for name, pool in self.pools.items()}
        admission.admit(job, slots, self.notifying.directory() if self.notifying else None)

    async def run(self) -> None:
        """Lead until cancelled; returns when the lease is lost. Waits for it first."""
        await self._take_lease()
        try:
            await self._prepare()
            if self.recorder:
                await self.recorder.load()
            if self.spending:
                await self.spending.load()
            if self.notifying:
                await self.notifying.load()
            async with asyncio.TaskGroup() as group:
                self._group = group
                await self._adopt_active()
                group.create_task(self._collector.collect(), name="collect")
                group.create_task(self._tick_for_ever(), name="tick")
                group.create_task(self._finish_retries(), name="finish retries")
                group.create_task(self.reports.keep(), name="reports")
                if self.notifying:
                    group.create_task(self.notifying.run(), name="notify")
                if self.scheduler:
                    group.create_task(self.scheduler.run(), name="schedules")
                if self.recorder:
                    group.create_task(self.recorder.keep(), name="record")
                self.is_leader.set()
                self.has_led = True
                await self._keep_lease()
                self.is_leader.clear()
                raise _LeaseLostError
        except* _LeaseLostError:
            log.warning("%s is no longer the leader", self.owner)
        finally:
            if self.spending and self.is_leader.is_set():
                await self.spending.close()
                if self.recorder:
                    await self.recorder.leave()
            self.is_leader.clear()
            self._group = None
            with suppress(BackendError):  # it runs out by itself
                await self.ports.ledger.release(LEASE, self.owner)

    async def _prepare(self) -> None:
        await self._ensure(events_queue(self.settings))
        for pool in self.pools.values():
            dead = QueueSpec(naming.dead_letters(pool.name))
            await self._ensure(dead)
            await self._ensure(
                QueueSpec(
                    naming.tasks_queue(pool.name),
                    visibility_s=self.settings.visibility_s,
                    dead_letters=dead.name,
                    max_receives=self.settings.max_receives,
                )
            )
            await self.ports.fleet.ensure(pool)

    async def _ensure(self, spec: QueueSpec) -> None:
        await self.ports.patience(lambda: self.ports.queue.ensure(spec))

    async def _take_lease(self) -> None:
        """Wait until nobody has the lease, or its holder has not renewed it for as long as it
        lasts by our own clock. No two clocks have to agree."""
        ttl_s, clock = self.settings.lease_ttl_s, self.ports.clock
        seen, since_s = None, clock.monotonic_s()
        while True:
            is_over = clock.monotonic_s() - since_s >= ttl_s
            stands = await self.ports.ledger.lease(
                LEASE, self.owner, over=seen if is_over else None
            )
            if stands.owner == self.owner:
                self._beat = stands.beat
                return
            if stands != seen:
                seen, since_s = stands, clock.monotonic_s()
            await asyncio.sleep(ttl_s / 3)

    async def _keep_lease(self) -> None:
        while True:
            await asyncio.sleep(self.settings.lease_ttl_s / 3)
            try:
                async with asyncio.timeout(self.settings.lease_ttl_s * 2 / 3):
                    stands = await self.ports.ledger.lease(LEASE, self.owner)
            except TimeoutError:
                return  # it has run out; a standby may have taken it
            if stands.owner != self.owner:
                return
            if stands.beat != self._beat + 1:
                # We stood still, and found the lease free again. Or an answer was lost, and we
                # asked twice: then what follows was not needed.
                self._others_led = True
                self.hurry()
            self._beat = stands.beat

    async def _catch_up(self) -> None:
        """Learn from the ledger what others who led have planned, begun and ended."""
        if not self._others_led:
            return
        log.warning("%s stood still while another one led: it adopts every job anew", self.owner)
        self._others_led = self._looked_back = False  # first: it may be so again meanwhile
        if self.scheduler:
            self.scheduler.reread()
        await self._drop_all()
        try:
            # What they have counted and seen, before any job is adopted with less.
            if self.spending:
                await self.spending.reread()
            if self.recorder:
                await self.recorder.reread()
            await self._adopt_active()
        except (Throttled, Unreachable):
            self._others_led = True
            raise

    async def _adopt_active(self) -> None:
        """Conduct every job that has not ended."""
        self._adopted_s = self.ports.clock.monotonic_s()
        for record in await self.ports.ledger.jobs(active=True, limit=10_000):
            if record.job.id not in self.lives:
                rows = await self.ports.ledger.rows(record.job.id)
                await self._adopt(Written(rows, is_new=False))

    async def _adopt(self, found: Written) -> LiveJob:
        """Conduct a job: new, taken over from the leader before us, or re-opened."""
        ledger, rows = self.ports.ledger, found.rows
        job = rows.job.job
        # A retry is two steps in the ledger; the leader before us may have died between them.
        cuts = await cuts_of_round(self.ports, rows.job)
        for cut in cuts:
            rows = (await ledger.add_cut(cut)).rows
        if rows.job.state is JobState.SCHEDULED:
            self._due_s.setdefault(job.id, self._starts_s(job))
        # From the clock, or a watcher of the manager before us would take our news for old.
        live = LiveJob(
            rows.job,
            {s.counts.stage: s for s in rows.stages},
            version=int(self.ports.clock.now_s() * 1000),
            doubtful=not found.is_new,
            retried_s=min((cut.at_s for cut in cuts if cut.at_s is not None), default=None),
            known_after=0 if found.is_new else None,
        )
        if not found.is_new:
            # What a crashed leader planned but did not send is looked for well before `silence_s`.
            heard_s = self.ports.clock.monotonic_s() - 0.75 * self.settings.silence_s
            planned = await ledger.bundles(job.id, done=False)
            live.expect((r.bundle, heard_s) for r in planned)
        if self.spending:
            await self.spending.open(live, is_new=found.is_new)
        if self.recorder:
            self.recorder.adopt(live)
        known = self.lives.get(job.id)
        # Two submissions with one token came at once; or a retry came so soon after the job's end
        # that the round before has not been taken off yet: then the new one takes its place.
        if known and not known.ended.is_set() and known.round >= live.round:
            return known
        self.lives[job.id] = live
        if self.spending:
            self.spending.refill()
        if self._group is not None:
            live.conducting = self._group.create_task(self._conduct(live), name=f"job {job.id}")
        return live

    async def _conduct(self, live: LiveJob) -> None:
        logs.note(job=live.id, trace=trace_of(live.job.trace))
        while not live.ended.is_set():
            try:
                await self.conductor.conduct(live)
            except BackendError as error:
                # Patience ran out. The job is not lost, only late: its state is in the bucket.
                log.warning("job %s waits for the backend: %s", live.id, error)
                live.trouble = str(error)
                await asyncio.sleep(self.settings.tick_s)
            except Exception as error:
                # A bug, met by one job's data: it must not take the other jobs with it.
                log.exception("job %s met a bug", live.id)
                live.trouble = f"an error inside the manager: {error!r}; see its log"
                await asyncio.sleep(self.settings.lease_ttl_s)
        if self.lives.get(live.id) is live:
            del self.lives[live.id]
            self._due_s.pop(live.id, None)

    async def _finish_retries(self) -> None:
        while True:
            try:
                if not self._looked_back:
                    self._looked_back = True  # first: others may have led meanwhile
                    await self.requests.look_back()
                await self.requests.finish_retries()
            except BackendError as error:
                self._looked_back = False
                log.warning("a retry waits for the backend: %s", error)
            await asyncio.sleep(self.settings.silence_s)

    # --- The tick --------------------------------------------------------------------------------

    async def _tick_for_ever(self) -> None:
        while True:
            begun_s = self.ports.clock.monotonic_s()
            try:
                async with self._quiet:
                    await self._catch_up()
                    await self.tick()
                self.trouble = ""
                self.counts.ticks.observe(self.ports.clock.monotonic_s() - begun_s)
            except NotFound as error:
                log.warning(
                    "something is not there, so queues and groups are made again: %s", error
                )
                self.trouble = str(error)
                with suppress(BackendError):  # the next tick comes here again
                    await self._prepare()
                    await self._end_the_lost()
            except Refused as error:
                log.warning("this tick is cut short: %s", error)
            except BackendError as error:
                log.warning("this tick is skipped: %s", error)
                self.trouble = str(error)
                self.counts.skipped += 1
            await set_within(self._hurry, self.settings.tick_s)
            self._hurry.clear()

    async def _end_the_lost(self) -> None:
        """End the jobs whose objects are gone with the queues: nothing will ever come of them."""
        for live in list(self.lives.values()):
            spec = partial(self.ports.objects.head, naming.spec(live.id))
            if await self.ports.patience(spec) is None:
                await self.conductor.abandon(live, LOST)

    def hurry(self) -> None:
        """Something has happened that the next tick must not wait for, such as the death of an
        instance."""
        self._hurry.set()

    def _on_plan(self, pool: str) -> None:
        """A stage has been planned: new capacity, where it takes any, must not wait."""
        alive = _alive(self.groups[pool]) if pool in self.groups else 0
        if in_pool(self.lives, pool) > alive:
            self.hurry()

    async def tick(self) -> None:
        """One round of everything periodic."""
        await self.registry.bury(await self.ports.fleet.tick())
        await self._start_scheduled()
        described = await self.ports.fleet.describe()
        there = [one for view in described for one in view.instances]
        self.registry.keep({one.id for one in there})
        self.registry.back({one.id for one in there if one.state is LifecycleState.IN_SERVICE})
        views = [view for view in described if view.pool.name in self.pools]
        self.autoscaler.boots.observe(views)
        if self.spending:
            self.spending.observe(views)
        for view in views:
            await self.autoscaler.scale(view)
        await self._silence.look(views)
        # What has just been decided is carried out in this tick, not in the next.
        await self.registry.bury(await self.ports.fleet.tick())
        self.groups = {view.pool.name: view for view in await self.ports.fleet.describe()}
        self.autoscaler.boots.observe(list(self.groups.values()))
        for name, view in self.groups.items():
            if name not in self.pools:
                continue
            self._slots[name] = _alive(view) or _soon(view.pool)
        await self._look_at_queues()
        # The leader before us may have begun, re-opened or resumed a job after we looked, before
        # it knew that it no longer leads.
        if self.ports.clock.monotonic_s() - self._adopted_s >= self.settings.silence_s:
            await self._adopt_active()
            for live in [one for one in self.lives.values() if one.record.control is Control.PAUSE]:
                await self._reconciler.heed(live)
        for live in list(self.lives.values()):
            await self._show_start(live)
            live.poke.set()
        if self.spending:
            # Before the recorder forgets those that have ended meanwhile.
            self.spending.notice_ends()
        if self.recorder:
            self.recorder.observe(self.groups, self.depths, self.autoscaler.backlog)
        if self.spending:
            await self.spending.save()
        if self.notifying:
            await self.notifying.observe()
        self.tails.forget()

    def _caps_of(self, live: LiveJob) -> str:
        books = self.spending
        return f"{books.cap_of(live)}/{books.max_cost_usd}" if books else ""

    async def _look_at_queues(self) -> None:
        """What waits in each pool, what has become a dead letter, and which bundles are silent."""
        now_s = self.ports.clock.monotonic_s()
        # A tick is due a moment early or late.
        if now_s - self._looked_s < (LOOK_S if self.lives else IDLE_LOOK_S) - 0.001:
            return
        self._looked_s = now_s
        try:
            for name in self.pools:
                self.depths[name] = await self.ports.queue.depth(naming.tasks_queue(name))
                await self._reconciler.drain_dead_letters(name)
            await self._reconciler.look_for_the_silent(self.depths)
        except BackendError:
            if self.lives:
                self._looked_s = -IDLE_LOOK_S  # the next tick meets the outage too, and says so
            raise

    async def _start_scheduled(self) -> None:
        now_s = self.ports.clock.monotonic_s()
        for live in list(self.lives.values()):
            if live.record.state is JobState.SCHEDULED:
                late_s = now_s - self._due_s.get(live.id, now_s)
                if late_s > SET_BACK_S or self._starts_s(live.job) <= now_s:
                    await move(self.ports, live, JobState.SUBMITTED)
                    live.poke.set()

    def _starts_s(self, job: JobDef) -> float:
        """When the job is to start, on the monotonic clock, by what the wall clock says now."""
        clock = self.ports.clock
        return clock.monotonic_s() + (job.start_at_s or 0.0) - clock.now_s()

    async def _show_start(self, live: LiveJob) -> None:
        """RUNNABLE waits for capacity, STARTING sees it come: what AWS Batch's words mean."""
        if live.record.state is not JobState.RUNNABLE:
            return
        pools = {stage.pool for stage in live.job.stages}
        if any(self.groups[p].instances for p in sorted(pools) if p in self.groups):
            await move(self.ports, live, JobState.STARTING)

    # --- Repairs ---------------------------------------------------------------------------------

    async def rebuild_ledger(self) -> int:
        """Make the ledger anew from the bucket; answers how many jobs it found."""
        async with self._quiet:
            await self._drop_all()
            count = await rebuild(self.ports)
            # Somebody may have asked for a job meanwhile, and knows of it what the ledger knew.
            await self._drop_all()
            # Still in quiet: adopting writes, and a second rebuild may be waiting.
            await self._adopt_active()
        return count

    async def _drop_all(self) -> None:
        """Conduct no job any more."""
        conducting = [live.conducting for live in self.lives.values() if live.conducting]
        self.lives.clear()
        for task in conducting:
            task.cancel()
        await asyncio.gather(*conducting, return_exceptions=True)


def _unheard(*_: object) -> None:
    """Where nobody records."""


class _LeaseLostError(Exception):
    """Ends the leader's task group."""


def _alive(view: GroupView) -> int:
    """Slots of the instances that are in service."""
    alive = sum(i.state is LifecycleState.IN_SERVICE for i in view.instances)
    return alive * view.pool.slots


def _soon(pool: Pool) -> int:
    return max(1, min(pool.max_size, SOON)) * pool.slots
