"""The leader's lease. A standby takes the lease after it has expired.

Invariant: clocks need not agree. A standby takes the lease only after the holder's beat has not
changed for the lease's duration, measured by the standby's monotonic clock. The holder gives up
earlier.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from batchlab.core.errors import BackendError
from batchlab.core.ports import Clock, Ledger

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
