"""Actors (the processes of the simulated grid), their clocks and ids, and the control commands of their jobs.

Invariant: no port call of a dead actor's tasks has any effect. Actors read the time of the event loop, and derive ids
from a seed. Actors never read the clock or the random source of the machine.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import random
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

from batchlab.core.errors import BatchlabError
from batchlab.core.model import Control, JobId
from batchlab.core.ports import Clock
from batchlab.core.protocol.json_format import ControlCommand
from batchlab.core.protocol.mended_inputs import TaskInputs
from batchlab.manager.retry_rounds import TaskSelection

T = TypeVar("T")

CANCEL_ROUNDS = 1_000
"""Number of times that a task may catch a cancellation before the task counts as stuck."""


class SimulationError(BatchlabError):
    """Error for a broken rule of the simulation, or for a wrong setup of the simulation."""


class Violated(SimulationError):
    """Error for a broken promise of the grid."""


def check(holds: bool, promise: str, facts: str) -> None:
    """Raise Violated if the condition `holds` is false."""
    if not holds:
        raise Violated(f"{promise} is violated: {facts}")


class ActorKilled(BaseException):
    """Exception at a port call of a dead actor.

    ActorKilled is a BaseException, so that the `except Exception` of a retry loop cannot catch it.
    """


@runtime_checkable
class Freezer(Protocol):
    """Methods of an event loop that freezes actors. SimLoop implements Freezer."""

    def freeze(self, actor: Actor) -> None: ...

    def thaw(self, actor: Actor) -> None: ...


class Actor:
    """A process that can be killed at any moment: a group of tasks that SIGKILL ends together.

    Each restart of a process creates a new Actor. An Actor with the name of an earlier Actor continues the numbering of
    the earlier Actor's port calls.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.guarded = True
        """Whether all ports of the actor have a wrapper. An actor with an unwrapped port cannot be killed."""
        # A dict serves as an ordered set, because tasks must die in the order in which they were created.
        self._tasks: dict[asyncio.Task[Any], None] = {}

    def __repr__(self) -> str:
        return f"Actor({self.name!r}, {'alive' if self.alive else 'dead'})"

    def spawn(self, coro: Coroutine[Any, Any, T], *, name: str | None = None) -> asyncio.Task[T]:
        """Run `coro` as a task of the actor. Every task that `coro` creates also belongs to the actor.

        Callers wait for the task's end with `asyncio.wait([task])`, because `await task` would raise ActorKilled in the
        caller. Raise SimulationError if the actor is dead.
        """
        if not self.alive:
            coro.close()
            raise SimulationError(f"{self.name} is dead and cannot start anything.")
        context = contextvars.copy_context()
        context.run(CURRENT.set, self)
        loop = asyncio.get_running_loop()
        return loop.create_task(coro, name=name or self.name, context=context)

    def kill(self) -> None:
        """Simulate SIGKILL: disconnect the ports, then cancel all tasks in the order of their creation.

        The `finally` blocks of killed tasks run, because Python cannot drop a coroutine, but port calls in the blocks
        take no effect.
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
        """Simulate SIGSTOP: the actor stops until it is thawed or killed. A dead actor is ignored."""
        loop = asyncio.get_running_loop()
        if self.alive and isinstance(loop, Freezer):
            loop.freeze(self)

    def thaw(self) -> None:
        """Simulate SIGCONT."""
        loop = asyncio.get_running_loop()
        if isinstance(loop, Freezer):
            loop.thaw(self)

    def adopt(self, task: asyncio.Task[Any]) -> None:
        """Add a task to the actor. The event loop calls `adopt` for every task created in the actor's context."""
        self._tasks[task] = None
        if not self.alive:
            task.cancel()

    def forget(self, task: asyncio.Task[Any]) -> None:
        """Remove a task from the actor. The event loop calls `forget` at the end of each task."""
        self._tasks.pop(task, None)

    def _reap(self, rounds: int) -> None:
        # A killed task needs several cancellations, because `finally` blocks wait, and loops catch cancellations. All
        # cancellations happen at the same virtual instant, so that no code of a dead actor runs later.
        if not self._tasks:
            return
        if rounds == CANCEL_ROUNDS:
            names = ", ".join(task.get_name() for task in self._tasks)
            raise SimulationError(f"Killed actor {self.name} swallows every cancellation: {names}.")
        for task in list(self._tasks):
            task.cancel()
        asyncio.get_running_loop().call_soon(self._reap, rounds + 1)


CURRENT: contextvars.ContextVar[Actor | None] = contextvars.ContextVar("actor", default=None)
"""The actor whose code is running. New tasks inherit the current actor, because asyncio copies the context."""


def silence_killed_actors() -> None:
    """Silence Python's reports about dropped coroutines in a process that exits during a simulation."""
    original = sys.unraisablehook

    def report(dropped: sys.UnraisableHookArgs) -> None:
        if not isinstance(dropped.exc_value, ActorKilled):
            original(dropped)

    sys.unraisablehook = report


class SimClock:
    """The Clock of the world and its services: virtual time, with a wall clock that may jump."""

    def __init__(self, loop: asyncio.AbstractEventLoop, epoch_s: float) -> None:
        """`epoch_s` is the wall-clock time at the loop's time 0, in seconds since the epoch."""
        self._loop = loop
        self._epoch_s = epoch_s
        # `monotonic_s` is the method of the loop itself, because every simulated step calls it.
        self.monotonic_s = loop.time

    def now_s(self) -> float:
        return self._epoch_s + self._loop.time()

    def jump(self, seconds: float) -> None:
        """Set the wall clock forward, or back if the value is negative."""
        self._epoch_s += seconds


class SkewedClock:
    """Clock of one actor. The actor's wall clock is `off_s` seconds ahead of the world's clock, and may jump."""

    def __init__(self, world: SimClock, off_s: float = 0.0) -> None:
        self._world = world
        self.off_s = off_s
        self.monotonic_s = world.monotonic_s

    def now_s(self) -> float:
        return self._world.now_s() + self.off_s


class SimIds:
    """Source of ids drawn from a seeded random source.

    Each actor needs its own source of ids. With a shared source of ids, the interleaving of actors would change the
    ids.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def fresh(self, kind: str) -> str:
        """Return a new id with the prefix `kind`."""
        return f"{kind}-{self._rng.getrandbits(64):016x}"


@dataclass(slots=True)
class RetryRequest:
    """A user's request to retry some failed tasks of a job, or all of them if `chosen` is None."""

    chosen: TaskSelection | None
    inputs: TaskInputs = field(default_factory=dict)
    """Mended inputs of some of the tasks in `chosen`."""
    is_accepted: bool = False


@dataclass(slots=True)
class JobControls:
    """Record of the control commands, cancellations, retries, and ends of all jobs of a world."""

    clock: Clock
    forbidden_s: dict[JobId, float] = field(default_factory=dict)
    """Time of the acknowledged cancellation of each job that was not retried after the cancellation."""
    _words: dict[str, list[tuple[float, Control]]] = field(default_factory=dict)
    _cancelled: dict[str, int] = field(default_factory=dict)
    """The last round in which each job was canceled."""
    _ended: set[str] = field(default_factory=set)
    """Jobs with at least one ended round."""
    _retries: dict[JobId, list[int]] = field(default_factory=dict)
    """Numbers of requested and of acknowledged retries of each job."""
    choices: dict[JobId, list[RetryRequest]] = field(default_factory=dict)
    """Requests of users to retry each job."""

    # --- Control words ---------------------------------------------------------------------------

    def on_write(self, job: str, word: ControlCommand) -> None:
        """Record a control command that was written to the bucket."""
        self._words.setdefault(job, []).append((self.clock.monotonic_s(), word.control))
        if word.control is Control.CANCEL:
            self._cancelled[job] = max(word.round, self._cancelled.get(job, -1))

    def on_end(self, job: str) -> None:
        self._ended.add(job)

    def is_live(self, job: str) -> bool:
        """Return whether no round of the job has ended and the job's last control command is RUN."""
        words = self._words.get(job, [])
        return job not in self._ended and (not words or words[-1][1] is Control.RUN)

    def live_since_s(self, job: str) -> float:
        """Return the time when the job was last allowed to run, or infinity if the job is not live."""
        words = self._words.get(job, [])
        return (words[-1][0] if words else 0.0) if self.is_live(job) else math.inf

    def was_stopped(self, job: str, since_s: float) -> bool:
        """Return whether the job was canceled or paused at any time after `since_s`."""
        words = self._words.get(job, [])
        last = [word for at_s, word in words if at_s <= since_s][-1:]
        later = [word for at_s, word in words if at_s > since_s]
        return any(word is not Control.RUN for word in (*last, *later))

    def stopped_s(self, job: JobId) -> float:
        """Return the time since which the control object forbids starts, or infinity if the object allows starts."""
        since_s = math.inf
        for at_s, word in reversed(self._words.get(job, [])):
            if word is Control.RUN:
                break
            since_s = at_s
        return since_s

    def was_cancelled(self, job: JobId, round_: int = 0) -> bool:
        """Return whether a user or the failure limit canceled the job in `round_` or in a later round."""
        return self._cancelled.get(job, -1) >= round_

    # --- Requests of users -----------------------------------------------------------------------

    def on_cancel_request(self, job: JobId) -> Callable[[], None]:
        """Record that a user cancels the job.

        The caller calls the returned function when the cancellation is acknowledged.

        A cancellation that overlaps a retry does not count, because the order of the two requests is unknown.
        """
        before = list(self._retries.setdefault(job, [0, 0]))

        def on_acknowledged() -> None:
            if self._retries[job] == before and before[0] == before[1]:
                self.forbidden_s[job] = self.clock.monotonic_s()

        return on_acknowledged

    def on_choice(self, job: JobId, chosen: TaskSelection | None, inputs: TaskInputs) -> RetryRequest:
        """Record the failures and the mended inputs of a user's retry."""
        request = RetryRequest(chosen, inputs)
        self.choices.setdefault(job, []).append(request)
        return request

    def on_retry_request(self, job: JobId) -> Callable[[], None]:
        """Record that a user retries the job. The caller calls the returned function when the retry is acknowledged."""
        counts = self._retries.setdefault(job, [0, 0])
        counts[0] += 1
        self.forbidden_s.pop(job, None)

        def on_acknowledged() -> None:
            counts[1] += 1

        return on_acknowledged


class Pause:
    """A faster `asyncio.sleep` (for more than 0 s) that stores its event loop.

    `asyncio.sleep` looks up the running loop at each call, which costs a system call for the process id. Every
    simulated port call and task uses a pause, so a pause must be fast. A pause ends at the same time, and in the same
    order, as a call of `asyncio.sleep`.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __call__(self, seconds: float) -> None:
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        timer = loop.call_later(seconds, _wake, future)
        try:
            await future
        except BaseException:
            timer.cancel()
            raise

    async def until(self, next_s: Callable[[], float]) -> None:
        """Wait until `next_s` returns 0. Until then, `next_s` returns the seconds to its next call.

        Timers call `next_s`, so the caller's task runs only at the end of the wait. A task that checks a condition
        between two pauses resumes each of its coroutines, which takes ten times as long.
        """
        seconds = next_s()
        if seconds <= 0:
            return
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        timer: asyncio.TimerHandle

        def check() -> None:
            nonlocal timer
            seconds = next_s()
            if seconds > 0:
                timer = loop.call_later(seconds, check)
            else:
                _wake(future)

        timer = loop.call_later(seconds, check)
        try:
            await future
        except BaseException:
            timer.cancel()
            raise


def _wake(future: asyncio.Future[None]) -> None:
    if not future.cancelled():
        future.set_result(None)
