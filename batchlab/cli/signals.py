"""Ctrl-C and SIGTERM as an exception that nothing in between takes for its own, or loses."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

INTERRUPTED = 130
AGAIN_S = 0.05
"""What was raised where Python drops it is raised once more after so long."""
_BOTH = (signal.SIGINT, signal.SIGTERM)


class Stopped(SystemExit):
    """Somebody asked this command to end.

    A SystemExit, because asyncio hands only that and KeyboardInterrupt on from wherever the
    signal hits it; Typer would turn the latter into exit code 1.
    """


def install() -> None:
    """From now on both signals raise Stopped in the main thread."""
    for number in _BOTH:
        signal.signal(number, _stop)
    sys.unraisablehook = _dropped


@contextmanager
def as_keyboard_interrupt() -> Iterator[None]:
    """Within it both signals raise KeyboardInterrupt, which comes out of it as Stopped: to who
    runs code of users in this process, a SystemExit is one of theirs."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in _BOTH}
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(INTERRUPTED) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise Stopped(INTERRUPTED)


def _dropped(told: UnraisableHookArgs) -> None:
    """Whatever a finalizer or a callback of a weak reference raises ends there, and asyncio has
    such a callback for each of its tasks."""
    if not issubclass(told.exc_type, (Stopped, KeyboardInterrupt)):
        sys.__unraisablehook__(told)
        return
    main = threading.main_thread().ident
    again = threading.Timer(AGAIN_S, signal.pthread_kill, (main, signal.SIGINT))
    again.daemon = True
    again.start()
