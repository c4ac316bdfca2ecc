"""Facts about a job, from which `wait_reasons` derives the reason why the job waits.

Invariant: each fact is a row of the ledger, a heartbeat, or an answer of the fleet.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from batchlab.core.job_definition import StageDef
from batchlab.core.model import (
    Activity,
    BundleId,
    Control,
    GroupView,
    Instance,
    JobId,
    LifecycleState,
    Market,
    StageName,
)
from batchlab.core.ports import JobRecord, StageRecord
from batchlab.core.service_settings import ManagerSettings
from batchlab.manager import fleet_commands
from batchlab.manager.manager import Manager
from batchlab.manager.state import LiveJob, Outstanding, WorkerStatus

MAX_ACTIVITIES = 20
"""Number of scaling activities that are read for each pool.

With 20 activities, the facts include several launches of a crash loop.
"""

Key = tuple[StageName, BundleId]


@dataclass(frozen=True)
class Facts:
    """Facts about a job and its grid.

    The mappings `groups`, `held` (manually set capacity), `activities` (newest first), `capped`, and `stopped` have
    pools as keys. `capped` has the reason why a cost cap stops launches, and `stopped` has the reason why failing
    launches are stopped. The keys of `workers` are instances. `live` is None if the manager does not run the job.
    `trouble` is the reason why the manager's last tick was skipped.
    """

    record: JobRecord
    stages: Sequence[StageRecord]
    now_s: float
    monotonic_s: float
    settings: ManagerSettings
    live: LiveJob | None = None
    lives: Mapping[JobId, LiveJob] = field(default_factory=dict)
    groups: Mapping[str, GroupView] = field(default_factory=dict)
    workers: Mapping[str, WorkerStatus] = field(default_factory=dict)
    held: Mapping[str, int] = field(default_factory=dict)
    activities: Mapping[str, Sequence[Activity]] = field(default_factory=dict)
    capped: Mapping[str, str] = field(default_factory=dict)
    stopped: Mapping[str, str] = field(default_factory=dict)
    trouble: str = ""
    outage: tuple[float, str] | None = None
    """Start (epoch time) and first error of the current outage of the events queue, or None without an outage."""
    lag_s: float = 0.0
    """Age in seconds of the oldest unprocessed event of the workers."""
    warning: tuple[float, str] | None = None
    """Last warning about the job in the manager's log, as the epoch time and the text of the warning."""
    unreadable: str = ""
    """Clause about the messages and objects of the job that cannot be read."""
    has_shares: bool = False
    """Whether the grid has a fair-share policy."""
    share_waits: Mapping[str, str] = field(default_factory=dict)
    """Clauses about why the job waits for its share, by pool."""
    spot: Collection[str] = ()
    """Ids of the instances whose workers reported that they run on Spot Instances."""
    undelivered: str = ""
    """Clause with the reason why a notification of the job is not delivered."""

    @cached_property
    def by_stage(self) -> Mapping[StageName, StageRecord]:
        return {record.counts.stage: record for record in self.stages}

    @cached_property
    def open_stages(self) -> list[StageDef]:
        """Return the stages that have not ended, in the order of the job's stages."""
        return [s for s in self.record.job.stages if not self.by_stage[s.name].counts.ended]

    @cached_property
    def outstanding(self) -> Mapping[Key, Outstanding]:
        every = self.live.all_outstanding() if self.live else []
        # A stage that has ended may still have an outstanding bundle, if the outcome arrived before the manager
        # expected the bundle.
        open_ = {stage.name for stage in self.open_stages}
        return {(o.bundle.stage, o.bundle.id): o for o in every if o.bundle.stage in open_}

    @cached_property
    def running(self) -> Mapping[Key, tuple[float, str]]:
        """Return the start (in monotonic seconds) and the instance of each outstanding bundle that runs."""
        running: dict[Key, tuple[float, str]] = {}
        for instance, worker_status in self.workers.items():
            for held, since_s in worker_status.since_s.items():
                key = (held.stage, held.bundle)
                if held.job == self.record.job.id and key in self.outstanding:
                    running[key] = min(running.get(key, (since_s, instance)), (since_s, instance))
        return running

    @cached_property
    def idle(self) -> list[Outstanding]:
        """Return the idle bundles, which are outstanding bundles that no worker runs."""
        return [outstanding for key, outstanding in self.outstanding.items() if key not in self.running]

    @cached_property
    def delayed_bundles(self) -> list[Outstanding]:
        """Return the idle bundles whose backoff has not expired, the next due bundle first."""
        delayed = [outstanding for outstanding in self.idle if outstanding.heard_s > self.monotonic_s]
        return sorted(delayed, key=lambda outstanding: outstanding.heard_s)

    @cached_property
    def queued_bundles(self) -> list[Outstanding]:
        """Return the idle bundles without a backoff or whose backoff has expired.

        A worker can receive each of these idle bundles now, or has prefetched the bundle.
        """
        return [outstanding for outstanding in self.idle if outstanding.heard_s <= self.monotonic_s]

    def pools(self) -> list[str]:
        """Return the sorted names of the pools in which tasks of the job could start now."""
        busy = {self.record.job.stage(outstanding.bundle.stage).pool for outstanding in self.queued_bundles}
        busy |= {s.pool for s in self.open_stages if self.by_stage[s.name].left}
        return sorted(busy)

    def in_service(self, pool: str) -> list[Instance]:
        return [i for i in self.groups[pool].instances if i.state is LifecycleState.IN_SERVICE]

    def pending(self, pool: str) -> list[Instance]:
        return [i for i in self.groups[pool].instances if i.state is LifecycleState.PENDING]

    def uses_spot(self, pool: str) -> bool:
        """Return whether an instance of the pool in service is a Spot Instance."""
        found = self.in_service(pool) if pool in self.groups else []
        return any(i.machine.market is Market.SPOT or i.id in self.spot for i in found)

    def rivals(self, pool: str) -> Iterator[LiveJob]:
        """Yield the other running jobs that have work for the pool. The oldest job is the first."""
        for live in sorted(self.lives.values(), key=lambda live: (live.job.submitted_s, live.id)):
            runs = live.record.control is Control.RUN
            if live.id == self.record.job.id or not runs or live.must_wait:
                continue
            stages = [s.name for s in live.job.stages if s.pool == pool]
            if live.has_uncut_tasks(pool) or any(live.outstanding.get(name) for name in stages):
                yield live


async def gather(manager: Manager, job: JobId) -> Facts:
    """Return the facts about a job. Raise NotFound if the job is unknown."""
    fleet, ledger = manager.ports.fleet, manager.ports.ledger
    groups = await fleet_commands.groups(manager)
    activities = {pool: await fleet.activities(pool, limit=MAX_ACTIVITIES) for pool in groups}
    rows = await ledger.rows(job)
    # The rest of the function does not await, so that all facts from the manager's memory are from the same moment.
    live = manager.lives.get(job)
    return Facts(
        record=live.record if live else rows.job,
        stages=list(live.stages.values()) if live else rows.stages,
        now_s=manager.ports.clock.now_s(),
        monotonic_s=manager.ports.clock.monotonic_s(),
        settings=manager.settings,
        live=live,
        lives=manager.lives,
        groups=groups,
        workers=manager.registry.workers,
        held=manager.autoscaler.user_capacity,
        activities=activities,
        capped=manager.spending.caps.capped if manager.spending else {},
        stopped=manager.autoscaler.launch_breaker.stopped(),
        trouble=manager.trouble,
        outage=manager.registry.outage,
        lag_s=manager.counts.lag_s,
        warning=manager.recent.last(job) if manager.recent else None,
        unreadable=manager.quarantine.trouble(job),
        has_shares=manager.fair_share.policy is not None,
        share_waits={
            pool: text
            for pool in sorted({stage.pool for stage in live.job.stages} if live else ())
            if live and (text := manager.fair_share.wait_reason(live, pool))
        },
        spot=manager.registry.spot,
        undelivered=manager.notifier.trouble(job) if manager.notifier else "",
    )
