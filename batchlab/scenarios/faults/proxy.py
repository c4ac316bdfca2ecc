"""Proxy before an endpoint of S3 and SQS that answers a share of S3's requests with status 503 or delays clients.

The proxy forwards requests unchanged, including the Host header, because a request's signature covers the Host header.
The proxy identifies a client by the process that owns the client's port on this machine (Linux only). On a grid in
containers, this module is also a program that takes LocalStack's address, forwards requests, and prints its counts at
the end.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import httpx
import uvicorn

from batchlab.core.errors import BackendError, NotFound
from batchlab.core.operating_system.processes import family, owns_port
from batchlab.runtime import factory
from batchlab.runtime.compose_project import HOME_LABEL, LABEL, PYTHON
from batchlab.runtime.factory import Backend, new_bucket_name
from batchlab.runtime.home import Home, Place
from batchlab.scenarios.faults.target_grid import (
    NOTHING_HIT,
    FaultResult,
    NothingHit,
    Rollback,
    TargetGrid,
    complete,
    wait_for,
)
from batchlab.scenarios.model.values import Fault

if TYPE_CHECKING:
    from docker import APIClient

    from batchlab.scenarios.faults.containers import ContainerFaults

_HOP = {b"connection", b"keep-alive", b"transfer-encoding", b"expect"}
_S3 = re.compile(rb"/s3/aws4_request")
_SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message><RequestId>0</RequestId></Error>"
)
_ANSWER_S = 120.0
"""Timeout in seconds of a forwarded request. The timeout is longer than the timeout of any client."""

Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]


@dataclass
class RequestCounts:
    """Number of S3 requests, number of S3 requests answered with 503, and number of requests that had to wait."""

    asked: int = 0
    refused: int = 0
    kept_waiting: int = 0


class FaultProxy:
    """Proxy before the endpoint at `target`. `rate` is the share of S3's requests that get a 503."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.rate = 0.0
        self.counts = RequestCounts()
        self.url = ""
        """Address of the proxy while the proxy runs."""
        self._random = random.Random(1)  # noqa: S311 - no secret
        self._cut: Callable[[int], bool] | None = None
        self._client: httpx.AsyncClient | None = None

    def cut(self, is_cut: Callable[[int], bool] | None) -> None:
        """Stop answering the clients for whose port `is_cut` returns True.

        If `is_cut` is None, answer all clients again. Any thread may call `cut`.
        """
        self._cut = is_cut

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer or forward a request as an ASGI application."""
        if scope["type"] != "http":
            return
        is_counted = False
        while (is_cut := self._cut) is not None and await asyncio.to_thread(is_cut, scope["client"][1]):
            self.counts.kept_waiting += not is_counted
            is_counted = True
            await asyncio.sleep(0.1)
        signature = dict(scope["headers"]).get(b"authorization", b"")
        if _S3.search(signature) or _S3.search(scope["query_string"].replace(b"%2F", b"/")):
            self.counts.asked += 1
            if self._random.random() < self.rate:
                self.counts.refused += 1
                # The request body is read first, because an early answer would break the connection of a client that
                # still sends the body.
                await _drain(receive)
                await _answer(send, 503, b"application/xml", _SLOW_DOWN)
                return
        await self._forward(scope, receive, send)

    async def _forward(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        if self._client is None:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
            self._client = httpx.AsyncClient(trust_env=False, limits=limits, timeout=_ANSWER_S)
        path = scope["raw_path"] + (b"?" + scope["query_string"]) * bool(scope["query_string"])
        headers = [(key, value) for key, value in scope["headers"] if key not in _HOP]
        has_body = any(key in (b"content-length", b"transfer-encoding") for key, _ in scope["headers"])
        url = httpx.URL(self.target).copy_with(raw_path=path)
        request = httpx.Request(scope["method"], url, headers=headers, content=_body(receive) if has_body else None)
        try:
            answer = await self._client.send(request, stream=True)
        except _ClientDisconnected:
            return
        except httpx.TransportError:
            await _drain(receive)
            await _answer(send, 502, b"text/plain", b"The endpoint behind the proxy does not answer.\n")
            return
        try:
            headers = [(key.lower(), value) for key, value in answer.headers.raw if key.lower() not in _HOP]
            await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
            async for part in answer.aiter_raw():
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await answer.aclose()

    async def aclose(self) -> None:
        """Close the connections to the endpoint."""
        if self._client is not None:
            await self._client.aclose()


class _ClientDisconnected(Exception):
    """The client disconnected during the request."""


async def _body(receive: Receive) -> AsyncIterator[bytes]:
    more = True
    while more:
        event = await receive()
        if event["type"] == "http.disconnect":
            raise _ClientDisconnected
        yield event.get("body", b"")
        more = event.get("more_body", False)


async def _drain(receive: Receive) -> None:
    with suppress(_ClientDisconnected):
        async for _ in _body(receive):
            pass


async def _answer(send: Send, status: int, kind: bytes, body: bytes) -> None:
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def server_of(front: FaultProxy) -> uvicorn.Server:
    """Create the server of the proxy."""
    return uvicorn.Server(
        uvicorn.Config(
            front,
            lifespan="off",
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_graceful_shutdown=1,
            timeout_keep_alive=60,
        )
    )


@contextmanager
def run_proxy(front: FaultProxy) -> Iterator[FaultProxy]:
    """Run the proxy on 127.0.0.1 in its own thread, so that a busy event loop does not delay the grid."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    front.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = server_of(front)

    async def serve() -> None:
        try:
            await server.serve(sockets=[listener])
        finally:
            await front.aclose()

    serving = threading.Thread(target=asyncio.run, args=(serve(),), name="front")
    serving.start()
    try:
        yield front
    finally:
        front.cut(None)
        server.should_exit = True
        serving.join()
        listener.close()


@contextmanager
def with_proxy(backend: Backend, home: Home, say: Callable[[str], None]) -> Iterator[tuple[Backend, FaultProxy | None]]:
    """Run a proxy before the endpoint of a grid that starts after the proxy.

    Yield the backend with the proxy's address, and the proxy. The context must stay open as long as the grid runs,
    because the proxy ends with the context. Yield the unchanged backend and None if the backend does not need a proxy.

    The home contains the proxy's address while the proxy runs, and the endpoint's address afterwards.
    """
    if backend.emulator is None:
        yield backend, None
        return
    with ExitStack() as stack:
        home.make()
        backend.provide(home, say)
        stored, place = home.place(backend.name), backend.find_place(home)
        if place is None:
            # `open_emulator` opens the emulator that the grid would start, with the same data.
            emulator = backend.open_emulator(home)
            assert emulator
            url = stack.enter_context(emulator).url
            place = Place(url, stored.bucket if stored else new_bucket_name(), named=False)
        front = stack.enter_context(run_proxy(FaultProxy(place.url)))
        home.backend_folder(backend.name).mkdir(exist_ok=True)
        stack.enter_context(_proxy_home(home, backend.name, place, front.url, is_new=stored is None))
        yield factory.load(backend.name, f"{front.url}/{place.bucket}"), front


@contextmanager
def _proxy_home(home: Home, name: str, place: Place, url: str, *, is_new: bool) -> Iterator[None]:
    """Store the proxy's address in the home.

    On exit, the home gets the endpoint's address `place` back. If `is_new` is True and the home's file is unchanged,
    the address is deleted instead.
    """
    written = home.backend_folder(name) / "endpoint.json"
    ours: tuple[int, int] | None = None
    try:
        home.write_place(name, replace(place, url=url, behind=place.url))
        ours = _version(written)
        yield
    finally:
        if is_new and ours == _version(written):
            home.forget_place(name)
        else:
            home.write_place(name, place)


def _version(file: Path) -> tuple[int, int]:
    """Return a value that changes when another file replaces the file."""
    state = file.stat()
    return state.st_ino, state.st_mtime_ns


def is_port_of(leaders: Collection[int], port: int) -> bool:
    """Return whether one of the processes `leaders`, or a descendant of one of them, owns the connection at the local
    port `port`.
    """
    return owns_port({pid for leader in leaders for pid in family(leader)}, port)


T = TypeVar("T")

_WHAT = "The proxy before LocalStack"
_ASIDE, _BESIDE = 9, 8
"""`_ASIDE` is the last byte of LocalStack's address while the proxy has LocalStack's usual address. `_BESIDE` is the
last byte of the proxy's address before the proxy gets LocalStack's usual address.
"""
_STOP_S = 5
_MARGIN_S = 60.0
_MEMORY = "256m"


class LocalStackProxy:
    """Proxy before LocalStack, which runs in the container `storage` with the address `url` on the grid's network."""

    def __init__(self, containers: ContainerFaults, storage: str, url: str) -> None:
        self._containers = containers
        self._storage = storage
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._aside = f"{containers.at.subnet}.{_ASIDE}"
        self._beside = f"{containers.at.subnet}.{_BESIDE}"

    async def hold(self, grid: TargetGrid, fault: Fault) -> FaultResult:
        """Answer the fault's share of S3 requests with status 503 for the duration of the fault."""
        # The container's name is chosen before the container's creation, because a cancellation would lose the
        # container's id.
        front = grid.backend.open_ids().fresh(f"{self._containers.at.project}-front")
        counts, backs_s = RequestCounts(), [0.0]

        async def give_back() -> None:
            began_s = time.monotonic()
            await self._give_back(front)
            backs_s.append(time.monotonic() - began_s)

        async with Rollback(grid.over) as undoing:
            await undoing.breaking(
                f"the container {front}",
                partial(self._end, front, counts),
                partial(self._breaks, self._creation(front, fault)),
            )
            await self._do(lambda api: api.start(front))
            await self._wait_for_answer(self._beside)
            began_s = time.monotonic()
            await undoing.breaking(
                f"the loss of LocalStack's address {self._host}",
                give_back,
                partial(self._breaks, self._move(self._storage, self._aside)),
            )
            await complete(self._breaks(self._move(front, self._host)))
            await self._wait_for_answer(self._host)
            away_s = time.monotonic() - began_s
            held_s = await grid.hold(fault.for_s)
        if not counts.refused:
            raise NothingHit(NOTHING_HIT.format(unit="request"))
        return FaultResult(
            (f"{self._host}:{self._port}",),
            f"{counts.refused} of {counts.asked} requests to S3 were answered 503 SlowDown in {held_s:.1f} s; the "
            f"address was unreachable for {away_s:.1f} s before and {backs_s[-1]:.1f} s after",
        )

    async def _do(self, call: Callable[[APIClient], T]) -> T:
        return await self._containers.do(_WHAT, call)

    def _breaks(self, call: Callable[[APIClient], None]) -> asyncio.Future[None]:
        return self._containers.breaks(_WHAT, call)

    def _creation(self, front: str, fault: Fault) -> Callable[[APIClient], None]:
        at = self._containers.at
        argv = ["-m", __name__, str(self._port), f"{self._aside}:{self._port}"]

        def create(api: APIClient) -> None:
            address = api.create_endpoint_config(ipv4_address=self._beside)
            # The type stubs of the Docker SDK have a wrong type for the addresses of a container.
            beside: Any = {at.project: address}
            networking: Any = api.create_networking_config(beside)
            api.create_container(
                at.image,
                name=front,
                entrypoint=[PYTHON, "-P"],
                command=[*argv, str(fault.rate), str(fault.for_s + _MARGIN_S)],
                user=at.user,
                labels={LABEL: at.project, HOME_LABEL: str(self._containers.home)},
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

    async def _wait_for_answer(self, host: str) -> None:
        async def listens() -> bool:
            return await asyncio.to_thread(_answers, host, self._port)

        await wait_for(listens, f"an answer at {host}:{self._port}")

    def _move(self, container: str, address: str) -> Callable[[APIClient], None]:
        """Return a function that gives the container the address `address` on the grid's network."""
        network = self._containers.at.project

        def move(api: APIClient) -> None:
            has = networks(api.inspect_container(container)).get(network)
            if has is not None and has.get("IPAddress") == address:
                return
            if has is not None:
                api.disconnect_container_from_network(container, network, force=True)
            api.connect_container_to_network(container, network, ipv4_address=address)

        return move

    async def _give_back(self, front: str) -> None:
        """Give LocalStack its usual address back and wait until LocalStack answers."""
        try:
            await self._do(self._move(front, self._beside))
        except BackendError:
            with suppress(NotFound):  # NotFound means that the proxy's container has ended and has released the address
                await self._do(lambda api: api.stop(front, timeout=_STOP_S))
        await self._do(self._move(self._storage, self._host))
        await self._wait_for_answer(self._host)

    async def _end(self, front: str, counts: RequestCounts) -> None:
        """Remove the proxy's container and read the proxy's request counts."""
        with suppress(NotFound):
            try:
                await self._do(lambda api: api.stop(front, timeout=_STOP_S))
                output = await self._do(lambda api: api.logs(front, tail=20))
                if lines := [line for line in output.decode().splitlines() if line[:1] == "{"]:
                    vars(counts).update(json.loads(lines[-1]))
            finally:
                await self._do(lambda api: api.remove_container(front, v=True, force=True))


def networks(container: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the networks of a container by name."""
    by_name: Mapping[str, Any] = container.get("NetworkSettings", {}).get("Networks", {})
    return by_name


def _answers(host: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((host, port), timeout=1.0):
        return True
    return False


def main(arguments: Sequence[str]) -> None:
    """Run the proxy with the arguments PORT TARGET-HOST:PORT RATE SECONDS until SIGTERM, and print the request counts.

    After SECONDS, the proxy only forwards requests, because the process that should have stopped the proxy has died.
    """
    port, target, rate = int(arguments[0]), arguments[1], float(arguments[2])
    front = FaultProxy(f"http://{target}")
    front.rate = rate
    # The proxy listens on all addresses, because the address of its container changes.
    listener = socket.create_server(("0.0.0.0", port), backlog=256)  # noqa: S104
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    server = server_of(front)

    async def serve() -> None:
        asyncio.get_running_loop().call_later(float(arguments[3]), lambda: setattr(front, "rate", 0.0))
        stop = asyncio.create_task(server.serve(sockets=[listener]))
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: setattr(server, "should_exit", True))
        await stop
        await front.aclose()

    with suppress(KeyboardInterrupt):
        asyncio.run(serve())
    print(json.dumps(asdict(front.counts)), flush=True)  # noqa: T201 - the program's output


if __name__ == "__main__":
    main(sys.argv[1:])
