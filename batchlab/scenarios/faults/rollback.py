"""What a fault breaks, and how each of it is undone: noted before it is broken.

Invariant: however a harm is left, all that was noted is undone, what came last first; neither a
cancellation nor the failure of one undo keeps the others from it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from batchlab.core.errors import BackendError
from batchlab.core.text import capital
from batchlab.scenarios.faults.target_grid import RunEnded

log = logging.getLogger(__name__)

T = TypeVar("T")

Undo = Callable[[], Awaitable[object]]
"""Mends one thing, also one that is whole: it is asked too where the breaking has failed, and
again where its first try did."""

UNDO_TRIES = 3
MAX_UNDO_RESTARTS = 3
"""So often one that is stopped in the middle begins anew."""
PAUSE_S = 0.5
"""Between two tries of an undo that fails."""


class RollbackFailed(BackendError):
    """Something that was broken still is."""


class Rollback:
    """Async context manager that undoes all changes on exit, the latest change first.

    `over` is set when nothing more may be broken. The exit raises RollbackFailed for the changes
    that it could not undo, with the message of the original error. On a cancellation, it logs
    them instead.
    """

    def __init__(self, over: asyncio.Event) -> None:
        self._over = over
        self._owed: list[tuple[str, Undo, int]] = []

    def owe(self, what: str, undo: Undo, *, tries: int = UNDO_TRIES) -> None:
        """Something is about to be broken, and `undo` mends it, with so many tries. RunEnded where
        it is not to be broken any more; what was begun before is not left half done."""
        if self._over.is_set() and not self._owed:
            raise RunEnded
        self._owed.append((what, undo, tries))

    async def breaking(self, what: str, undo: Undo, call: Callable[[], Awaitable[T]]) -> T:
        """Break it by `call`, once it is noted how it is mended. Who is cancelled meanwhile waits
        for the call's end: nothing can be mended before it is broken."""
        self.owe(what, undo)
        return await complete(call())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        stands: list[tuple[str, BaseException]] = []
        cancelled: asyncio.CancelledError | None = None
        while self._owed:
            what, undo, tries = self._owed.pop()
            why, stopped = await _run_undo(undo, tries)
            cancelled = stopped or cancelled
            if why is not None:
                stands.append((what, why))
        told = " ".join(f"{capital(what)} could not be undone: {why}" for what, why in stands)
        ends = cancelled is not None or not isinstance(error, Exception | None)
        if stands and ends:
            log.error("%s", told)
        elif stands:
            raise RollbackFailed(f"{error} {told}" if error else told) from (error or stands[0][1])
        if cancelled is not None and isinstance(error, Exception | None):
            raise cancelled from error


async def _run_undo(
    undo: Undo, tries: int
) -> tuple[BaseException | None, asyncio.CancelledError | None]:
    """Why it failed, if it did, and the cancellation that has come meanwhile."""

    async def mend() -> None:
        await undo()

    cancelled = None
    failures: list[BaseException] = []
    for _ in range(tries + MAX_UNDO_RESTARTS):
        task = asyncio.ensure_future(mend())
        cancelled = await _wait_uncancelled(task) or cancelled
        if task.cancelled():  # as a loop that is closed does to all its tasks: it begins anew
            continue
        why = task.exception()
        if why is None:
            return None, cancelled
        failures.append(why)
        if len(failures) == tries:
            break
        cancelled = (
            await _wait_uncancelled(asyncio.ensure_future(asyncio.sleep(PAUSE_S))) or cancelled
        )
    return failures[-1] if failures else TimeoutError("it was stopped again and again"), cancelled


async def _wait_uncancelled(future: asyncio.Future[Any]) -> asyncio.CancelledError | None:
    """Wait for its end; the cancellation of ours that has come meanwhile."""
    cancelled = None
    while not future.done():
        try:
            await asyncio.wait({future})
        except asyncio.CancelledError as error:
            cancelled = error
    return cancelled


async def complete(doing: Awaitable[T]) -> T:
    """What it gives. Who is cancelled meanwhile waits for its end all the same, and is cancelled
    then: a call in a thread goes on whoever waits for it."""
    future = asyncio.ensure_future(doing)
    cancelled = await _wait_uncancelled(future)
    if cancelled is not None:
        raise cancelled from (None if future.cancelled() else future.exception())
    return future.result()


def in_thread(call: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
    """`call` in a thread. No task, which whoever closes the loop would cancel without ending the
    thread."""
    return asyncio.get_running_loop().run_in_executor(None, partial(call, *arguments))
