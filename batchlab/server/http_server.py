"""HTTP server of a manager, which ends without fixed waits."""

from __future__ import annotations

import asyncio
import socket
from types import FrameType
from typing import Any

import uvicorn

from batchlab.core.port_retries import set_within

TICK_S = 1.0
"""Interval in seconds at which uvicorn updates the header `Date`."""
ACCEPT_STEPS = 5
"""Number of steps of the event loop after which uvicorn knows each accepted connection. asyncio needs three."""


class Server(uvicorn.Server):
    """uvicorn's server with a main loop that waits for an event.

    uvicorn's own main loop wakes ten times a second, and its shutdown always waits for 0.1 s.
    """

    def __init__(self, app: Any) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,  # the process configures its own logs
            log_level="warning",
            timeout_graceful_shutdown=2,
            lifespan="off",
            proxy_headers=False,
        )
        super().__init__(config)
        self._ending = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def end(self) -> None:
        """Make `serve` return after the requests that are in progress."""
        self.should_exit = True
        self._ending.set()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self._loop:
            self._loop.call_soon_threadsafe(self._ending.set)

    async def main_loop(self) -> None:
        self._loop = asyncio.get_running_loop()
        while not await self.on_tick(0):
            await set_within(self._ending, TICK_S)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for listener in sockets or ():
            listener.close()
        for _ in range(ACCEPT_STEPS):
            await asyncio.sleep(0)
        if self.server_state.connections or self.server_state.tasks:
            await super().shutdown(sockets)
