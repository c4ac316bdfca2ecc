"""Task slots of one instance: a first-come, first-served counter that can be closed."""

from __future__ import annotations

import asyncio
from collections import deque


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
