"""Values that the parts of one manager share, such as ports, settings, jobs, workers, counters, and queues."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from batchlab.core.fair_share import share_of
from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import GroupView, JobId, LifecycleState, Pool
from batchlab.core.notifications import Notification, NotificationSettings, Target
from batchlab.core.ports import Depth
from batchlab.core.service_settings import ManagerSettings
from batchlab.core.tracing import NO_TRACER, Tracer
from batchlab.manager import admission
from batchlab.manager.audit_log import AuditLog
from batchlab.manager.counters import Counters
from batchlab.manager.fair_share import FairShare
from batchlab.manager.live_jobs import LiveJobs
from batchlab.manager.quarantine import OutcomeStore, Quarantine
from batchlab.manager.recorder import Recorder, ReportQueue
from batchlab.manager.state import Ports
from batchlab.manager.worker_registry import WorkerRegistry

EMPTY_POOL_SIZE = 8
"""Assumed number of instances of an empty pool, used to size the first wave of bundles."""

Deliver = Callable[[Target, Notification], Awaitable[None]]
"""Function that delivers a notification to a target, or raises NotDelivered."""


@dataclass(frozen=True, slots=True)
class NotificationChannels:
    """The grid's current directory of notification targets, and the delivery function."""

    directory: Callable[[], NotificationSettings]
    deliver: Deliver


class PendingSubmissions:
    """Submissions whose first bundles are sent before the ledger has the job."""

    def __init__(self) -> None:
        self._pending: dict[JobId, asyncio.Event] = {}

    @contextmanager
    def of(self, job: JobId) -> Iterator[None]:
        end = self._pending[job] = asyncio.Event()
        try:
            yield
        finally:
            end.set()
            # Another request may have created the same job again, if the bucket lost objects during the submission.
            if self._pending.get(job) is end:
                del self._pending[job]

    async def ended(self, jobs: Iterable[JobId]) -> None:
        for job in jobs if self._pending else ():
            if end := self._pending.get(job):
                await end.wait()


@dataclass(slots=True)
class Context:
    """Shared values of one manager. Each part of the manager receives the context."""

    ports: Ports
    settings: ManagerSettings = field(default_factory=ManagerSettings)
    pools: dict[str, Pool] = field(default_factory=dict)
    lives: LiveJobs = field(default_factory=LiveJobs)
    counts: Counters = field(default_factory=Counters)
    tracer: Tracer = NO_TRACER
    channels: NotificationChannels | None = None
    """Channels of notifications, or None if this manager does not send notifications."""
    audit: AuditLog | None = None
    """Audit log, or None if this manager does not write an audit log."""
    recorder: Recorder | None = None
    """Recorder of performance data, or None if this manager does not record performance data."""
    reports: ReportQueue = field(default_factory=ReportQueue)
    slots: dict[str, int] = field(default_factory=dict)
    """Number of slots of each pool, by pool name. An empty pool has an assumed number of slots."""
    depths: dict[str, Depth] = field(default_factory=dict)
    """Most recent depth of each pool's task queue."""
    groups: dict[str, GroupView] = field(default_factory=dict)
    """Views of the groups at the end of the last tick, by pool."""
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    """Event that starts the next tick without a wait."""
    ledger_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Lock that each fold, tick, and rebuild holds, because no other operation may change the ledger at the same
    time."""
    pending_submissions: PendingSubmissions = field(default_factory=PendingSubmissions)
    fair_share: FairShare = field(init=False)
    quarantine: Quarantine = field(init=False)
    registry: WorkerRegistry = field(init=False)
    outcomes: OutcomeStore = field(init=False)

    def __post_init__(self) -> None:
        self.fair_share = FairShare(self)
        self.quarantine = Quarantine(self.counts)
        self.registry = WorkerRegistry(self.ports, self.lives, self.quarantine)
        self.outcomes = OutcomeStore(self.ports, self.quarantine)
        for pool in self.pools.values():
            self.update_slots(pool.name)

    def admit(self, job: JobDef, *, is_new: bool = True) -> None:
        """Raise UsageError if this grid cannot run the job. The fair-share policy does not apply to a job that is not
        new, because the policy may have changed since the manager accepted the job."""
        slots = {name: pool.slots for name, pool in self.pools.items()}
        gpus = {name: pool.gpus for name, pool in self.pools.items()}
        admission.admit(job, slots, self.channels.directory() if self.channels else None, gpus)
        if is_new:
            self.fair_share.check_share(share_of(job))

    def slots_in_service(self, pool: str) -> int:
        """Return the number of slots of the pool's instances that were InService at the last tick."""
        view = self.groups.get(pool)
        return view.pool.slots * _in_service(view) if view else 0

    def _pool(self, name: str) -> Pool:
        return self.groups[name].pool if name in self.groups else self.pools[name]

    def _instances(self, name: str) -> int:
        """Return the number of instances of a pool that were InService at the last tick. An empty pool counts as
        EMPTY_POOL_SIZE instances."""
        count = _in_service(self.groups[name]) if name in self.groups else 0
        return count or max(1, min(self._pool(name).max_size, EMPTY_POOL_SIZE))

    def free_gpus(self, name: str) -> int:
        """Return the number of GPUs of a pool that no outstanding bundle needs. An empty pool has an assumed number of
        GPUs. The result is negative if the outstanding bundles need more GPUs than the pool has."""
        if name not in self.pools:
            return 0
        total = self._instances(name) * self._pool(name).gpus
        return total - self.lives.pool(name).gpus - self.fair_share.pending_gpus(name)

    def parallel_tasks(self, stage: StageDef) -> int:
        """Return the number of tasks of the stage that the instances of its pool can run at once, at least 1."""
        slots = self.slots.get(stage.pool, 1)
        tasks = slots // stage.slots
        if stage.gpus and stage.pool in self.pools:
            pool = self._pool(stage.pool)
            tasks = min(tasks, slots // pool.slots * (pool.gpus // stage.gpus))
        return max(1, tasks)

    def wake_if_short(self, pool: str) -> None:
        """Start the next tick without a wait if the pool can grow and has more outstanding bundles than slots."""
        view = self.groups.get(pool)
        if view is not None and view.desired >= view.pool.max_size:
            return
        if self.lives.pool(pool).bundles > self.slots_in_service(pool):
            self.wake.set()

    def window(self, pool: str) -> int:
        """Return the number of bundles of a pool that may be outstanding at once."""
        return self.settings.window * self.slots.get(pool, 1) + 1

    def update_slots(self, name: str) -> None:
        """Set the number of slots of a pool from the pool's group."""
        self.slots[name] = self._instances(name) * self._pool(name).slots


def _in_service(view: GroupView) -> int:
    return sum(instance.state is LifecycleState.IN_SERVICE for instance in view.instances)


class Part:
    """Base class of the manager's parts, which copies the shared values into attributes."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._ports = ports = context.ports
        self._objects, self._queue, self._fleet, self._ledger = ports.objects, ports.queue, ports.fleet, ports.ledger
        self._clock, self._ids, self._keys, self._patience = ports.clock, ports.ids, ports.keys, ports.patience
        self._settings = context.settings
        self._lives = context.lives
        self._counts = context.counts
        self._tracer = context.tracer
        self._recorder = context.recorder
        self._quarantine = context.quarantine
        self._registry = context.registry
        self._outcomes = context.outcomes
