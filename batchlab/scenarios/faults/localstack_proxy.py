"""Proxy that temporarily takes the network address of a grid's LocalStack.

As a program, this module runs the proxy: it listens, forwards, and prints its counts at the end.
LocalStack gets its address back whatever happens to the proxy.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from batchlab.core.errors import BackendError, NotFound
from batchlab.runtime.compose.project import HOME_LABEL, LABEL
from batchlab.scenarios.faults.proxy import FaultProxy, RequestCounts, server_of
from batchlab.scenarios.faults.rollback import Rollback, complete
from batchlab.scenarios.faults.target_grid import NOTHING_HIT, FaultResult, TargetGrid, wait_for
from batchlab.scenarios.model.values import Fault

if TYPE_CHECKING:
    from docker import APIClient

    from batchlab.scenarios.faults.containers import ContainerFaults

T = TypeVar("T")

_WHAT = "The front before LocalStack"
PYTHON = "/opt/batchlab/venv/bin/python"
"""Python in the images that compose/Dockerfile builds."""
_ASIDE, _BESIDE = 9, 8
"""Last byte of LocalStack's address while the proxy has its own, and of the proxy's address before
that.
"""
_STOP_S = 5
_MARGIN_S = 60.0
_MEMORY = "256m"


class LocalStackProxy:
    """LocalStack's container `storage` with the address `url` on the grid's network."""

    def __init__(self, there: ContainerFaults, storage: str, url: str) -> None:
        self._there = there
        self._storage = storage
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._aside = f"{there.at.subnet}.{_ASIDE}"
        self._beside = f"{there.at.subnet}.{_BESIDE}"

    async def hold(self, scene: TargetGrid, fault: Fault) -> FaultResult:
        """Answer the fault's share of S3 requests with 503 for its time."""
        # The name is known before the creation, because a cancellation would lose the id.
        front = scene.backend.open_ids().fresh(f"{self._there.at.project}-front")
        counts, backs_s = RequestCounts(), [0.0]

        async def give_back() -> None:
            began_s = time.monotonic()
            await self._give_back(front)
            backs_s.append(time.monotonic() - began_s)

        async with Rollback(scene.over) as undoing:
            await undoing.breaking(
                f"the container {front}",
                partial(self._end, front, counts),
                partial(self._breaks, self._creating(front, fault)),
            )
            await self._do(lambda api: api.start(front))
            await self._answered(self._beside)
            began_s = time.monotonic()
            await undoing.breaking(
                f"the loss of LocalStack's address {self._host}",
                give_back,
                partial(self._breaks, self._moving(self._storage, self._aside)),
            )
            await complete(self._breaks(self._moving(front, self._host)))
            await self._answered(self._host)
            away_s = time.monotonic() - began_s
            held_s = await scene.hold(fault.for_s)
        if not counts.refused:
            return FaultResult(impossible=NOTHING_HIT.format(one="request"))
        return FaultResult(
            (f"{self._host}:{self._port}",),
            f"{counts.refused} of {counts.asked} requests to S3 were answered 503 SlowDown in "
            f"{held_s:.1f} s; the address itself was nobody's for {away_s:.1f} s before and "
            f"{backs_s[-1]:.1f} s after",
        )

    async def _do(self, call: Callable[[APIClient], T]) -> T:
        return await self._there.do(_WHAT, call)

    def _breaks(self, call: Callable[[APIClient], None]) -> asyncio.Future[None]:
        return self._there.breaks(_WHAT, call)

    def _creating(self, front: str, fault: Fault) -> Callable[[APIClient], None]:
        at = self._there.at
        argv = ["-m", __name__, str(self._port), f"{self._aside}:{self._port}"]

        def create(api: APIClient) -> None:
            address = api.create_endpoint_config(ipv4_address=self._beside)
            # The type stubs are wrong here.
            beside: Any = {at.project: address}
            networking: Any = api.create_networking_config(beside)
            api.create_container(
                at.image,
                name=front,
                entrypoint=[PYTHON, "-P"],
                command=[*argv, str(fault.rate), str(fault.for_s + _MARGIN_S)],
                user=at.user,
                labels={LABEL: at.project, HOME_LABEL: str(self._there.home)},
                networking_config=networking,
                stop_signal="SIGTERM",
                host_config=api.create_host_config(
                    network_mode=at.project,
                    read_only=True,
                    tmpfs={"/tmp": "rw,nosuid,nodev,size=16m"},  # noqa: S108 - its own
                    cap_drop=["ALL"],
                    security_opt=["no-new-privileges:true"],
                    mem_limit=_MEMORY,
                    init=True,
                ),
            )

        return create

    async def _answered(self, host: str) -> None:
        async def listens() -> bool:
            return await asyncio.to_thread(_answers, host, self._port)

        await wait_for(listens, f"an answer at {host}:{self._port}")

    def _moving(self, container: str, address: str) -> Callable[[APIClient], None]:
        """Return a call that gives the container this address on the grid's network."""
        network = self._there.at.project

        def move(api: APIClient) -> None:
            has = networks(api.inspect_container(container)).get(network)
            if has is not None and has.get("IPAddress") == address:
                return
            if has is not None:
                api.disconnect_container_from_network(container, network, force=True)
            api.connect_container_to_network(container, network, ipv4_address=address)

        return move

    async def _give_back(self, front: str) -> None:
        """Give LocalStack its address back and wait until it answers."""
        try:
            await self._do(self._moving(front, self._beside))
        except BackendError:
            with suppress(NotFound):  # an ended container does not have the address either
                await self._do(lambda api: api.stop(front, timeout=_STOP_S))
        await self._do(self._moving(self._storage, self._host))
        await self._answered(self._host)

    async def _end(self, front: str, counts: RequestCounts) -> None:
        """Remove the proxy and read its counts."""
        with suppress(NotFound):
            try:
                await self._do(lambda api: api.stop(front, timeout=_STOP_S))
                said = await self._do(lambda api: api.logs(front, tail=20))
                if lines := [line for line in said.decode().splitlines() if line[:1] == "{"]:
                    vars(counts).update(json.loads(lines[-1]))
            finally:
                await self._do(lambda api: api.remove_container(front, v=True, force=True))


def networks(container: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the networks of a container by name."""
    found: Mapping[str, Any] = container.get("NetworkSettings", {}).get("Networks", {})
    return found


def _answers(host: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((host, port), timeout=1.0):
        return True
    return False


def main(arguments: Sequence[str]) -> None:
    """Run the proxy with the arguments PORT TARGET-HOST:PORT RATE SECONDS until SIGTERM, then print
    the counts.

    After SECONDS it only forwards requests, because the process that should have stopped it has
    died.
    """
    port, target, rate = int(arguments[0]), arguments[1], float(arguments[2])
    front = FaultProxy(f"http://{target}")
    front.rate = rate
    # It listens on all addresses, because its own address changes. In a container, that is not
    # wider.
    listener = socket.create_server(("0.0.0.0", port), backlog=256)  # noqa: S104
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    server = server_of(front)

    async def serve() -> None:
        asyncio.get_running_loop().call_later(
            float(arguments[3]), lambda: setattr(front, "rate", 0.0)
        )
        stop = asyncio.create_task(server.serve(sockets=[listener]))
        asyncio.get_running_loop().add_signal_handler(
            signal.SIGTERM, lambda: setattr(server, "should_exit", True)
        )
        await stop
        await front.aclose()

    with suppress(KeyboardInterrupt):
        asyncio.run(serve())
    print(json.dumps(asdict(front.counts)), flush=True)  # noqa: T201 - what whoever started it reads


if __name__ == "__main__":
    main(sys.argv[1:])
