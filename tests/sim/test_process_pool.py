"""Work in several processes, which loses no item and leaves no process behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import weakref
from contextlib import closing
from itertools import count
from multiprocessing.connection import Connection
from typing import cast

import pytest

from batchlab.sim import process_pool
from batchlab.sim.process_pool import ProcessDeath, ProcessPool, spread
from tests.support import ROOT


def square(item: int) -> int:
    return item * item


def deadly(item: int) -> int:
    if item % 4 == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if item % 4 == 3:
        os._exit(7)
    return item


def endless(item: int) -> int:
    signal.alarm(1)  # replaces the alarm that `spread` has set
    while True:
        pass


def mask(item: int) -> bool:
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_every_item_returns_with_its_result() -> None:
    assert dict(spread(square, range(50), 2)) == {item: item * item for item in range(50)}
    assert list(spread(square, [], 2)) == []


def test_a_process_that_dies_costs_its_item_only() -> None:
    found = dict(spread(deadly, range(9), 2))
    assert found.keys() == set(range(9))
    assert {item for item, result in found.items() if result == item} == {0, 2, 4, 6, 8}
    assert found[1] == found[5] == ProcessDeath(-signal.SIGKILL)
    assert found[3] == found[7] == ProcessDeath(7)


def test_an_item_that_never_ends_costs_its_process() -> None:
    assert list(spread(endless, [0], 1)) == [(0, ProcessDeath(-signal.SIGALRM))]
    assert process_pool.MAX_ITEM_S > 60


def test_a_source_without_end_is_taken_from_as_needed_and_closing_ends_all() -> None:
    items = count()
    results = spread(square, items, 2)
    seen = [next(results)[0] for _ in range(20)]
    assert len(set(seen)) == 20
    assert next(items) < 25
    assert multiprocessing.active_children()
    results.close()
    assert not multiprocessing.active_children()


def test_ctrl_c_in_the_terminal_is_the_parents_affair() -> None:
    assert list(spread(mask, [0], 1)) == [(0, True)]
    assert not mask(0)


class Thing:
    pass


def hit(item: int) -> int:
    """Raise Ctrl-C in the callback of a weak reference, where Python drops the exception."""
    thing = Thing()
    reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
    del thing
    assert reference() is None
    return item


def test_nor_does_it_reach_the_very_first_process() -> None:
    """The test uses a fresh interpreter, in which multiprocessing has not started its own process yet."""
    code = "from tests.sim.test_process_pool import hit, spread; print(*spread(hit, [0, 1], 2))"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert told.stderr == ""
    assert "(0, 0)" in told.stdout
    assert "(1, 1)" in told.stdout


@pytest.mark.parametrize("processes", [1, 3])
def test_pool_ends_at_once_if_the_consumer_fails(processes: int) -> None:
    def consume() -> None:
        results = spread(time.sleep, [0.0, 600.0, 600.0, 600.0], processes)
        try:
            next(results)
            raise ZeroDivisionError
        finally:
            results.close()

    begun_s = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        consume()
    assert time.monotonic() - begun_s < 60
    assert not multiprocessing.active_children()


def who(_: int) -> int:
    return os.getpid()


def test_processes_are_reused_between_batches_and_end_with_the_pool() -> None:
    with closing(ProcessPool(who, 2)) as crew:
        first = {pid for _, pid in crew.each(range(6))}
        second = {pid for _, pid in crew.each(range(6))}
        assert first | second <= {child.pid for child in multiprocessing.active_children()}
        assert len(first | second) <= 2
        # A caller that stops early must not leave a process at work, whose answer the next call would receive.
        results = crew.each(count())
        next(results)
        results.close()
        assert len(dict(crew.each(range(10, 14)))) == 4
    assert not multiprocessing.active_children()


class OneItem:
    """A pipe that returns one item and is then closed."""

    def __init__(self) -> None:
        self.items, self.answers = [0], list[float]()

    def recv(self) -> int:
        if not self.items:
            raise EOFError
        return self.items.pop()

    def send(self, answer: float) -> None:
        self.answers.append(answer)


def test_only_work_can_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that waits for its next item does not hang, however long it waits."""
    set_s: list[int] = []
    monkeypatch.setattr(signal, "alarm", set_s.append)
    pipe = OneItem()
    process_pool._serve(cast(Connection, pipe), lambda _: float(set_s[-1]))
    assert pipe.answers == [process_pool.MAX_ITEM_S]
    assert set_s == [process_pool.MAX_ITEM_S, 0]
