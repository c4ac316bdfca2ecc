"""Breaks things in a grid that is up, each for its time, and says what was seen of it.

Invariant: what it has begun it undoes, also where it is cancelled; what stands after all is told;
and nothing is broken twice at the same time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from batchlab.backends import Backend
from batchlab.client import Client
from batchlab.errors import BatchlabError, UsageError
from batchlab.home import Home
from batchlab.model import Pool
from batchlab.replay.course import OVER
from batchlab.replay.harm.scene import Harm, Over, Scene, Seen
from batchlab.replay.harm.table import cell
from batchlab.scenario.model import Fault, FaultName
from batchlab.scenario.record import Injected

if TYPE_CHECKING:
    from batchlab.replay.harm.front import Front


class Injector:
    """The harm that one backend knows."""

    def __init__(self, scene: Scene, harms: Mapping[FaultName, Harm]) -> None:
        self._scene = scene
        self._harms = harms
        self._standing: dict[asyncio.Task[Seen], Fault] = {}

    async def inject(self, fault: Fault, at_s: float) -> Injected:
        """Break it now, keep it broken for `for_s`, mend it, and say what was seen.

        Cancelled, it mends first. What did not go as it should is said too: it could not be
        broken, was not seen to be (and is mended all the same), or stands after all. What breaks
        the same thing as one that stands waits until that is mended, and has its time then.
        """
        row = cell(fault.name, self._scene.backend.name)
        harm = self._harms.get(fault.name)
        if not row.possible or harm is None:
            return Injected(fault.name, at_s, impossible=_clause(row.why_not))
        came_s = time.monotonic()
        while before := [one for one, other in self._standing.items() if fault.shares(other)]:
            await asyncio.wait(before)
            await asyncio.sleep(0)  # whoever waited for it notes its end
            at_s, came_s = at_s + time.monotonic() - came_s, time.monotonic()
        if self._scene.over.is_set():
            return Injected(fault.name, at_s, impossible=OVER)
        doing = asyncio.ensure_future(harm(fault))
        self._standing[doing] = fault
        try:
            seen = await doing
        except Over:
            return Injected(fault.name, at_s, impossible=OVER)
        except BatchlabError as error:
            return Injected(fault.name, at_s, trouble=error.message)
        except OSError as error:  # no room, no process, no socket: this machine's, not the grid's
            return Injected(fault.name, at_s, trouble=f"This machine refused it: {error}.")
        finally:
            del self._standing[doing]
        return Injected(fault.name, at_s, seen.targets, seen.evidence, _clause(seen.impossible))

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
    front: Front | None = None,
) -> Injector:
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
    scene = Scene(backend, home, client, tuple(pools), parent)
    return Injector(scene, _harms(scene, front))


def _harms(scene: Scene, front: Front | None) -> Mapping[FaultName, Harm]:
    # Each only where it is needed: the Docker SDK and boto3 are dear to import.
    if scene.backend.capabilities.stack:
        from batchlab.replay.harm import deployed

        return deployed.harms(scene)
    if scene.backend.capabilities.container_manager:
        from batchlab.replay.harm import containers

        return containers.harms(scene)
    from batchlab.replay.harm import processes

    return processes.harms(scene, front)
