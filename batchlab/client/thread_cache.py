"""Pool of threads that are reused for a short time, and a delay of Python's exit until the executors' work is done.

Threads are reused, because the start of a thread takes a noticeable part of the time of a short call on an idle grid.
Invariant: an idle thread does not refer to its past work and does not delay the exit of Python. After `is_exiting`
returns True, executors refuse new calls, and complete the accepted calls.
"""

from __future__ import annotations

import atexit

# The import of concurrent.futures registers an exit hook, which stops every thread pool at the exit of Python. Exit
# hooks run in the reverse order of their registration. The hook of this module must run before the hook of
# concurrent.futures, so concurrent.futures is imported first.
import concurrent.futures.thread  # noqa: F401 - imported for its exit hook
import os
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from weakref import WeakMethod, WeakSet

MAX_IDLE_S = 1.0
"""Time in seconds for which an idle thread waits for more work."""

Work = Callable[[], None]


def _nothing() -> None:
    pass


class ThreadCache:
    """Pool of daemon threads. An idle thread ends after `spare_s` seconds."""

    def __init__(self, name: str, spare_s: float = MAX_IDLE_S) -> None:
        self._name = name
        self._spare_s = spare_s
        self._lock = threading.Lock()
        self._spare: list[SimpleQueue[tuple[Work, Work]]] = []
        """Queues of the idle threads. The thread of the last queue in the list has been idle for the shortest time."""

    @property
    def count(self) -> int:
        """Return the number of idle threads."""
        return len(self._spare)

    def run(self, work: Work, then: Work = _nothing) -> None:
        """Call `work` on an idle or a new thread. Then call `then`, after the thread has dropped its reference to
        `work`.

        `work` and `then` must not raise errors. Raise RuntimeError if a thread cannot be started, or if Python is
        exiting.
        """
        with self._lock:
            if self._spare:
                # The work is put into the thread's queue before the queue is removed from `_spare`, so that Ctrl-C
                # between the two lines does not lose the thread.
                self._spare[-1].put((work, then))
                self._spare.pop()
                return
        inbox: SimpleQueue[tuple[Work, Work]] = SimpleQueue()
        inbox.put((work, then))
        threading.Thread(target=self._live, args=(inbox,), name=self._name, daemon=True).start()

    def reset(self) -> None:
        """Empty the pool in a forked child process, because the pool's threads do not exist in the child process."""
        # A thread of the parent process may have held the old lock during the fork, so the child process needs a new
        # lock.
        self._lock = threading.Lock()
        self._spare = []

    def _live(self, inbox: SimpleQueue[tuple[Work, Work]]) -> None:
        while True:
            try:
                work, then = inbox.get(timeout=self._spare_s)
            except Empty:
                with self._lock:
                    if not inbox.empty():
                        continue  # Work has just arrived in the queue.
                    self._spare.remove(inbox)
                    return
            try:
                work()
            finally:
                # The reference to `work` is deleted before `then` is called, because the finalizers of `work` must run
                # before `then`.
                del work
                then()
            del then
            with self._lock:
                # A thread whose queue contains work does not count as idle, because new work would wait for the queued
                # work.
                if inbox not in self._spare and inbox.empty():
                    self._spare.append(inbox)


_spares = ThreadCache("batchlab-executor")
run = _spares.run
"""Run a function on an idle or a new thread of this process (see `ThreadCache.run`)."""

os.register_at_fork(after_in_child=_spares.reset)


_awaited: WeakSet[threading.Event] = WeakSet()
_exit_methods: list[WeakMethod[Work]] = []
_begun = threading.Event()

is_exiting = _begun.is_set


def delay_exit_until(end: threading.Event) -> None:
    """Delay the exit of Python until `end` is set. The exit of a forked child process is not delayed."""
    _awaited.add(end)


def run_at_exit(method: Work) -> None:
    """Call a bound method at the exit of Python while threads can still be started, if its object still exists."""
    _exit_methods.append(WeakMethod(method, _exit_methods.remove))


def _at_exit() -> None:
    _begun.set()
    for end in list(_awaited):
        end.wait()
    methods = [reference() for reference in _exit_methods]
    # A WeakMethod that outlives its function, as when Python deletes all modules, prints an error.
    _exit_methods.clear()
    for method in methods:
        if method:
            method()


# A forked child process must not wait for the events, because the threads that set the events do not exist in the child
# process. The methods belong to the parent process.
os.register_at_fork(after_in_child=_awaited.clear)
os.register_at_fork(after_in_child=_exit_methods.clear)

# The exit hook is not registered with the module atexit, because hooks of atexit run when threads can no longer be
# started. The function `_register_atexit` of `threading` is not public, but concurrent.futures and joblib also use
# `_register_atexit`. If `_register_atexit` does not exist, unfinished calls are canceled at the exit.
getattr(threading, "_register_atexit", atexit.register)(_at_exit)
