"""A process of the simulated grid: a group of tasks that SIGKILL ends as one.

Invariant: once an actor is dead, no port call of its tasks has any effect.

Clocks and ids of the simulated processes.

Invariant: time is the loop's, and ids come from a seed; nothing here looks at the machine.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
import sys
from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar, runtime_checkable

from batchlab.core.errors import BatchlabError

T = TypeVar("T")

CANCEL_ROUNDS = 1_000
"""How often a task may come back from a cancellation before it counts as stuck."""


class SimulationError(BatchlabError):
    """The simulated program did what no program may do, or the simulation was set up wrongly."""


class ActorKilled(BaseException):
    """Raised by a dead actor's port calls.

    Not an Exception: a retry loop's `except Exception` must not bring the dead back.
    """


@runtime_checkable
class Freezer(Protocol):
    """What an event loop must have for its actors to freeze; SimLoop has it."""

    def freeze(self, actor: Actor) -> None: ...

    def thaw(self, actor: Actor) -> None: ...


class Actor:
    """One process that may be killed at any moment.

    A restarted process is a new Actor; give it the old name to continue its fault numbering.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.guarded = True
        """False once a port was handed to it without a wrapper: it can no longer be killed."""
        # A dict as an ordered set: tasks must die in the order they were spawned.
        self._tasks: dict[asyncio.Task[Any], None] = {}

    def __repr__(self) -> str:
        return f"Actor({self.name!r}, {'alive' if self.alive else 'dead'})"

    def spawn(self, coro: Coroutine[Any, Any, T], *, name: str | None = None) -> asyncio.Task[T]:
        """Run `coro` as a task of this actor; every task that it creates belongs here too.

        Wait for its end with `asyncio.wait([task])`: awaiting the task itself would raise
        ActorKilled in the one who waits. Raises SimulationError on a dead actor.
        """
        if not self.alive:
            coro.close()
            raise SimulationError(f"{self.name} is dead and cannot start anything.")
        context = contextvars.copy_context()
        context.run(CURRENT.set, self)
        loop = asyncio.get_running_loop()
        return loop.create_task(coro, name=name or self.name, context=context)

    def kill(self) -> None:
        """SIGKILL: cuts the ports off, then cancels all tasks, in spawn order, at this instant.

        Their `finally` blocks do run (a coroutine cannot just be dropped), but reach nothing.
        """
        if not self.alive:
            return
        if not self.guarded:
            raise SimulationError(
                f"{self.name} cannot be killed: it holds a port without a wrapper.",
                remedy="Wrap its ports with Faults, whose rates may all be 0.",
            )
        self.alive = False
        self.thaw()
        self._reap(0)

    def freeze(self) -> None:
        """SIGSTOP: nothing of it runs until it is thawed or killed; nothing where it is dead."""
        loop = asyncio.get_running_loop()
        if self.alive and isinstance(loop, Freezer):
            loop.freeze(self)

    def thaw(self) -> None:
        """SIGCONT."""
        loop = asyncio.get_running_loop()
        if isinstance(loop, Freezer):
            loop.thaw(self)

    def adopt(self, task: asyncio.Task[Any]) -> None:
        """Called by the loop for every task created in this actor's context."""
        self._tasks[task] = None
        if not self.alive:
            task.cancel()

    def forget(self, task: asyncio.Task[Any]) -> None:
        """Called by the loop when a task has ended."""
        self._tasks.pop(task, None)

    def _reap(self, rounds: int) -> None:
        # One cancellation is not enough: `finally` blocks wait, loops swallow it. Again and again
        # at the same virtual instant, so that nothing of a dead actor runs on in virtual time.
        if not self._tasks:
            return
        if rounds == CANCEL_ROUNDS:
            names = ", ".join(task.get_name() for task in self._tasks)
            raise SimulationError(f"Killed actor {self.name} swallows every cancellation: {names}.")
        for task in list(self._tasks):
            task.cancel()
        asyncio.get_running_loop().call_soon(self._reap, rounds + 1)


CURRENT: contextvars.ContextVar[Actor | None] = contextvars.ContextVar("actor", default=None)
"""The actor whose code is running. Tasks inherit it, because asyncio copies the context."""


def let_the_dead_rest() -> None:
    """For a process that was told to end in the middle of a simulation, and does: what an actor
    would still have done is dropped with its coroutines, and Python need not tell of each."""
    told = sys.unraisablehook

    def tell(dropped: sys.UnraisableHookArgs) -> None:
        if not isinstance(dropped.exc_value, ActorKilled):
            told(dropped)

    sys.unraisablehook = tell


class SimClock:
    """The Clock of the world and its services: virtual time, with a wall clock that may jump."""

    def __init__(self, loop: asyncio.AbstractEventLoop, epoch_s: float) -> None:
        """`epoch_s` is the wall-clock time at the loop's time 0, in epoch seconds."""
        self._loop = loop
        self._epoch_s = epoch_s
        self.monotonic_s = loop.time
        """Virtual seconds since the loop was made; jumps do not touch it. Asked at every turn, so
        without a detour."""

    def now_s(self) -> float:
        """Epoch seconds."""
        return self._epoch_s + self._loop.time()

    def jump(self, seconds: float) -> None:
        """Set the wall clock forward, or back if negative."""
        self._epoch_s += seconds


class SkewedClock:
    """One actor's Clock: the world's, but its wall clock is off, and may jump by itself."""

    def __init__(self, world: SimClock, off_s: float = 0.0) -> None:
        self._world = world
        self.off_s = off_s
        """By how much it is ahead of the world's."""
        self.monotonic_s = world.monotonic_s
        """As the world's."""

    def now_s(self) -> float:
        """Epoch seconds as this actor believes them."""
        return self._world.now_s() + self.off_s


class SimIds:
    """Ids drawn from a seeded source; hand each actor its own, or interleavings change ids."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def fresh(self, kind: str) -> str:
        """A new id with the prefix `kind`."""
        return f"{kind}-{self._rng.getrandbits(64):016x}"
