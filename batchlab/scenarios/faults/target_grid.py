"""Running grid that is the target of fault injection, and the rollback of the faults' changes.

An undo function is registered before each change of the grid. On exit, a rollback undoes all changes of the grid, the
latest change first, even after a cancellation or a failed undo.
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
"""Time in seconds within which the effect of a fault must become visible."""
NO_INSTANCE = "No instance was in service."
NOTHING_HIT = "No {unit} was affected: there were none, or too few."


class EffectNotSeen(Unreachable):
    """The expected effect of a fault was not seen in time."""


class RunEnded(BatchlabError):
    """The run has ended, so no fault may change the grid."""

    def __init__(self) -> None:
        super().__init__(RUN_ENDED)


class NothingHit(BatchlabError):
    """The fault did not have a target or an effect. The exception's message gives the reason."""


@dataclass(frozen=True, slots=True)
class FaultResult:
    """Targets and observed evidence of a fault."""

    targets: tuple[str, ...]
    evidence: str


FaultAction = Callable[[Fault], Coroutine[Any, Any, FaultResult]]
"""Coroutine that injects a fault, holds the fault for its duration, and undoes the fault, also on a cancellation.

A FaultAction raises NothingHit for a fault without a target or an effect.
"""


@dataclass
class TargetGrid:
    """Running grid into which faults are injected. The event `over` is set when all faults must be undone early."""

    backend: Backend
    home: Home
    client: Client
    pools: Sequence[Pool] = ()
    parent: bool = False
    """Whether a manager that a fault restarts ends with this process."""
    over: asyncio.Event = field(default_factory=asyncio.Event)
    leaving: AsyncExitStack = field(default_factory=AsyncExitStack)
    """Resources to close after the last fault."""

    async def hold(self, seconds: float) -> float:
        """Wait for `seconds` or until all faults must be undone. Return the waiting time in seconds."""
        begun_s = time.monotonic()
        await set_within(self.over, max(0.0, seconds))
        return time.monotonic() - begun_s

    async def grid(self) -> GridView:
        """Return the pools with their instances. If the manager does not answer, wait until a manager answers."""

        async def look() -> GridView | None:
            with suppress(BackendError):  # the manager or a service that the manager needs does not answer
                return await asyncio.to_thread(self.client.grid)
            return None

        view = await wait_for(look, "the manager's answer")
        assert view is not None
        return view

    async def targets(self, fault: Fault, among: Collection[str] | None = None) -> list[str]:
        """Return the fault's targets, or only the targets in `among`.

        Raise NothingHit if the fault does not have a target, and RunEnded if the run has ended.
        """
        grid = await self.grid()
        if self.over.is_set():
            raise RunEnded
        targets = select_targets(grid, fault, among)
        if not targets:
            raise NothingHit(NO_INSTANCE)
        return targets

    async def pool_names(self, pool: str) -> list[str]:
        """Return a list with the name `pool`, or the names of all pools if `pool` is empty."""
        return [view["name"] for view in (await self.grid())["pools"] if pool in ("", view["name"])]

    async def leader(self, *, after: str, within_s: float = 5 * EFFECT_TIMEOUT_S) -> str:
        """Wait until another manager than `after` leads, and return the name of the new leader."""

        async def look() -> str:
            with suppress(BatchlabError):
                view = await asyncio.to_thread(self.client.grid)
                if view["leader"] and view["owner"] != after:
                    return view["owner"]
            return ""

        return await wait_for(look, "another manager's lead", within_s=within_s)


def select_targets(grid: GridView, fault: Fault, among: Collection[str] | None = None) -> list[str]:
    """Return the number or share of instances in service that the fault specifies, the oldest instances first."""
    instances: list[InstanceView] = [
        instance
        for pool in grid["pools"]
        if fault.pool in ("", pool["name"])
        for instance in pool["instances"]
        if instance["state"] == LifecycleState.IN_SERVICE and (among is None or instance["id"] in among)
    ]
    instances.sort(key=lambda instance: (instance["launched_s"], instance["id"]))
    return [instance["id"] for instance in instances[: fault.among(len(instances))]]


async def wait_for(look: Callable[[], Awaitable[T]], what: str, *, within_s: float = EFFECT_TIMEOUT_S) -> T:
    """Call `look` repeatedly until the result is true. Raise EffectNotSeen after `within_s` seconds."""
    deadline_s = time.monotonic() + within_s
    while not (result := await look()):
        if time.monotonic() > deadline_s:
            raise EffectNotSeen(f"{capital(what)} was not seen within {within_s:g} s.")
        await asyncio.sleep(POLL_S)
    return result


log = logging.getLogger(__name__)

Undo = Callable[[], Awaitable[object]]
"""Function that undoes one change of the grid.

The undo function also runs after a failed change and after its own failure, so the function must work on an unchanged
grid.
"""

UNDO_TRIES = 3
MAX_UNDO_RESTARTS = 3
"""Maximum number of restarts of an undo function that was stopped."""
PAUSE_S = 0.5
"""Pause in seconds between two calls of an undo function."""


class RollbackFailed(BackendError):
    """A change of the grid could not be undone."""


class Rollback:
    """Async context manager that undoes all changes on exit, the latest change first.

    The event `over` is set when no fault may change the grid any more. The exit raises RollbackFailed with the changes
    that could not be undone and the message of the original error. On a cancellation, the exit logs the changes that
    could not be undone.
    """

    def __init__(self, over: asyncio.Event) -> None:
        self._over = over
        self._owed: list[tuple[str, Undo, int]] = []

    def owe(self, what: str, undo: Undo, *, tries: int = UNDO_TRIES) -> None:
        """Register the undo function of a change. The caller makes the change after the call of `owe`.

        Raise RunEnded if the run has ended, except for a fault that has already begun.
        """
        if self._over.is_set() and not self._owed:
            raise RunEnded
        self._owed.append((what, undo, tries))

    async def breaking(self, what: str, undo: Undo, call: Callable[[], Awaitable[T]]) -> T:
        """Register the undo function `undo`, and then call `call`.

        On a cancellation, wait for the end of `call`, because a change can be undone only after the change was made.
        """
        self.owe(what, undo)
        return await complete(call())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        failures: list[tuple[str, BaseException]] = []
        cancelled: asyncio.CancelledError | None = None
        while self._owed:
            what, undo, tries = self._owed.pop()
            failure, stopped = await _run_undo(undo, tries)
            cancelled = stopped or cancelled
            if failure is not None:
                failures.append((what, failure))
        message = " ".join(f"{capital(what)} could not be undone: {failure}" for what, failure in failures)
        is_exit = cancelled is not None or not isinstance(error, Exception | None)
        if failures and is_exit:
            log.error("%s", message)
        elif failures:
            raise RollbackFailed(f"{error} {message}" if error else message) from (error or failures[0][1])
        if cancelled is not None and isinstance(error, Exception | None):
            raise cancelled from error


async def _run_undo(undo: Undo, tries: int) -> tuple[BaseException | None, asyncio.CancelledError | None]:
    """Run an undo function. Return the error of the undo, and a cancellation that arrived during the undo."""

    async def run() -> None:
        await undo()

    cancelled = None
    failures: list[BaseException] = []
    for _ in range(tries + MAX_UNDO_RESTARTS):
        task = asyncio.ensure_future(run())
        cancelled = await _wait_uncancelled(task) or cancelled
        if task.cancelled():  # the undo is tried again, because a closing event loop cancels all tasks
            continue
        failure = task.exception()
        if failure is None:
            return None, cancelled
        failures.append(failure)
        if len(failures) == tries:
            break
        cancelled = await _wait_uncancelled(asyncio.ensure_future(asyncio.sleep(PAUSE_S))) or cancelled
    return failures[-1] if failures else TimeoutError("it was stopped repeatedly"), cancelled


async def _wait_uncancelled(future: asyncio.Future[Any]) -> asyncio.CancelledError | None:
    """Wait for the end of `future`. Return a cancellation that arrived during the wait."""
    cancelled = None
    while not future.done():
        try:
            await asyncio.wait({future})
        except asyncio.CancelledError as error:
            cancelled = error
    return cancelled


async def complete(doing: Awaitable[T]) -> T:
    """Await `doing` to its end even if the caller is canceled, and then raise the cancellation.

    A call that runs in a thread cannot be stopped.
    """
    future = asyncio.ensure_future(doing)
    cancelled = await _wait_uncancelled(future)
    if cancelled is not None:
        raise cancelled from (None if future.cancelled() else future.exception())
    return future.result()


def in_thread(call: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
    """Run `call` in a thread as a plain future, which the end of the event loop does not cancel."""
    return asyncio.get_running_loop().run_in_executor(None, partial(call, *arguments))
