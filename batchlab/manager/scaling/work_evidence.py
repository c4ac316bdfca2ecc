"""Evidence that an instance does what its worker reports.

Invariant: a report alone is not evidence. Evidence is an outcome that was counted, or a held bundle
of a live job whose commit key the worker has. The bundle need not be outstanding, because another
worker with the key could have reported its end. So a lying worker loses its evidence when the
jobs that it was given have ended. An honest worker that runs nothing but copies of bundles of ended
jobs lacks evidence too. The grid would discard its results.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping

from batchlab.core.errors import Malformed, NotFound
from batchlab.core.model import Control, JobId
from batchlab.core.ports import Depth, JobRecord
from batchlab.core.protocol.messages import Beat
from batchlab.manager.scaling.worker_registry import Registry
from batchlab.manager.state import LiveJob, Ports

IDLE = "its worker has taken no work"
BUSY = "its worker reports work of which the manager knows nothing"
MANAGER = "manager"
"""The worker in outcomes that the manager has made."""


class Evidence:
    """Evidence that one manager has of each worker of a grid."""

    def __init__(
        self,
        ports: Ports,
        registry: Registry,
        lives: Mapping[JobId, LiveJob],
        depths: Mapping[str, Depth],
        known: Callable[[JobId], Awaitable[JobRecord]],
    ) -> None:
        """`known` returns a job of the ledger or the bucket, or raises NotFound."""
        self._ports = ports
        self._registry = registry
        self._lives = lives
        self._depths = depths
        self._known = known
        self.authors: set[str] = set()
        """Workers of the outcomes that were counted since the last call of `missing`."""

    def missing(self, pools: Mapping[str, str]) -> dict[str, str]:
        """Return the reason for each instance without evidence of work. `pools` maps instances to
        pools. An idle instance needs no evidence while no work waits in its pool."""
        waits = {pool: self._waits(pool) for pool in dict.fromkeys(pools.values())}
        lacking: dict[str, str] = {}
        for instance, pool in pools.items():
            seen = self._registry.workers.get(instance)
            if seen is None or self._is_shown(seen.beat):
                continue
            if seen.beat.busy or seen.beat.held:
                lacking[instance] = BUSY
            elif waits[pool]:
                lacking[instance] = IDLE
        self.authors.clear()
        return lacking

    async def is_refuted(self, instance: str) -> bool:
        """Return whether no held bundle belongs to a job that has not ended.

        This reads the ledger and the bucket, because a manager may have died before it had
        written a job to the ledger. Raises BackendError if they cannot be read."""
        seen = self._registry.workers.get(instance)
        for job in sorted({one.job for one in seen.beat.held} - self._lives.keys() if seen else ()):
            try:
                if not (await self._known(job)).state.ended:
                    return False
            except (Malformed, NotFound):
                continue
        return True

    def _is_shown(self, beat: Beat) -> bool:
        if any(one.job in self._lives for one in beat.held):
            return True
        is_own = self._registry.named.get(beat.worker) == beat.instance
        return is_own and beat.worker != MANAGER and beat.worker in self.authors

    def _waits(self, pool: str) -> bool:
        """Return whether the pool's queue has messages, and a bundle is due that no worker holds.
        Messages alone do not count, because any worker can send messages that no worker can run."""
        depth = self._depths.get(pool)
        if depth is None or not depth.visible:
            return False
        held = {
            (one.job, one.stage, one.bundle)
            for seen in self._registry.workers.values()
            for one in seen.beat.held
        }
        return any(self._has_due(live, pool, held) for live in self._lives.values())

    def _has_due(self, live: LiveJob, pool: str, held: Collection[tuple[str, str, str]]) -> bool:
        if live.record.control is not Control.RUN:
            return False  # workers drop its messages
        now_s = self._ports.clock.monotonic_s()
        return any(
            one.heard_s <= now_s and (live.id, stage, bundle) not in held
            for stage, waiting in live.outstanding.items()
            if live.job.stage(stage).pool == pool
            for bundle, one in waiting.items()
        )
