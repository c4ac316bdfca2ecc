"""Shutdown of a long-lived process by a signal or with its parent process, and shutdown of the instances that the
process started.

Invariant: a service ends everything that the service started, first gracefully and then by force.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from batchlab.core.port_retries import set_within

if TYPE_CHECKING:
    from batchlab.adapters.docker.launcher import ContainerLauncher
    from batchlab.adapters.docker.mixed_launcher import MixedLauncher
    from batchlab.adapters.local.processes import ProcessLauncher

log = logging.getLogger(__name__)

FOLDER_POLL_S = 0.5
"""Interval in seconds of the checks whether the grid's folder exists. A check takes about 10 µs."""


def stop_by_signal() -> asyncio.Event:
    """Return an event that SIGTERM and SIGINT set."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


async def end_with(parent: int, stop: asyncio.Event) -> None:
    """Set `stop` when the process `parent` has ended."""
    while parent:
        if os.getppid() != parent:
            stop.set()
            return
        await asyncio.sleep(0.5)


async def end_with_folder(has_folder: Callable[[], bool], stop: asyncio.Event) -> None:
    """Set `stop` when the grid's folder was deleted or moved. `has_folder` returns whether the folder exists."""
    while True:
        if not has_folder():
            log.error("the folder of the grid was deleted or moved, so this process ends")
            stop.set()
            return
        await asyncio.sleep(FOLDER_POLL_S)


async def end_instances(launcher: ProcessLauncher | ContainerLauncher | MixedLauncher, drain_s: float) -> None:
    """Drain every instance, wait up to `drain_s` seconds, and kill the remaining instances."""
    running = [name for name, ended in (await launcher.running()).items() if ended is None]
    for name in running:
        await launcher.terminate(name, grace_s=drain_s)
    deadline_s = time.monotonic() + drain_s
    while time.monotonic() < deadline_s:
        launcher.changed.clear()  # the event is cleared before the check, so that a change during the check is not lost
        living = await launcher.running()
        if all(living.get(name) is not None for name in running):
            break
        await set_within(launcher.changed, 0.2)
    await launcher.close(kill=True)
