"""Threads that are there a moment longer than their work, since to start one takes a part of what a
short call takes on an idle grid.

Invariant: a spare thread refers to nothing that it has done, and holds up neither Python's end nor
anybody else.

The end of Python, put off until executors have done what they took on.

Invariant: once `begun` says so, no new work is taken, and what was taken before is still done.
"""

from __future__ import annotations

import atexit

# Imported for its hook at the interpreter's end, which stops every pool of threads. Hooks run in
# the reverse order of their registration, and ours must come before that one.
import concurrent.futures.thread  # noqa: F401 - see above
import os
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from weakref import WeakSet

SPARE_S = 1.0
"""How long one waits for more work."""

Work = Callable[[], None]


def _nothing() -> None:
    pass


class Spares:
    """Threads for whoever asks, daemons all of them."""

    def __init__(self, name: str, spare_s: float = SPARE_S) -> None:
        self._name = name
        self._spare_s = spare_s
        self._lock = threading.Lock()
        self._spare: list[SimpleQueue[tuple[Work, Work]]] = []
        """What those listen to that have nothing to do; the last has waited for the shortest."""

    @property
    def count(self) -> int:
        """How many have nothing to do."""
        return len(self._spare)

    def run(self, work: Work, then: Work = _nothing) -> None:
        """Do it on a thread, and when nothing refers to it any more, `then`; neither raises
        anything. RuntimeError where there is no room for another thread, or Python ends."""
        with self._lock:
            if self._spare:
                # In this order: Ctrl-C between the two must not lose a thread.
                self._spare[-1].put((work, then))
                self._spare.pop()
                return
        inbox: SimpleQueue[tuple[Work, Work]] = SimpleQueue()
        inbox.put((work, then))
        threading.Thread(target=self._live, args=(inbox,), name=self._name, daemon=True).start()

    def forget(self) -> None:
        """In a forked child, where there are none of them."""
        self._lock = threading.Lock()  # one of them may have had it
        self._spare = []

    def _live(self, inbox: SimpleQueue[tuple[Work, Work]]) -> None:
        while True:
            try:
                work, then = inbox.get(timeout=self._spare_s)
            except Empty:
                with self._lock:
                    if not inbox.empty():
                        continue  # it has come just now
                    self._spare.remove(inbox)
                    return
            try:
                work()
            finally:
                # The last reference may be this one, and what it does then is part of the work.
                del work
                then()
            del then
            with self._lock:
                # Not with work in it, which would wait for what that one asks for.
                if inbox not in self._spare and inbox.empty():
                    self._spare.append(inbox)


_spares = Spares("batchlab-executor")
run = _spares.run
"""Of this process."""

os.register_at_fork(after_in_child=_spares.forget)


_awaited: WeakSet[threading.Event] = WeakSet()
_begun = threading.Event()

begun = _begun.is_set


def put_off_for(end: threading.Event) -> None:
    """Python does not end before this is set, unless nobody is left who could set it."""
    _awaited.add(end)


def _at_exit() -> None:
    _begun.set()
    for end in list(_awaited):
        end.wait()


# In a forked child nobody is left who would bring them to their end.
os.register_at_fork(after_in_child=_awaited.clear)

# atexit's own hooks run when no thread can be started any more. This one is not public, but is what
# concurrent.futures itself uses, and joblib; without it, unfinished calls are cancelled at the end.
getattr(threading, "_register_atexit", atexit.register)(_at_exit)
