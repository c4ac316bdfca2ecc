"""Handoff of the tasks that wait behind a long task, and the slots of an instance.

Invariant: the outcome of the bundle is committed and reported first. It names the part that this
worker keeps among its follow-ups. The message stays in flight until the outcome of that part is
also reported. If the worker dies, the next receiver of the message finds the first outcome and
forwards it again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from batchlab.core.job_definition import JobDef
from batchlab.core.model import Json, Ran, TaskSet
from batchlab.core.protocol.bundle_size import BUDGET_S
from batchlab.worker.commit_and_forward import BundleFinisher
from batchlab.worker.inflight_message import InflightMessage

LOOK_S = 0.1
"""Seconds until the next check if no task is running at the moment."""


class WorkHandoff:
    """Handoff of waiting tasks by one worker."""

    def __init__(self, finisher: BundleFinisher) -> None:
        self._finisher = finisher

    async def run(
        self,
        inflight: InflightMessage,
        job: JobDef,
        items: Sequence[Json],
        started_s: float,
        runs: AsyncIterator[Ran],
    ) -> list[Ran]:
        """Collect the results of the tasks that stay here: all tasks, or those of `inflight.part`.

        Raise BackendError if a committed outcome could not be forwarded.
        """
        ran: list[Ran] = []
        watching = self._watch(inflight, job, items, ran, started_s)
        watch = asyncio.create_task(watching, name=f"handoff {inflight.bundle.id}")
        try:
            async for one in runs:
                ran.append(one)  # noqa: PERF401 - `_watch` reads the list while it grows
        finally:
            if not inflight.shedding:
                watch.cancel()
            # Wait for a commit that is in progress.
            await asyncio.wait({watch})
        if inflight.shedding:
            watch.result()
        return [one for one in ran if one.task in inflight.bundle.tasks]

    async def _watch(
        self,
        inflight: InflightMessage,
        job: JobDef,
        items: Sequence[Json],
        ran: Sequence[Ran],
        started_s: float,
    ) -> None:
        """Hand off the tasks behind the running one once the budget is used up."""
        await asyncio.sleep(BUDGET_S)
        while (running := inflight.handle.running) is None or not _after(inflight, ran, running):
            if inflight.handle.stop or len(ran) >= len(inflight.bundle.tasks):
                return
            await asyncio.sleep(LOOK_S)
        if inflight.handle.stop:
            return
        inflight.shedding = True
        inflight.handle.stop = True
        await self._shed(inflight, job, items, list(ran), _after(inflight, ran, running), started_s)

    async def _shed(
        self,
        inflight: InflightMessage,
        job: JobDef,
        items: Sequence[Json],
        ran: Sequence[Ran],
        rest: TaskSet,
        started_s: float,
    ) -> None:
        bundle = inflight.bundle
        kept = replace(bundle, tasks=bundle.tasks - TaskSet.of(r.task for r in ran) - rest)
        if await self._finisher.shed(inflight, job, started_s, ran, items, kept):
            # Set only after the commit: once a heartbeat names the part, the manager no longer
            # needs the message. If another worker's outcome counts, this run finds it at its end.
            inflight.part = kept


def _after(inflight: InflightMessage, ran: Sequence[Ran], running: int) -> TaskSet:
    """Return the tasks that have not started. Tasks start in order."""
    left = inflight.bundle.tasks - TaskSet.of(r.task for r in ran)
    return left - TaskSet.span(0, running + 1)


class Slots:
    """Task slots of one instance, served first come, first served.

    A later waiter that needs fewer slots does not go first. Otherwise, a stage that needs all slots
    would starve.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.free = total
        self._waiters: deque[tuple[int, asyncio.Future[bool]]] = deque()

    def ask(self, count: int) -> asyncio.Future[bool]:
        """Return a future that becomes True when the caller has `count` slots, at most `total`."""
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiters.append((min(count, self.total), future))
        self._serve()
        return future

    def release(self, count: int) -> None:
        self.free += min(count, self.total)
        self._serve()

    def refuse(self, waiter: asyncio.Future[bool]) -> None:
        """Resolve a waiter with False. A waiter that has its slots keeps them."""
        if not waiter.done():
            waiter.set_result(False)
            self._serve()

    def _serve(self) -> None:
        while self._waiters:
            count, future = self._waiters[0]
            if future.done():  # It was refused.
                self._waiters.popleft()
                continue
            if count > self.free:
                return
            self._waiters.popleft()
            self.free -= count
            future.set_result(True)
