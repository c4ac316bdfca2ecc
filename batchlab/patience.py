"""Patience with a port: S3's 409 and 503, SQS throttling and short outages are waited out.

Invariant: only calls that may be repeated come through here, which the protocol makes of all.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from batchlab.errors import Throttled, Unreachable

T = TypeVar("T")

FIRST_WAIT_S = 0.05
LONGEST_WAIT_S = 5.0


class Patience:
    """Tries again with exponentially growing, jittered waits, `limit_s` in all at the most."""

    def __init__(self, rng: random.Random, *, limit_s: float = 60.0) -> None:
        self._rng = rng
        self._limit_s = limit_s

    async def __call__(self, call: Callable[[], Awaitable[T]]) -> T:
        """The result of `call`; its last Throttled or Unreachable once patience has run out."""
        wait_s, waited_s = FIRST_WAIT_S, 0.0
        while True:
            try:
                return await call()
            except (Throttled, Unreachable):
                if waited_s >= self._limit_s:
                    raise
            # Full jitter: workers that were throttled together must not come back together.
            pause_s = self._rng.uniform(0, wait_s)
            await asyncio.sleep(pause_s)
            waited_s += pause_s
            wait_s = min(LONGEST_WAIT_S, wait_s * 2)
