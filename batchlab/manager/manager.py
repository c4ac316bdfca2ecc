"""The manager process and its leader lease.

Invariant: only the holder of the lease collects, plans, and scales. Two managers that lead at once cannot damage data,
because every decision is a conditional PUT and every fold counts once. This module creates and connects all parts of
the manager.

Invariant of the lease: the clocks of different managers need not agree. A standby manager takes the lease only after
the lease's beat counter has not changed for the lease's duration by the standby's monotonic clock. The holder stops
leading before a standby can take the lease.
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
from batchlab.core.port_retries import patiently, raise_if_cancelled, set_after
from batchlab.core.ports import Clock, JobRecord, Ledger, QueueSpec
from batchlab.core.pricing.usage import Accounting
from batchlab.core.protocol import object_keys
from batchlab.core.service_settings import ManagerSettings
from batchlab.core.tracing import NO_TRACER, Tracer
from batchlab.manager.adoption import Adoption
from batchlab.manager.audit_log import AuditLog
from batchlab.manager.autoscaler import Autoscaler, Prewarm
from batchlab.manager.bundling import Bundler
from batchlab.manager.collector import Collector, events_queue
from batchlab.manager.context import Context, NotificationChannels
from batchlab.manager.counters import Counters
from batchlab.manager.dependencies import Dependencies
from batchlab.manager.fleet_end import FleetEnd
from batchlab.manager.job_commands import JobCommands
from batchlab.manager.job_coordinator import JobCoordinator
from batchlab.manager.job_deletion import JobDeletion
from batchlab.manager.ledger_rebuild import LOST_JOBS, RebuildResult, has_lost_jobs, rebuild
from batchlab.manager.ledger_writer import LedgerWriter
from batchlab.manager.live_logs import LiveLogs
from batchlab.manager.notifier import Notifier
from batchlab.manager.pool_images import PoolImages
from batchlab.manager.reconciler import Reconciler
from batchlab.manager.recorder import Recorder, ReportQueue
from batchlab.manager.schedule_commands import ScheduleCommands
from batchlab.manager.speculation import Speculation
from batchlab.manager.spending import Spending
from batchlab.manager.state import Ports, set_job_state
from batchlab.manager.unresponsive_workers import UnresponsiveWorkers, WorkEvidence

log = logging.getLogger(__name__)

LEASE = "leader"


class LeaderLease:
    """Leader lease of one manager. `ttl_s` is the time until an unrenewed lease expires."""

    def __init__(self, ledger: Ledger, clock: Clock, owner: str, ttl_s: float) -> None:
        self._ledger = ledger
        self._clock = clock
        self._owner = owner
        self._ttl_s = ttl_s
        self._beat = 0
        self._renewed_s = 0.0
        """Monotonic time of the last request that renewed the lease."""

    async def acquire(self) -> None:
        """Take the lease when the lease is free, or when the holder has not renewed the lease for `ttl_s`."""
        seen, since_s = None, self._clock.monotonic_s()
        while True:
            asked_s = self._clock.monotonic_s()
            is_over = asked_s - since_s >= self._ttl_s
            lease = await self._ledger.lease(LEASE, self._owner, over=seen if is_over else None)
            if lease.owner == self._owner:
                if self._clock.monotonic_s() - asked_s < self._ttl_s:
                    self._beat, self._renewed_s = lease.beat, asked_s
                    return
                continue  # the response arrived late, so a standby may have taken the lease since
            if lease != seen:
                seen, since_s = lease, self._clock.monotonic_s()
            await asyncio.sleep(self._ttl_s / 3)

    async def renew(self, on_gap: Callable[[], None]) -> None:
        """Renew the lease regularly, and return when the lease is lost. `on_gap` is called if another manager may have
        held the lease between two renewals."""
        while True:
            now_s = self._clock.monotonic_s()
            await asyncio.sleep(max(0.0, self._renewed_s + self._ttl_s / 3 - now_s))
            asked_s = self._clock.monotonic_s()
            # The lease's duration starts with the last request, because the response may have arrived much later. A
            # manager process that was paused for longer than the lease's duration sends one more request.
            left_s = self._renewed_s + self._ttl_s - asked_s
            try:
                async with asyncio.timeout(left_s if left_s > 0 else self._ttl_s * 2 / 3):
                    lease = await self._ledger.lease(LEASE, self._owner)
            except TimeoutError:
                return  # the lease has expired, and a standby may have taken the lease
            if lease.owner != self._owner:
                return
            if lease.beat != self._beat + 1:
                # The lease was free while this process was paused, or a request was sent twice after a lost response.
                # An unnecessary call of `on_gap` is harmless.
                on_gap()
            self._beat, self._renewed_s = lease.beat, asked_s

    async def release(self) -> None:
        with suppress(BackendError):  # without a release, the lease expires by itself
            await self._ledger.release(LEASE, self._owner)


QUEUE_CHECK_S = 1.0
"""Interval between reads of the queue depths while jobs are live."""
DEAD_LETTER_CHECK_S = 15.0
"""Interval between receives from the dead-letter queues. A message was received many times before it gets there."""
IDLE_QUEUE_CHECK_S = 300.0
"""Interval between reads of empty queues without live jobs, because each read is billed."""

RECENT_S = 60.0
"""Age in seconds of jobs that an earlier manager may not have added to the ledger. Their messages restore them."""
LOST_OBJECTS = (
    "the bucket has lost the job's objects: it was emptied, or its server restarted without its "
    "data, as LocalStack does; submit the job again"
)

_LIVING = (LifecycleState.PENDING, LifecycleState.IN_SERVICE)


class Manager:
    """Manager of a grid. The coroutine `run` ends when it is cancelled, or when the manager loses its lease."""

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
        channels: NotificationChannels | None = None,
        recent: logs.Recent | None = None,
        *,
        audit: AuditLog | None = None,
        schedules: bool = False,
        shares: bool = False,
        one_machine: bool = False,
    ) -> None:
        """Create and connect the parts of a manager.

        With `accounting`, the manager counts usage and enforces cost caps. With `accounting` and `reports`, the manager
        also records performance data. `counts` are the counters of an earlier manager of the same process, which the
        new manager continues. With `channels`, the manager sends notifications. `recent` stores recent log lines.
        `audit` is the audit log, which the managers of one process share. With `schedules`, the manager submits
        scheduled jobs at their due times. With `shares`, the manager follows the grid's fair-share policy.
        With `one_machine`, all instances run on one machine and share its GPUs.
        """
        ports = replace(ports, ledger=patiently(ports.ledger, ports.patience))
        by_name = {pool.name: pool for pool in pools}
        self.context = context = Context(ports, settings, by_name, counts=counts or Counters(), tracer=tracer)
        context.channels, context.audit = channels, audit
        if reports and accounting:
            context.recorder = Recorder(ports, context.lives, context.registry)
            context.reports = reports
        self.ports, self.settings, self.counts = ports, settings, context.counts
        self.pools, self.lives, self.registry = context.pools, context.lives, context.registry
        self.groups, self.depths, self.quarantine = context.groups, context.depths, context.quarantine
        self.recorder, self.reports = context.recorder, context.reports
        self.owner, self.recent, self.audit = owner, recent, audit
        self.one_machine = one_machine
        self.admit = context.admit
        self.fair_share = context.fair_share
        self.fair_share.is_enabled = shares
        self.is_leader = asyncio.Event()
        self.has_led = False
        self.trouble = ""
        """Error message of the last tick, or "" after a successful tick."""
        self.ledger_trouble = ""
        """Sentence about jobs that the ledger has lost, or ""."""
        self.spending = Spending(context, accounting) if accounting else None
        caps = self.spending.caps if self.spending else None
        self.notifier = Notifier(context, channels, caps) if channels else None
        self._unresponsive = UnresponsiveWorkers(context, WorkEvidence(context, self.job_record))
        ledger_writer = LedgerWriter(context, self._restore)
        bundler = Bundler(context)
        dependencies = Dependencies(context, self.job_record)
        self.coordinator = JobCoordinator(
            context, ledger_writer, bundler, self.notifier, lambda live: self._adoption.readopt(live), dependencies
        )
        self._adoption = Adoption(context, self.coordinator, self.spending)
        self.job_commands = JobCommands(context, self.coordinator, bundler, self._adoption, dependencies)
        self.autoscaler = Autoscaler(context, caps)
        self.fleet_end = FleetEnd(context, owner, self.autoscaler.user_capacity)
        self.scheduler: ScheduleCommands | None = None
        if schedules:
            self.scheduler = ScheduleCommands(context, self.job_commands)
            self.autoscaler.minimum_capacity = Prewarm(context, self.scheduler, caps)
        self.job_deletion = JobDeletion(context, self.job_record, self._is_awaited, self.spending)
        self.live_logs = LiveLogs(context)
        self._collector = Collector(context, ledger_writer)
        self._reconciler = Reconciler(context, ledger_writer, self.coordinator)
        self._speculation = Speculation(context, self.coordinator)
        self._checked_s = -IDLE_QUEUE_CHECK_S
        """Monotonic time of the last read of the queue depths."""
        self._drained_s = -DEAD_LETTER_CHECK_S
        """Monotonic time of the last receives from the dead-letter queues."""
        self._are_queues_empty = False
        """Whether the last check found no messages in the task queues and the dead-letter queues."""
        self._lease = LeaderLease(ports.ledger, ports.clock, owner, settings.lease_ttl_s)
        self._others_led = False
        """Whether another manager has held the lease during a pause of this manager, so that the cached job state is
        stale."""
        self._retries_searched = False

    async def job_record(self, job: JobId) -> JobRecord:
        """Return the job from the ledger. If only the bucket has the job, restore the job to the ledger first. Raise
        NotFound if the job does not exist."""
        try:
            return await self.ports.ledger.job(job)
        except NotFound:
            if await self._adoption.restore(job, concurrent=True) is None:
                raise
            return await self.ports.ledger.job(job)

    async def _restore(self, job: JobId) -> JobDef | None:
        """Restore the job of an event that the ledger does not have."""
        if (job_def := await self._adoption.restore(job)) is None:
            await self.job_deletion.sweep_late(job)
        return job_def

    async def run(self) -> None:
        """Wait for the lease, then lead until the lease is lost or the call of `run` is cancelled."""
        await self._lease.acquire()
        try:
            async with asyncio.TaskGroup() as group:
                # The renewal of the lease starts first, because the preparation may take longer than the lease's
                # duration.
                keeping = group.create_task(self._keep_lease(), name="lease")
                has_old_bucket = await self._prepare()
                await self.registry.instances.load()
                if self.recorder:
                    await self.recorder.load()
                if self.spending:
                    await self.spending.load()
                if self.notifier:
                    await self.notifier.load()
                await self.fair_share.load()
                await PoolImages(self.ports, self.pools).save()
                self._adoption.group = group
                await self._adoption.adopt_active()
                # A manager that cannot lead must not restore the limits of the groups or postpone their end.
                await self._prepare_fleet()
                # The ledger is read before the collector restores jobs. A new grid does not need these requests.
                if has_old_bucket and not self.lives and not await self.ports.ledger.jobs(limit=1):
                    group.create_task(self._find_lost_jobs(), name="find lost jobs")
                group.create_task(self._collector.collect(), name="collect")
                group.create_task(self._run_ticks(), name="tick")
                group.create_task(self.job_deletion.run(), name="finish deletions")
                group.create_task(self._finish_retries(), name="finish retries")
                group.create_task(self.reports.run(), name="reports")
                if self.fleet_end.is_needed:
                    group.create_task(self.fleet_end.run(), name="fleet end")
                if self.notifier:
                    group.create_task(self.notifier.run(), name="notify")
                if self.scheduler:
                    group.create_task(self.scheduler.run(), name="schedules")
                if self.recorder:
                    group.create_task(self.recorder.save_regularly(), name="record")
                self.is_leader.set()
                self.has_led = True
                await keeping
        except* _LeaseLostError:
            log.warning("%s is no longer the leader", self.owner)
        finally:
            if self.is_leader.is_set():
                await self._store_accounts()
            self.is_leader.clear()
            self._adoption.group = None
            await self._lease.release()

    async def _store_accounts(self) -> None:
        """Store the usage, the recorded data, and the use of the shares before this manager stops leading."""
        if self.spending:
            await self.spending.close()
            if self.recorder:
                await self.recorder.save_within_limit()
        await self.fair_share.close()

    async def _keep_lease(self) -> None:
        await self._lease.renew(self._others_have_led)
        self.is_leader.clear()
        raise _LeaseLostError

    async def _prepare(self) -> bool:
        """Create the queues of the grid. Return whether an earlier manager has used the bucket."""
        has_old_bucket = await self.ports.keys.ensure()
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
        return has_old_bucket

    async def _prepare_fleet(self) -> None:
        """Create the groups of the grid, set their limits, and schedule their end without a manager."""
        for pool in self.pools.values():
            await self.ports.fleet.ensure(pool)
        await self.fleet_end.begin()

    async def _ensure(self, spec: QueueSpec) -> None:
        await self.ports.patience(lambda: self.ports.queue.ensure(spec))

    def _others_have_led(self) -> None:
        self._others_led = True
        self.wake()

    async def _catch_up(self) -> None:
        """Read all jobs again from the ledger if another manager led while this manager was paused."""
        if not self._others_led:
            return
        log.warning("another manager led while %s was paused: all jobs are adopted again", self.owner)
        # The flags are reset before the ledger is read, because another manager may lead again during the reads.
        self._others_led = self._retries_searched = False
        self.job_deletion.reload()
        if self.scheduler:
            self.scheduler.reload()
        await self._adoption.drop_all()
        try:
            # The manager reads usage and recorded data before it adopts jobs, because adopted jobs continue the usage
            # and the recording.
            if self.spending:
                await self.spending.reread()
            if self.recorder:
                await self.recorder.reread()
            await self.fair_share.load()
            await self._adoption.adopt_active()
        except (Throttled, Unreachable):
            self._others_led = True
            raise

    async def _is_awaited(self, job: JobId) -> bool:
        """Return whether a schedule has not recorded the end of its job yet."""
        if self.scheduler is None:
            return False
        await self.scheduler.wait_until_read()
        schedules = self.scheduler.store.schedules.values()
        return any(one.running is not None and one.running.job == job for one in schedules)

    async def _find_lost_jobs(self) -> None:
        """Report jobs that only the bucket has. The manager does not restore them itself, because the user may have
        given an old bucket to a new grid, in which unfinished jobs would run again.
        """
        before_s = self.ports.clock.now_s() - RECENT_S
        while True:
            try:
                if await has_lost_jobs(self.ports, before_s):
                    self.ledger_trouble = LOST_JOBS
                    log.warning("%s", LOST_JOBS)
                return
            except BackendError as error:
                raise_if_cancelled()
                log.warning("the search for lost jobs waits for the backend: %s", error)
                await asyncio.sleep(self.settings.silence_s)

    async def _finish_retries(self) -> None:
        while True:
            try:
                if not self._retries_searched:
                    self._retries_searched = True  # set first, as another manager may lead during the search
                    await self.job_commands.find_unfinished_retries()
                await self.job_commands.finish_retries()
            except BackendError as error:
                self._retries_searched = False
                log.warning("an unfinished retry waits for the backend: %s", error)
            raise_if_cancelled()
            await asyncio.sleep(self.settings.silence_s)

    async def _run_ticks(self) -> None:
        while True:
            begun_s = self.ports.clock.monotonic_s()
            try:
                async with self.context.ledger_lock:
                    await self._catch_up()
                    await self.tick()
                self.trouble = ""
                self.counts.ticks.observe(self.ports.clock.monotonic_s() - begun_s)
            except NotFound as error:
                log.warning("a queue or a group is missing, so all are created again: %s", error)
                self.trouble = str(error)
                with suppress(BackendError, Refused):  # the next tick repeats the preparation
                    await self._prepare()
                    await self._prepare_fleet()
                    await self._end_lost_jobs()
            except Refused as error:
                log.warning("this tick is cut short: %s", error)
            except BackendError as error:
                log.warning("this tick is skipped: %s", error)
                self.trouble = str(error)
                self.counts.skipped += 1
            raise_if_cancelled()
            await set_after(self.context.wake, self.settings.tick_s)
            self.context.wake.clear()

    async def _end_lost_jobs(self) -> None:
        """End the jobs whose definition is lost from the bucket, because a job without a definition cannot continue."""
        for live in list(self.lives.values()):
            spec = partial(self.ports.objects.head, object_keys.spec(live.id))
            if await self.ports.patience(spec) is None:
                await self.coordinator.abandon(live, LOST_OBJECTS)

    def wake(self) -> None:
        """Start the next tick without a wait, for example after the death of an instance."""
        self.context.wake.set()

    def _with_image(self, view: GroupView) -> GroupView:
        """Return the view with the configured image of the pool, because Auto Scaling does not know the image."""
        configured = self.pools.get(view.pool.name)
        if configured is None or configured.image == view.pool.image:
            return view
        return replace(view, pool=replace(view.pool, image=configured.image))

    async def tick(self) -> None:
        await self.registry.release_messages(await self.ports.fleet.tick())
        await self._adoption.delayed_jobs.start_due(self.lives)
        described = await self._describe()
        await self.registry.update_instances(described)
        instances = [instance for view in described for instance in view.instances]
        self.registry.forget_vanished({one.id for one in instances})
        self.registry.readmit({one.id for one in instances if one.state in _LIVING})
        views = [view for view in described if view.pool.name in self.pools]
        self.autoscaler.launch_breaker.observe(views)
        if self.spending:
            self.spending.observe(views)
        for view in views:
            await self.autoscaler.scale(view)
        await self._unresponsive.check(views)
        if await self.ports.fleet.describe() != described:
            # The second fleet tick applies the scaling decisions without a wait for the next manager tick.
            await self.registry.release_messages(await self.ports.fleet.tick())
            described = await self.ports.fleet.describe()
            await self.registry.update_instances(described)
        await self.registry.instances.save()
        self.groups.clear()
        self.groups.update({view.pool.name: self._with_image(view) for view in described})
        self.autoscaler.launch_breaker.observe(described)
        for name in self.groups.keys() & self.pools.keys():
            self.context.update_slots(name)
        await self._check_queues()
        await self._speculation.step()
        # The previous leader may have started, reopened, or resumed a job after this manager read the ledger, because a
        # leader notices the loss of its lease late.
        if self._adoption.is_search_due:
            await self._adoption.adopt_active()
            for live in [one for one in self.lives.values() if one.record.control is Control.PAUSE]:
                await self._reconciler.follow_control(live)
        await self._show_starts()
        is_shared = self.fair_share.policy is not None
        windows = {} if is_shared else {name: self.context.window(name) for name in self.pools}
        for live in self.lives.needing_step(windows, self.ports.clock.monotonic_s()):
            live.wake.set()
        self.fair_share.wake(set(self.pools))
        if self.spending:
            # The accounts of ended jobs are closed before the recorder samples, because the recorder removes the data
            # of ended jobs.
            self.spending.close_ended()
        if self.recorder:
            self.recorder.observe(self.groups, self.depths, self.autoscaler.backlog)
        if self.spending:
            await self.spending.save()
        await self.fair_share.save()
        if self.notifier:
            await self.notifier.observe()
        self.live_logs.drop_unused()

    async def _describe(self) -> Sequence[GroupView]:
        """Return the groups, and restore the limits of groups whose scheduled actions were performed."""
        described = await self.ports.fleet.describe()
        return await self.ports.fleet.describe() if await self.fleet_end.restore(described) else described

    async def _check_queues(self) -> None:
        """Read the queue depths, drain the dead-letter queues, and recover silent bundles."""
        now_s = self.ports.clock.monotonic_s()
        # The tolerance of 1 ms allows for a tick that starts slightly early.
        idle_s = IDLE_QUEUE_CHECK_S if self._are_queues_empty else DEAD_LETTER_CHECK_S
        if now_s - self._checked_s < (QUEUE_CHECK_S if self.lives else idle_s) - 0.001:
            return
        self._checked_s = now_s
        try:
            for name in self.pools:
                self.depths[name] = await self.ports.queue.depth(object_keys.tasks_queue(name))
            if now_s - self._drained_s >= DEAD_LETTER_CHECK_S - 0.001:
                are_drained = all([await self._reconciler.drain_dead_letters(name) for name in self.pools])
                if are_drained:  # else the next check continues
                    self._drained_s = now_s
                depths = (self.depths[name] for name in self.pools)
                self._are_queues_empty = are_drained and not any(d.visible or d.in_flight or d.delayed for d in depths)
            await self._reconciler.recover_silent()
        except BackendError:
            if self.lives:
                self._checked_s = -IDLE_QUEUE_CHECK_S  # the next tick reads the depths again and reports the outage
            raise

    async def _show_starts(self) -> None:
        """Move RUNNABLE jobs to STARTING after one of their pools has instances, as AWS Batch does."""
        pools = [name for name, view in self.groups.items() if view.instances]
        runnable = {live.number: live for pool in pools for live in self.lives.pool(pool).runnable.values()}
        for _, live in sorted(runnable.items()):
            if live.record.state is JobState.RUNNABLE:
                await set_job_state(self.ports, live, JobState.STARTING)

    async def rebuild_ledger(self) -> RebuildResult:
        async with self.context.ledger_lock:
            await self._adoption.drop_all()
            rebuilt = await rebuild(self.ports)
            self.ledger_trouble = ""
            # A request may have adopted a job from the old content of the ledger during the rebuild.
            await self._adoption.drop_all()
            # The adoption needs the ledger lock, because adoption writes to the ledger and a second rebuild may be
            # waiting.
            await self._adoption.adopt_active()
        return rebuilt


class _LeaseLostError(Exception):
    """Internal error that ends the leader's task group."""
