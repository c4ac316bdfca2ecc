"""Breaks things in a grid that is up, each for its time, and says what was seen of it.

Invariant: what it has begun it undoes, also where it is cancelled; what stands after all is told;
and nothing is broken twice at the same time.

What every kind of harm needs: the grid, whom it hits, and how long it lasts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from batchlab.client.http import Client
from batchlab.core.errors import BatchlabError, UsageError
from batchlab.core.model import Pool
from batchlab.runtime.factory import Backend
from batchlab.runtime.home import Home
from batchlab.scenarios.faults.fault_table import support_of
from batchlab.scenarios.faults.target_grid import FaultAction, FaultResult, RunEnded, TargetGrid
from batchlab.scenarios.model.values import Fault, FaultName
from batchlab.scenarios.record import InjectedFault
from batchlab.scenarios.replay.run_state import RUN_ENDED

if TYPE_CHECKING:
    from batchlab.scenarios.faults.proxy import FaultProxy


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
