"""Where the blocking calls of a ledger or a queue run.

Invariant: what only one thread may use at a time is used by one at a time, also where somebody who
waited for a call has been cancelled meanwhile.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Protocol, TypeVar

from batchlab.core.errors import Unreachable

T = TypeVar("T")

_BUSY_S = 10.0
_AGAIN_S = 0.01


class Busy(Unreachable):
    """Somebody else has the database's lock."""


class Run(Protocol):
    """Where blocking calls run: those that write one at a time, in the order they are made."""

    async def __call__(self, call: Callable[[], T], /, *, writes: bool, quick: bool) -> T:
        """The result of `call`, which takes about a millisecond where it is `quick`."""

    async def close(self, last: Callable[[], None]) -> None:
        """Run `last` once everything has run that was asked for, and nothing after it; also where
        who waits for that is cancelled."""


class Inline:
    """On the spot: for the simulator, whose event loop knows no threads."""

    async def __call__(self, call: Callable[[], T], /, *, writes: bool, quick: bool) -> T:  # noqa: ARG002
        return call()

    async def close(self, last: Callable[[], None]) -> None:
        last()


class OneThread:
    """In one thread of its own, where calls queue up in the order they are made; but a quick one
    that finds the thread idle runs on the spot, since going there and back takes as long."""

    def __init__(self, name: str = "ledger") -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._waiting = 0

    @property
    def is_idle(self) -> bool:
        """Whether everything has ended that was submitted."""
        return not self._waiting

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Run it in the thread, whatever becomes of who asks."""
        with self._lock:
            self._waiting += 1
        submitted = self._executor.submit(call)
        submitted.add_done_callback(self._ended)
        return submitted

    def _ended(self, _: Future[T]) -> None:
        with self._lock:
            self._waiting -= 1

    async def __call__(self, call: Callable[[], T], /, *, writes: bool, quick: bool) -> T:  # noqa: ARG002
        if quick and self.is_idle:
            # Somebody else's lock is waited for where that holds up nobody.
            with suppress(Busy):
                return call()
        return await asyncio.wrap_future(self.submit(lambda: _patiently(call)))

    async def close(self, last: Callable[[], None]) -> None:
        closing = self.submit(lambda: _patiently(last))
        closing.add_done_callback(lambda _: self._executor.shutdown(wait=False))
        await asyncio.shield(asyncio.wrap_future(closing))
        self._executor.shutdown()


def _patiently(call: Callable[[], T]) -> T:
    deadline_s = time.monotonic() + _BUSY_S
    while True:
        try:
            return call()
        except Busy:
            if time.monotonic() > deadline_s:
                raise
        time.sleep(_AGAIN_S)


class Threads:
    """What writes in one thread, in the order it is asked for; what reads beside it in a few
    others, so that a long listing holds up neither a fold nor the lease.

    For a database behind a network: no call, however quick, runs in the event loop's thread, which
    would wait with it. A read that is asked for while a write is under way may see the state
    before it, even where its answer comes later.
    """

    READERS = 3

    def __init__(self) -> None:
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="ledger-write")
        self._readers = ThreadPoolExecutor(self.READERS, thread_name_prefix="ledger-read")

    async def __call__(self, call: Callable[[], T], /, *, writes: bool, quick: bool) -> T:  # noqa: ARG002
        executor = self._writer if writes else self._readers
        return await asyncio.get_running_loop().run_in_executor(executor, call)

    async def close(self, last: Callable[[], None]) -> None:
        def end() -> None:
            self._readers.shutdown()
            self._writer.shutdown()
            last()

        await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, end))
