"""Faults of a grid in containers, through Docker and the grid's own Auto Scaling endpoint.

A crash fault kills a container's first process from outside the container, so Docker restarts the container if a
restart policy is configured.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from batchlab.adapters.docker.container import INSTANCE, MARKET, ZONE
from batchlab.adapters.docker.engine import Engine
from batchlab.core.errors import BackendError, NotFound, UsageError
from batchlab.core.model import Market
from batchlab.core.operating_system.processes import is_in_container
from batchlab.core.text import first_of
from batchlab.runtime import compose_deployment
from batchlab.runtime.compose_project import LABEL, PYTHON
from batchlab.scenarios.faults import services
from batchlab.scenarios.faults.aws_stack import ZoneOutage
from batchlab.scenarios.faults.proxy import LocalStackProxy, networks
from batchlab.scenarios.faults.target_grid import (
    EFFECT_TIMEOUT_S,
    FaultAction,
    FaultResult,
    NothingHit,
    Rollback,
    TargetGrid,
    complete,
    in_thread,
    wait_for,
)
from batchlab.scenarios.model.values import Fault, FaultName
from batchlab.server.autoscaling_api.metadata import send_notice

if TYPE_CHECKING:
    from docker import APIClient

T = TypeVar("T")

SERVICE = "com.docker.compose.service"
_PROBE = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 2).close()"


class ContainerFaults:
    """Faults of the containers of the grid's project. Labels identify the containers of a project."""

    def __init__(self, grid: TargetGrid) -> None:
        self._grid = grid
        self.at = grid.backend.deployment(grid.home)
        self.home = grid.home.path
        self.engine = Engine()
        grid.leaving.push_async_callback(self.engine.close)

    async def do(self, what: str, call: Callable[[APIClient], T]) -> T:
        return await self.engine.run(what, call)

    def breaks(self, what: str, call: Callable[[APIClient], T]) -> asyncio.Future[T]:
        """Run a Docker call in a thread that a cancellation does not stop."""
        return in_thread(self.engine.do, what, call)

    async def instances(self) -> dict[str, Mapping[str, Any]]:
        """Return Docker's description of the container of each running instance, by instance."""
        filters = {"label": [f"{LABEL}={self.at.project}", INSTANCE], "status": "running"}
        rows = await self.do("The instances", lambda api: api.containers(filters=filters))
        return {row["Labels"][INSTANCE]: row for row in rows}

    async def service(self, name: str) -> str:
        """Return the container id of a service of the grid. Raise BackendError if the service does not have a
        container.
        """
        filters = {"label": [f"{LABEL}={self.at.project}", f"{SERVICE}={name}"]}
        rows = await self.do(name, lambda api: api.containers(all=True, filters=filters))
        if not rows:
            raise BackendError(f"The service {name} of the grid does not have a container.")
        return str(rows[0]["Id"])

    async def look(self, container: str) -> Mapping[str, Any]:
        """Inspect a container. Return an empty mapping if the container no longer exists."""
        with suppress(NotFound):
            state: Mapping[str, Any] = await self.do(
                f"Container {container[:12]}", lambda api: api.inspect_container(container)
            )
            return state
        return {}

    async def is_running(self, container: str) -> bool:
        return bool((await self.look(container)).get("State", {}).get("Running"))

    async def targets(self, fault: Fault, among: Mapping[str, Any] | None = None) -> dict[str, str]:
        """Return the container ids of the fault's target instances, by instance."""
        rows = await self.instances() if among is None else among
        return {name: str(rows[name]["Id"]) for name in await self._grid.targets(fault, rows)}

    async def kill(self, fault: Fault) -> FaultResult:
        targets = await self.targets(fault)
        return FaultResult(tuple(targets), first_of(await self.kill_containers(targets)))

    async def kill_containers(self, targets: Mapping[str, str]) -> list[str]:
        """Kill the first process of each container and return the containers' final states."""
        for name, container in targets.items():
            with suppress(NotFound):  # the container has already ended
                await complete(self.breaks(name, partial(_kill, container)))
        return [f"{name}: {await self._wait_for_end(container)}" for name, container in targets.items()]

    async def _wait_for_end(self, container: str) -> str:
        async def look() -> str:
            state = (await self.look(container)).get("State")
            if state is None:
                return "removed"
            return "" if state["Running"] else f"{state['Status']} with {state['ExitCode']}"

        return await wait_for(look, "the end of the container")

    async def pause(self, fault: Fault) -> FaultResult:
        targets = await self.targets(fault)
        async with Rollback(self._grid.over) as undoing:
            for name, container in targets.items():
                await undoing.breaking(
                    f"the pause of {name}",
                    partial(self._unpause, container),
                    partial(self.breaks, name, partial(_pause, container)),
                )
            states = [(await self.look(container)).get("State", {}).get("Status") for container in targets.values()]
            held_s = await self._grid.hold(fault.for_s)
        alive = [name for name, container in targets.items() if await self.is_running(container)]
        return FaultResult(
            tuple(targets),
            f"{states.count('paused')} of {len(targets)} containers were paused for {held_s:.1f} s; {len(alive)} run "
            f"again, {len(targets) - len(alive)} ended meanwhile",
        )

    async def _unpause(self, container: str) -> None:
        if (await self.look(container)).get("State", {}).get("Paused"):
            with suppress(NotFound):
                await self.do("The pause", lambda api: api.unpause(container))

    async def partition(self, fault: Fault) -> FaultResult:
        targets = await self.targets(fault)
        async with Rollback(self._grid.over) as undoing:
            for name, container in targets.items():
                await undoing.breaking(
                    f"the partition of {name}",
                    partial(self._connect, container),
                    partial(self.breaks, name, partial(_disconnect, container, self.at.project)),
                )
            cut = [name for name, container in targets.items() if not await self._reaches(container)]
            held_s = await self._grid.hold(fault.for_s)
        connected = [name for name, container in targets.items() if await self._is_connected(container)]
        reachable = [name for name in connected if await self._reaches(targets[name])]
        return FaultResult(
            tuple(targets),
            f"{len(cut)} of {len(targets)} instances could not reach the grid's services for {held_s:.1f} s, and "
            f"{len(reachable)} reach them again; {len(targets) - len(connected)} ended meanwhile",
        )

    async def _reaches(self, container: str) -> bool:
        """Return whether a program in the container can reach the metadata service."""
        argv = [PYTHON, "-c", _PROBE, f"{self.at.subnet}.12", str(compose_deployment.METADATA_PORT)]

        def probe(api: APIClient) -> bool:
            execution = api.exec_create(container, argv)["Id"]
            api.exec_start(execution)
            return bool(api.exec_inspect(execution)["ExitCode"] == 0)

        with suppress(BackendError):  # the container has ended
            return await self.do("A look from within", probe)
        return False

    async def _connect(self, container: str) -> None:
        """If the container still runs, reconnect the container to the grid's network."""
        if await self.is_running(container) and not await self._is_connected(container):
            try:
                await self.do("The network", lambda api: api.connect_container_to_network(container, self.at.project))
            except BackendError:
                if await self.is_running(container):  # a container that no longer runs ended during the call
                    raise

    async def _is_connected(self, container: str) -> bool:
        return self.at.project in networks(await self.look(container))

    async def spot_wave(self, fault: Fault) -> FaultResult:
        rows = await self.instances()
        spot = {name: row for name, row in rows.items() if row["Labels"].get(MARKET) == Market.SPOT}
        if not spot:
            raise NothingHit(
                "No instance is a Spot Instance, and only Spot Instances are interrupted: give the pool a Spot share."
            )
        targets = await self.targets(fault, spot)
        began_s = time.monotonic()
        notified = [name for name in targets if await self._notice(name, fault.notice_s)]

        async def alive() -> list[str]:
            return [name for name, container in targets.items() if await self.is_running(container)]

        async def look() -> bool:
            return self._grid.over.is_set() or not await alive()

        await wait_for(look, "the end of the instances", within_s=fault.notice_s + EFFECT_TIMEOUT_S)
        took_s = time.monotonic() - began_s
        ended = len(targets) - len(await alive())
        return FaultResult(
            tuple(targets),
            f"{len(notified)} of {len(targets)} instances received a notice of {fault.notice_s:g} s, and {ended} ended "
            f"within {took_s:.1f} s ({first_of(list(targets))})",
        )

    async def _notice(self, instance: str, notice_s: float) -> bool:
        endpoint = compose_deployment.autoscaling(self._grid.home, self.at)
        with suppress(UsageError):  # the instance has ended
            await asyncio.to_thread(send_notice, endpoint, instance, "interruption", notice_s)
            return True
        return False

    async def crash(self, service: str, undoing: Rollback) -> str:
        """Kill a service's first process, wait until Docker has restarted the service, and return the evidence of the
        restart.
        """
        container = await self.service(service)
        before = (await self.look(container))["State"]
        pid = int(before["Pid"])

        async def start() -> None:
            if not await self.is_running(container):
                await self.do(service, lambda api: api.start(container))

        undoing.owe(f"the end of {service}", start)
        if _is_its(pid, container):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        else:
            # If the process belongs to another user or a virtual machine, Docker sends the signal. Docker then treats
            # the end of the process as a stop and does not restart the container.
            await complete(self.breaks(service, partial(_kill, container)))
            await start()

        async def look() -> str:
            state = (await self.look(container)).get("State", {})
            is_new = state.get("Running") and state.get("StartedAt", "") != before["StartedAt"]
            return f"{service} (pid {pid}) was killed, and runs again (pid {state['Pid']})" if is_new else ""

        return await wait_for(look, f"the restart of {service}")

    async def crash_manager(self, _: Fault) -> FaultResult:
        owner = (await self._grid.grid())["owner"]
        began_s = time.monotonic()
        async with Rollback(self._grid.over) as undoing:
            evidence = await self.crash("manager", undoing)
        successor = await self._grid.leader(after=owner)
        took_s = time.monotonic() - began_s
        return FaultResult((owner,), f"{evidence}; {successor} led {took_s:.1f} s later, in place of {owner}")

    async def lose_database(self, fault: Fault) -> FaultResult:
        async def restart(undoing: Rollback) -> str:
            return f"{await self.crash('postgres', undoing)}; "

        return await services.lose_ledger(self._grid, fault, before=restart)

    async def zone_loss(self, fault: Fault) -> FaultResult:
        zones = ZoneOutage(compose_deployment.autoscaling(self._grid.home, self.at), prefix=f"{self.at.project}-")

        async def kill(instances: Sequence[str]) -> list[str]:
            rows = await self.instances()
            return await self.kill_containers(
                {instance: rows[instance]["Id"] for instance in instances if instance in rows}
            )

        async def inside(zone: str) -> list[str]:
            rows = (await self.instances()).items()
            return sorted(name for name, row in rows if row["Labels"].get(ZONE) == zone)

        return await zones.lose(self._grid, fault, inside=inside, kill=kill)

    async def s3_errors(self, fault: Fault) -> FaultResult:
        place = self._grid.backend.place(self._grid.home)
        if place.named:
            raise NothingHit(f"The endpoint {place.url} is the user's own: the grid cannot put a proxy before it.")
        storage = await self.service("localstack")
        return await LocalStackProxy(self, storage, place.url).hold(self._grid, fault)


def _kill(container: str, api: APIClient) -> None:
    api.kill(container, "SIGKILL")


def _pause(container: str, api: APIClient) -> None:
    api.pause(container)


def _disconnect(container: str, network: str, api: APIClient) -> None:
    api.disconnect_container_from_network(container, network, force=True)


def _is_its(pid: int, container: str) -> bool:
    """Return whether the process belongs to the container and accepts signals from this process."""
    if is_in_container(pid, container):
        with suppress(OSError):
            os.kill(pid, 0)
            return True
    return False


def actions(grid: TargetGrid) -> Mapping[FaultName, FaultAction]:
    """Return the action of each fault that a grid in containers supports according to the table of faults."""
    faults = ContainerFaults(grid)
    return {
        FaultName.KILL: faults.kill,
        FaultName.PAUSE: faults.pause,
        FaultName.PARTITION: faults.partition,
        FaultName.SPOT_WAVE: faults.spot_wave,
        FaultName.ZONE_LOSS: faults.zone_loss,
        FaultName.S3_ERRORS: faults.s3_errors,
        FaultName.SQS_DUPLICATES: partial(services.duplicates, grid),
        FaultName.SQS_DELAYS: partial(services.delays, grid),
        FaultName.MANAGER_CRASH: faults.crash_manager,
        FaultName.DATABASE_LOSS: faults.lose_database,
    }
