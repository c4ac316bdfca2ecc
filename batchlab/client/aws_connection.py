"""Connection to the manager of a stack on AWS, held by a separate process.

Invariant: while the process runs, the home's record names its address, so every command finds the
manager as it finds a local one. The process ends by a signal or with its parent process, and does
not change the stack.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
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
from batchlab.server.shutdown import end_with, stop_by_signal

log = logging.getLogger(__name__)

VARIABLE = "BATCHLAB_MANAGER_URL"
"""Environment variable with the URL of a manager that is reachable without a session."""

OPEN_S = 20.0
"""Time in seconds within which the port of a session must answer."""
BOOT_S = 600.0
"""Time in seconds that an instance may take from its launch until its manager answers."""
AGAIN_S = (1.0, 30.0)
"""Shortest and longest pause in seconds before a new session replaces an ended one."""


async def hold(home: Home, backend: Backend, stop: asyncio.Event) -> None:
    """Hold the connection until `stop` is set.

    Before the first connection, wait up to BOOT_S for an instance that boots, and then raise
    BackendError. After the first connection, reconnect without a time limit. Raise UsageError if
    the Session Manager plugin is missing, or if VARIABLE is invalid.
    """
    at = backend.stack(home)
    token = await asyncio.to_thread(backend.api_token, home)
    if named := os.environ.get(VARIABLE):
        _check(named)
        _say(home, backend, named)
        await stop.wait()
        return
    stack_connections.find_plugin()  # a missing plugin fails at once, without retries
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    give_up_s = asyncio.get_running_loop().time() + BOOT_S
    pause_s, was_up = AGAIN_S[0], False
    while not stop.is_set():
        try:
            session = await _opened(home, at, port, Client(url, token))
        except BackendError as error:
            if not was_up and asyncio.get_running_loop().time() > give_up_s:
                raise
            log.warning("%s", error)
            await set_within(stop, pause_s)
            pause_s = doubled_s(pause_s, AGAIN_S[1])
            continue
        if not was_up:
            _say(home, backend, url)
        pause_s, was_up = AGAIN_S[0], True
        if not await _ended_first(session, stop):
            log.warning("the session has ended; opening another one")
            await set_within(stop, pause_s)


def _say(home: Home, backend: Backend, url: str) -> None:
    home.write_record(ManagerRecord(url, os.getpid(), f"connection-{os.getpid()}", backend.name))
    log.info("the manager of the stack is at %s", url)


def _check(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"{VARIABLE} is {url!r}, which is no URL.", remedy="Write for example http://127.0.0.1:8080.")


async def _opened(home: Home, at: AwsDeployment, port: int, manager: Client) -> subprocess.Popen[bytes]:
    """Open a session through which the manager answers. Raise Unreachable if it does not answer."""
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
        f"A session on {instance} was opened, and no manager answers through it.",
        remedy="It may still be booting; docs/boot.md says how to look at one that does not.",
    )


async def _ended_first(session: subprocess.Popen[bytes], stop: asyncio.Event) -> bool:
    """Return whether `stop` was set before the session ended. If so, end the session."""
    while session.poll() is None:
        if await set_within(stop, 0.5):
            _end(session)
            return True
    return stop.is_set()


def _end(session: subprocess.Popen[bytes]) -> None:
    # After SIGTERM, the session reports its end to AWS at once. AWS notices a killed session only
    # later.
    session.send_signal(signal.SIGTERM)
    try:
        session.wait(5.0)
    except subprocess.TimeoutExpired:
        session.kill()
        session.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def connection_main(home: Home, backend: Backend, *, parent: int = 0) -> None:
    """Hold a connection to a stack's manager until SIGTERM, SIGINT, or the end of process
    `parent`."""
    gc_control.resume()
    logs.set_up(service="connect")
    with home.locked():
        asyncio.run(_connect(home, backend, parent))


async def _connect(home: Home, backend: Backend, parent: int) -> None:
    stop = stop_by_signal()
    watching = asyncio.create_task(end_with(parent, stop))
    try:
        await hold(home, backend, stop)
    finally:
        watching.cancel()
