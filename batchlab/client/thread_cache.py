"""Threads that are reused for a short time, and a delay of Python's exit until the executors' work
is done.

The start of a thread takes a noticeable part of a short call on an idle grid. Invariant: a spare
thread does not refer to its past work and does not delay the exit of Python. After `is_exiting` returns
True, executors accept no new work, and the accepted work is still done.
"""

from __future__ import annotations

import atexit

# This module is imported for its hook at the exit of Python, which stops every pool of threads.
# Hooks run in the reverse order of their registration, and the hook of this module must run before
# that one.
import concurrent.futures.thread  # noqa: F401 - see above
import os
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from weakref import WeakSet

MAX_IDLE_S = 1.0
"""Time in seconds that a spare thread waits for more work."""

Work = Callable[[], None]


def _nothing() -> None:
    pass


class ThreadCache:
    """Pool of daemon threads."""

    def __init__(self, name: str, spare_s: float = MAX_IDLE_S) -> None:
        self._name = name
        self._spare_s = spare_s
        self._lock = threading.Lock()
        self._spare: list[SimpleQueue[tuple[Work, Work]]] = []
        """Queues of the spare threads. The last one has waited for the shortest time."""

    @property
    def count(self) -> int:
        """Return the number of spare threads."""
        return len(self._spare)

    def run(self, work: Work, then: Work = _nothing) -> None:
        """Run `work` on a thread. When no reference to `work` is left, run `then`. Neither may
        raise. Raise RuntimeError if no thread can be started, or if Python is exiting."""
        with self._lock:
            if self._spare:
                # In this order, so that Ctrl-C between the two lines does not lose a thread.
                self._spare[-1].put((work, then))
                self._spare.pop()
                return
        inbox: SimpleQueue[tuple[Work, Work]] = SimpleQueue()
        inbox.put((work, then))
        threading.Thread(target=self._live, args=(inbox,), name=self._name, daemon=True).start()

    def forget(self) -> None:
        """Reset the pool in a forked child, which does not have the threads."""
        self._lock = threading.Lock()  # a thread of the parent may have held the lock
        self._spare = []

    def _live(self, inbox: SimpleQueue[tuple[Work, Work]]) -> None:
        while True:
            try:
                work, then = inbox.get(timeout=self._spare_s)
            except Empty:
                with self._lock:
                    if not inbox.empty():
                        continue  # work has just arrived
                    self._spare.remove(inbox)
                    return
            try:
                work()
            finally:
                # This may be the last reference, and its finalizers belong to the work.
                del work
                then()
            del then
            with self._lock:
                # A queue with work is not spare, because its next work may wait for the work in it.
                if inbox not in self._spare and inbox.empty():
                    self._spare.append(inbox)


_spares = ThreadCache("batchlab-executor")
run = _spares.run
"""Run work on a spare thread of this process."""

os.register_at_fork(after_in_child=_spares.forget)


_awaited: WeakSet[threading.Event] = WeakSet()
_begun = threading.Event()

is_exiting = _begun.is_set


def delay_exit_until(end: threading.Event) -> None:
    """Delay the exit of Python until `end` is set. In a forked child, the exit is not delayed."""
    _awaited.add(end)


def _at_exit() -> None:
    _begun.set()
    for end in list(_awaited):
        end.wait()


# In a forked child, the threads that would set these events do not exist.
os.register_at_fork(after_in_child=_awaited.clear)

# atexit's own hooks run when threads can no longer be started. This hook is not public, but
# concurrent.futures and joblib use it. Without it, unfinished calls are canceled at the exit.
getattr(threading, "_register_atexit", atexit.register)(_at_exit)
