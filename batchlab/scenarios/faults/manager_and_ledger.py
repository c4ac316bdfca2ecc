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
from batchlab.scenarios.faults.fault_injection import (
    EFFECT_TIMEOUT_S,
    FaultResult,
    TargetGrid,
    wait_for,
)
from batchlab.scenarios.faults.rollback import Rollback, complete, in_thread
from batchlab.scenarios.model.values import Fault

_MOST_JOBS = 10_000
_PAGE = 1000
NO_JOB = "The ledger knew of no job."


class ManagerProcess:
    """Of a grid whose manager is a process of this machine."""

    def __init__(self, scene: TargetGrid) -> None:
        self._scene = scene

    async def crash(self, fault: Fault) -> FaultResult:
        """The manager's process dies; after the fault's time another one is started."""
        scene = self._scene
        before = await scene.grid()
        running = scene.home.record()
        if running is None:
            return FaultResult(impossible="No manager ran here.")
        started: list[ManagerRecord] = []

        def start() -> None:
            started.append(self._start(running.url))

        async with Rollback(scene.over) as undoing:
            await undoing.breaking(
                "the end of the manager",
                partial(in_thread, start),
                partial(in_thread, manager_process.kill_manager, scene.home),
            )
            gone_s = time.monotonic()
            await scene.hold(fault.for_s)
        owner = await scene.leader(after=before["owner"])
        return FaultResult(
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

    async def lose_ledger(self, fault: Fault) -> FaultResult:
        return await lose_ledger(self._scene, fault)


async def lose_ledger(
    scene: TargetGrid, fault: Fault, *, before: Callable[[Rollback], Awaitable[str]] | None = None
) -> FaultResult:
    """Empty the ledger, and after the fault's time have the manager rebuild it from the bucket.
    `before` is done to the database first, and says what was seen of it."""
    ledger = scene.backend.open_ledger(scene.home)
    found: list[int] = []

    async def forget() -> bool:
        with suppress(BackendError):  # it may be just starting
            await complete(ledger.forget())
            return True
        return False

    try:
        had = len(await ledger.jobs(limit=_MOST_JOBS))
        if not had:
            return FaultResult(impossible=NO_JOB)
        async with Rollback(scene.over) as undoing:
            add_rebuild(scene, undoing, found)
            told = await before(undoing) if before else ""
            await wait_for(forget, "the ledger's answer", within_s=2 * EFFECT_TIMEOUT_S)
            left = len(await ledger.jobs(limit=_MOST_JOBS))
            away_s = await scene.hold(fault.for_s)
    finally:
        await ledger.close()
    return FaultResult(
        ("ledger",),
        f"{told}it had {had} jobs, {left} once it was lost, and {found[-1]} again when it was "
        f"rebuilt from the bucket {away_s:.1f} s later",
    )


def add_rebuild(scene: TargetGrid, undoing: Rollback, found: list[int]) -> None:
    """What is owed to whoever loses a ledger; `found` has how many jobs were rebuilt then."""

    async def rebuild() -> None:
        found.append(await rebuild_ledger(scene))

    # It waits for a manager that is away by itself.
    undoing.owe("the loss of the ledger", rebuild, tries=1)


async def count_jobs(scene: TargetGrid) -> int:
    """How many jobs the manager knows of."""
    number, last = 0, None
    while page := await asyncio.to_thread(scene.client.jobs, limit=_PAGE, before=last):
        number, last = number + len(page), page[-1]["id"]
    return number


async def rebuild_ledger(scene: TargetGrid) -> int:
    """How many jobs the manager has rebuilt; one that is away is waited for."""
    began_s = time.monotonic()
    while True:
        try:
            return await asyncio.to_thread(scene.client.rebuild)
        except BackendError:
            if time.monotonic() - began_s > 2 * EFFECT_TIMEOUT_S:
                raise
            await asyncio.sleep(1.0)
