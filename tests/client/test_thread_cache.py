"""Threads that wait for a moment for more work."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from typing import Any, NoReturn

import pytest

from batchlab.client.thread_cache import ThreadCache
from tests.support.waiting import until

WAIT_S = 10.0


@pytest.fixture
def spares() -> ThreadCache:
    return ThreadCache("spare")


def _wait_for(event: threading.Event) -> None:
    assert event.wait(WAIT_S)


def ran_by(spares: ThreadCache) -> threading.Thread:
    """Return the thread that runs the next piece of work."""
    found: list[threading.Thread] = []
    spares.run(lambda: found.append(threading.current_thread()))
    until(lambda: bool(found))
    return found[0]


def test_a_thread_that_has_done_its_work_does_the_next(spares: ThreadCache) -> None:
    first = ran_by(spares)
    until(lambda: spares.count == 1)
    assert ran_by(spares) is first
    assert first.daemon


def test_work_that_lasts_holds_up_no_other(spares: ThreadCache) -> None:
    go = threading.Event()
    try:
        spares.run(lambda: _wait_for(go))
        other = ran_by(spares)
        until(lambda: spares.count == 1)
        assert ran_by(spares) is other
    finally:
        go.set()


def test_one_that_gets_nothing_to_do_ends() -> None:
    spares = ThreadCache("spare", spare_s=0.01)
    first = ran_by(spares)
    first.join(WAIT_S)
    assert not first.is_alive()
    assert spares.count == 0
    assert ran_by(spares) is not first


def test_thread_keeps_no_reference_to_finished_work(spares: ThreadCache) -> None:
    class Thing:
        def use(self) -> None:
            pass

    thing = Thing()
    gone = weakref.ref(thing)
    spares.run(thing.use)
    until(lambda: spares.count == 1)
    del thing
    gc.collect()
    assert gone() is None


def test_finalizers_run_before_the_end_is_reported(spares: ThreadCache) -> None:
    told: list[str] = []
    handed_over = threading.Event()

    class Thing:
        def use(self) -> None:
            until(handed_over.is_set)

        def __del__(self) -> None:
            time.sleep(0.01)
            told.append("gone")

    spares.run(Thing().use, lambda: told.append("over"))
    handed_over.set()
    until(lambda: len(told) == 2)
    assert told == ["gone", "over"]


class Interrupted(list[Any]):
    """A list whose `pop` raises KeyboardInterrupt, like Ctrl-C between the handover of work and the choice of a
    thread."""

    def pop(self, *_: object) -> NoReturn:
        raise KeyboardInterrupt


def test_an_interrupt_loses_neither_the_work_nor_the_thread(spares: ThreadCache) -> None:
    first = ran_by(spares)
    until(lambda: spares.count == 1)
    held, done, go = spares._spare, threading.Event(), threading.Event()

    def work() -> None:
        done.set()
        until(go.is_set)

    spares._spare = Interrupted(held)
    with pytest.raises(KeyboardInterrupt):
        spares.run(work)
    spares._spare = held
    assert done.wait(WAIT_S)
    # The second work item waits behind the first. The work that the second item requests gets its own thread.
    asked: list[threading.Thread] = []
    second = threading.Event()

    def ask() -> None:
        asked.append(ran_by(spares))
        second.set()

    spares.run(ask)
    go.set()
    assert second.wait(WAIT_S)
    assert asked[0] is not first
    until(lambda: spares.count == 2)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_starts_its_own(spares: ThreadCache) -> None:
    ran_by(spares)
    until(lambda: spares.count == 1)
    child = os.fork()
    if not child:
        done = threading.Event()
        spares.reset()
        spares.run(done.set)
        os._exit(0 if done.wait(WAIT_S) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
