"""What every kind of harm needs: the grid, whom it hits, and how long it lasts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from batchlab.backends import Backend
from batchlab.client import Client
from batchlab.errors import BackendError, BatchlabError, Unreachable
from batchlab.home import Home
from batchlab.model import LifecycleState, Pool
from batchlab.replay.course import OVER
from batchlab.scenario.model import Fault
from batchlab.views import GridView, InstanceView
from batchlab.waits import set_within

T = TypeVar("T")

LOOK_S = 0.1
SEEN_S = 60.0
"""So long an effect may take until it can be seen; longer is an error."""
NOBODY = "No instance was in service."
UNHIT = "No {one} was hit: none came, or none of the few that did."


class NotSeen(Unreachable):
    """What was to come about has not been seen in time."""


class Over(BatchlabError):
    """Everything is to be undone, so nothing more is broken."""

    def __init__(self) -> None:
        super().__init__(OVER)


@dataclass(frozen=True, slots=True)
class Seen:
    """Who was hit, and what was seen of it; `impossible` where it turns out that it cannot be."""

    targets: tuple[str, ...] = ()
    evidence: str = ""
    impossible: str = ""


Harm = Callable[[Fault], Coroutine[Any, Any, Seen]]
"""Does it, keeps it up for the fault's time, and undoes it, also where it is cancelled."""


@dataclass
class Scene:
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
        view = await until(self._grid, "the manager's answer")
        assert view is not None
        return view

    async def _grid(self) -> GridView | None:
        try:
            return await asyncio.to_thread(self.client.grid)
        except BackendError:  # it is away, or what it asks for its answer
            return None

    async def hit(self, fault: Fault, among: Collection[str] | None = None) -> list[str]:
        """The instances that the fault takes, of those `among` where that is given; Over where
        nothing more is to be broken."""
        grid = await self.grid()
        if self.over.is_set():
            raise Over
        return chosen(grid, fault, among)

    async def leader(self, *, after: str, within_s: float = 5 * SEEN_S) -> str:
        """The owner of the lease, once that is another than `after` and it leads."""

        async def look() -> str:
            with suppress(BatchlabError):
                view = await asyncio.to_thread(self.client.grid)
                if view["leader"] and view["owner"] != after:
                    return view["owner"]
            return ""

        return await until(look, "another manager's lead", within_s=within_s)


def chosen(grid: GridView, fault: Fault, among: Collection[str] | None = None) -> list[str]:
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


async def until(look: Callable[[], Awaitable[T]], what: str, *, within_s: float = SEEN_S) -> T:
    """What `look` gives as soon as that is true; NotSeen where it is not `within_s`."""
    give_up_s = time.monotonic() + within_s
    while not (found := await look()):
        if time.monotonic() > give_up_s:
            raise NotSeen(f"{what[0].upper()}{what[1:]} was not seen within {within_s:g} s.")
        await asyncio.sleep(LOOK_S)
    return found
