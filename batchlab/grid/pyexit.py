"""The end of Python, put off until executors have done what they took on.

Invariant: once `begun` says so, no new work is taken, and what was taken before is still done.
"""

from __future__ import annotations

import atexit

# Imported for its hook at the interpreter's end, which stops every pool of threads. Hooks run in
# the reverse order of their registration, and ours must come before that one.
import concurrent.futures.thread  # noqa: F401 - see above
import os
import threading
from weakref import WeakSet

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
