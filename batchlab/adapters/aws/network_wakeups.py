"""Wakeups between the containers of a grid: a sender broadcasts a datagram in the grid's own network.

Invariants: a datagram has no content, so a forged datagram only makes a receiver poll once more. A receiver that misses
a datagram finds the message at its next regular poll. A datagram wakes all receivers of a queue, so a frozen container
cannot take the only wakeup.
"""

from __future__ import annotations

import socket
import zlib
from contextlib import suppress

from batchlab.adapters.local.local_wakeup_queue import wait_until_readable
from batchlab.core.errors import Unreachable

_FIRST_PORT = 20_000
_PORTS = 10_000
"""Ports below the range from which Linux chooses the local ports of connections."""


class NetworkWakeups:
    """Wakeups by datagrams to the broadcast address of a network."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sender.setblocking(False)
        self._sender.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)

    def open(self, queue: str) -> NetworkBell:
        return NetworkBell(_port(queue))

    def wake(self, queue: str, count: int) -> None:
        if count > 0:
            # A container without a network cannot send. The receivers poll regularly.
            with suppress(OSError):
                self._sender.sendto(b"", (self._address, _port(queue)))

    def close(self) -> None:
        self._sender.close()


class NetworkBell:
    """Socket that receives the broadcasts of one queue."""

    def __init__(self, port: int) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Linux delivers broadcasts to sockets that are bound to all addresses, also after the network was
            # disconnected and connected again.
            self._socket.bind(("", port))
        except OSError as error:
            self._socket.close()
            raise Unreachable(
                f"The UDP port {port}, which wakes receivers of messages, cannot be used: {error}."
            ) from error

    async def wait(self, timeout_s: float) -> bool:
        return await wait_until_readable(self._socket.fileno(), timeout_s)

    def close(self) -> bool:
        self._socket.close()
        return False  # the other receivers of the queue had the same wakeup


def _port(queue: str) -> int:
    return _FIRST_PORT + zlib.crc32(queue.encode()) % _PORTS
