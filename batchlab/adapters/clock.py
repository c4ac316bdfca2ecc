"""Real time, random ids, and the threads that run the blocking calls of a ledger or a queue.

Invariants: the core gets the wall time and the randomness of a real backend only from this module. If an object
supports one thread at a time, only one thread at a time uses the object. The invariant of one thread at a time also
holds if the task that waits for a call is canceled.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Protocol, TypeVar

from batchlab.core.errors import Unreachable
from batchlab.core.operating_system import since_boot_s


class WallClock:
    """Clock port over the clocks of the machine."""

    def now_s(self) -> float:
        """Return epoch seconds. The operating system may set the wall clock back."""
        return time.time()

    def monotonic_s(self) -> float:
        """Return the seconds since an arbitrary start. The returned time never goes back.

        On some operating systems, the returned time includes the time for which the machine was suspended. If the
        operating system counts the suspended time, a lease expires while a laptop is suspended.
        """
        return since_boot_s()


class RandomIds:
    """Random ids from the operating system. Processes draw ids without coordination."""

    def fresh(self, kind: str) -> str:
        """Return a new id with the prefix `kind`. With 64 bits, ten million ids do not collide."""
        return f"{kind}-{secrets.token_hex(8)}"


T = TypeVar("T")

_BUSY_S = 10.0
_RETRY_S = 0.01


class Busy(Unreachable):
    """Another connection holds the database's lock."""


class CallRunner(Protocol):
    """Runner of the blocking calls of a ledger or a queue.

    Writing calls run one at a time, in the order of the calls.
    """

    async def __call__(self, call: Callable[[], T], /, *, writes: bool, quick: bool) -> T:
        """Return the result of `call`. A `quick` call takes about a millisecond."""

    async def close(self, last: Callable[[], None]) -> None:
        """Run `last` after all earlier calls. The runner does not accept calls after `last`.

        `last` also runs if the task that waits for `last` is canceled.
        """


class InlineRunner:
    """Runner that makes calls in the caller's thread, because the simulator runs without threads."""

    async def __call__(self, call: Callable[[], T], /, *, writes: bool, quick: bool) -> T:  # noqa: ARG002
        return call()

    async def close(self, last: Callable[[], None]) -> None:
        last()


class SingleThread:
    """Runner with one thread, which makes the calls in the order of their submission.

    If the runner's thread is idle, a quick call runs in the caller's thread, because a change of threads takes as long
    as the quick call.
    """

    def __init__(self, name: str = "ledger") -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._waiting = 0

    @property
    def is_idle(self) -> bool:
        """Return whether all submitted calls have ended."""
        return not self._waiting

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Run the call in the thread, even if its caller is canceled."""
        with self._lock:
            self._waiting += 1
        submitted = self._executor.submit(call)
        submitted.add_done_callback(self._on_end)
        return submitted

    def _on_end(self, _: Future[T]) -> None:
        with self._lock:
            self._waiting -= 1

    async def __call__(self, call: Callable[[], T], /, *, writes: bool, quick: bool) -> T:  # noqa: ARG002
        if quick and self.is_idle:
            # The runner's thread waits for the lock of another process, so the event loop can run other tasks.
            with suppress(Busy):
                return call()
        return await asyncio.wrap_future(self.submit(lambda: _retry_while_busy(call)))

    async def close(self, last: Callable[[], None]) -> None:
        closing = self.submit(lambda: _retry_while_busy(last))
        closing.add_done_callback(lambda _: self._executor.shutdown(wait=False))
        await asyncio.shield(asyncio.wrap_future(closing))
        self._executor.shutdown()


def _retry_while_busy(call: Callable[[], T]) -> T:
    deadline_s = time.monotonic() + _BUSY_S
    while True:
        try:
            return call()
        except Busy:
            if time.monotonic() > deadline_s:
                raise
        time.sleep(_RETRY_S)


class ReadWriteThreads:
    """Runner with one thread for writing calls and a few threads for reading calls.

    Readers have their own threads, so a long listing delays neither a fold nor the lease. Writing calls run in the
    order of the calls.

    The runner is for a database in a network, where even a quick call would block the event loop. A read that begins
    during a write may see the state before the write, even if the read ends later.
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
