"""End of a fleet without a manager.

The leading manager regularly postpones a scheduled action of each pool's group, which sets the group's limits and its
desired capacity to 0. If no manager leads for `orphan_s`, the service of the groups performs the action. The manager
also renews the leader beat, an object in the bucket. A worker without a renewed leader beat for `orphan_s` ends when it
is idle, because scale-in does not end an instance with scale-in protection.

Invariant: a leading manager postpones the scheduled actions `leader_beat.ROUNDS` times in `orphan_s`, so one failed
call does not end the fleet. A manager that finds that the action has ended its fleet restores the limits of the pool.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence

from batchlab.core.errors import BatchlabError, Denied, Malformed, NotFound, Refused
from batchlab.core.model import GroupView
from batchlab.core.port_retries import raise_if_cancelled
from batchlab.core.protocol import leader_beat, object_keys
from batchlab.core.protocol.leader_beat import ROUNDS, LeaderBeat
from batchlab.manager.context import Context, Part

log = logging.getLogger(__name__)

MAX_RETRY_S = 30.0
"""Longest pause in seconds before a failed call is repeated."""


class FleetEnd(Part):
    """Scheduled actions that end the fleet, and the leader beat. `user_capacity` has the capacity that a user has set,
    by pool."""

    def __init__(self, context: Context, owner: str, user_capacity: Mapping[str, int]) -> None:
        super().__init__(context)
        self._pools = context.pools
        self._orphan_s = self._settings.orphan_s
        self._owner = owner
        self._user_capacity = user_capacity
        self._beats = 0
        self._postponed_s: dict[str, float] = {}
        """Monotonic time of the last request that postponed the scheduled action, by pool."""
        self._failures: dict[str, str] = {}
        self._unscheduled: set[str] = set()
        """Pools whose groups do not have a scheduled action, or would not perform the action."""

    @property
    def is_needed(self) -> bool:
        """Whether `run` has work: to postpone the scheduled actions, or to remove the actions of earlier leaders."""
        return self._orphan_s > 0 or self._fleet.is_managed_service or bool(self._failures)

    def trouble(self, pool: str) -> str:
        """Return a phrase about a failed change of the pool's scheduled action, or ""."""
        if not (why := self._failures.get(pool)):
            return ""
        left_s = self.left_s(pool) or 0.0
        when = f", and the pool ends in {left_s:.0f} s" if left_s > 0 and pool not in self._unscheduled else ""
        return f"the scheduled action that ends the pool without a manager cannot be changed{when}: {why}"

    def left_s(self, pool: str) -> float | None:
        """Return the seconds until the pool's scheduled action, or None without a scheduled action."""
        postponed_s = self._postponed_s.get(pool)
        return None if postponed_s is None else postponed_s + self._orphan_s - self._clock.monotonic_s()

    async def begin(self) -> None:
        """Postpone the scheduled actions of all pools at the start of a manager, or remove the actions if `orphan_s` is
        0. A failed call is repeated later by `run`."""
        for pool in list(self._pools):
            await self._attempt(pool)

    async def run(self) -> None:
        """Postpone the scheduled actions and renew the leader beat, until the call is cancelled. If `orphan_s` is 0,
        remove the actions again and again, because an earlier leader may have been suspended during its last call."""
        pause_s = await self._end_round(should_retry=bool(self._failures))
        while self.is_needed:
            await asyncio.sleep(pause_s)
            outcomes = [await self._attempt(pool) for pool in list(self._pools)]
            pause_s = await self._end_round(should_retry=not all(outcomes))

    async def _end_round(self, *, should_retry: bool) -> float:
        """Renew the leader beat, and return the pause in seconds until the next round."""
        should_retry |= not await self._renew_beat()
        pause_s = leader_beat.round_s(self._orphan_s)
        return min(MAX_RETRY_S, pause_s / ROUNDS) if should_retry else pause_s

    async def restore(self, views: Sequence[GroupView]) -> bool:
        """Restore the pools whose scheduled actions were performed, and return whether there were such pools.

        Close to its time, an action may be performed while the manager postpones it. The manager may also lack the
        permission to postpone the action.
        """
        ended = [view.pool.name for view in views if not view.pool.max_size]
        ended = [name for name in ended if name in self._pools and self._pools[name].max_size]
        for name in ended:
            await self._restore(name)
        return bool(ended)

    async def _restore(self, pool: str) -> None:
        """Restore the limits and the user's capacity of a pool."""
        limits = self._pools[pool]
        log.warning("the scheduled action has ended the pool, whose limits are restored", extra={"pool": pool})
        # The fleet must end again if this manager ends now.
        await self._attempt(pool)
        await self._fleet.ensure(limits)
        if (capacity := self._user_capacity.get(pool)) is not None:
            desired = max(limits.min_size, min(limits.max_size, capacity))
            await self._fleet.set_desired(pool, desired, cause="the return of the manager")
        self._context.wake.set()

    async def _attempt(self, pool: str) -> bool:
        """Postpone or remove the pool's scheduled action. Return False if the call should be repeated soon."""
        try:
            asked_s = self._clock.monotonic_s()
            end = await self._fleet.schedule_end(pool, self._orphan_s or None)
        except BatchlabError as error:
            raise_if_cancelled()
            self._note_failure(pool, str(error), is_scheduled=not isinstance(error, Refused | Denied))
            return isinstance(error, Refused | Denied)
        if self._orphan_s:
            self._postponed_s[pool] = asked_s
        elif end.existed:
            log.warning("the scheduled action of an earlier manager is removed", extra={"pool": pool})
        if end.problem:
            self._note_failure(pool, end.problem, is_scheduled=end.is_performed)
            return True
        self._unscheduled.discard(pool)
        if self._failures.pop(pool, None):
            log.warning("the scheduled action of the group can be changed again", extra={"pool": pool})
        return True

    def _note_failure(self, pool: str, why: str, *, is_scheduled: bool) -> None:
        if pool not in self._failures:
            log.warning("the scheduled action of the group cannot be changed: %s", why, extra={"pool": pool})
        self._failures[pool] = why.rstrip(".")
        if not is_scheduled:
            self._unscheduled.add(pool)

    async def _renew_beat(self) -> bool:
        try:
            # If the group did not end, it would replace each worker that ends, so no worker must end.
            orphan_s = 0.0 if self._unscheduled else self._orphan_s
            if self._orphan_s or await self._must_replace_earlier_beat():
                self._beats += 1
                beat = LeaderBeat(self._owner, self._beats, orphan_s)
                await self._objects.put(object_keys.LEADER, beat.to_bytes())
        except BatchlabError as error:
            raise_if_cancelled()
            log.warning("the leader beat cannot be renewed: %s", error)
            return False
        return True

    async def _must_replace_earlier_beat(self) -> bool:
        """Return whether the leader beat of an earlier leader would end workers."""
        if not self._fleet.is_managed_service:
            return False
        try:
            return leader_beat.from_bytes(await self._objects.get(object_keys.LEADER)).orphan_s > 0
        except NotFound:
            return False
        except Malformed:
            return True
