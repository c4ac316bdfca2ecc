"""Waiting in virtual time, for those who do it for every call and every task.

Invariant: who waits wakes when, and in the order in which, `asyncio.sleep` would wake him.
"""

from __future__ import annotations

import asyncio


class Pause:
    """`asyncio.sleep` of more than 0 s, for one event loop, which it remembers: asyncio asks each
    time which one runs, and for that the kernel which process this is."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __call__(self, seconds: float) -> None:
        """Wait so long."""
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        timer = loop.call_later(seconds, _wake, future)
        try:
            await future
        except BaseException:
            timer.cancel()
            raise


def _wake(future: asyncio.Future[None]) -> None:
    if not future.cancelled():
        future.set_result(None)
