"""Launcher whose instances are processes, or containers in pools with an image."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from batchlab.adapters.docker.launcher import ContainerLauncher
from batchlab.adapters.local.processes import ProcessLauncher
from batchlab.core.model import Machine, Pool
from batchlab.core.ports import ANY_MACHINE


class MixedLauncher:
    """The Launcher port over `processes` and `containers`. A pool with an image gets containers.

    While Docker does not answer, the state of all instances is unknown, and calls raise Unreachable.
    """

    def __init__(self, processes: ProcessLauncher, containers: ContainerLauncher) -> None:
        self._processes = processes
        self._containers = containers
        # The task that waits for changes waits for the instances of both launchers.
        containers.changed = processes.changed

    @property
    def changed(self) -> asyncio.Event:
        """Event that is set when an instance ends."""
        return self._processes.changed

    def prepare(self) -> None:
        self._processes.prepare()

    def end_fork_server(self) -> None:
        self._processes.end_fork_server()

    async def launch(self, pool: Pool, instance: str, machine: Machine = ANY_MACHINE) -> None:
        launcher = self._containers if pool.image else self._processes
        await launcher.launch(pool, instance, machine)

    async def terminate(self, instance: str, *, grace_s: float) -> None:
        # Each launcher ignores an instance that it does not know.
        await self._processes.terminate(instance, grace_s=grace_s)
        await self._containers.terminate(instance, grace_s=grace_s)

    async def running(self) -> Mapping[str, str | None]:
        return {**await self._processes.running(), **await self._containers.running()}

    async def close(self, *, kill: bool) -> None:
        try:
            await self._containers.close(kill=kill)
        finally:
            await self._processes.close(kill=kill)
