"""Functions for the tests of the simulator's event loop, actors, and faults."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

from batchlab.sim.actors import Actor
from batchlab.sim.event_loop import SimLoop
from batchlab.sim.faults import Fault, FaultKind, Faults

Main = Coroutine[Any, Any, Any]
INSTANT = (0.0, 0.0)


async def forever() -> None:
    await asyncio.get_running_loop().create_future()


async def fail_soon(message: str = "lost") -> None:
    await asyncio.sleep(1)
    raise KeyError(message)


def forget(coro: Main, name: str | None = None) -> str:
    """Start a task without keeping a reference to it."""
    return asyncio.create_task(coro, name=name).get_name()


async def caught(call: Main) -> BaseException | None:
    try:
        await call
    except Exception as error:  # noqa: BLE001 - returned to the test
        return error
    return None


def script(*faults: Fault) -> Faults:
    return Faults.from_list(faults, random.Random(1))


def at(call: int, kind: FaultKind) -> Faults:
    """Return faults that inject `kind` at call number `call` of actor a."""
    return script(Fault("a", call, kind))


def killed(main: Callable[[Actor], Main]) -> Actor:
    """Run `main` as an actor and return it once it has ended."""
    actor = Actor("a")

    async def watch() -> None:
        await asyncio.wait([actor.spawn(main(actor))])
        assert not actor.alive

    SimLoop().run(watch())
    return actor
