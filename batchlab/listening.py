"""The socket that a service listens on, had before anything that takes longer is begun."""

from __future__ import annotations

import os
import socket

from batchlab.errors import UsageError


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
