"""Replacement of instances whose worker is silent or does not show evidence of work.

An Auto Scaling group replaces instances that fail the group's own health checks, but keeps an instance whose worker has
stopped.

Invariants: a silence includes only time in which the current or the previous leader received events. An outage of the
events queue, or a pause of the manager, neither adds to a silence nor resets a silence. If all workers of a pool are
silent, the cause may be the manager, so the manager replaces instances one at a time.

Evidence of work is a counted outcome, or a held bundle of a live job whose commit key the worker has. A worker's report
alone is not evidence of work. A held bundle need not be outstanding, because another worker with the commit key could
have reported the bundle's end. A worker with false reports loses its evidence of work when the reported jobs have
ended. An honest worker that runs only copies of bundles of ended jobs also lacks evidence of work, and the grid
discards its results.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

from batchlab.core.errors import BackendError, Malformed, NotFound, Refused
from batchlab.core.model import Control, GroupView, JobId, LifecycleState
from batchlab.core.ports import JobRecord
from batchlab.core.protocol.messages import Beat
from batchlab.manager.context import Context, Part
from batchlab.manager.state import LiveJob
from batchlab.manager.worker_registry import LOST_S

log = logging.getLogger(__name__)

NO_WORK_TAKEN = "its worker has taken no work"
UNKNOWN_WORK = "its worker reports work of which the manager knows nothing"
MANAGER = "manager"
"""Name of the worker in outcomes that the manager itself commits."""


class WorkEvidence(Part):
    """Evidence of work for each worker of a grid."""

    def __init__(self, context: Context, job_record: Callable[[JobId], Awaitable[JobRecord]]) -> None:
        """The function `job_record` returns a job from the ledger or the bucket, or raises NotFound."""
        super().__init__(context)
        self._job_record = job_record

    def missing(self, pools: Mapping[str, str]) -> dict[str, str]:
        """Return the reason for each instance that does not have evidence of work. `pools` maps instances to pools. An
        idle instance does not need evidence of work while no work waits in its pool."""
        waits = {pool: self._has_waiting_work(pool) for pool in dict.fromkeys(pools.values())}
        lacking: dict[str, str] = {}
        for instance, pool in pools.items():
            worker_status = self._registry.workers.get(instance)
            if worker_status is None or self._has_evidence(worker_status.beat):
                continue
            if worker_status.beat.busy or worker_status.beat.held:
                lacking[instance] = UNKNOWN_WORK
            elif waits[pool]:
                lacking[instance] = NO_WORK_TAKEN
        self._registry.authors.clear()
        return lacking

    async def is_refuted(self, instance: str) -> bool:
        """Return whether every bundle that the instance's worker reports belongs to a job that has ended or does not
        exist. The check reads the ledger and the bucket, because a manager may have died before the write of a job to
        the ledger. Raise BackendError if the backend is unavailable."""
        worker_status = self._registry.workers.get(instance)
        for job in sorted({held.job for held in worker_status.beat.held} - self._lives.keys() if worker_status else ()):
            try:
                if not (await self._job_record(job)).state.ended:
                    return False
            except (Malformed, NotFound):
                continue
        return True

    def _has_evidence(self, beat: Beat) -> bool:
        if any(held.job in self._lives for held in beat.held):
            return True
        is_own = self._registry.instance_by_worker.get(beat.worker) == beat.instance
        return is_own and beat.worker != MANAGER and beat.worker in self._registry.authors

    def _has_waiting_work(self, pool: str) -> bool:
        """Return whether the pool's queue has visible messages, and at least one due bundle is not held by any worker.
        Messages alone are not waiting work, because a worker can send messages that no worker can run."""
        depth = self._context.depths.get(pool)
        if depth is None or not depth.visible:
            return False
        held = {
            (bundle.job, bundle.stage, bundle.bundle)
            for worker_status in self._registry.workers.values()
            for bundle in worker_status.beat.held
        }
        return any(self._has_due(live, pool, held) for live in self._lives.values())

    def _has_due(self, live: LiveJob, pool: str, held: Collection[tuple[str, str, str]]) -> bool:
        if live.record.control is not Control.RUN:
            return False
        now_s = self._clock.monotonic_s()
        return any(
            outstanding.heard_s <= now_s and (live.id, stage, bundle) not in held
            for stage, waiting in live.outstanding.items()
            if live.job.stage(stage).pool == pool
            for bundle, outstanding in waiting.items()
        )


SILENCE_FACTOR = 3
"""Maximum silence of a worker before its instance is replaced, as a multiple of `silence_s`. The reconciler recovers a
silent worker's bundles before the worker is replaced."""
STEPS = 10
"""Number of equal steps between 0 and the silence limit. Stored silences are rounded down to a step."""
MIN_STEPS = 3
"""Number of steps from which a silence is stored. An idle worker sends heartbeats at shorter intervals, so the silences
of idle workers are not written."""
MAX_TICKS = 2
"""Maximum time between two checks of workers that counts as silence, in manager ticks."""


class UnresponsiveWorkers(Part):
    """Silence of each InService instance, and time without evidence of work."""

    def __init__(self, context: Context, evidence: WorkEvidence) -> None:
        super().__init__(context)
        self._evidence = evidence
        self._step_s = MAX_TICKS * context.settings.tick_s
        self.limit_s = max(LOST_S, SILENCE_FACTOR * context.settings.silence_s)
        self._silences_s: dict[str, float] = {}
        """Seconds for which the manager has not received a heartbeat, by instance."""
        self._unproven_s: dict[str, float] = {}
        """Seconds without evidence of work, by instance."""
        self._checked_s: float | None = None

    async def check(self, views: Sequence[GroupView]) -> None:
        """Update each instance's silence and time without evidence of work, and replace instances above the limit."""
        now_s = self._clock.monotonic_s()
        if self._checked_s is None:
            self._silences_s = dict(self._registry.instances.silences_s)
        since_s = now_s if self._checked_s is None else self._checked_s
        self._checked_s = now_s
        is_deaf = self._registry.outage_s is not None and self._registry.outage_s >= since_s
        # During an outage of the events queue, silences stay as they are, because a reset would prevent replacement
        # under steady load.
        step_s = 0.0 if is_deaf else min(now_s - since_s, self._step_s)
        pools = {
            instance.id: view.pool.name
            for view in views
            for instance in view.instances
            if instance.state is LifecycleState.IN_SERVICE
        }
        self._silences_s = {
            pool: 0.0 if self._has_reported(pool, since_s) else self._silences_s.get(pool, 0.0) + step_s
            for pool in pools
        }
        for instance_id in self._overdue(self._silences_s, pools):
            cause = f"its worker has been silent for {self._silences_s[instance_id]:.0f} s"
            await self._replace(instance_id, pools.pop(instance_id), cause)
            self._silences_s[instance_id] = 0.0
        part_s = self.limit_s / STEPS
        # The rounded silences rarely change and are rarely written, because few instances are silent for long.
        self._registry.instances.record_silences(
            {
                instance_id: part_s * (quiet_s // part_s)
                for instance_id, quiet_s in self._silences_s.items()
                if quiet_s >= MIN_STEPS * part_s
            }
        )
        missing = self._evidence.missing(pools)
        self._unproven_s = {
            pool: self._unproven_s.get(pool, 0.0) + step_s if pool in missing else 0.0 for pool in pools
        }
        for instance_id in self._overdue(self._unproven_s, pools):
            cause = f"{missing[instance_id]} for {self._unproven_s[instance_id]:.0f} s"
            if await self._is_refuted(instance_id, pools[instance_id], cause):
                await self._replace(instance_id, pools[instance_id], cause)
            self._unproven_s[instance_id] = 0.0

    def _overdue(self, counted_s: dict[str, float], pools: Mapping[str, str]) -> list[str]:
        """Return the instances above the limit. If all instances of a pool are above the limit, return only the pool's
        first instance, and reset the durations of the pool's other instances."""
        overdue: list[str] = []
        for pool in dict.fromkeys(pools.values()):
            members = [instance_id for instance_id in pools if pools[instance_id] == pool]
            over = [member for member in members if counted_s[member] >= self.limit_s]
            if len(over) == len(members):
                counted_s |= dict.fromkeys(over[1:], 0.0)
                del over[1:]
            overdue += over
        return overdue

    def _has_reported(self, instance: str, since_s: float) -> bool:
        worker_status = self._registry.workers.get(instance)
        return worker_status is not None and worker_status.heard_s >= since_s

    async def _is_refuted(self, instance: str, pool: str, cause: str) -> bool:
        try:
            return await self._evidence.is_refuted(instance)
        except BackendError as error:
            about = {"instance": instance, "pool": pool}
            log.warning("%s, and its jobs cannot be read: %s", cause, error, extra=about)
            return False

    async def _replace(self, instance: str, pool: str, cause: str) -> None:
        about = {"instance": instance, "pool": pool}
        try:
            await self._fleet.set_health(instance, healthy=False, cause=cause)
        except (Refused, BackendError) as error:
            # A failed replacement must not stop the replacement of other instances or the rest of the tick.
            log.warning("%s, and it cannot be replaced: %s", cause, error, extra=about)
        else:
            log.warning("%s: it is replaced", cause, extra=about)
