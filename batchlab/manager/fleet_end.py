"""End of a fleet without a manager.

The leading manager regularly postpones a scheduled action of each pool's group, which sets the group's limits and its
desired capacity to 0. If no manager leads for `orphan_s`, the service of the groups performs the action. The manager
also renews the leader beat, an object in the bucket. A worker without a renewed leader beat for `orphan_s` ends when it
is idle, because scale-in does not end an instance with scale-in protection.

Invariant: a leading manager postpones the scheduled actions `PUSHES` times in `orphan_s`, so one failed call does not
end the fleet. A manager that finds that the action has ended its fleet restores the limits of the pool.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from batchlab.core.errors import BatchlabError
from batchlab.core.port_retries import raise_if_cancelled
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.leader_beat import LeaderBeat
from batchlab.manager.context import Context, Part

log = logging.getLogger(__name__)

PUSHES = 6
"""Number of times that the manager postpones the scheduled action in `orphan_s`."""
MAX_RETRY_S = 30.0
"""Longest pause in seconds before a failed call is repeated."""


class FleetEnd(Part):
    """Scheduled actions that end the fleet, and the leader beat. `user_capacity` has the capacity that a user has set,
    by pool."""

    def __init__(self, context: Context, owner: str, user_capacity: Mapping[str, int]) -> None:
        super().__init__(context)
        self._pools = context.pools
        self._after_s = self._settings.orphan_s
        self._owner = owner
        self._user_capacity = user_capacity
        self._beats = 0
        self._postponed_s: dict[str, float] = {}
        """Monotonic time of the last request that postponed the scheduled action, by pool."""
        self._failures: dict[str, str] = {}

    @property
    def is_needed(self) -> bool:
        """Whether `run` has work: to postpone the scheduled actions, or to repeat a failed removal."""
        return self._after_s > 0 or bool(self._failures)

    def trouble(self, pool: str) -> str:
        """Return a phrase about a failed change of the pool's scheduled action, or ""."""
        if not (why := self._failures.get(pool)):
            return ""
        left_s = self.left_s(pool) or 0.0
        when = f", and the pool ends in {left_s:.0f} s" if left_s > 0 else ""
        return f"the scheduled action that ends the pool without a manager cannot be changed{when}: {why}"

    def left_s(self, pool: str) -> float | None:
        """Return the seconds until the pool's scheduled action, or None without a scheduled action."""
        postponed_s = self._postponed_s.get(pool)
        return None if postponed_s is None else postponed_s + self._after_s - self._clock.monotonic_s()

    async def begin(self) -> None:
        """Postpone the scheduled actions of all pools at the start of a manager, or remove the actions if `orphan_s` is
        0. A failed call is repeated later by `run`."""
        for pool in list(self._pools):
            await self._attempt(pool)

    async def run(self) -> None:
        """Postpone the scheduled actions and renew the leader beat, until the call is cancelled. If `orphan_s` is 0,
        return after the removal of the actions."""
        failed = bool(self._failures)
        if self._after_s:
            failed |= not await self._renew_beat()
        while self.is_needed:
            await asyncio.sleep(self._pause_s(failed=failed))
            failed = not all([await self._attempt(pool) for pool in list(self._pools)])
            if self._after_s:
                failed |= not await self._renew_beat()

    def _pause_s(self, *, failed: bool) -> float:
        if not self._after_s:
            return MAX_RETRY_S
        pause_s = self._after_s / PUSHES
        return min(MAX_RETRY_S, pause_s / PUSHES) if failed else pause_s

    async def _attempt(self, pool: str) -> bool:
        """Postpone or remove the pool's scheduled action. Return whether the call has succeeded."""
        try:
            await (self._postpone(pool) if self._after_s else self._remove(pool))
        except BatchlabError as error:
            raise_if_cancelled()
            if pool not in self._failures:
                log.warning("the scheduled action of the group cannot be changed: %s", error, extra={"pool": pool})
            self._failures[pool] = str(error).rstrip(".")
            return False
        if self._failures.pop(pool, None):
            log.warning("the scheduled action of the group can be changed again", extra={"pool": pool})
        return True

    async def _postpone(self, pool: str) -> None:
        asked_s = self._clock.monotonic_s()
        before_s = self._postponed_s.get(pool)
        existed = await self._fleet.schedule_end(pool, self._after_s)
        # The action exists until it is performed. Close to its time, it may have been performed during the call.
        may_have_ended = not existed or before_s is None or asked_s - before_s > self._after_s * (1 - 1 / PUSHES)
        if may_have_ended:
            await self._restore(pool)
        self._postponed_s[pool] = asked_s

    async def _restore(self, pool: str) -> None:
        """Restore the limits and the user's capacity of a pool whose scheduled action was performed."""
        view = next((view for view in await self._fleet.describe() if view.pool.name == pool), None)
        limits = self._pools[pool]
        if view is None or view.pool.max_size or not limits.max_size:
            return
        log.warning("the scheduled action has ended the pool, whose limits are restored", extra={"pool": pool})
        await self._fleet.ensure(limits)
        if (capacity := self._user_capacity.get(pool)) is not None:
            desired = max(limits.min_size, min(limits.max_size, capacity))
            await self._fleet.set_desired(pool, desired, cause="the return of the manager")
        self._context.wake.set()

    async def _remove(self, pool: str) -> None:
        if await self._fleet.schedule_end(pool, None):
            # Workers that have read an earlier beat must not end.
            await self._put_beat()

    async def _renew_beat(self) -> bool:
        try:
            await self._put_beat()
        except BatchlabError as error:
            raise_if_cancelled()
            log.warning("the leader beat cannot be renewed: %s", error)
            return False
        return True

    async def _put_beat(self) -> None:
        self._beats += 1
        beat = LeaderBeat(self._owner, self._beats, self._after_s)
        await self._objects.put(object_keys.LEADER, beat.to_bytes())
