"""Process that keeps a connection to the manager of a stack on AWS open.

Invariant: while the process runs, the home's record names the local address of the connection. A command therefore
finds the manager of a stack in the same way as it finds a local manager. The process of the connection ends after a
signal or with its parent process, and does not change the stack.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import urlsplit

from batchlab.client.http import Client
from batchlab.core import gc_control, logs
from batchlab.core.errors import BackendError, Unreachable, UsageError
from batchlab.core.port_retries import doubled_s, set_within
from batchlab.runtime import stack_connections
from batchlab.runtime.aws_deployment import AwsDeployment
from batchlab.runtime.factory import Backend
from batchlab.runtime.home import Home, ManagerRecord
from batchlab.server.shutdown import end_with, end_with_folder, stop_by_signal

log = logging.getLogger(__name__)

VARIABLE = "BATCHLAB_MANAGER_URL"
"""Environment variable with the URL of a manager that is reachable without a session."""

OPEN_S = 20.0
"""Time in seconds within which the manager must answer through a new session."""
BOOT_S = 600.0
"""Time in seconds for which the first connection to a manager is retried, because the manager's instance may be
booting.
"""
MIN_PAUSE_S, MAX_PAUSE_S = 1.0, 30.0
"""Shortest and longest pause in seconds before a new session replaces an ended session."""


async def hold(home: Home, backend: Backend, stop: asyncio.Event) -> None:
    """Keep a connection to the stack's manager open until `stop` is set.

    Raise BackendError if the first connection fails for BOOT_S seconds, within which an instance boots. After the first
    connection, reconnect whenever the connection ends. Raise UsageError if the Session Manager plugin is missing, or if
    VARIABLE is invalid.
    """
    at = backend.stack(home)
    token = await asyncio.to_thread(backend.api_token, home)
    if url := os.environ.get(VARIABLE):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(
                f"{VARIABLE} is {url!r}, which is not a URL.", remedy="Write for example http://127.0.0.1:8080."
            )
        _write_record(home, backend, url)
        await stop.wait()
        return
    stack_connections.find_plugin()  # Raise UsageError for a missing plugin before the first attempt.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    give_up_s = asyncio.get_running_loop().time() + BOOT_S
    pause_s, was_up = MIN_PAUSE_S, False
    while not stop.is_set():
        try:
            session = await _open_session(home, at, port, Client(url, token))
        except BackendError as error:
            if not was_up and asyncio.get_running_loop().time() > give_up_s:
                raise
            log.warning("%s", error)
            await set_within(stop, pause_s)
            pause_s = doubled_s(pause_s, MAX_PAUSE_S)
            continue
        if not was_up:
            _write_record(home, backend, url)
        pause_s, was_up = MIN_PAUSE_S, True
        if not await _stopped_first(session, stop):
            log.warning("the session has ended, and a new session replaces it")
            await set_within(stop, pause_s)


def _write_record(home: Home, backend: Backend, url: str) -> None:
    home.write_record(ManagerRecord(url, os.getpid(), f"connection-{os.getpid()}", backend.name))
    log.info("the manager of the stack is at %s", url)


async def _open_session(home: Home, at: AwsDeployment, port: int, manager: Client) -> subprocess.Popen[bytes]:
    """Open a session to the manager. Raise Unreachable if the manager does not answer in time."""
    instance = await asyncio.to_thread(stack_connections.manager_instance, at)
    session = await asyncio.to_thread(stack_connections.open_session, at, instance, port, home.manager_log)
    try:
        async with asyncio.timeout(OPEN_S):
            while session.poll() is None:
                with suppress(Unreachable):
                    await asyncio.to_thread(manager.health)
                    return session
                await asyncio.sleep(0.2)
    except TimeoutError:
        _end(session)
    except BaseException:
        _end(session)
        raise
    finally:
        manager.close()
    raise Unreachable(
        f"The manager does not answer through a session on the instance {instance}.",
        remedy="Wait until the instance has booted. docs/runbook.md describes how to inspect an instance that does not "
        "boot.",
    )


async def _stopped_first(session: subprocess.Popen[bytes], stop: asyncio.Event) -> bool:
    """Return whether `stop` was set before the session ended. End the session if `stop` is set."""
    while session.poll() is None:
        if await set_within(stop, 0.5):
            _end(session)
            return True
    return stop.is_set()


def _end(session: subprocess.Popen[bytes]) -> None:
    # After SIGTERM, the session reports its end to AWS at once. AWS would detect the end of a killed session only
    # later.
    session.send_signal(signal.SIGTERM)
    try:
        session.wait(5.0)
    except subprocess.TimeoutExpired:
        session.kill()
        session.wait()


def connection_main(home: Home, backend: Backend, *, parent: int = 0) -> None:
    """Keep a connection to a stack's manager open until SIGTERM, SIGINT, or the end of the process `parent`."""
    gc_control.resume()
    logs.set_up(service="connect")
    with home.lock() as has_folder:
        asyncio.run(_connect(home, backend, parent, has_folder))


async def _connect(home: Home, backend: Backend, parent: int, has_folder: Callable[[], bool]) -> None:
    stop = stop_by_signal()
    watching = [asyncio.create_task(one) for one in (end_with(parent, stop), end_with_folder(has_folder, stop))]
    try:
        await hold(home, backend, stop)
    finally:
        for task in watching:
            task.cancel()
