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
"""So long an effect may take until it can be seen; longer is an error."""
NO_INSTANCE = "No instance was in service."
NOTHING_HIT = "No {one} was hit: none came, or none of the few that did."


class EffectNotSeen(Unreachable):
    """What was to come about has not been seen in time."""


class RunEnded(BatchlabError):
    """Everything is to be undone, so nothing more is broken."""

    def __init__(self) -> None:
        super().__init__(RUN_ENDED)


@dataclass(frozen=True, slots=True)
class FaultResult:
    """Who was hit, and what was seen of it; `impossible` where it turns out that it cannot be."""

    targets: tuple[str, ...] = ()
    evidence: str = ""
    impossible: str = ""


FaultAction = Callable[[Fault], Coroutine[Any, Any, FaultResult]]
"""Does it, keeps it up for the fault's time, and undoes it, also where it is cancelled."""


@dataclass
class TargetGrid:
    """A grid that is up. `over` is set when everything is to be undone before its time."""

    backend: Backend
    home: Home
    client: Client
    pools: Sequence[Pool] = ()
    parent: bool = False
    """Whether a manager that is started again ends with this process."""
    over: asyncio.Event = field(default_factory=asyncio.Event)
    leaving: AsyncExitStack = field(default_factory=AsyncExitStack)
    """What is to be closed when nothing will be broken any more."""

    async def hold(self, seconds: float) -> float:
        """Wait so long, or until everything is to be undone; the seconds that it took."""
        begun_s = time.monotonic()
        await set_within(self.over, max(0.0, seconds))
        return time.monotonic() - begun_s

    async def grid(self) -> GridView:
        """The pools with their instances; a manager that is away is waited for."""
        view = await wait_for(self._grid, "the manager's answer")
        assert view is not None
        return view

    async def _grid(self) -> GridView | None:
        try:
            return await asyncio.to_thread(self.client.grid)
        except BackendError:  # it is away, or what it asks for its answer
            return None

    async def hit(self, fault: Fault, among: Collection[str] | None = None) -> list[str]:
        """The instances that the fault takes, of those `among` where that is given; RunEnded where
        nothing more is to be broken."""
        grid = await self.grid()
        if self.over.is_set():
            raise RunEnded
        return select_targets(grid, fault, among)

    async def leader(self, *, after: str, within_s: float = 5 * EFFECT_TIMEOUT_S) -> str:
        """The owner of the lease, once that is another than `after` and it leads."""

        async def look() -> str:
            with suppress(BatchlabError):
                view = await asyncio.to_thread(self.client.grid)
                if view["leader"] and view["owner"] != after:
                    return view["owner"]
            return ""

        return await wait_for(look, "another manager's lead", within_s=within_s)


def select_targets(grid: GridView, fault: Fault, among: Collection[str] | None = None) -> list[str]:
    """Those in service, the oldest first, cut to the fault's count, or its share rounded up."""
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
    """What `look` gives as soon as that is true; EffectNotSeen where it is not `within_s`."""
    give_up_s = time.monotonic() + within_s
    while not (found := await look()):
        if time.monotonic() > give_up_s:
            raise EffectNotSeen(f"{what[0].upper()}{what[1:]} was not seen within {within_s:g} s.")
        await asyncio.sleep(POLL_S)
    return found
