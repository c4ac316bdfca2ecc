"""Functions to run and wait for containers, for the tests of the container launcher."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Coroutine
from typing import Any

from batchlab.adapters.docker.launcher import ContainerLauncher
from batchlab.core.port_retries import set_within
from tests.support.docker.containers import DockerGrid

DEADLINE_S = 30.0


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 3 * DEADLINE_S))
    gc.collect()  # resources that a test leaves open are reported in the same test


async def soon(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, "never came about"
        await asyncio.sleep(0.02)


async def up(grid: DockerGrid, *instances: str) -> None:
    for instance in instances:
        await soon(lambda instance=instance: "up" in grid.printed(instance))  # type: ignore[misc]


async def end_of(launcher: ContainerLauncher, instance: str) -> str:
    """Wait until an instance has ended, and return how it ended. The function looks after each change and every second,
    as a fleet does. Docker's list may be older than its events."""
    deadline_s = time.monotonic() + DEADLINE_S
    while True:
        launcher.changed.clear()  # cleared before the look, so that a change during the look is not lost
        if (how := (await launcher.running())[instance]) is not None:
            return how
        assert time.monotonic() < deadline_s, f"{instance} never ended"
        await set_within(launcher.changed, 1.0)
