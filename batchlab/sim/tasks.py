"""The tasks of the simulator's loop.

Invariant: nothing about a task follows from its address.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from contextvars import Context
from typing import Any

from batchlab.sim.actors import Actor


class SimTask(asyncio.Task[Any]):
    """A task that knows its actor, and whose hash is its number.

    TaskGroup and asyncio.wait keep tasks in sets; with the default hash, an address, the order of
    cancellation would change from process to process.
    """

    __slots__ = ("actor", "serial")
    _log_traceback: bool

    def __init__(
        self,
        coro: Coroutine[Any, Any, Any] | Generator[Any, None, Any],
        serial: int,
        actor: Actor | None,
        *,
        loop: asyncio.AbstractEventLoop,
        name: str,
        context: Context | None,
    ) -> None:
        # Before the base's constructor, which already puts the task into a set.
        self.serial = serial
        self.actor = actor
        super().__init__(coro, loop=loop, name=name, context=context)

    def __hash__(self) -> int:
        return self.serial

    def __str__(self) -> str:
        """Its name, and where it waits: `w-1 (run:103 > _fetch:140 > wait:212)`."""
        chain: list[str] = []
        coro: Any = self.get_coro()
        while (frame := getattr(coro, "cr_frame", None)) is not None:
            chain.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
            coro = coro.cr_await
        owner = f"{self.actor.name}/" if self.actor and self.actor.name != self.get_name() else ""
        return f"{owner}{self.get_name()} ({' > '.join(chain)})"
