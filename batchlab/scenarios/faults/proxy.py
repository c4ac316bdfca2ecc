"""Proxy before an endpoint of S3 and SQS. It can answer a share of S3's requests with 503 or leave
some clients without an answer.

Requests are forwarded unchanged, including the Host header, because the signature covers it.
Clients are identified by the owner of their port on this machine (Linux).
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import socket
import threading
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterator,
    Mapping,
    MutableMapping,
)
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from batchlab.runtime import factory
from batchlab.runtime.factory import Backend, fresh_bucket
from batchlab.runtime.home import Home, Place
from batchlab.worker.process_table import family

_HOP = {b"connection", b"keep-alive", b"transfer-encoding", b"expect"}
_S3 = re.compile(rb"/s3/aws4_request")
_SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message><RequestId>0</RequestId></Error>"
)
_ANSWER_S = 120.0
"""Longer than the timeout of any client."""

Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]


@dataclass
class RequestCounts:
    """Numbers of S3 requests, of those answered with 503, and of requests that had to wait."""

    asked: int = 0
    refused: int = 0
    kept_waiting: int = 0


class FaultProxy:
    """Proxy before the endpoint at `target`.

    `rate` is the share of S3's requests that get a 503.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.rate = 0.0
        self.counts = RequestCounts()
        self.url = ""
        """Its address while it runs."""
        self._random = random.Random(1)  # noqa: S311 - no secret
        self._cut: Callable[[int], bool] | None = None
        self._client: httpx.AsyncClient | None = None

    def cut(self, is_cut: Callable[[int], bool] | None) -> None:
        """Leave clients without an answer if `is_cut` returns True for their port.

        None answers all clients again. Any thread may call this.
        """
        self._cut = is_cut

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Handle a request as an ASGI application."""
        if scope["type"] != "http":
            return
        await self._wait(scope["client"][1])
        if self._is_s3(scope):
            self.counts.asked += 1
            if self._random.random() < self.rate:
                self.counts.refused += 1
                await _refuse(receive, send)
                return
        await self._pass_on(scope, receive, send)

    async def _wait(self, port: int) -> None:
        counted = False
        while (is_cut := self._cut) is not None and await asyncio.to_thread(is_cut, port):
            self.counts.kept_waiting += not counted
            counted = True
            await asyncio.sleep(0.1)

    def _is_s3(self, scope: Mapping[str, Any]) -> bool:
        headers = dict(scope["headers"])
        return bool(
            _S3.search(headers.get(b"authorization", b""))
            or _S3.search(scope["query_string"].replace(b"%2F", b"/"))
        )

    async def _pass_on(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        if self._client is None:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
            self._client = httpx.AsyncClient(trust_env=False, limits=limits, timeout=_ANSWER_S)
        path = scope["raw_path"] + (b"?" + scope["query_string"]) * bool(scope["query_string"])
        headers = [(k, v) for k, v in scope["headers"] if k not in _HOP]
        has_body = any(k in (b"content-length", b"transfer-encoding") for k, _ in scope["headers"])
        there = httpx.URL(self.target).copy_with(raw_path=path)
        asked = httpx.Request(
            scope["method"],
            there,
            headers=headers,
            content=_body(receive) if has_body else None,
        )
        try:
            answer = await self._client.send(asked, stream=True)
        except _ClientDisconnected:
            return
        except httpx.TransportError:
            await _drain(receive)
            await _answer(
                send, 502, b"text/plain", b"The endpoint behind the proxy does not answer.\n"
            )
            return
        try:
            kept = [(k.lower(), v) for k, v in answer.headers.raw if k.lower() not in _HOP]
            start = {"type": "http.response.start", "status": answer.status_code, "headers": kept}
            await send(start)
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


async def _refuse(receive: Receive, send: Send) -> None:
    # A client that gets an answer before it has sent its body would see a broken connection.
    await _drain(receive)
    await _answer(send, 503, b"application/xml", _SLOW_DOWN)


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
    """Run the proxy on 127.0.0.1 in its own thread, so that a busy event loop does not delay the
    grid.
    """
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
def with_proxy(
    backend: Backend, home: Home, say: Callable[[str], None]
) -> Iterator[tuple[Backend, FaultProxy | None]]:
    """Run a proxy before the endpoint of a grid that is started later. Yield the backend with the
    proxy's address, and the proxy, which must run as long as the grid. On other backends, yield the
    unchanged backend and None.

    The home has the proxy's address during this time and the endpoint's address afterwards. Raise
    BackendError or UsageError.
    """
    if backend.emulator is None:
        yield backend, None
        return
    with ExitStack() as stack:
        home.make()
        backend.provide(home, say)
        known, place = home.place(backend.name), backend.named_place(home)
        if place is None:
            # The emulator that the grid itself would start, with its data.
            emulator = backend.open_emulator(home)
            assert emulator
            url = stack.enter_context(emulator).url
            place = Place(url, known.bucket if known else fresh_bucket(), named=False)
        front = stack.enter_context(run_proxy(FaultProxy(place.url)))
        home.of(backend.name).mkdir(exist_ok=True)
        stack.enter_context(
            _proxied_home(home, backend.name, place, front.url, is_new=known is None)
        )
        yield factory.load(backend.name, f"{front.url}/{place.bucket}"), front


@contextmanager
def _proxied_home(home: Home, name: str, place: Place, url: str, *, is_new: bool) -> Iterator[None]:
    """Store the proxy's address in the home.

    A new place is removed again unless a grid has stored it meanwhile.
    """
    written = home.of(name) / "endpoint.json"
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
    """Return a value that changes when the file is replaced."""
    found = file.stat()
    return found.st_ino, found.st_mtime_ns


def is_port_of(leaders: Collection[int], port: int) -> bool:
    """Return whether one of these processes, or a child of one, owns the connection at this local
    port.
    """
    links = {f"socket:[{inode}]" for inode in _inodes(port)}
    if not links:
        return False
    pids = {pid for leader in leaders for pid in family(leader)}
    return any(not links.isdisjoint(_open_files(pid)) for pid in pids)


def _inodes(port: int) -> list[str]:
    """Return the inodes of the TCP sockets with this local port."""
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(FileNotFoundError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if int(fields[1].rpartition(":")[2], 16) == port:
                    found.append(fields[9])
    return found


def _open_files(pid: int) -> list[str]:
    """Return the targets of the process's open file descriptors."""
    found = []
    # The process may end or close files meanwhile.
    with suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208 - called often
            with suppress(OSError):
                found.append(os.readlink(f"/proc/{pid}/fd/{name}"))  # noqa: PTH115
    return found
