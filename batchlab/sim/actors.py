"""Actors (the processes of the simulated grid), and their clocks and ids.

Invariant: once an actor is dead, no port call of its tasks has any effect. Time is the event
loop's, and ids come from a seed. Nothing here reads the machine's clock or its random source.
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
"""Number of times that a task may catch a cancellation before it counts as stuck."""


class SimulationError(BatchlabError):
    """The simulated program broke a rule of the simulation, or the simulation was set up
    wrongly."""


class ActorKilled(BaseException):
    """A dead actor made a port call.

    This is a BaseException, so that the `except Exception` of a retry loop cannot catch it.
    """


@runtime_checkable
class Freezer(Protocol):
    """The methods that an event loop needs to freeze actors. SimLoop has them."""

    def freeze(self, actor: Actor) -> None: ...

    def thaw(self, actor: Actor) -> None: ...


class Actor:
    """A process that can be killed at any moment: a group of tasks that SIGKILL ends together.

    A restarted process is a new Actor. Give it the old name to continue its fault numbering.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.guarded = True
        """False once the actor has a port without a wrapper. It can then no longer be killed."""
        # A dict is used as an ordered set: tasks must die in the order in which they were created.
        self._tasks: dict[asyncio.Task[Any], None] = {}

    def __repr__(self) -> str:
        return f"Actor({self.name!r}, {'alive' if self.alive else 'dead'})"

    def spawn(self, coro: Coroutine[Any, Any, T], *, name: str | None = None) -> asyncio.Task[T]:
        """Run `coro` as a task of this actor. Every task that it creates also belongs to the actor.

        Wait for its end with `asyncio.wait([task])`: awaiting the task itself would raise
        ActorKilled in the waiting task. Raises SimulationError on a dead actor.
        """
        if not self.alive:
            coro.close()
            raise SimulationError(f"{self.name} is dead and cannot start anything.")
        context = contextvars.copy_context()
        context.run(CURRENT.set, self)
        loop = asyncio.get_running_loop()
        return loop.create_task(coro, name=name or self.name, context=context)

    def kill(self) -> None:
        """Simulate SIGKILL: disconnect the ports, then cancel all tasks at this instant, in the
        order of their creation.

        Their `finally` blocks run, because a coroutine cannot be dropped, but they have no effect.
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
        """Simulate SIGSTOP: the actor stops until it is thawed or killed. A dead actor is left as
        it is."""
        loop = asyncio.get_running_loop()
        if self.alive and isinstance(loop, Freezer):
            loop.freeze(self)

    def thaw(self) -> None:
        """Simulate SIGCONT."""
        loop = asyncio.get_running_loop()
        if isinstance(loop, Freezer):
            loop.thaw(self)

    def adopt(self, task: asyncio.Task[Any]) -> None:
        """Add a task. The loop calls this for every task created in this actor's context."""
        self._tasks[task] = None
        if not self.alive:
            task.cancel()

    def forget(self, task: asyncio.Task[Any]) -> None:
        """Remove a task. The loop calls this when the task has ended."""
        self._tasks.pop(task, None)

    def _reap(self, rounds: int) -> None:
        # One cancellation is not enough, because `finally` blocks wait and loops catch it. All
        # rounds happen at the same virtual instant, so that no code of a dead actor runs later.
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
    """Silence Python's reports about dropped coroutines, for a process that exits in the middle of
    a simulation."""
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
        """Return the virtual seconds since the loop was made. Jumps do not change it. This is
        called at every step, so it reads the loop's field directly."""

    def now_s(self) -> float:
        """Return the wall-clock time in epoch seconds."""
        return self._epoch_s + self._loop.time()

    def jump(self, seconds: float) -> None:
        """Set the wall clock forward, or back if the value is negative."""
        self._epoch_s += seconds


class SkewedClock:
    """One actor's Clock: the world's clock, with a wall clock that is off and may jump by
    itself."""

    def __init__(self, world: SimClock, off_s: float = 0.0) -> None:
        self._world = world
        self.off_s = off_s
        """Seconds by which the wall clock is ahead of the world's."""
        self.monotonic_s = world.monotonic_s
        """Return the world's virtual seconds."""

    def now_s(self) -> float:
        """Return the epoch seconds that this actor reads."""
        return self._world.now_s() + self.off_s


class SimIds:
    """Ids drawn from a seeded source. Each actor needs its own source: with a shared one, the
    interleaving of actors would change the ids."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def fresh(self, kind: str) -> str:
        """Return a new id with the prefix `kind`."""
        return f"{kind}-{self._rng.getrandbits(64):016x}"
