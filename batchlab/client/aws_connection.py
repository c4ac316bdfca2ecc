"""A connection to the manager of a stack on AWS, held by a process of its own.

Invariant: while it is held, its process is who is at home: every command finds the manager by the
home's record, as it finds one that runs here. Ended, it leaves the stack as it was.

The connection to a stack's manager, as a process.

Invariant: it ends with the process that wanted it, or by a signal, and leaves the stack as it was.
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
from batchlab.core.retry import doubled_s, set_within
from batchlab.runtime.aws import session_manager
from batchlab.runtime.aws.deployment import AwsDeployment
from batchlab.runtime.factory import Backend
from batchlab.runtime.home import Home, ManagerRecord
from batchlab.server.shutdown import end_with, stop_by_signal

log = logging.getLogger(__name__)

VARIABLE = "BATCHLAB_MANAGER_URL"
"""Environment variable with the manager's URL, where there is another way to it than a session."""

OPEN_S = 20.0
"""How long a session may take until its port answers."""
BOOT_S = 600.0
"""How long an instance may take from its launch to a manager that answers."""
AGAIN_S = (1.0, 30.0)
"""A session that has ended is followed by another one: the first pause, and the longest."""


async def hold(home: Home, backend: Backend, stop: asyncio.Event) -> None:
    """Hold the connection until `stop`. A manager whose instance is still booting is waited for,
    for BOOT_S, and later for as long as it takes; BackendError or UsageError where nothing is
    reached in that time."""
    at = backend.stack(home)
    token = await asyncio.to_thread(backend.api_token, home)
    if named := os.environ.get(VARIABLE):
        _check(named)
        _say(home, backend, named)
        await stop.wait()
        return
    session_manager.find_plugin()  # what is missing here is no matter of waiting
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
        raise UsageError(
            f"{VARIABLE} is {url!r}, which is no URL.",
            remedy="Write for example http://127.0.0.1:8080.",
        )


async def _opened(
    home: Home, at: AwsDeployment, port: int, manager: Client
) -> subprocess.Popen[bytes]:
    """A session through which the manager answers; Unreachable where it does not."""
    instance = await asyncio.to_thread(session_manager.manager_instance, at)
    session = await asyncio.to_thread(
        session_manager.open_session, at, instance, port, home.manager_log
    )
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
    """Whether `stop` came before the session's end; then it is ended."""
    while session.poll() is None:
        if await set_within(stop, 0.5):
            _end(session)
            return True
    return stop.is_set()


def _end(session: subprocess.Popen[bytes]) -> None:
    # Of a session that is told to end AWS hears at once; of one that is killed, later.
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
    gc_control.ended()
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
