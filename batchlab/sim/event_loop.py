"""An asyncio event loop whose clock jumps to the next timer when nothing is left to run.

Invariant: what runs, and in which order, follows from the program alone. Equal times run in the
order they were asked for; threads, sockets and wall time have no way in.

What the simulator's loop runs: asyncio's handles, without what those pay for debugging.

Invariant: a handle's fields are those of asyncio's own, which the loop and asyncio's futures read.
They are made and run a hundred times for each simulated bundle.

The tasks of the simulator's loop.

Invariant: nothing about a task follows from its address.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import math
import threading
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Sequence
from contextvars import Context, copy_context
from heapq import heapify, heappop, heappush
from typing import Any, NoReturn, TypeVar, TypeVarTuple

from batchlab.sim.actors import CANCEL_ROUNDS, CURRENT, Actor, ActorKilled, SimulationError


class SimHandle(asyncio.Handle):
    """A callback that is to run."""

    __slots__ = ()
    _callback: Any
    _args: Any
    _loop: Any
    # Only debugging sets them.
    _repr = None
    _source_traceback = None

    def __init__(
        self,
        callback: Callable[..., object],
        args: Sequence[Any],
        loop: asyncio.AbstractEventLoop,
        context: Context | None,
    ) -> None:
        self._callback = callback
        self._args = args
        self._loop = loop
        self._context = copy_context() if context is None else context
        self._cancelled = False


class SimTimer(SimHandle, asyncio.TimerHandle):
    """A callback that is to run at `when`, seconds of its loop. The loop says `_scheduled`."""

    __slots__ = ()
    _when: float
    _scheduled: bool

    def __init__(
        self,
        when: float,
        callback: Callable[..., object],
        args: Sequence[Any],
        loop: asyncio.AbstractEventLoop,
        context: Context | None,
    ) -> None:
        # Not by way of the base's, which takes as long again.
        self._callback = callback
        self._args = args
        self._loop = loop
        self._context = copy_context() if context is None else context
        self._cancelled = False
        self._when = when
        self._scheduled = True

    def cancel(self) -> None:
        """As asyncio's; the loop is told only of one that has not fired yet."""
        if not self._cancelled:
            self._cancelled = True
            self._callback = self._args = None
            if self._scheduled:
                self._loop._timer_handle_cancelled(self)


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


T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_YOUNG_STEPS = 1 << 16
_FULL_STEPS = 1 << 20
_FEW_TIMERS = 64
_NAMED = 20


class Deadlock(SimulationError):
    """Tasks wait, but nothing is scheduled that could wake them."""


class TimeLimit(SimulationError):
    """The program has not ended within its limit of virtual seconds."""


class StepLimit(SimulationError):
    """The program has not ended within its limit of steps: perhaps it spins without waiting."""


class Crashed(SimulationError):
    """A task or callback raised an exception that nobody looked at; it is the `__cause__`."""


class SimLoop(asyncio.BaseEventLoop):
    """The loop. Time starts at 0 and has no relation to the machine's.

    It holds no file descriptor and need not be closed. `asyncio.as_completed` over bare coroutines
    keeps them in a set of addresses: hand it tasks.
    """

    _ready: deque[Any]
    _stopping: bool
    _thread_id: int | None

    def __init__(self, *, inline_executor: bool = False) -> None:
        """`inline_executor` runs what is meant for a thread (asyncio.to_thread) on the spot."""
        super().__init__()
        self.steps = 0
        """Callbacks run so far."""
        self._inline_executor = inline_executor
        self._now_s = 0.0
        self._timers: list[tuple[float, int, SimTimer]] = []
        self._timers_cancelled = 0
        self._numbers = itertools.count(1)
        self._limit_s = math.inf
        self._limit_steps = math.inf
        self._tasks: dict[SimTask, None] = {}
        self._failed: list[weakref.ref[SimTask]] = []
        self._crashes: list[SimulationError] = []
        self._ending = False
        self._frozen: dict[Actor, deque[Any]] = {}
        self._thawed_s: dict[Actor, float] = {}

    def __del__(self) -> None:
        """Silences the base's complaint about loops that were not closed."""

    def run(
        self,
        main: Coroutine[Any, Any, T],
        *,
        limit_s: float | None = None,
        limit_steps: int | None = None,
    ) -> T:
        """Run `main` to its end, then end whatever still runs, as a machine that is switched off.

        `limit_s` is in virtual seconds, `limit_steps` in callbacks, both from now. Raises what
        `main` raises, Deadlock, TimeLimit, StepLimit, or Crashed as soon as some other task's
        exception is lost.
        """
        self._limit_s = math.inf if limit_s is None else self._now_s + limit_s
        self._limit_steps = math.inf if limit_steps is None else self.steps + limit_steps
        # The collector runs after a number of allocations, which differs from process to process,
        # and it runs finalizers of generators: so here it runs after a number of steps instead.
        collecting = gc.isenabled()
        gc.disable()
        try:
            result = self.run_until_complete(self.create_task(main, name="main"))
        except BaseException as error:
            interrupted = isinstance(error, (KeyboardInterrupt, SystemExit))
            for crash in self._switch_off(interrupted=interrupted):
                error.add_note(f"Also: {crash}")
            raise
        else:
            for crash in self._switch_off(interrupted=False):
                raise crash
            return result
        finally:
            if collecting:
                gc.enable()

    # --- time and order ---

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._now_s

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        """As asyncio's."""
        handle = SimHandle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_at(
        self,
        when: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """As asyncio's."""
        timer = SimTimer(when, callback, args, self, context)
        heappush(self._timers, (when, next(self._numbers), timer))
        return timer

    def call_later(
        self,
        delay: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """As asyncio's."""
        timer = SimTimer(self._now_s + delay, callback, args, self, context)
        heappush(self._timers, (timer._when, next(self._numbers), timer))
        return timer

    def _timer_handle_cancelled(self, _timer: asyncio.TimerHandle) -> None:
        # Called for timers that have not fired yet.
        self._timers_cancelled += 1
        if self._timers_cancelled > _FEW_TIMERS and self._timers_cancelled * 2 > len(self._timers):
            self._timers[:] = [entry for entry in self._timers if not entry[2]._cancelled]
            heapify(self._timers)
            self._timers_cancelled = 0

    def _run_once(self) -> None:
        # Called over and over by the base's run_forever, whose own loop costs a call per instant.
        ready, timers = self._ready, self._timers
        while not self._stopping:
            if self._crashes and not self._ending:
                raise self._crashes.pop(0)
            if not ready:
                self._jump()
            now_s = self._now_s
            while timers and timers[0][0] <= now_s:
                timer = heappop(timers)[2]
                timer._scheduled = False
                if timer._cancelled:
                    self._timers_cancelled -= 1
                else:
                    ready.append(timer)
            self._run_ready(ready)

    def _run_ready(self, ready: deque[Any]) -> None:
        count = len(ready)
        before = self.steps
        self.steps = after = before + count
        if after > self._limit_steps:
            raise StepLimit(
                f"No end after {before} steps, at {self._now_s:.3f} s. {self._waiting()}"
            )
        take, frozen = ready.popleft, self._frozen
        for _ in range(count):
            handle = take()
            if not handle._cancelled:
                if frozen and self._parked(handle):
                    continue
                try:
                    handle._context.run(handle._callback, *handle._args)
                except (SystemExit, KeyboardInterrupt):
                    raise
                except BaseException as error:  # noqa: BLE001 - as asyncio's, for `run` to raise
                    message = f"Exception in callback {handle._callback!r}"
                    self.call_exception_handler(
                        {"message": message, "exception": error, "handle": handle}
                    )
                # A failed task's traceback may hold this handle; without the way back to the task
                # no cycle keeps the failure from surfacing at once.
                handle._callback = None
        if before // _YOUNG_STEPS != after // _YOUNG_STEPS:
            gc.collect(2 if before // _FULL_STEPS != after // _FULL_STEPS else 1)

    def _parked(self, handle: Any) -> bool:
        actor = handle._context.get(CURRENT)
        waiting = self._frozen.get(actor) if actor is not None else None
        if waiting is None:
            return False
        waiting.append(handle)
        return True

    def _jump(self) -> None:
        while self._timers and self._timers[0][2]._cancelled:
            heappop(self._timers)[2]._scheduled = False
            self._timers_cancelled -= 1
        when = self._timers[0][0] if self._timers else math.inf
        if when > self._limit_s:
            self._now_s = self._limit_s
            raise TimeLimit(f"No end within the limit, at {self._limit_s:.3f} s. {self._waiting()}")
        if when == math.inf:
            raise Deadlock(
                f"deadlock: nothing is scheduled at {self._now_s:.3f} s. {self._waiting()}"
            )
        if when > self._now_s:
            self._now_s = when

    def _waiting(self) -> str:
        names = [str(task) for task in itertools.islice(self._tasks, _NAMED)]
        more = len(self._tasks) - len(names)
        return f"Waiting: {', '.join(names)}{f' and {more} more' if more else ''}."

    # --- freezing and failing ---

    def freeze(self, actor: Actor) -> None:
        """From now on nothing of the actor runs, as after SIGSTOP: its timers come due, and answers
        arrive, but it sees them only once it is thawed."""
        self._frozen.setdefault(actor, deque())

    def parked(self, actor: Actor) -> int:
        """How many steps of a frozen actor wait until it is thawed."""
        return len(self._frozen.get(actor, ()))

    def thaw(self, actor: Actor) -> None:
        """What has become due meanwhile runs now, in the order in which it became so."""
        if actor in self._frozen:
            self._thawed_s[actor] = self.time()
        self._ready.extend(self._frozen.pop(actor, ()))

    def thawed_s(self, actor: Actor) -> float:
        """Return when the actor was last thawed, or minus infinity if it never was."""
        return self._thawed_s.get(actor, -math.inf)

    def is_frozen(self, actor: Actor) -> bool:
        return actor in self._frozen

    def fail(self, error: SimulationError) -> None:
        """End the run with `error`, whoever is running: no code under test can swallow it."""
        self._crashes.append(error)

    # --- tasks ---

    def create_task(
        self,
        coro: Coroutine[Any, Any, T] | Generator[Any, None, T],
        *,
        name: object = None,
        context: Context | None = None,
    ) -> asyncio.Task[T]:
        """As asyncio's; the task belongs to the actor in whose context it is created."""
        actor = CURRENT.get() if context is None else context.get(CURRENT)
        serial = next(self._numbers)
        # asyncio's own default name counts over the whole process: the second run would differ.
        label = f"task-{serial}" if name is None else str(name)
        task = SimTask(coro, serial, actor, loop=self, name=label, context=context)
        self._tasks[task] = None
        if actor is not None:
            actor.adopt(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        assert isinstance(task, SimTask)
        del self._tasks[task]
        if task.actor is not None:
            task.actor.forget(task)
        if not task.cancelled() and task._log_traceback:
            # Weak, so that an exception nobody can look at any more surfaces at once.
            self._failed.append(weakref.ref(task))

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Keeps what asyncio would only log, for `run` to raise; it may be called by `__del__`."""
        error = context.get("exception")
        task = context.get("task") or context.get("future")
        handle = context.get("handle")
        if isinstance(task, SimTask):
            actor = task.actor
        else:
            actor = handle._context.get(CURRENT) if handle is not None else CURRENT.get()
        if (actor is not None and not actor.alive) or _of_the_dead(error):
            return
        who = f"{actor.name}: " if actor is not None else ""
        what = f" ({task.get_name()})" if isinstance(task, asyncio.Task) else ""
        crash = Crashed(f"{who}{context['message']}{what}: {error!r}")
        crash.__cause__ = error
        self._crashes.append(crash)

    def _switch_off(self, *, interrupted: bool) -> list[SimulationError]:
        """End every task at this instant; returns the exceptions that nobody has looked at. Raises
        the interrupt that hits it, where the run has not been `interrupted` already."""
        self._limit_s = self._limit_steps = math.inf
        self._ending = True
        for task in self._tasks:
            if task.actor is not None:
                task.actor.alive = False
        for actor in list(self._frozen):
            self.thaw(actor)
        ending = self.create_task(self._cancel_all(), name="switch off")
        hit: BaseException | None = None
        while not ending.done():
            try:
                self.run_until_complete(ending)
            except (KeyboardInterrupt, SystemExit) as interrupt:
                hit = hit or interrupt
        ending.result()
        self._ending = False
        for failed in self._failed:
            task_left = failed()
            if task_left is not None and task_left._log_traceback:
                message = "task exception was never retrieved"
                error = task_left.exception()
                self.call_exception_handler(
                    {"message": message, "exception": error, "task": task_left}
                )
        self._failed.clear()
        self._timers.clear()
        self._timers_cancelled = 0
        crashes, self._crashes = self._crashes, []
        # Whoever waited for a task that was interrupted has raised that once more.
        if hit is not None and not interrupted:
            raise hit
        return crashes

    async def _cancel_all(self) -> None:
        me = asyncio.current_task()
        for _ in range(CANCEL_ROUNDS):
            others = [task for task in self._tasks if task is not me]
            if not others and not self._ready:
                gc.collect(0)  # which may find generators, whose closing is then ready
                if not self._ready:
                    return
            for task in others:
                task.cancel()
            await asyncio.sleep(0)
        raise SimulationError(f"Tasks swallow every cancellation. {self._waiting()}")

    def _asyncgen_finalizer_hook(self, generator: AsyncGenerator[Any, Any]) -> None:
        # Called by the interpreter for a generator dropped half-way. As the base's, but not after
        # the run, when nobody would await the closing.
        if self.is_running():
            self.call_soon(self.create_task, generator.aclose())

    # --- the outside ---

    def call_soon_threadsafe(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        """As call_soon; raises SimulationError in any other thread."""
        if self._thread_id not in (None, threading.get_ident()):
            raise SimulationError("Another thread spoke to the simulation.")
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(
        self, _executor: object, func: Callable[[*Ts], T], *args: *Ts
    ) -> asyncio.Future[T]:
        """Raises SimulationError, or with `inline_executor` runs `func` before it returns."""
        if not self._inline_executor:
            raise SimulationError(f"The simulation has no threads to run {func!r} in.")
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - it belongs to whoever awaits the future
            future.set_exception(error)
        return future


def _of_the_dead(error: BaseException | None) -> bool:
    """Whether it only says that an actor was killed, as it may in the futures of gather."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_of_the_dead, error.exceptions))
    return isinstance(error, ActorKilled)


def _no_outside(*_: object, **__: object) -> NoReturn:
    raise SimulationError("The simulation has no sockets, pipes, processes or signals.")


# Named, because the base would open real sockets before it fails.
for _name in (
    "create_connection",
    "create_server",
    "create_datagram_endpoint",
    "create_unix_connection",
    "create_unix_server",
    "connect_accepted_socket",
    "connect_read_pipe",
    "connect_write_pipe",
    "subprocess_exec",
    "subprocess_shell",
    "add_reader",
    "add_writer",
    "add_signal_handler",
    "getaddrinfo",
    "getnameinfo",
    "sock_accept",
    "sock_connect",
    "sock_recv",
    "sock_sendall",
):
    setattr(SimLoop, _name, _no_outside)
