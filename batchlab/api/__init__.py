"""The manager's HTTP API: JSON under /v1, described at /openapi.json.

Invariant: no rules live here. A request becomes one call of the manager, an answer one view.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from batchlab import __version__
from batchlab.api import (
    failures,
    files,
    grid,
    jobs,
    logs,
    metrics,
    notifications,
    results,
    schedules,
    spending,
    tasks,
)
from batchlab.api.common import Served, answer
from batchlab.api.door import Door
from batchlab.api.sessions import Sessions
from batchlab.errors import BatchlabError, UsageError
from batchlab.manager.manager import Manager


def create_app(
    manager: Manager, *, token: str, backend_name: str, on_shutdown: Callable[[], None]
) -> tuple[FastAPI, Served]:
    """The application, and what may be exchanged in it. `on_shutdown` is called in the event loop
    when a client asks for the manager's end, after the answer has been sent."""
    app = FastAPI(
        title="batchlab",
        version=__version__,
        # Their pages load scripts from the network, which a laptop on a train does not have.
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
    )
    sessions = Sessions(token, manager.ports.clock)
    app.state.served = served = Served(manager, token, backend_name, on_shutdown, sessions)
    for kind in (BatchlabError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
    for module in (
        *(grid, files, jobs, results, failures, tasks, logs, spending),
        *(schedules, notifications, metrics),
    ):
        app.include_router(module.router)
    app.include_router(grid.public)
    app.add_middleware(Door, token=token)
    return app, served


def listen(host: str, port: int) -> socket.socket:
    """A socket to serve the application on; port 0 takes a free one. UsageError where the address
    is taken, or none of this machine's.

    With Nagle's algorithm every answer over a kept connection waits 40 ms for the client's delayed
    acknowledgement. asyncio turns it off only for sockets whose protocol number is set, which
    `create_server` does not do; accepted connections inherit the option from here.
    """
    try:
        listener = socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None) or 0
        # A name that cannot be resolved has a negative number, which strerror does not know.
        why = os.strerror(number) if number > 0 else str(error).partition(" (")[0]
        raise UsageError(
            f"{host}:{port} cannot be listened on: {why.rstrip('.')}.",
            remedy="Name another with --host or --port; port 0 takes any that is free.",
        ) from error
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
