"""An asyncio event loop whose clock jumps to the next timer when no callback is ready.

Invariant: the simulated program alone decides which callbacks run, and in which order. Callbacks with equal times run
in the order in which they were scheduled. Threads, sockets, and wall time cannot affect the order of callbacks.
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
    """A callback to run, with the fields that asyncio's futures read.

    The loop runs about 100 handles for each simulated bundle, so a handle omits the debug mode of asyncio.
    """

    __slots__ = ()
    _callback: Any
    _args: Any
    _loop: Any
    # asyncio sets these fields of a handle only in debug mode.
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
    """Callback to run at the loop time `when`, in seconds."""

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
        # A call of the base constructor would double the time to create a timer.
        self._callback = callback
        self._args = args
        self._loop = loop
        self._context = copy_context() if context is None else context
        self._cancelled = False
        self._when = when
        self._scheduled = True

    def cancel(self) -> None:
        """Cancel the timer as asyncio does. The loop is notified only if the timer has not fired yet."""
        if not self._cancelled:
            self._cancelled = True
            self._callback = self._args = None
            if self._scheduled:
                self._loop._timer_handle_cancelled(self)


class SimTask(asyncio.Task[Any]):
    """A task of an actor, whose hash is its serial number.

    TaskGroup and asyncio.wait store tasks in sets. The default hash is an address, so the order of cancellations would
    differ between processes.
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
        # The base constructor adds the task to a set, so the serial number is set before the constructor runs.
        self.serial = serial
        self.actor = actor
        super().__init__(coro, loop=loop, name=name, context=context)

    def __hash__(self) -> int:
        return self.serial

    def __str__(self) -> str:
        """Return the task's name and its waiting functions, such as `w-1 (run:103 > _fetch:140 > wait:212)`."""
        chain: list[str] = []
        coro: Any = self.get_coro()
        while (frame := getattr(coro, "cr_frame", None)) is not None:
            chain.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
            coro = coro.cr_await
        owner = f"{self.actor.name}/" if self.actor and self.actor.name != self.get_name() else ""
        return f"{owner}{self.get_name()} ({' > '.join(chain)})"


T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_YOUNG_STEPS = 1 << 18
_FULL_STEPS = 1 << 22
_MIN_CANCELLED_TIMERS = 64
_MAX_NAMED_TASKS = 20


class Deadlock(SimulationError):
    """Error if tasks wait, but no scheduled callback can wake any task."""


class TimeLimit(SimulationError):
    """Error if the program does not end within its limit of virtual seconds."""


class StepLimit(SimulationError):
    """Error if the program does not end within its limit of steps.

    A program that exceeds its limit of steps may loop without waiting.
    """


class Crashed(SimulationError):
    """Error if a task or callback raised an exception that no code retrieved.

    The `__cause__` of Crashed is the lost exception.
    """


class SimLoop(asyncio.BaseEventLoop):
    """An event loop in virtual time, which starts at 0 and is independent of the machine's clock.

    The loop opens no file descriptor, so the caller does not need to close the loop. Callers of `asyncio.as_completed`
    must pass tasks, because asyncio stores bare coroutines in a set ordered by addresses.

    With `inline_executor`, functions passed to a thread (asyncio.to_thread) run immediately in the loop.
    """

    _ready: deque[Any]
    _stopping: bool
    _thread_id: int | None

    def __init__(self, *, inline_executor: bool = False) -> None:
        super().__init__()
        self.steps = 0
        """Number of callbacks that the loop has run."""
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
        """Suppress the base class's warning about unclosed loops."""

    def run(self, main: Coroutine[Any, Any, T], *, limit_s: float | None = None, limit_steps: int | None = None) -> T:
        """Run `main` to its end, then stop all other tasks, as if the machine were switched off.

        `limit_s` (virtual seconds) and `limit_steps` (callbacks) count from the call of `run`. `run` raises the
        exception of `main`, Deadlock, TimeLimit, StepLimit, or Crashed for a lost exception of another task.
        """
        self._limit_s = math.inf if limit_s is None else self._now_s + limit_s
        self._limit_steps = math.inf if limit_steps is None else self.steps + limit_steps
        # The garbage collector would run generator finalizers after a number of allocations, which differs between
        # processes. SimLoop collects garbage after a fixed number of steps, so that all processes behave alike.
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
        """Return the virtual seconds since the loop was created."""
        return self._now_s

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        handle = SimHandle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        timer = SimTimer(when, callback, args, self, context)
        heappush(self._timers, (when, next(self._numbers), timer))
        return timer

    def call_later(
        self, delay: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        timer = SimTimer(self._now_s + delay, callback, args, self, context)
        heappush(self._timers, (timer._when, next(self._numbers), timer))
        return timer

    def _timer_handle_cancelled(self, _timer: asyncio.TimerHandle) -> None:
        # asyncio calls `_timer_handle_cancelled` only for timers that have not fired yet.
        self._timers_cancelled += 1
        if self._timers_cancelled > _MIN_CANCELLED_TIMERS and self._timers_cancelled * 2 > len(self._timers):
            self._timers[:] = [entry for entry in self._timers if not entry[2]._cancelled]
            heapify(self._timers)
            self._timers_cancelled = 0

    def _run_once(self) -> None:
        # `_run_once` loops over all instants, because `run_forever` of the base class would call `_run_once` once per
        # instant.
        ready, timers, crashes, frozen = self._ready, self._timers, self._crashes, self._frozen
        pop = ready.popleft
        next_collection = (self.steps // _YOUNG_STEPS + 1) * _YOUNG_STEPS
        while not self._stopping:
            if crashes and not self._ending:
                raise crashes.pop(0)
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
            count = len(ready)
            self.steps = steps = self.steps + count
            if steps > self._limit_steps:
                raise StepLimit(f"No end after {steps - count} steps, at {self._now_s:.3f} s. {self._waiting()}")
            for _ in range(count):
                handle = pop()
                if handle._cancelled or (frozen and self._park(handle)):
                    continue
                try:
                    handle._context.run(handle._callback, *handle._args)
                except (SystemExit, KeyboardInterrupt):
                    raise
                except BaseException as error:  # noqa: BLE001 - as in asyncio; `run` raises the error
                    message = f"Exception in callback {handle._callback!r}"
                    self.call_exception_handler({"message": message, "exception": error, "handle": handle})
                # The traceback of a failed task may refer to the handle that ran the task. Without a reference from the
                # handle to the task, no cycle exists, so the failure is reported immediately.
                handle._callback = None
            del handle  # a failed task is reported at once only if no variable refers to the task's last handle
            if steps >= next_collection:
                gc.collect(2 if steps // _FULL_STEPS != (steps - count) // _FULL_STEPS else 1)
                next_collection = (steps // _YOUNG_STEPS + 1) * _YOUNG_STEPS

    def _park(self, handle: Any) -> bool:
        """Store the handle until its actor is thawed. Return False for a handle whose actor is not frozen."""
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
            raise Deadlock(f"deadlock: nothing is scheduled at {self._now_s:.3f} s. {self._waiting()}")
        if when > self._now_s:
            self._now_s = when

    def _waiting(self) -> str:
        names = [str(task) for task in itertools.islice(self._tasks, _MAX_NAMED_TASKS)]
        more = len(self._tasks) - len(names)
        return f"Waiting: {', '.join(names)}{f' and {more} more' if more else ''}."

    # --- freezing and failing ---

    def freeze(self, actor: Actor) -> None:
        """Stop the actor, as SIGSTOP does.

        Expired timers and received answers of a frozen actor wait until the actor is thawed.
        """
        self._frozen.setdefault(actor, deque())

    def parked(self, actor: Actor) -> int:
        """Return the number of steps of a frozen actor that wait for the thaw."""
        return len(self._frozen.get(actor, ()))

    def thaw(self, actor: Actor) -> None:
        """Thaw the actor, and run the steps that became due while the actor was frozen, in their order."""
        if actor in self._frozen:
            self._thawed_s[actor] = self.time()
        self._ready.extend(self._frozen.pop(actor, ()))

    def thawed_s(self, actor: Actor) -> float:
        """Return the time when the actor was last thawed, or minus infinity if the actor was never thawed."""
        return self._thawed_s.get(actor, -math.inf)

    def is_frozen(self, actor: Actor) -> bool:
        return actor in self._frozen

    def fail(self, error: SimulationError) -> None:
        """End the run with `error`, which the simulated code cannot catch."""
        self._crashes.append(error)

    # --- tasks ---

    def create_task(
        self,
        coro: Coroutine[Any, Any, T] | Generator[Any, None, T],
        *,
        name: object = None,
        context: Context | None = None,
    ) -> asyncio.Task[T]:
        """Create a task of the actor whose context is current."""
        actor = CURRENT.get() if context is None else context.get(CURRENT)
        serial = next(self._numbers)
        # asyncio's default task names count up over the whole process, so the names in a second run would differ.
        label = f"task-{serial}" if name is None else str(name)
        task = SimTask(coro, serial, actor, loop=self, name=label, context=context)
        self._tasks[task] = None
        if actor is not None:
            actor.adopt(task)
        task.add_done_callback(self._on_end)
        return task

    def _on_end(self, task: asyncio.Task[Any]) -> None:
        assert isinstance(task, SimTask)
        del self._tasks[task]
        if task.actor is not None:
            task.actor.forget(task)
        if not task.cancelled() and task._log_traceback:
            # A weak reference to a failed task lets a lost exception be reported immediately.
            self._failed.append(weakref.ref(task))

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Store an error that asyncio would only log, so that `run` raises the error.

        A `__del__` method may call `call_exception_handler`.
        """
        error = context.get("exception")
        task = context.get("task") or context.get("future")
        handle = context.get("handle")
        if isinstance(task, SimTask):
            actor = task.actor
        else:
            actor = handle._context.get(CURRENT) if handle is not None else CURRENT.get()
        if (actor is not None and not actor.alive) or _reports_a_kill(error):
            return
        who = f"{actor.name}: " if actor is not None else ""
        what = f" ({task.get_name()})" if isinstance(task, asyncio.Task) else ""
        crash = Crashed(f"{who}{context['message']}{what}: {error!r}")
        crash.__cause__ = error
        self._crashes.append(crash)

    def _switch_off(self, *, interrupted: bool) -> list[SimulationError]:
        """End every task at the current instant, and return the exceptions that no code retrieved.

        An interrupt that arrives during the end of the tasks is raised, unless the run was already `interrupted`.
        """
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
                self.call_exception_handler({"message": message, "exception": error, "task": task_left})
        self._failed.clear()
        self._timers.clear()
        self._timers_cancelled = 0
        crashes, self._crashes = self._crashes, []
        # A task that waited for the interrupted task has raised the same interrupt again.
        if hit is not None and not interrupted:
            raise hit
        return crashes

    async def _cancel_all(self) -> None:
        me = asyncio.current_task()
        for _ in range(CANCEL_ROUNDS):
            others = [task for task in self._tasks if task is not me]
            if not others and not self._ready:
                gc.collect(0)  # The garbage collection may find generators, which the loop then closes.
                if not self._ready:
                    return
            for task in others:
                task.cancel()
            await asyncio.sleep(0)
        raise SimulationError(f"Tasks swallow every cancellation. {self._waiting()}")

    def _asyncgen_finalizer_hook(self, generator: AsyncGenerator[Any, Any]) -> None:
        # The interpreter calls `_asyncgen_finalizer_hook` for a generator that is dropped before its end. After the
        # run, no loop would await the closing of a generator, so the hook does nothing.
        if self.is_running():
            self.call_soon(self.create_task, generator.aclose())

    # --- the outside ---

    def call_soon_threadsafe(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        """Schedule a callback as call_soon does. A call from another thread raises SimulationError."""
        if self._thread_id not in (None, threading.get_ident()):
            raise SimulationError("Another thread called the simulation.")
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(self, _executor: object, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        """Run `func` before returning. A loop without `inline_executor` raises SimulationError."""
        if not self._inline_executor:
            raise SimulationError(f"The simulation cannot run {func!r}, because simulations do not use threads.")
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - the awaiting task receives it
            future.set_exception(error)
        return future


def _reports_a_kill(error: BaseException | None) -> bool:
    """Return whether the error only reports the kill of an actor, as futures of `asyncio.gather` may."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_reports_a_kill, error.exceptions))
    return isinstance(error, ActorKilled)


def _refuse(*_: object, **__: object) -> NoReturn:
    raise SimulationError("The simulation does not support sockets, pipes, processes, or signals.")


# SimLoop defines the methods in `_UNSUPPORTED`, because the base class would open real sockets before a failure.
_UNSUPPORTED = """
    create_connection create_server create_datagram_endpoint create_unix_connection create_unix_server
    connect_accepted_socket connect_read_pipe connect_write_pipe subprocess_exec subprocess_shell add_reader add_writer
    add_signal_handler getaddrinfo getnameinfo sock_accept sock_connect sock_recv sock_sendall
"""
for _name in _UNSUPPORTED.split():
    setattr(SimLoop, _name, _refuse)
