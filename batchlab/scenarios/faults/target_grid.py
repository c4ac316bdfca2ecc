"""Running grid that faults are injected into, and the result of a fault.

Rollback of a fault's changes. The undo of each change is registered before the change.

All registered changes are undone on exit, the latest first. Neither a cancellation nor a failed
undo prevents the other undos.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from batchlab.client.http import Client
from batchlab.core.api_types import GridView, InstanceView
from batchlab.core.errors import BackendError, BatchlabError, Unreachable
from batchlab.core.model import LifecycleState, Pool
from batchlab.core.port_retries import set_within
from batchlab.core.text import capital
from batchlab.runtime.factory import Backend
from batchlab.runtime.home import Home
from batchlab.scenarios.model.values import Fault
from batchlab.scenarios.replay.run_state import RUN_ENDED

T = TypeVar("T")

POLL_S = 0.1
EFFECT_TIMEOUT_S = 60.0
"""Time in which an effect must become visible."""
NO_INSTANCE = "No instance was in service."
NOTHING_HIT = "No {one} was affected: there were none, or too few."


class EffectNotSeen(Unreachable):
    """An effect was not seen in time."""


class RunEnded(BatchlabError):
    """The run is over, so nothing more may be broken."""

    def __init__(self) -> None:
        super().__init__(RUN_ENDED)


@dataclass(frozen=True, slots=True)
class FaultResult:
    """Targets and observed evidence of a fault.

    `impossible` has the reason why it could not be injected.
    """

    targets: tuple[str, ...] = ()
    evidence: str = ""
    impossible: str = ""


FaultAction = Callable[[Fault], Coroutine[Any, Any, FaultResult]]
"""Coroutine that injects a fault, holds it for its time, and undoes it, also on a cancellation."""


@dataclass
class TargetGrid:
    """Running grid into which faults are injected.

    `over` is set when all faults must be undone early.
    """

    backend: Backend
    home: Home
    client: Client
    pools: Sequence[Pool] = ()
    parent: bool = False
    """Whether a restarted manager ends with this process."""
    over: asyncio.Event = field(default_factory=asyncio.Event)
    leaving: AsyncExitStack = field(default_factory=AsyncExitStack)
    """Resources to close after the last fault."""

    async def hold(self, seconds: float) -> float:
        """Wait for this time or until all faults must be undone. Return the seconds waited."""
        begun_s = time.monotonic()
        await set_within(self.over, max(0.0, seconds))
        return time.monotonic() - begun_s

    async def grid(self) -> GridView:
        """Return the pools with their instances. Wait for a manager that does not answer."""
        view = await wait_for(self._grid, "the manager's answer")
        assert view is not None
        return view

    async def _grid(self) -> GridView | None:
        try:
            return await asyncio.to_thread(self.client.grid)
        except BackendError:  # the manager or a service behind it does not answer
            return None

    async def hit(self, fault: Fault, among: Collection[str] | None = None) -> list[str]:
        """Return the fault's targets, optionally only those in `among`.

        Raise RunEnded if nothing more may be broken.
        """
        grid = await self.grid()
        if self.over.is_set():
            raise RunEnded
        return select_targets(grid, fault, among)

    async def leader(self, *, after: str, within_s: float = 5 * EFFECT_TIMEOUT_S) -> str:
        """Wait for another leader than `after` and return its name."""

        async def look() -> str:
            with suppress(BatchlabError):
                view = await asyncio.to_thread(self.client.grid)
                if view["leader"] and view["owner"] != after:
                    return view["owner"]
            return ""

        return await wait_for(look, "another manager's lead", within_s=within_s)


def select_targets(grid: GridView, fault: Fault, among: Collection[str] | None = None) -> list[str]:
    """Return the fault's count or share of the instances in service, the oldest first."""
    there: list[InstanceView] = [
        one
        for pool in grid["pools"]
        if fault.pool in ("", pool["name"])
        for one in pool["instances"]
        if one["state"] == LifecycleState.IN_SERVICE and (among is None or one["id"] in among)
    ]
    there.sort(key=lambda one: (one["launched_s"], one["id"]))
    return [one["id"] for one in there[: fault.among(len(there))]]


async def wait_for(look: Callable[[], Awaitable[T]], what: str, *, within_s: float = EFFECT_TIMEOUT_S) -> T:
    """Poll `look` until its result is true. Raise EffectNotSeen after `within_s`."""
    give_up_s = time.monotonic() + within_s
    while not (found := await look()):
        if time.monotonic() > give_up_s:
            raise EffectNotSeen(f"{what[0].upper()}{what[1:]} was not seen within {within_s:g} s.")
        await asyncio.sleep(POLL_S)
    return found


log = logging.getLogger(__name__)

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
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
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


async def _run_undo(undo: Undo, tries: int) -> tuple[BaseException | None, asyncio.CancelledError | None]:
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
        cancelled = await _wait_uncancelled(asyncio.ensure_future(asyncio.sleep(PAUSE_S))) or cancelled
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
