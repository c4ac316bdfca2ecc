"""An instance metadata service on 127.0.0.1, with the instances that a test chooses."""

from __future__ import annotations

import asyncio
import http.client
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import urlsplit

from batchlab.adapters.aws.metadata_server import Metadata, MetadataServer
from batchlab.core.errors import Unreachable
from batchlab.core.model import Machine, Market
from tests.support.fleet import ManualClock

HERE = "127.0.0.1"
TTL = "X-aws-ec2-metadata-token-ttl-seconds"
TOKEN = "X-aws-ec2-metadata-token"

SPOT = Metadata(
    "i-0123456789abcdef0",
    HERE,
    Machine("m7i.large", "us-west-2b", Market.SPOT),
    launched_s=1_700_000_000.0,
    image="ami-1",
    tags={"Name": "worker", "team": "a", "not one": "x"},
)


@dataclass
class Source:
    """A MetadataSource whose instances are set by a test."""

    known: dict[str, Metadata] = field(default_factory=lambda: {HERE: SPOT})
    away: bool = False

    async def metadata(self, address: str) -> Metadata | None:
        if self.away:
            raise Unreachable("Docker does not answer.")
        return self.known.get(address)


class Service:
    """A MetadataServer in a thread, because its clients block."""

    def __init__(self) -> None:
        self.source = Source()
        self.clock = ManualClock()
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._server = MetadataServer(self.source, self.clock)

    def __enter__(self) -> Self:
        self._thread.start()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def start(self) -> None:
        """Start listening on the same port as before. Tokens from before the start become invalid."""
        port = urlsplit(self.url).port or 0
        self._server = MetadataServer(self.source, self.clock)
        starting = asyncio.run_coroutine_threadsafe(self._server.start(HERE, port), self._loop)
        self.url = starting.result()

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._server.close(), self._loop).result()

    def ask(self, method: str, path: str, headers: Mapping[str, str] = {}) -> tuple[int, str, Mapping[str, str]]:
        """Send a request, and return the status, the content, and the headers."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=5)
        try:
            connection.request(method, path, headers=dict(headers))
            answer = connection.getresponse()
            return answer.status, answer.read().decode(), dict(answer.headers)
        finally:
            connection.close()

    def token(self, ttl_s: int = 60) -> str:
        status, token, _ = self.ask("PUT", "/latest/api/token", {TTL: str(ttl_s)})
        assert status == 200
        return token

    def get(self, path: str) -> tuple[int, str]:
        status, content, _ = self.ask("GET", path, {TOKEN: self.token()})
        return status, content
