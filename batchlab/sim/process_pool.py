"""Work spread over processes, one item at a time, so that a process that dies costs one item.

Invariant: every item comes back once, as its result or as the way its process ended; and when the
generator is closed, by whatever exception, none of its processes is left.
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

ENDLESS_S = 900
"""Real seconds after which an item has hung its process, which SIGALRM then ends."""

# Not fork: it copies whatever threads and locks the parent has. Not concurrent.futures: a process
# that dies breaks its whole pool, and nobody knows which item killed it.
_SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True, slots=True)
class Died:
    """The process that had the item has ended instead of answering."""

    exit_code: int | None
    """Negative: the signal that ended it."""


class Crew(Generic[T, R]):
    """As many processes as there is work for, at most `processes`, that all do the same `work` and
    stay from one lot of items to the next. `work`, items and results are pickled."""

    def __init__(self, work: Callable[[T], R], processes: int) -> None:
        self.processes = processes
        self._work = work
        self._idle: dict[Connection, SpawnProcess] = {}

    def each(self, items: Iterable[T]) -> Generator[tuple[T, R | Died], None, None]:
        """Each item with what `work` makes of it, in the order in which they are done.

        Items are taken from their source as processes get free, so it may be endless. Where this
        is closed early, what was in hand then goes with its process.
        """
        left = iter(items)
        busy: dict[Connection, tuple[SpawnProcess, T]] = {}
        try:
            for item in islice(left, self.processes):
                self._give(item, busy)
            while busy:
                for pipe in wait(list(busy)):
                    assert isinstance(pipe, Connection)
                    process, done = busy[pipe]
                    result: R | Died = _answer(pipe, process)
                    del busy[pipe]
                    if isinstance(result, Died):
                        _dismiss(pipe, process)
                    else:
                        self._idle[pipe] = process
                    for item in islice(left, 1):
                        self._give(item, busy)
                    yield done, result
        finally:
            for pipe, (process, _) in busy.items():
                _dismiss(pipe, process)

    def close(self) -> None:
        """End those that have nothing to do; nobody else is left once `each` is over."""
        while self._idle:
            _dismiss(*self._idle.popitem())

    def _give(self, item: T, busy: dict[Connection, tuple[SpawnProcess, T]]) -> None:
        pipe, process = self._idle.popitem() if self._idle else _hire(self._work)
        busy[pipe] = process, item
        with suppress(BrokenPipeError, ConnectionResetError):  # it has just died: _answer tells
            pipe.send(item)


def spread(
    work: Callable[[T], R], items: Iterable[T], processes: int
) -> Generator[tuple[T, R | Died], None, None]:
    """See Crew.each; the processes are there for these items only."""
    with closing(Crew(work, processes)) as crew:
        yield from crew.each(items)


def _hire(work: Callable[[T], R]) -> tuple[Connection, SpawnProcess]:
    pipe, far_end = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_serve, args=(far_end, work), daemon=True)
    # A terminal's Ctrl-C reaches the whole process group; only this process shall answer it. The
    # mask is inherited, whereas a handler in the child would come too late for its first second.
    # The first start of a process also starts multiprocessing's tracker, which unblocks SIGINT.
    ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    far_end.close()
    return pipe, process


def _answer(pipe: Connection, process: SpawnProcess) -> R | Died:
    try:
        result: R = pipe.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        return Died(process.exitcode)
    return result


def _dismiss(pipe: Connection, process: SpawnProcess) -> None:
    process.kill()
    process.join()
    process.close()
    pipe.close()


def _serve(pipe: Connection, work: Callable[[T], R]) -> None:
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return  # our parent has been killed
        # Code that loops without waiting cannot be interrupted from within the simulation.
        signal.alarm(ENDLESS_S)
        result = work(item)
        signal.alarm(0)  # whoever waits for its next item hangs nobody
        pipe.send(result)
