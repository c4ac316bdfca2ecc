"""The connection to a stack's manager, as a process.

Invariant: it ends with the process that wanted it, or by a signal, and leaves the stack as it was.
"""

from __future__ import annotations

import asyncio

from batchlab import connection, loading, logs
from batchlab.backends import Backend
from batchlab.home import Home
from batchlab.services.stopping import end_with, stop_by_signal


def connection_main(home: Home, backend: Backend, *, parent: int = 0) -> None:
    """Hold a connection to a stack's manager until SIGTERM, SIGINT, or the end of process
    `parent`."""
    loading.ended()
    logs.set_up(service="connect")
    with home.locked():
        asyncio.run(_connect(home, backend, parent))


async def _connect(home: Home, backend: Backend, parent: int) -> None:
    stop = stop_by_signal()
    watching = asyncio.create_task(end_with(parent, stop))
    try:
        await connection.hold(home, backend, stop)
    finally:
        watching.cancel()
