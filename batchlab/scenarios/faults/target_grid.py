"""Running grid that faults are injected into, and the result of a fault."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from batchlab.client.http import Client
from batchlab.core.api_types import GridView, InstanceView
from batchlab.core.errors import BackendError, BatchlabError, Unreachable
from batchlab.core.model import LifecycleState, Pool
from batchlab.core.retry import set_within
from batchlab.runtime.factory import Backend
from batchlab.runtime.home import Home
from batchlab.scenarios.model.values import Fault
from batchlab.scenarios.replay.run_state import RUN_ENDED

if TYPE_CHECKING:
    pass


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


async def wait_for(
    look: Callable[[], Awaitable[T]], what: str, *, within_s: float = EFFECT_TIMEOUT_S
) -> T:
    """Poll `look` until its result is true. Raise EffectNotSeen after `within_s`."""
    give_up_s = time.monotonic() + within_s
    while not (found := await look()):
        if time.monotonic() > give_up_s:
            raise EffectNotSeen(f"{what[0].upper()}{what[1:]} was not seen within {within_s:g} s.")
        await asyncio.sleep(POLL_S)
    return found
