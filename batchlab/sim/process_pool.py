"""A process pool that runs one item at a time per process, so that the death of a process costs one item.

Invariant: every item is returned once, with its result or with the end of its process. After the generator is closed,
by any exception, all its processes have ended.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterable
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from multiprocessing.resource_tracker import ensure_running
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

MAX_ITEM_S = 900
"""Real seconds after which SIGALRM ends a process that hangs in an item."""

# fork would copy the parent's threads and locks. In concurrent.futures, the death of a process ends the whole pool, and
# does not show which item caused the death.
_SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True, slots=True)
class ProcessDeath:
    """End of the process of an item without a result."""

    exit_code: int | None
    """Exit code of the process. A negative value is the signal that ended it."""


class ProcessPool(Generic[T, R]):
    """A pool of at most `processes` processes for the same `work`.

    The pool starts no more processes than there are items. The processes stay alive between calls of `each`. `work`,
    items, and results are pickled.
    """

    def __init__(self, work: Callable[[T], R], processes: int) -> None:
        self.processes = processes
        self._work = work
        self._idle: dict[Connection, SpawnProcess] = {}

    def each(self, items: Iterable[T]) -> Generator[tuple[T, R | ProcessDeath], None, None]:
        """Yield each item with the result of `work`, in the order of completion.

        Items are read from their source as processes become free, so the source may be endless. If the generator is
        closed early, unfinished items end with their processes.
        """
        remaining = iter(items)
        busy: dict[Connection, tuple[SpawnProcess, T]] = {}
        try:
            for item in islice(remaining, self.processes):
                self._start_item(item, busy)
            while busy:
                for pipe in wait(list(busy)):
                    assert isinstance(pipe, Connection)
                    process, done = busy[pipe]
                    result: R | ProcessDeath = _result(pipe, process)
                    del busy[pipe]
                    if isinstance(result, ProcessDeath):
                        _end(pipe, process)
                    else:
                        self._idle[pipe] = process
                    for item in islice(remaining, 1):
                        self._start_item(item, busy)
                    yield done, result
        finally:
            for pipe, (process, _) in busy.items():
                _end(pipe, process)

    def close(self) -> None:
        """End the idle processes. After the end of `each`, all processes are idle."""
        while self._idle:
            _end(*self._idle.popitem())

    def _start_item(self, item: T, busy: dict[Connection, tuple[SpawnProcess, T]]) -> None:
        pipe, process = self._idle.popitem() if self._idle else _start_process(self._work)
        busy[pipe] = process, item
        with suppress(BrokenPipeError, ConnectionResetError):  # _result reports the death.
            pipe.send(item)


def spread(
    work: Callable[[T], R], items: Iterable[T], processes: int
) -> Generator[tuple[T, R | ProcessDeath], None, None]:
    """Run `work` on these items as ProcessPool.each does, with processes for this call only."""
    with closing(ProcessPool(work, processes)) as pool:
        yield from pool.each(items)


def _start_process(work: Callable[[T], R]) -> tuple[Connection, SpawnProcess]:
    pipe, far_end = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_serve, args=(far_end, work), daemon=True)
    # A terminal's Ctrl-C reaches the whole process group, but only this process must handle it. The mask is inherited,
    # whereas a handler in the child would be set too late. The first start of a process also starts multiprocessing's
    # tracker, which unblocks SIGINT.
    ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    far_end.close()
    return pipe, process


def _result(pipe: Connection, process: SpawnProcess) -> R | ProcessDeath:
    try:
        result: R = pipe.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        return ProcessDeath(process.exitcode)
    return result


def _end(pipe: Connection, process: SpawnProcess) -> None:
    process.kill()
    process.join()
    process.close()
    pipe.close()


def _serve(pipe: Connection, work: Callable[[T], R]) -> None:
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return  # The parent has been killed.
        # Code that loops without waiting cannot be interrupted from within the simulation.
        signal.alarm(MAX_ITEM_S)
        result = work(item)
        signal.alarm(0)  # The wait for the next item must not raise the alarm.
        pipe.send(result)
