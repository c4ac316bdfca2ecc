"""Harm to what keeps the books: the manager, and the ledger; each comes back by itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from urllib.parse import urlsplit

from batchlab.core.errors import BackendError
from batchlab.runtime import manager_process
from batchlab.runtime.home import ManagerRecord
from batchlab.scenarios.faults.fault_injection import SEEN_S, Scene, Seen, until
from batchlab.scenarios.faults.rollback import Undoing, in_thread, to_its_end
from batchlab.scenarios.model.values import Fault

_MOST_JOBS = 10_000
_PAGE = 1000
NO_JOB = "The ledger knew of no job."


class ProcessKeeper:
    """Of a grid whose manager is a process of this machine."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene

    async def crash(self, fault: Fault) -> Seen:
        """The manager's process dies; after the fault's time another one is started."""
        scene = self._scene
        before = await scene.grid()
        running = scene.home.record()
        if running is None:
            return Seen(impossible="No manager ran here.")
        started: list[ManagerRecord] = []

        def start() -> None:
            started.append(self._start(running.url))

        async with Undoing(scene.over) as undoing:
            await undoing.breaking(
                "the end of the manager",
                partial(in_thread, start),
                partial(in_thread, manager_process.kill_manager, scene.home),
            )
            gone_s = time.monotonic()
            await scene.hold(fault.for_s)
        owner = await scene.leader(after=before["owner"])
        return Seen(
            (before["owner"],),
            f"{before['owner']} (pid {running.pid}) was gone, and {owner} led (pid "
            f"{started[-1].pid}) "
            f"{time.monotonic() - gone_s:.1f} s later",
        )

    def _start(self, url: str) -> ManagerRecord:
        scene = self._scene
        return manager_process.start_manager(
            scene.home,
            scene.backend,
            pools=scene.pools,
            parent=scene.parent,
            port=urlsplit(url).port or 0,
        )

    async def lose(self, fault: Fault) -> Seen:
        return await lose(self._scene, fault)


async def lose(
    scene: Scene, fault: Fault, *, before: Callable[[Undoing], Awaitable[str]] | None = None
) -> Seen:
    """Empty the ledger, and after the fault's time have the manager rebuild it from the bucket.
    `before` is done to the database first, and says what was seen of it."""
    ledger = scene.backend.open_ledger(scene.home)
    found: list[int] = []

    async def forget() -> bool:
        with suppress(BackendError):  # it may be just starting
            await to_its_end(ledger.forget())
            return True
        return False

    try:
        had = len(await ledger.jobs(limit=_MOST_JOBS))
        if not had:
            return Seen(impossible=NO_JOB)
        async with Undoing(scene.over) as undoing:
            owe_rebuild(scene, undoing, found)
            told = await before(undoing) if before else ""
            await until(forget, "the ledger's answer", within_s=2 * SEEN_S)
            left = len(await ledger.jobs(limit=_MOST_JOBS))
            away_s = await scene.hold(fault.for_s)
    finally:
        await ledger.close()
    return Seen(
        ("ledger",),
        f"{told}it had {had} jobs, {left} once it was lost, and {found[-1]} again when it was "
        f"rebuilt from the bucket {away_s:.1f} s later",
    )


def owe_rebuild(scene: Scene, undoing: Undoing, found: list[int]) -> None:
    """What is owed to whoever loses a ledger; `found` has how many jobs were rebuilt then."""

    async def rebuild() -> None:
        found.append(await rebuilt(scene))

    # It waits for a manager that is away by itself.
    undoing.owe("the loss of the ledger", rebuild, tries=1)


async def known(scene: Scene) -> int:
    """How many jobs the manager knows of."""
    number, last = 0, None
    while page := await asyncio.to_thread(scene.client.jobs, limit=_PAGE, before=last):
        number, last = number + len(page), page[-1]["id"]
    return number


async def rebuilt(scene: Scene) -> int:
    """How many jobs the manager has rebuilt; one that is away is waited for."""
    began_s = time.monotonic()
    while True:
        try:
            return await asyncio.to_thread(scene.client.rebuild)
        except BackendError:
            if time.monotonic() - began_s > 2 * SEEN_S:
                raise
            await asyncio.sleep(1.0)
