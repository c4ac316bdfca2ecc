"""The lease on the lead: who has it decides, and whoever stands by takes it once it has run out.

Invariant: no two clocks have to agree. A standby takes it only when its holder's beat has not grown
for as long as the lease lasts by the standby's own watch; a holder gives up before that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from batchlab.core.errors import BackendError
from batchlab.core.ports import Clock, Ledger

LEASE = "leader"


class Leadership:
    """One manager's side of the lease; `ttl_s` is how long it lasts without being renewed."""

    def __init__(self, ledger: Ledger, clock: Clock, owner: str, ttl_s: float) -> None:
        self._ledger = ledger
        self._clock = clock
        self._owner = owner
        self._ttl_s = ttl_s
        self._beat = 0
        """When it was last taken or renewed."""
        self._asked_s = 0.0
        """Monotonic time of the request by which it was last taken or renewed."""

    async def take(self) -> None:
        """Wait until nobody has the lease, or its holder has not renewed it for as long as it
        lasts by our own clock."""
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
        """Renew it until it is lost; `on_gap` is called where others may have led meanwhile."""
        while True:
            now_s = self._clock.monotonic_s()
            await asyncio.sleep(max(0.0, self._asked_s + self._ttl_s / 3 - now_s))
            asked_s = self._clock.monotonic_s()
            # It counts from the last request, since the answer may have come much later. A process
            # that stood still for longer than that asks once.
            left_s = self._asked_s + self._ttl_s - asked_s
            try:
                async with asyncio.timeout(left_s if left_s > 0 else self._ttl_s * 2 / 3):
                    stands = await self._ledger.lease(LEASE, self._owner)
            except TimeoutError:
                return  # it has run out; a standby may have taken it
            if stands.owner != self._owner:
                return
            if stands.beat != self._beat + 1:
                # We stood still, and found the lease free again. Or an answer was lost, and we
                # asked twice: then what follows was not needed.
                on_gap()
            self._beat, self._asked_s = stands.beat, asked_s

    async def release(self) -> None:
        """Let others take it at once."""
        with suppress(BackendError):  # it runs out by itself
            await self._ledger.release(LEASE, self._owner)
