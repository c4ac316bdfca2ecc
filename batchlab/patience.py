"""Patience with a port: S3's 409 and 503, SQS throttling and short outages are waited out.

Invariant: only calls that may be repeated come through here, which the protocol makes of all.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

from batchlab.errors import Throttled, Unreachable
from batchlab.waits import cancels, doubled_s, heed_cancellation

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
        wait_s, waited_s, before = FIRST_WAIT_S, 0.0, cancels()
        while True:
            try:
                return await call()
            except (Throttled, Unreachable):
                heed_cancellation(before)
                if waited_s >= self._limit_s:
                    raise
            # Full jitter: workers that were throttled together must not come back together.
            pause_s = self._rng.uniform(0, wait_s)
            await asyncio.sleep(pause_s)
            waited_s += pause_s
            wait_s = doubled_s(wait_s, LONGEST_WAIT_S)


class _Patient:
    def __init__(self, inner: object, patience: Patience) -> None:
        self._inner = inner
        self._patience = patience

    def __getattr__(self, name: str) -> Any:
        target = getattr(self._inner, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            return await self._patience(lambda: target(*args, **kwargs))

        setattr(self, name, call)
        return call


def patiently(port: T, patience: Patience) -> T:
    """`port` with patience in every call: for a port whose methods are all async and repeatable.

    What such a method answers may be the answer to its second try: "not new" for what was new.
    """
    # A dynamic proxy behind the type of what it stands for: twenty delegates would say nothing.
    return cast(T, _Patient(port, patience))
