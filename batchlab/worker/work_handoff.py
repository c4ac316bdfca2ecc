"""What waits behind a long task is given away while that still runs.

Invariant: the bundle's outcome is committed and told of before its worker goes on, and names among
what follows the part that the worker keeps. The message stays in hand until that part's own outcome
is told too: if the worker dies, whoever gets the message finds the first outcome, and forwards it
again.

Task slots of one instance: a first-come, first-served counter that can be closed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from batchlab.core.job_definition import JobDef
from batchlab.core.model import Json, Ran, TaskSet
from batchlab.core.protocol.bundle_size import BUDGET_S
from batchlab.worker.commit_and_forward import Closing
from batchlab.worker.inflight_message import Hand

LOOK_S = 0.1
"""Between two tasks there is nobody to keep: soon the next one runs, or the run has ended."""


class Shedding:
    """Of one worker."""

    def __init__(self, closing: Closing) -> None:
        self._closing = closing

    async def run(
        self,
        hand: Hand,
        job: JobDef,
        items: Sequence[Json],
        started_s: float,
        runs: AsyncIterator[Ran],
    ) -> list[Ran]:
        """What the tasks that stay in hand come to: all, or those of `hand.part`. BackendError
        where what was committed could not be told of."""
        ran: list[Ran] = []
        watching = self._watch(hand, job, items, ran, started_s)
        watch = asyncio.create_task(watching, name=f"shedding {hand.bundle.id}")
        try:
            async for one in runs:
                ran.append(one)  # noqa: PERF401 - it is looked at while it grows
        finally:
            if not hand.shedding:
                watch.cancel()
            # A commit that is under way must not be forgotten.
            await asyncio.wait({watch})
        if hand.shedding:
            watch.result()
        return [one for one in ran if one.task in hand.bundle.tasks]

    async def _watch(
        self,
        hand: Hand,
        job: JobDef,
        items: Sequence[Json],
        ran: Sequence[Ran],
        started_s: float,
    ) -> None:
        """Shed once the budget is used up, where something waits behind the task that runs then."""
        await asyncio.sleep(BUDGET_S)
        while (running := hand.handle.running) is None or not _after(hand, ran, running):
            if hand.handle.stop or len(ran) >= len(hand.bundle.tasks):
                return
            await asyncio.sleep(LOOK_S)
        if hand.handle.stop:
            return
        hand.shedding = True
        hand.handle.stop = True
        await self._shed(hand, job, items, list(ran), _after(hand, ran, running), started_s)

    async def _shed(
        self,
        hand: Hand,
        job: JobDef,
        items: Sequence[Json],
        ran: Sequence[Ran],
        rest: TaskSet,
        started_s: float,
    ) -> None:
        bundle = hand.bundle
        kept = replace(bundle, tasks=bundle.tasks - TaskSet.of(r.task for r in ran) - rest)
        if await self._closing.shed(hand, job, started_s, ran, items, kept):
            # Only now: where a beat names the part, the manager may do without the bundle's
            # message. Where somebody else was faster, this run comes to the same at its end.
            hand.part = kept


def _after(hand: Hand, ran: Sequence[Ran], running: int) -> TaskSet:
    """What has neither ended nor begun: tasks begin in order."""
    left = hand.bundle.tasks - TaskSet.of(r.task for r in ran)
    return left - TaskSet.span(0, running + 1)


class Slots:
    """`total` slots. A waiter is served in its turn even where a later, smaller one would fit:
    otherwise a stage that needs all slots would starve beside one that needs few."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.free = total
        self._waiters: deque[tuple[int, asyncio.Future[bool]]] = deque()

    def ask(self, count: int) -> asyncio.Future[bool]:
        """A future that becomes True when `count` slots are ours (at most `total` are given)."""
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiters.append((min(count, self.total), future))
        self._serve()
        return future

    def release(self, count: int) -> None:
        self.free += min(count, self.total)
        self._serve()

    def refuse(self, waiter: asyncio.Future[bool]) -> None:
        """Send a waiter away with False; one that has its slots already keeps them."""
        if not waiter.done():
            waiter.set_result(False)
            self._serve()

    def _serve(self) -> None:
        while self._waiters:
            count, future = self._waiters[0]
            if future.done():  # refused while it waited
                self._waiters.popleft()
                continue
            if count > self.free:
                return
            self._waiters.popleft()
            self.free -= count
            future.set_result(True)
