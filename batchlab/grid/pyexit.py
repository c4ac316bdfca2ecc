"""The end of Python, put off until the threads of executors have come to theirs.

Invariant: once `begun` says so, no new work is taken, and what was taken before is still done.
"""

from __future__ import annotations

import atexit

# Imported for its hook at the interpreter's end, which stops every pool of threads. Hooks run in
# the reverse order of their registration, and ours must come before that one.
import concurrent.futures.thread  # noqa: F401 - see above
import threading
from weakref import WeakSet

_threads: WeakSet[threading.Thread] = WeakSet()
_begun = threading.Event()

begun = _begun.is_set


def put_off_for(thread: threading.Thread) -> None:
    """Python does not end before this thread does."""
    _threads.add(thread)


def _at_exit() -> None:
    _begun.set()
    for thread in list(_threads):
        thread.join()


# atexit's own hooks run when no thread can be started any more. This one is not public, but is what
# concurrent.futures itself uses, and joblib; without it, unfinished calls are cancelled at the end.
getattr(threading, "_register_atexit", atexit.register)(_at_exit)
