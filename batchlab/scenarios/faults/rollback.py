"""Rollback of a fault's changes. The undo of each change is registered before the change.

All registered changes are undone on exit, the latest first. Neither a cancellation nor a failed
undo prevents the other undos.
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
"""Function that undoes one change.

It also runs after a failed change and again after its own failure, so it must accept an intact
part.
"""

UNDO_TRIES = 3
MAX_UNDO_RESTARTS = 3
"""Maximum number of restarts of a stopped undo."""
PAUSE_S = 0.5
"""Pause between two tries of an undo."""


class RollbackFailed(BackendError):
    """A change could not be undone."""


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
        """Register the undo of a change that follows.

        Raise RunEnded if nothing more may be broken, except for a fault that has already begun.
        """
        if self._over.is_set() and not self._owed:
            raise RunEnded
        self._owed.append((what, undo, tries))

    async def breaking(self, what: str, undo: Undo, call: Callable[[], Awaitable[T]]) -> T:
        """Register the undo and then call `call`.

        On a cancellation, wait for the end of the call, because a change can be undone only after
        it was made.
        """
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
    """Run an undo. Return its error and a cancellation that arrived meanwhile."""

    async def mend() -> None:
        await undo()

    cancelled = None
    failures: list[BaseException] = []
    for _ in range(tries + MAX_UNDO_RESTARTS):
        task = asyncio.ensure_future(mend())
        cancelled = await _wait_uncancelled(task) or cancelled
        if task.cancelled():  # a closing loop cancels all tasks: try again
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
    return failures[-1] if failures else TimeoutError("it was stopped repeatedly"), cancelled


async def _wait_uncancelled(future: asyncio.Future[Any]) -> asyncio.CancelledError | None:
    """Wait for the end. Return a cancellation that arrived meanwhile."""
    cancelled = None
    while not future.done():
        try:
            await asyncio.wait({future})
        except asyncio.CancelledError as error:
            cancelled = error
    return cancelled


async def complete(doing: Awaitable[T]) -> T:
    """Await to the end, even if the caller is cancelled meanwhile; then raise the cancellation.

    A call in a thread cannot be stopped.
    """
    future = asyncio.ensure_future(doing)
    cancelled = await _wait_uncancelled(future)
    if cancelled is not None:
        raise cancelled from (None if future.cancelled() else future.exception())
    return future.result()


def in_thread(call: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
    """Run `call` in a thread as a plain future, which the end of the event loop does not cancel."""
    return asyncio.get_running_loop().run_in_executor(None, partial(call, *arguments))
