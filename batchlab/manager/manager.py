"""The heart of the manager process: takes the lease, adopts live jobs, runs the loops.

Invariant: only the holder of the lease collects, plans and scales; and even two at once would do
no harm, since every decision is a conditional PUT and every fold counts once. It is long by what it
puts together, in one place and in one order.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

from batchlab.core import logs
from batchlab.core.errors import BackendError, NotFound, Refused, Throttled, Unreachable
from batchlab.core.job_definition import JobDef
from batchlab.core.model import Control, GroupView, JobId, JobState, LifecycleState, Pool
from batchlab.core.ports import Depth, JobRecord, QueueSpec
from batchlab.core.pricing.usage_meter import Accounting
from batchlab.core.protocol import object_keys
from batchlab.core.retry import heed_cancellation, patiently, set_within
from batchlab.core.tracing import NOBODY, Tracer
from batchlab.manager.counters import Counts
from batchlab.manager.events.collector import Collector, events_queue
from batchlab.manager.events.folding import Folder
from batchlab.manager.events.quarantine import Quarantine
from batchlab.manager.jobs import admission
from batchlab.manager.jobs.adoption import Adoption
from batchlab.manager.jobs.bundling import Cutter
from batchlab.manager.jobs.delayed_jobs import Starts
from batchlab.manager.jobs.early_events import Arrivals
from batchlab.manager.jobs.job_coordinator import Conductor
from batchlab.manager.jobs.live_logs import Tails
from batchlab.manager.jobs.requests import Requests
from batchlab.manager.lease import Leadership
from batchlab.manager.notifications.notifier import Notifying, Outlets
from batchlab.manager.recording.recorder import Recorder
from batchlab.manager.recording.report_requests import Reports
from batchlab.manager.repair.rebuild import Rebuilt, rebuild
from batchlab.manager.repair.reconciler import Reconciler
from batchlab.manager.scaling.autoscaler import Autoscaler
from batchlab.manager.scaling.prewarm import Prewarm
from batchlab.manager.scaling.unresponsive_workers import Silence
from batchlab.manager.scaling.work_evidence import Evidence
from batchlab.manager.scaling.worker_registry import Registry
from batchlab.manager.schedules.requests import Schedules
from batchlab.manager.settings import ManagerSettings
from batchlab.manager.state import LiveJob, Ports, in_pool, move
from batchlab.manager.usage.spending import Spending

log = logging.getLogger(__name__)

LOOK_S = 1.0
IDLE_LOOK_S = 60.0
"""The queues are looked at so often only, the second while there is no job: each look is billed."""

LOST = (
    "the bucket has lost the job's objects: it was emptied, or what serves it came back without "
    "what it had kept, as LocalStack does after a restart; submit the job again"
)

SOON = 8
"""Instances a pool is expected to have soon when it has none: sizes the first wave."""

_LIVING = (LifecycleState.PENDING, LifecycleState.IN_SERVICE)


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
        self.quarantine = quarantine = Quarantine(counts)
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
        self.registry = Registry(ports, self.lives, quarantine)
        evidence = Evidence(ports, self.registry, self.lives, self.depths, self.known)
        self._silence = Silence(ports, settings, self.registry, evidence)
        self.reports = reports or Reports()
        recorder = Recorder(ports, self.lives, self.registry) if reports and accounting else None
        self.recorder = recorder
        repeated = recorder.repeated if recorder else _unheard
        folder = Folder(
            ports,
            self.lives,
            lambda job: self._adoption.restored(job),
            repeated,
            counts,
            tracer,
            evidence.authors.add,
        )
        self.notifying = (
            Notifying(ports, self.lives, self.registry.workers, outlets, counts, self._caps_of)
            if outlets
            else None
        )
        on_end = self.notifying.ended if self.notifying else None
        cutter = Cutter(ports.clock, self.lives, self._slots, settings.window)
        self.conductor = Conductor(
            ports=ports,
            settings=settings,
            folder=folder,
            cutter=cutter,
            on_plan=self._on_plan,
            counts=counts,
            tracer=tracer,
            on_end=on_end,
            on_missing=lambda live: self._adoption.begin_anew(live),
            quarantine=quarantine,
        )
        self.tails = Tails(ports, settings)
        self.spending = (
            Spending(
                ports=ports,
                settings=settings,
                lives=self.lives,
                registry=self.registry,
                pools=self.pools,
                accounting=accounting,
                recorder=recorder,
                on_written=self.reports.ended,
            )
            if accounting
            else None
        )
        caps = self.spending.caps if self.spending else None
        self._starts = Starts(ports)
        self._adoption = Adoption(
            ports=ports,
            settings=settings,
            lives=self.lives,
            conductor=self.conductor,
            starts=self._starts,
            spending=self.spending,
            recorder=recorder,
            admit=self.admit,
            quarantine=quarantine,
        )
        arrivals = Arrivals()
        self.requests = Requests(
            ports=ports,
            conductor=self.conductor,
            cutter=cutter,
            lives=self.lives,
            adopt=partial(self._adoption.adopt, beside=True),
            arrivals=arrivals,
            is_staffed=lambda pool: self._in_service(pool) > 0,
            counts=counts,
            tracer=tracer,
        )
        self.autoscaler = Autoscaler(
            ports=ports,
            settings=settings,
            lives=self.lives,
            registry=self.registry,
            caps=caps,
            on_decision=recorder.decided if recorder else _unheard,
            counts=counts,
        )
        self.scheduler: Schedules | None = None
        if schedules:
            shared = ports, settings, self.lives, self.admit, self.requests, self.registry
            self.scheduler = Schedules(*shared)
            prewarm = Prewarm(ports.clock, settings, self.scheduler, caps)
            self.autoscaler.warmth = prewarm
        self._looked_s = -IDLE_LOOK_S
        """Monotonic; when the queues were last looked at."""
        self._lease = Leadership(ports.ledger, ports.clock, owner, settings.lease_ttl_s)
        self._others_led = False
        """Somebody else has led since we began to, and is gone: what we know of jobs is old."""
        self._looked_back = False
        """For retries that an earlier leader did not finish."""
        self._quiet = asyncio.Lock()
        self._collector = Collector(
            ports=ports,
            settings=settings,
            lives=self.lives,
            folder=folder,
            registry=self.registry,
            quiet=self._quiet,
            arrivals=arrivals,
            met_twice=recorder.told if recorder else _unheard,
            counts=counts,
            quarantine=quarantine,
        )
        self._reconciler = Reconciler(
            ports, settings, self.lives, folder, self.conductor, quarantine
        )

    async def known(self, job: JobId) -> JobRecord:
        """The job, also where only the bucket has it: its submission was told of an error, or of
        nothing, though its work has begun. NotFound where there is none."""
        try:
            return await self.ports.ledger.job(job)
        except NotFound:
            if await self._adoption.restored(job, beside=True) is None:
                raise
            return await self.ports.ledger.job(job)

    def admit(self, job: JobDef) -> None:
        """UsageError where this grid does not take the job."""
        slots = {name: pool.slots for name, pool in self.pools.items()}
        admission.admit(job, slots, self.notifying.directory() if self.notifying else None)

    async def run(self) -> None:
        """Lead until cancelled; returns when the lease is lost. Waits for it first."""
        await self._lease.take()
        try:
            async with asyncio.TaskGroup() as group:
                # First: what precedes the lead may take longer than the lease lasts.
                keeping = group.create_task(self._keep_lease(), name="lease")
                await self._prepare()
                await self.registry.instances.load()
                if self.recorder:
                    await self.recorder.load()
                if self.spending:
                    await self.spending.load()
                if self.notifying:
                    await self.notifying.load()
                self._adoption.group = group
                await self._adoption.adopt_active()
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
                await keeping
        except* _LeaseLostError:
            log.warning("%s is no longer the leader", self.owner)
        finally:
            if self.spending and self.is_leader.is_set():
                await self.spending.close()
                if self.recorder:
                    await self.recorder.leave()
            self.is_leader.clear()
            self._adoption.group = None
            await self._lease.release()

    async def _keep_lease(self) -> None:
        await self._lease.keep(self._others_have_led)
        self.is_leader.clear()
        raise _LeaseLostError

    async def _prepare(self) -> None:
        await self.ports.keys.ensure()
        await self._ensure(events_queue(self.settings))
        for pool in self.pools.values():
            dead = QueueSpec(object_keys.dead_letters(pool.name))
            await self._ensure(dead)
            await self._ensure(
                QueueSpec(
                    object_keys.tasks_queue(pool.name),
                    visibility_s=self.settings.visibility_s,
                    dead_letters=dead.name,
                    max_receives=self.settings.max_receives,
                )
            )
            await self.ports.fleet.ensure(pool)

    async def _ensure(self, spec: QueueSpec) -> None:
        await self.ports.patience(lambda: self.ports.queue.ensure(spec))

    def _others_have_led(self) -> None:
        self._others_led = True
        self.hurry()

    async def _catch_up(self) -> None:
        """Learn from the ledger what others who led have planned, begun and ended."""
        if not self._others_led:
            return
        log.warning("%s stood still while another one led: it adopts every job anew", self.owner)
        self._others_led = self._looked_back = False  # first: it may be so again meanwhile
        if self.scheduler:
            self.scheduler.reread()
        await self._adoption.drop_all()
        try:
            # What they have counted and seen, before any job is adopted with less.
            if self.spending:
                await self.spending.reread()
            if self.recorder:
                await self.recorder.reread()
            await self._adoption.adopt_active()
        except (Throttled, Unreachable):
            self._others_led = True
            raise

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
            heed_cancellation()
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
                with suppress(BackendError, Refused):  # the next tick comes here again
                    await self._prepare()
                    await self._end_the_lost()
            except Refused as error:
                log.warning("this tick is cut short: %s", error)
            except BackendError as error:
                log.warning("this tick is skipped: %s", error)
                self.trouble = str(error)
                self.counts.skipped += 1
            heed_cancellation()
            await set_within(self._hurry, self.settings.tick_s)
            self._hurry.clear()

    async def _end_the_lost(self) -> None:
        """End the jobs whose objects are gone with the queues: nothing will ever come of them."""
        for live in list(self.lives.values()):
            spec = partial(self.ports.objects.head, object_keys.spec(live.id))
            if await self.ports.patience(spec) is None:
                await self.conductor.abandon(live, LOST)

    def hurry(self) -> None:
        """Something has happened that the next tick must not wait for, such as the death of an
        instance."""
        self._hurry.set()

    def _on_plan(self, pool: str) -> None:
        """A stage has been planned: new capacity, where it takes any, must not wait."""
        if in_pool(self.lives, pool) > self._in_service(pool):
            self.hurry()

    def _in_service(self, pool: str) -> int:
        """Slots of its instances that were in service at the last tick."""
        return _alive(self.groups[pool]) if pool in self.groups else 0

    async def tick(self) -> None:
        """One round of everything periodic."""
        await self.registry.bury(await self.ports.fleet.tick())
        await self._starts.look(self.lives)
        described = await self.ports.fleet.describe()
        await self.registry.see(described)
        there = [one for view in described for one in view.instances]
        self.registry.keep({one.id for one in there})
        self.registry.back({one.id for one in there if one.state in _LIVING})
        views = [view for view in described if view.pool.name in self.pools]
        self.autoscaler.boots.observe(views)
        if self.spending:
            self.spending.observe(views)
        for view in views:
            await self.autoscaler.scale(view)
        await self._silence.look(views)
        # What has just been decided is carried out in this tick, not in the next.
        await self.registry.bury(await self.ports.fleet.tick())
        described = await self.ports.fleet.describe()
        await self.registry.see(described)
        await self.registry.instances.save()
        self.groups = {view.pool.name: view for view in described}
        self.autoscaler.boots.observe(list(self.groups.values()))
        for name, view in self.groups.items():
            if name not in self.pools:
                continue
            self._slots[name] = _alive(view) or _soon(view.pool)
        await self._look_at_queues()
        # The leader before us may have begun, re-opened or resumed a job after we looked, before
        # it knew that it no longer leads.
        if self.ports.clock.monotonic_s() - self._adoption.asked_s >= self.settings.silence_s:
            await self._adoption.adopt_active()
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
        return f"{books.cap_of(live)}/{books.caps.max_cost_usd}" if books else ""

    async def _look_at_queues(self) -> None:
        """What waits in each pool, what has become a dead letter, and which bundles are silent."""
        now_s = self.ports.clock.monotonic_s()
        # A tick is due a moment early or late.
        if now_s - self._looked_s < (LOOK_S if self.lives else IDLE_LOOK_S) - 0.001:
            return
        self._looked_s = now_s
        try:
            for name in self.pools:
                self.depths[name] = await self.ports.queue.depth(object_keys.tasks_queue(name))
                await self._reconciler.drain_dead_letters(name)
            await self._reconciler.look_for_the_silent(self.depths)
        except BackendError:
            if self.lives:
                self._looked_s = -IDLE_LOOK_S  # the next tick meets the outage too, and says so
            raise

    async def _show_start(self, live: LiveJob) -> None:
        """RUNNABLE waits for capacity, STARTING sees it come: what AWS Batch's words mean."""
        if live.record.state is not JobState.RUNNABLE:
            return
        pools = {stage.pool for stage in live.job.stages}
        if any(self.groups[p].instances for p in sorted(pools) if p in self.groups):
            await move(self.ports, live, JobState.STARTING)

    # --- Repairs ---------------------------------------------------------------------------------

    async def rebuild_ledger(self) -> Rebuilt:
        """Make the ledger anew from the bucket; return what was found there."""
        async with self._quiet:
            await self._adoption.drop_all()
            rebuilt = await rebuild(self.ports)
            # Somebody may have asked for a job meanwhile, and knows of it what the ledger knew.
            await self._adoption.drop_all()
            # Still in quiet: adopting writes, and a second rebuild may be waiting.
            await self._adoption.adopt_active()
        return rebuilt


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
