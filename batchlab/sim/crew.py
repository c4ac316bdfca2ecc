"""Work spread over processes, one item at a time, so that a process that dies costs one item.

Invariant: every item comes back once, as its result or as the way its process ended; and when the
generator is closed, by whatever exception, none of its processes is left.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
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


@dataclass(slots=True)
class _Member(Generic[T]):
    process: SpawnProcess
    item: T


def spread(
    work: Callable[[T], R], items: Iterable[T], processes: int
) -> Generator[tuple[T, R | Died], None, None]:
    """Each item with what `work` makes of it, in the order in which they are done.

    `work`, items and results are pickled. Items are taken from their source as processes get
    free, so it may be endless.
    """
    left = iter(items)
    crew: dict[Connection, _Member[T]] = {}
    try:
        for item in islice(left, processes):
            _hire(crew, work, item)
        while crew:
            for pipe in wait(list(crew)):
                assert isinstance(pipe, Connection)
                member = crew[pipe]
                done, result = member.item, _answer(pipe, member.process)
                following = next(left, None)
                if following is None or isinstance(result, Died):
                    _dismiss(pipe, crew.pop(pipe))
                if following is not None and isinstance(result, Died):
                    _hire(crew, work, following)
                elif following is not None:
                    member.item = following
                    _hand(pipe, following)
                yield done, result
    finally:
        for pipe, member in crew.items():
            _dismiss(pipe, member)


def _hire(crew: dict[Connection, _Member[T]], work: Callable[[T], R], item: T) -> None:
    pipe, far_end = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_serve, args=(far_end, work), daemon=True)
    # A terminal's Ctrl-C reaches the whole process group; only this process shall answer it. The
    # mask is inherited, whereas a handler in the child would come too late for its first second.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    crew[pipe] = _Member(process, item)
    far_end.close()
    _hand(pipe, item)


def _hand(pipe: Connection, item: object) -> None:
    with suppress(BrokenPipeError, ConnectionResetError):  # it has just died: _answer tells
        pipe.send(item)


def _answer(pipe: Connection, process: SpawnProcess) -> R | Died:
    try:
        result: R = pipe.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        return Died(process.exitcode)
    return result


def _dismiss(pipe: Connection, member: _Member[T]) -> None:
    member.process.kill()
    member.process.join()
    member.process.close()
    pipe.close()


def _serve(pipe: Connection, work: Callable[[T], R]) -> None:
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return  # our parent has been killed
        # Code that loops without waiting cannot be interrupted from within the simulation.
        signal.alarm(ENDLESS_S)
        pipe.send(work(item))
