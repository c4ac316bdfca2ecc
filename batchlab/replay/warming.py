"""Scheduled capacity: a pool's least size raised for a while.

Invariant: where several want a pool warm at the same time, the largest counts; and however a run
is left, the pool's own least size counts again.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextlib import suppress

from batchlab.errors import BackendError
from batchlab.replay.course import Course
from batchlab.replay.link import Link
from batchlab.replay.sampling import EVERY_S, Sampler
from batchlab.scenario.model import Prewarm
from batchlab.views import PoolView


class Warmer:
    """Of one run. Another manager than the one that was told has limits of its own: it is told
    again as soon as it is seen to lead."""

    def __init__(self, course: Course, link: Link, sampler: Sampler) -> None:
        self._course = course
        self._link = link
        self._sampler = sampler
        self._own = {one.pool.name: one.pool.min_size for one in course.scenario.pools}
        self._wanted: dict[str, list[int]] = defaultdict(list)
        self._told: dict[str, tuple[int, str]] = {}
        """What each pool's least size was made last, and who led then."""
        self._telling: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._flying: set[asyncio.Task[PoolView]] = set()

    async def warm(self, one: Prewarm) -> None:
        """Wait for its time, and keep the pool warm until that is over. BackendError."""
        await self._course.until(one.at_s)
        self._wanted[one.pool].append(one.min_size)
        while (left_s := one.until_s - self._course.at_s()) > 0:
            await self._tell(one.pool)
            await asyncio.sleep(min(EVERY_S, left_s))
        self._wanted[one.pool].remove(one.min_size)
        await self._tell(one.pool)

    async def cool(self, *, within_s: float) -> None:
        """All pools have their own least size, as far as the manager can be told."""
        if self._flying:  # else what is in a thread could come after what is told now
            _, late = await asyncio.wait(set(self._flying), timeout=within_s)
            for one in late:
                one.cancel()
        for pool in list(self._told):
            self._wanted[pool].clear()
            # What was noted may have failed.
            self._told.pop(pool, None)
            with suppress(BackendError):
                await self._tell(pool, within_s=within_s)

    async def _tell(self, pool: str, *, within_s: float | None = None) -> None:
        async with self._telling[pool]:  # what was told last must be what is wanted last
            least = max(self._own[pool], *self._wanted[pool], 0)
            leads = self._sampler.grid["owner"] if self._sampler.grid else ""
            if self._told.get(pool) == (least, leads):
                return
            # Noted before it is so: who is cancelled meanwhile has it taken back.
            self._told[pool] = least, leads
            call = self._link.call(lambda there: there.scale(pool, min=least), within_s=within_s)
            flying = asyncio.create_task(call)
            self._flying.add(flying)
            flying.add_done_callback(self._flying.discard)
            await asyncio.shield(flying)
