"""Sockets of the manager and of other services, opened before any slow step of the start."""

from __future__ import annotations

import logging
import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from batchlab.core.errors import UsageError
from batchlab.runtime.home import Home

log = logging.getLogger(__name__)

LONGEST_PATH_BYTES = 100
"""Longest path of a Unix socket. macOS allows 103 bytes, Linux 107."""
_PREFIX, _NAME = "batchlab-", "manager.sock"


def listen(host: str, port: int) -> socket.socket:
    """Return a socket for the service. Port 0 takes a free port.

    Raise UsageError if the address is taken or does not belong to this machine.

    The socket disables Nagle's algorithm, which delays every response over a reused connection by
    40 ms until the client's acknowledgement. The asyncio module disables it only for sockets with a
    protocol number, and `create_server` does not set one. Accepted connections inherit the option.
    """
    try:
        listener = socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None) or 0
        # The error of a name that cannot be resolved has a negative number, which strerror does not
        # know.
        why = os.strerror(number) if number > 0 else str(error).partition(" (")[0]
        raise UsageError(
            f"{host}:{port} cannot be listened on: {why.rstrip('.')}.",
            remedy="Name another with --host or --port; port 0 takes any that is free.",
        ) from error
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def listen_locally(home: Home) -> tuple[socket.socket, Path] | None:
    """Return a Unix socket that only this user can open, and its path.

    Return None if the file systems here do not allow such a socket. The caller must hold the grid's
    lock.
    """
    for path in _candidates(home):
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            path.unlink(missing_ok=True)
            listener.bind(os.fspath(path))
            # A socket refuses connections before listen(), so the permissions apply to every
            # connection.
            path.chmod(0o600)
            listener.listen()
        except OSError as error:
            listener.close()
            log.info("no Unix socket at %s: %s", path, error)
        else:
            return listener, path
    home.forget_socket()
    log.warning("the manager has no Unix socket, so clients on this machine use its port")
    return None


def leave(home: Home) -> None:
    """Remove the Unix socket of a manager that ends, and its record."""
    if last := home.last_socket():
        last.unlink(missing_ok=True)
        if _is_fallback(last):
            with suppress(OSError):  # the folder contains files of another program
                last.parent.rmdir()
    home.forget_socket()


def _candidates(home: Home) -> Iterator[Path]:
    if len(os.fsencode(home.socket_file)) <= LONGEST_PATH_BYTES:
        yield home.socket_file
    # Try the address of the previous manager first, because clients wait for it there.
    if (last := home.last_socket()) and _is_fallback(last):
        yield last
    for folder in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"):  # noqa: S108
        if folder and len(os.fsencode(folder)) < LONGEST_PATH_BYTES - len(_PREFIX) - 25:
            with suppress(OSError):
                yield Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder)) / _NAME


def _is_fallback(path: Path) -> bool:
    """Return whether the socket is in a private folder that batchlab created for it."""
    try:
        found = path.parent.lstat()
    except OSError:
        return False
    is_private = found.st_uid == os.getuid() and not stat.S_IMODE(found.st_mode) & 0o077
    is_ours = path.name == _NAME and path.parent.name.startswith(_PREFIX)
    return stat.S_ISDIR(found.st_mode) and is_private and is_ours
