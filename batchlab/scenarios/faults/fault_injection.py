"""Breaks things in a grid that is up, each for its time, and says what was seen of it.

Invariant: what it has begun it undoes, also where it is cancelled; what stands after all is told;
and nothing is broken twice at the same time.

What every kind of harm needs: the grid, whom it hits, and how long it lasts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from batchlab.client.http import Client
from batchlab.core.api_types import GridView, InstanceView
from batchlab.core.errors import BackendError, BatchlabError, Unreachable, UsageError
from batchlab.core.model import LifecycleState, Pool
from batchlab.core.retry import set_within
from batchlab.runtime.factory import Backend
from batchlab.runtime.home import Home
from batchlab.scenarios.faults.fault_table import support_of
from batchlab.scenarios.model.values import Fault, FaultName
from batchlab.scenarios.replay.run_state import RUN_ENDED
from batchlab.scenarios.verdicts.record import InjectedFault

if TYPE_CHECKING:
    from batchlab.scenarios.faults.proxy import FaultProxy

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


class FaultInjector:
    """The harm that one backend knows."""

    def __init__(self, scene: TargetGrid, harms: Mapping[FaultName, FaultAction]) -> None:
        self._scene = scene
        self._harms = harms
        self._standing: dict[asyncio.Task[FaultResult], Fault] = {}

    async def inject(self, fault: Fault, at_s: float) -> InjectedFault:
        """Break it now, keep it broken for `for_s`, mend it, and say what was seen.

        Cancelled, it mends first. What did not go as it should is said too: it could not be
        broken, was not seen to be (and is mended all the same), or stands after all. What breaks
        the same thing as one that stands waits until that is mended, and has its time then.
        """
        row = support_of(fault.name, self._scene.backend.name)
        harm = self._harms.get(fault.name)
        if not row.possible or harm is None:
            return InjectedFault(fault.name, at_s, impossible=_clause(row.why_not))
        came_s = time.monotonic()
        while before := [one for one, other in self._standing.items() if fault.shares(other)]:
            await asyncio.wait(before)
            await asyncio.sleep(0)  # whoever waited for it notes its end
            at_s, came_s = at_s + time.monotonic() - came_s, time.monotonic()
        if self._scene.over.is_set():
            return InjectedFault(fault.name, at_s, impossible=RUN_ENDED)
        doing = asyncio.ensure_future(harm(fault))
        self._standing[doing] = fault
        try:
            seen = await doing
        except RunEnded:
            return InjectedFault(fault.name, at_s, impossible=RUN_ENDED)
        except BatchlabError as error:
            return InjectedFault(fault.name, at_s, trouble=error.message)
        except OSError as error:  # no room, no process, no socket: this machine's, not the grid's
            return InjectedFault(fault.name, at_s, trouble=f"This machine refused it: {error}.")
        finally:
            del self._standing[doing]
        return InjectedFault(
            fault.name, at_s, seen.targets, seen.evidence, _clause(seen.impossible)
        )

    async def undo(self) -> None:
        """Mend all that is broken now, and break nothing more; every `inject` returns then."""
        self._scene.over.set()
        if self._standing:
            await asyncio.wait(set(self._standing))

    async def close(self) -> None:
        """Undo, and let go of whom the harm is done by. Not of the client, which is the
        caller's."""
        await self.undo()
        await self._scene.leaving.aclose()


def _clause(why: str) -> str:
    """What others make a part of their own sentence."""
    return why.removesuffix(".")


def injector_for(
    backend: Backend,
    home: Home,
    client: Client,
    *,
    pools: Sequence[Pool] = (),
    parent: bool = False,
    front: FaultProxy | None = None,
) -> FaultInjector:
    """What breaks a grid of this backend that is up. Inside an event loop.

    `pools` and `parent` are what its manager was started with, for one that is started again: at
    the same address, so that `client` goes on. `front` stands before its endpoint (see
    `fronted`). UsageError for a backend that nothing real runs on.
    """
    if backend.capabilities.simulated:
        raise UsageError(
            f"Nothing real runs on the backend {backend.name}.",
            remedy="`batchlab scenario simulate` knows every fault by itself.",
        )
    scene = TargetGrid(backend, home, client, tuple(pools), parent)
    return FaultInjector(scene, _actions(scene, front))


def _actions(scene: TargetGrid, front: FaultProxy | None) -> Mapping[FaultName, FaultAction]:
    # Each only where it is needed: the Docker SDK and boto3 are dear to import.
    if scene.backend.capabilities.stack:
        from batchlab.scenarios.faults import aws_stack

        return aws_stack.actions(scene)
    if scene.backend.capabilities.container_manager:
        from batchlab.scenarios.faults import containers

        return containers.actions(scene)
    from batchlab.scenarios.faults import processes

    return processes.actions(scene, front)
