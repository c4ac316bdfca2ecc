"""Instances whose workers tell nothing any more, though nobody has seen them die: a group replaces
what its own checks find dead, and keeps for ever what has only stopped. An instance whose worker
shows no evidence of work for as long is replaced too (see manager/scaling/work_evidence.py).

Invariant: only time counts in which a manager has listened, this one or the leader before. An
outage of the events, or a manager that stood still, adds to nobody's silence, and takes nothing
from it. Where none of a pool is heard of, it may be for our sake, and they go one at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from batchlab.core.errors import BackendError, Refused
from batchlab.core.model import GroupView, LifecycleState
from batchlab.manager.scaling.work_evidence import Evidence
from batchlab.manager.scaling.worker_registry import LOST_S, Registry
from batchlab.manager.settings import ManagerSettings
from batchlab.manager.state import Ports

log = logging.getLogger(__name__)

SILENCES = 3
"""So often its bundles have been looked for by then."""
STEPS = 10
"""The next leader goes on with a silence in steps of this part of the limit."""
LONG_TICKS = 2
"""A look counts for so many ticks at the most, however long ago the one before was."""


class Silence:
    """For how long nothing was heard of each instance that is in service, and for how long its
    worker has shown no evidence of work."""

    def __init__(
        self, ports: Ports, settings: ManagerSettings, registry: Registry, evidence: Evidence
    ) -> None:
        self._ports = ports
        self._registry = registry
        self._evidence = evidence
        self._step_s = LONG_TICKS * settings.tick_s
        self.limit_s = max(LOST_S, SILENCES * settings.silence_s)
        self._quiet_s: dict[str, float] = {}
        """By instance."""
        self._useless_s: dict[str, float] = {}
        """By instance; seconds without evidence of work."""
        self._looked_s: float | None = None
        """Monotonic."""

    async def look(self, views: Sequence[GroupView]) -> None:
        """Count up to now, and have those replaced that were silent, or useless, for too long."""
        now_s = self._ports.clock.monotonic_s()
        if self._looked_s is None:
            self._quiet_s = dict(self._registry.instances.quiet_s)
        since_s = now_s if self._looked_s is None else self._looked_s
        self._looked_s = now_s
        is_deaf = self._registry.deaf_s is not None and self._registry.deaf_s >= since_s
        # What was heard before stays: were it forgotten, none would be replaced under steady load.
        step_s = 0.0 if is_deaf else min(now_s - since_s, self._step_s)
        pools = {
            instance.id: view.pool.name
            for view in views
            for instance in view.instances
            if instance.state is LifecycleState.IN_SERVICE
        }
        self._quiet_s = {
            one: 0.0 if self._heard(one, since_s) else self._quiet_s.get(one, 0.0) + step_s
            for one in pools
        }
        for one in self._overdue(self._quiet_s, pools):
            cause = f"its worker has been silent for {self._quiet_s[one]:.0f} s"
            await self._replace(one, pools.pop(one), cause)
            self._quiet_s[one] = 0.0
        part_s = self.limit_s / STEPS
        stored_s = {one: part_s * (quiet_s // part_s) for one, quiet_s in self._quiet_s.items()}
        # Few instances are silent for long, so this is seldom another one.
        self._registry.instances.note_quiet({one: s for one, s in stored_s.items() if s})
        missing = self._evidence.missing(pools)
        self._useless_s = {
            one: self._useless_s.get(one, 0.0) + step_s if one in missing else 0.0 for one in pools
        }
        for one in self._overdue(self._useless_s, pools):
            cause = f"{missing[one]} for {self._useless_s[one]:.0f} s"
            if await self._is_refuted(one, pools[one], cause):
                await self._replace(one, pools[one], cause)
            self._useless_s[one] = 0.0

    def _overdue(self, counted_s: dict[str, float], pools: Mapping[str, str]) -> list[str]:
        """The instances that have reached the limit. If a pool has no others, only the first of
        them, and the others are counted anew."""
        overdue: list[str] = []
        for pool in dict.fromkeys(pools.values()):
            members = [one for one in pools if pools[one] == pool]
            over = [one for one in members if counted_s[one] >= self.limit_s]
            if len(over) == len(members):
                counted_s |= dict.fromkeys(over[1:], 0.0)
                del over[1:]
            overdue += over
        return overdue

    def _heard(self, instance: str, since_s: float) -> bool:
        seen = self._registry.workers.get(instance)
        return seen is not None and seen.heard_s >= since_s

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
            await self._ports.fleet.set_health(instance, healthy=False, cause=cause)
        except (Refused, BackendError) as error:
            # What holds for one need not hold for the next, and the rest of the tick must go on.
            log.warning("%s, and it cannot be replaced: %s", cause, error, extra=about)
        else:
            log.warning("%s: it is replaced", cause, extra=about)
