"""Injection of a scenario's faults into a running grid.

Each fault is undone, also on a cancellation, and a failed rollback is reported. Faults that would
affect the same part run one after another.
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
    """Injector of the faults of one backend."""

    def __init__(self, scene: TargetGrid, harms: Mapping[FaultName, FaultAction]) -> None:
        self._scene = scene
        self._harms = harms
        self._standing: dict[asyncio.Task[FaultResult], Fault] = {}

    async def inject(self, fault: Fault, at_s: float) -> InjectedFault:
        """Inject the fault, hold it for `for_s`, undo it, and return what was observed.

        A cancellation undoes the fault first. Errors are reported in `trouble`: of the injection,
        of the observation (the fault is undone anyway), or of the rollback. A fault waits for a
        conflicting one and then has its full time.
        """
        row = support_of(fault.name, self._scene.backend.name)
        harm = self._harms.get(fault.name)
        if not row.possible or harm is None:
            return InjectedFault(fault.name, at_s, impossible=_clause(row.why_not))
        came_s = time.monotonic()
        while before := [one for one, other in self._standing.items() if fault.shares(other)]:
            await asyncio.wait(before)
            await asyncio.sleep(0)  # lets the other fault's caller run first
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
        except OSError as error:  # this machine lacks disk space, processes, or sockets
            return InjectedFault(fault.name, at_s, trouble=f"This machine refused it: {error}.")
        finally:
            del self._standing[doing]
        return InjectedFault(
            fault.name, at_s, seen.targets, seen.evidence, _clause(seen.impossible)
        )

    async def undo(self) -> None:
        """Undo all current faults and inject no more. Every `inject` then returns."""
        self._scene.over.set()
        if self._standing:
            await asyncio.wait(set(self._standing))

    async def close(self) -> None:
        """Undo all faults and close the used resources. The client belongs to the caller."""
        await self.undo()
        await self._scene.leaving.aclose()


def _clause(why: str) -> str:
    """Return the text without its period, as a part of a sentence."""
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
    """Create the injector of a running grid, inside an event loop.

    `pools` and `parent` are the arguments with which its manager was started. A restarted manager
    gets the same address, so that `client` continues to work. `front` is the proxy before its
    endpoint (see `with_proxy`). Raise UsageError for a backend without real processes.
    """
    if backend.capabilities.simulated:
        raise UsageError(
            f"Nothing real runs on the backend {backend.name}.",
            remedy="`batchlab scenario simulate` injects every fault itself.",
        )
    scene = TargetGrid(backend, home, client, tuple(pools), parent)
    return FaultInjector(scene, _actions(scene, front))


def _actions(scene: TargetGrid, front: FaultProxy | None) -> Mapping[FaultName, FaultAction]:
    # Imported only when needed, because the Docker SDK and boto3 are slow to import.
    if scene.backend.capabilities.stack:
        from batchlab.scenarios.faults import aws_stack

        return aws_stack.actions(scene)
    if scene.backend.capabilities.container_manager:
        from batchlab.scenarios.faults import containers

        return containers.actions(scene)
    from batchlab.scenarios.faults import processes

    return processes.actions(scene, front)
