"""Concurrent runs of checks that wait most of the time. The checks start before their tests ask for the results.

Invariant: a test reports the result of its own check only.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future, wait
from typing import Any, Generic, TypeVar

AT_ONCE = 8
CHECK_S = 300.0

W = TypeVar("W")


class SideBySide(Generic[W]):
    """A runner of async checks of a world, with an event loop in its own thread.

    The checks in `ahead` start at once, a few at a time. `close` cancels the checks that still run.
    """

    def __init__(self, world: W, ahead: Iterable[Callable[[W], Coroutine[Any, Any, None]]]) -> None:
        self.world = world
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="checks")
        self._thread.start()
        self._few = asyncio.Semaphore(AT_ONCE)
        self._ahead = {check: self._started(check) for check in ahead}

    def _started(self, check: Callable[[W], Coroutine[Any, Any, None]]) -> Future[None]:
        return asyncio.run_coroutine_threadsafe(self._checked(check), self._loop)

    async def _checked(self, check: Callable[[W], Coroutine[Any, Any, None]]) -> None:
        async with self._few:
            await asyncio.wait_for(check(self.world), CHECK_S)

    def run(self, check: Callable[[W], Coroutine[Any, Any, None]]) -> None:
        """Wait for the check, and raise its error. A check that was not started ahead runs now, and alone."""
        if check not in self._ahead:
            wait(self._ahead.values())
            self._started(check).result()
        else:
            self._ahead[check].result()

    def close(self) -> None:
        """End the checks and the thread."""
        asyncio.run_coroutine_threadsafe(self._cancelled(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _cancelled(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
