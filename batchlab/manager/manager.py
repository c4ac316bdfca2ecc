"""The manager process: takes the lease, adopts live jobs, and runs the loops.

Invariant: only the holder of the lease collects, plans, and scales. Two managers at once would do
no harm, because every decision is a conditional PUT and every fold counts once. This module is long
because it connects all parts in one place and in one order.

The leader's lease. A standby takes the lease after it has expired.

Invariant: clocks need not agree. A standby takes the lease only after the holder's beat has not
changed for the lease's duration, measured by the standby's monotonic clock. The holder gives up
earlier.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

from batchlab.core import logs
from batchlab.core.errors import BackendError, NotFound, Refused, Throttled, Unreachable
from batchlab.core.job_definition import JobDef
from batchlab.core.model import Control, GroupView, JobId, JobState, LifecycleState, Pool
from batchlab.core.port_retries import patiently, raise_if_cancelled, set_within
from batchlab.core.ports import Clock, Depth, JobRecord, Ledger, QueueSpec
from batchlab.core.pricing.usage import Accounting
from batchlab.core.protocol import object_keys
from batchlab.core.tracing import NO_TRACER, Tracer
from batchlab.manager import admission
from batchlab.manager.adoption import Adoption, DelayedJobs
from batchlab.manager.autoscaler import Autoscaler, Prewarm
from batchlab.manager.bundling import Bundler
from batchlab.manager.collector import Collector, PendingSubmissions, events_queue
from batchlab.manager.counters import Counters
from batchlab.manager.job_commands import JobCommands
from batchlab.manager.job_coordinator import JobCoordinator
from batchlab.manager.ledger_rebuild import RebuildResult, rebuild
from batchlab.manager.ledger_writer import LedgerWriter
from batchlab.manager.live_logs import LiveLogs
from batchlab.manager.notifier import NotificationChannels, Notifier
from batchlab.manager.quarantine import Quarantine
from batchlab.manager.reconciler import Reconciler
from batchlab.manager.recorder import Recorder, ReportQueue
from batchlab.manager.schedule_commands import ScheduleCommands
from batchlab.manager.spending import Spending
from batchlab.manager.state import LiveJob, ManagerSettings, Ports, outstanding_in_pool, set_job_state
from batchlab.manager.unresponsive_workers import UnresponsiveWorkers, WorkEvidence
from batchlab.manager.worker_registry import WorkerRegistry

LEASE = "leader"


class LeaderLease:
    """One manager's side of the lease. `ttl_s` is the time until an unrenewed lease expires."""

    def __init__(self, ledger: Ledger, clock: Clock, owner: str, ttl_s: float) -> None:
        self._ledger = ledger
        self._clock = clock
        self._owner = owner
        self._ttl_s = ttl_s
        self._beat = 0
        """Beat of the last renewal."""
        self._asked_s = 0.0
        """Monotonic time of the request that renewed the lease last."""

    async def take(self) -> None:
        """Wait until the lease is free, or until its holder has not renewed it for `ttl_s`, and
        take it."""
        seen, since_s = None, self._clock.monotonic_s()
        while True:
            asked_s = self._clock.monotonic_s()
            is_over = asked_s - since_s >= self._ttl_s
            stands = await self._ledger.lease(LEASE, self._owner, over=seen if is_over else None)
            if stands.owner == self._owner:
                self._beat, self._asked_s = stands.beat, asked_s
                return
            if stands != seen:
                seen, since_s = stands, self._clock.monotonic_s()
            await asyncio.sleep(self._ttl_s / 3)

    async def keep(self, on_gap: Callable[[], None]) -> None:
        """Renew the lease until it is lost. `on_gap` is called if another manager may have led in
        between."""
        while True:
            now_s = self._clock.monotonic_s()
            await asyncio.sleep(max(0.0, self._asked_s + self._ttl_s / 3 - now_s))
            asked_s = self._clock.monotonic_s()
            # The lease counts from the last request, because the response may have arrived much
            # later. A process that was paused for longer than that asks once.
            left_s = self._asked_s + self._ttl_s - asked_s
            try:
                async with asyncio.timeout(left_s if left_s > 0 else self._ttl_s * 2 / 3):
                    stands = await self._ledger.lease(LEASE, self._owner)
            except TimeoutError:
                return  # the lease has expired, and a standby may have taken it
            if stands.owner != self._owner:
                return
            if stands.beat != self._beat + 1:
                # This process was paused, and the lease was free again. Or a response was lost, and
                # the request was sent twice. Then `on_gap` is not needed, but harmless.
                on_gap()
            self._beat, self._asked_s = stands.beat, asked_s

    async def release(self) -> None:
        """Release the lease, so that another manager can take it at once."""
        with suppress(BackendError):  # the lease expires by itself
            await self._ledger.release(LEASE, self._owner)


log = logging.getLogger(__name__)

QUEUE_CHECK_S = 1.0
"""Time in seconds between two reads of the queue depths while jobs are live."""
IDLE_QUEUE_CHECK_S = 60.0
"""Time in seconds between two reads of the queue depths without live jobs.

Each read is billed.
"""

LOST_OBJECTS = (
    "the bucket has lost the job's objects: it was emptied, or its server restarted without its "
    "data, as LocalStack does; submit the job again"
)

EMPTY_POOL_SIZE = 8
"""Assumed number of instances of an empty pool, used to size the first wave of bundles."""

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
        reports: ReportQueue | None = None,
        counts: Counters | None = None,
        tracer: Tracer = NO_TRACER,
        outlets: NotificationChannels | None = None,
        recent: logs.Recent | None = None,
        *,
        schedules: bool = False,
    ) -> None:
        """Connect the parts of a manager.

        With `accounting`, the manager counts usage and enforces cost caps. With `accounting` and
        `reports`, it also records performance data. `counts` are the counters of an earlier manager
        of the same process, which this manager continues. With `outlets`, it sends notifications.
        `recent` keeps recent log lines. With `schedules`, it runs jobs when they are due.
        """
        self.recent = recent
        self.counts = counts = counts or Counters()
        self.quarantine = quarantine = Quarantine(counts)
        ports = replace(ports, ledger=patiently(ports.ledger, ports.patience))
        self.ports = ports
        self.settings = settings
        self.pools = {pool.name: pool for pool in pools}
        self.owner = owner
        self.lives: dict[JobId, LiveJob] = {}
        self.depths: dict[str, Depth] = {}
        """Most recent depth of each pool's task queue."""
        self.groups: dict[str, GroupView] = {}
        self.is_leader = asyncio.Event()
        self.has_led = False
        self.trouble = ""
        """Why the last tick was skipped."""
        self._slots: dict[str, int] = {p.name: _assumed_slots(p) for p in pools}
        self._wake = asyncio.Event()
        self.registry = WorkerRegistry(ports, self.lives, quarantine)
        evidence = WorkEvidence(ports, self.registry, self.lives, self.depths, self.known)
        self._unresponsive = UnresponsiveWorkers(ports, settings, self.registry, evidence)
        self.reports = reports or ReportQueue()
        recorder = Recorder(ports, self.lives, self.registry) if reports and accounting else None
        self.recorder = recorder
        repeated = recorder.repeated if recorder else _ignore
        ledger_writer = LedgerWriter(
            ports, self.lives, lambda job: self._adoption.restored(job), repeated, counts, tracer, evidence.authors.add
        )
        self.notifier = (
            Notifier(ports, self.lives, self.registry.workers, outlets, counts, self._caps_of) if outlets else None
        )
        on_end = self.notifier.ended if self.notifier else None
        bundler = Bundler(ports.clock, self.lives, self._slots, settings.window)
        self.coordinator = JobCoordinator(
            ports=ports,
            settings=settings,
            ledger_writer=ledger_writer,
            bundler=bundler,
            on_plan=self._on_plan,
            counts=counts,
            tracer=tracer,
            on_end=on_end,
            on_missing=lambda live: self._adoption.begin_anew(live),
            quarantine=quarantine,
        )
        self.tails = LiveLogs(ports, settings)
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
        self._delayed_jobs = DelayedJobs(ports)
        self._adoption = Adoption(
            ports=ports,
            settings=settings,
            lives=self.lives,
            coordinator=self.coordinator,
            delayed_jobs=self._delayed_jobs,
            spending=self.spending,
            recorder=recorder,
            admit=self.admit,
            quarantine=quarantine,
        )
        pending_submissions = PendingSubmissions()
        self.requests = JobCommands(
            ports=ports,
            coordinator=self.coordinator,
            bundler=bundler,
            lives=self.lives,
            adopt=partial(self._adoption.adopt, beside=True),
            pending_submissions=pending_submissions,
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
            on_decision=recorder.decided if recorder else _ignore,
            counts=counts,
        )
        self.scheduler: ScheduleCommands | None = None
        if schedules:
            shared = ports, settings, self.lives, self.admit, self.requests, self.registry
            self.scheduler = ScheduleCommands(*shared)
            prewarm = Prewarm(ports.clock, settings, self.scheduler, caps)
            self.autoscaler.minimum_capacity = prewarm
        self._looked_s = -IDLE_QUEUE_CHECK_S
        """Monotonic time of the last read of the queue depths."""
        self._lease = LeaderLease(ports.ledger, ports.clock, owner, settings.lease_ttl_s)
        self._others_led = False
        """Another manager held the lease after this manager last led, so the cached job state is
        stale."""
        self._retries_searched = False
        """Whether this manager has searched for unfinished retries of earlier leaders."""
        self._ledger_lock = asyncio.Lock()
        self._collector = Collector(
            ports=ports,
            settings=settings,
            lives=self.lives,
            ledger_writer=ledger_writer,
            registry=self.registry,
            ledger_lock=self._ledger_lock,
            pending_submissions=pending_submissions,
            on_duplicates=recorder.told if recorder else _ignore,
            counts=counts,
            quarantine=quarantine,
        )
        self._reconciler = Reconciler(ports, settings, self.lives, ledger_writer, self.coordinator, quarantine)

    async def known(self, job: JobId) -> JobRecord:
        """Return the job from the ledger, restored from the bucket if the ledger does not have it.
        A submission may have failed after it had written the job to the bucket. Raises NotFound."""
        try:
            return await self.ports.ledger.job(job)
        except NotFound:
            if await self._adoption.restored(job, beside=True) is None:
                raise
            return await self.ports.ledger.job(job)

    def admit(self, job: JobDef) -> None:
        """Raise UsageError if this grid cannot run the job."""
        slots = {name: pool.slots for name, pool in self.pools.items()}
        admission.admit(job, slots, self.notifier.directory() if self.notifier else None)

    async def run(self) -> None:
        """Wait for the lease, then lead until cancelled. Returns when the lease is lost."""
        await self._lease.take()
        try:
            async with asyncio.TaskGroup() as group:
                # The lease is renewed first, because the preparation may take longer than the lease
                # lasts.
                keeping = group.create_task(self._keep_lease(), name="lease")
                await self._prepare()
                await self.registry.instances.load()
                if self.recorder:
                    await self.recorder.load()
                if self.spending:
                    await self.spending.load()
                if self.notifier:
                    await self.notifier.load()
                self._adoption.group = group
                await self._adoption.adopt_active()
                group.create_task(self._collector.collect(), name="collect")
                group.create_task(self._tick_for_ever(), name="tick")
                group.create_task(self._finish_retries(), name="finish retries")
                group.create_task(self.reports.keep(), name="reports")
                if self.notifier:
                    group.create_task(self.notifier.run(), name="notify")
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
        self.wake()

    async def _catch_up(self) -> None:
        """Read from the ledger what other leaders have planned, started, and ended."""
        if not self._others_led:
            return
        log.warning("another manager led while %s was paused: all jobs are adopted again", self.owner)
        # first, because another manager may lead meanwhile
        self._others_led = self._retries_searched = False
        if self.scheduler:
            self.scheduler.reread()
        await self._adoption.drop_all()
        try:
            # Usage and records come first, because adopted jobs use them.
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
                if not self._retries_searched:
                    self._retries_searched = True  # first, because others may lead meanwhile
                    await self.requests.look_back()
                await self.requests.finish_retries()
            except BackendError as error:
                self._retries_searched = False
                log.warning("an unfinished retry waits for the backend: %s", error)
            raise_if_cancelled()
            await asyncio.sleep(self.settings.silence_s)

    # --- The tick --------------------------------------------------------------------------------

    async def _tick_for_ever(self) -> None:
        while True:
            begun_s = self.ports.clock.monotonic_s()
            try:
                async with self._ledger_lock:
                    await self._catch_up()
                    await self.tick()
                self.trouble = ""
                self.counts.ticks.observe(self.ports.clock.monotonic_s() - begun_s)
            except NotFound as error:
                log.warning("a queue or a group is missing, so all are created again: %s", error)
                self.trouble = str(error)
                with suppress(BackendError, Refused):  # the next tick tries again
                    await self._prepare()
                    await self._end_the_lost()
            except Refused as error:
                log.warning("this tick is cut short: %s", error)
            except BackendError as error:
                log.warning("this tick is skipped: %s", error)
                self.trouble = str(error)
                self.counts.skipped += 1
            raise_if_cancelled()
            await set_within(self._wake, self.settings.tick_s)
            self._wake.clear()

    async def _end_the_lost(self) -> None:
        """End the jobs whose definition has vanished from the bucket. They cannot make progress."""
        for live in list(self.lives.values()):
            spec = partial(self.ports.objects.head, object_keys.spec(live.id))
            if await self.ports.patience(spec) is None:
                await self.coordinator.abandon(live, LOST_OBJECTS)

    def wake(self) -> None:
        """Start the next tick at once, for example after the death of an instance."""
        self._wake.set()

    def _on_plan(self, pool: str) -> None:
        """Start the next tick at once if a planned stage needs more capacity."""
        if outstanding_in_pool(self.lives, pool) > self._in_service(pool):
            self.wake()

    def _in_service(self, pool: str) -> int:
        """Return the slots of the pool's instances that were in service at the last tick."""
        return _slots_in_service(self.groups[pool]) if pool in self.groups else 0

    async def tick(self) -> None:
        """Do one round of all periodic work."""
        await self.registry.bury(await self.ports.fleet.tick())
        await self._delayed_jobs.look(self.lives)
        described = await self.ports.fleet.describe()
        await self.registry.see(described)
        instances = [instance for view in described for instance in view.instances]
        self.registry.keep({one.id for one in instances})
        self.registry.back({one.id for one in instances if one.state in _LIVING})
        views = [view for view in described if view.pool.name in self.pools]
        self.autoscaler.launch_breaker.observe(views)
        if self.spending:
            self.spending.observe(views)
        for view in views:
            await self.autoscaler.scale(view)
        await self._unresponsive.look(views)
        # The decisions of this tick take effect in this tick.
        await self.registry.bury(await self.ports.fleet.tick())
        described = await self.ports.fleet.describe()
        await self.registry.see(described)
        await self.registry.instances.save()
        self.groups = {view.pool.name: view for view in described}
        self.autoscaler.launch_breaker.observe(list(self.groups.values()))
        for name, view in self.groups.items():
            if name not in self.pools:
                continue
            self._slots[name] = _slots_in_service(view) or _assumed_slots(view.pool)
        await self._look_at_queues()
        # The previous leader may have started, reopened, or resumed a job after this manager read
        # the ledger, before it noticed that it had lost the lease.
        if self.ports.clock.monotonic_s() - self._adoption.asked_s >= self.settings.silence_s:
            await self._adoption.adopt_active()
            for live in [one for one in self.lives.values() if one.record.control is Control.PAUSE]:
                await self._reconciler.heed(live)
        for live in list(self.lives.values()):
            await self._show_start(live)
            live.poke.set()
        if self.spending:
            # Before the recorder forgets the jobs that have ended.
            self.spending.notice_ends()
        if self.recorder:
            self.recorder.observe(self.groups, self.depths, self.autoscaler.backlog)
        if self.spending:
            await self.spending.save()
        if self.notifier:
            await self.notifier.observe()
        self.tails.forget()

    def _caps_of(self, live: LiveJob) -> str:
        books = self.spending
        return f"{books.cap_of(live)}/{books.caps.max_cost_usd}" if books else ""

    async def _look_at_queues(self) -> None:
        """Read queue depths, handle dead letters, and recover silent bundles."""
        now_s = self.ports.clock.monotonic_s()
        # The tolerance covers a tick that is slightly early.
        if now_s - self._looked_s < (QUEUE_CHECK_S if self.lives else IDLE_QUEUE_CHECK_S) - 0.001:
            return
        self._looked_s = now_s
        try:
            for name in self.pools:
                self.depths[name] = await self.ports.queue.depth(object_keys.tasks_queue(name))
                await self._reconciler.drain_dead_letters(name)
            await self._reconciler.look_for_the_silent(self.depths)
        except BackendError:
            if self.lives:
                self._looked_s = -IDLE_QUEUE_CHECK_S  # the next tick checks again and reports the outage
            raise

    async def _show_start(self, live: LiveJob) -> None:
        """Move a RUNNABLE job to STARTING once its pools have instances, as AWS Batch does."""
        if live.record.state is not JobState.RUNNABLE:
            return
        pools = {stage.pool for stage in live.job.stages}
        if any(self.groups[p].instances for p in sorted(pools) if p in self.groups):
            await set_job_state(self.ports, live, JobState.STARTING)

    # --- Repairs ---------------------------------------------------------------------------------

    async def rebuild_ledger(self) -> RebuildResult:
        """Rebuild the ledger from the bucket, and return what was found."""
        async with self._ledger_lock:
            await self._adoption.drop_all()
            rebuilt = await rebuild(self.ports)
            # A request may have adopted a job meanwhile, from the old content of the ledger.
            await self._adoption.drop_all()
            # Still under the lock, because adopting writes and a second rebuild may be waiting.
            await self._adoption.adopt_active()
        return rebuilt


def _ignore(*_: object) -> None:
    """Accept and discard any arguments."""


class _LeaseLostError(Exception):
    """Ends the task group of the leader."""


def _slots_in_service(view: GroupView) -> int:
    alive = sum(i.state is LifecycleState.IN_SERVICE for i in view.instances)
    return alive * view.pool.slots


def _assumed_slots(pool: Pool) -> int:
    return max(1, min(pool.max_size, EMPTY_POOL_SIZE)) * pool.slots
