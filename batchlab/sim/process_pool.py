"""A process pool that runs one item at a time per process, so that the death of a process costs one item.

Invariant: every item is returned once, with its result or with the death of its process. After the generator of a pool
is closed, even by an exception, all processes of the pool have ended.
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
"""Real seconds after which SIGALRM ends a process that does not finish its item."""

# The start method "fork" would copy the parent's threads and locks. In concurrent.futures, the death of a process ends
# the whole pool, and the pool does not report the item of the dead process.
_SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True, slots=True)
class ProcessDeath:
    """Death of a process before the process returned the result of its item."""

    exit_code: int | None
    """Exit code of the process. A negative exit code is the number of the signal that ended the process."""


class ProcessPool(Generic[T, R]):
    """Pool of at most `processes` processes that run the same function `work`.

    The pool starts at most one process per item. The processes of a pool stay alive between calls of `each`. `work`,
    items, and results are pickled.
    """

    def __init__(self, work: Callable[[T], R], processes: int) -> None:
        self.processes = processes
        self._work = work
        self._idle: dict[Connection, SpawnProcess] = {}

    def each(self, items: Iterable[T]) -> Generator[tuple[T, R | ProcessDeath], None, None]:
        """Yield each item with the result of `work`, in the order of completion.

        `each` reads an item from the source when a process is free, so the source may be endless. If the generator is
        closed early, the processes of unfinished items are ended.
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
        """End the idle processes. All processes are idle after the end of `each`."""
        while self._idle:
            _end(*self._idle.popitem())

    def _start_item(self, item: T, busy: dict[Connection, tuple[SpawnProcess, T]]) -> None:
        pipe, process = self._idle.popitem() if self._idle else _start_process(self._work)
        busy[pipe] = process, item
        # `_result` reports the death of a process with a broken pipe.
        with suppress(BrokenPipeError, ConnectionResetError):
            pipe.send(item)


def spread(
    work: Callable[[T], R], items: Iterable[T], processes: int
) -> Generator[tuple[T, R | ProcessDeath], None, None]:
    """Run `work` on `items` as ProcessPool.each does, in a pool that ends with the call."""
    with closing(ProcessPool(work, processes)) as pool:
        yield from pool.each(items)


def _start_process(work: Callable[[T], R]) -> tuple[Connection, SpawnProcess]:
    pipe, far_end = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_serve, args=(far_end, work), daemon=True)
    # Ctrl-C in a terminal reaches the whole process group, but only the parent process must react to the signal. A
    # child inherits the signal mask, whereas a handler in the child would be set too late. The first start of a process
    # also starts multiprocessing's tracker, which unblocks SIGINT.
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
            return  # A closed pipe means that the parent has been killed.
        # The simulation cannot interrupt code that loops without waiting, so the process needs an alarm.
        signal.alarm(MAX_ITEM_S)
        result = work(item)
        signal.alarm(0)  # The wait for the next item must not raise the alarm.
        pipe.send(result)
