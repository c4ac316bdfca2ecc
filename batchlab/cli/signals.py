"""Ctrl-C and SIGTERM as an exception that asyncio, Typer, and finalizers do not swallow."""

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
"""Delay after which an exception that Python dropped in a finalizer is raised again."""
_BOTH = (signal.SIGINT, signal.SIGTERM)


class Stopped(SystemExit):
    """Ctrl-C or SIGTERM of this command.

    It is a SystemExit, because asyncio passes on only SystemExit and KeyboardInterrupt, and Typer
    turns KeyboardInterrupt into exit code 1.
    """


def install() -> None:
    """Let both signals raise Stopped in the main thread."""
    for number in _BOTH:
        signal.signal(number, _stop)
    sys.unraisablehook = _on_dropped


@contextmanager
def as_keyboard_interrupt() -> Iterator[None]:
    """Let both signals raise KeyboardInterrupt inside the block, and Stopped at its end.

    The simulator runs a user's code in this process and takes a SystemExit for one of that code.
    """
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


def _on_dropped(dropped: UnraisableHookArgs) -> None:
    """Raise a dropped signal again.

    Python drops an exception in a finalizer or in a callback of a weak reference. asyncio has such
    a callback for each task.
    """
    if not issubclass(dropped.exc_type, (Stopped, KeyboardInterrupt)):
        sys.__unraisablehook__(dropped)
        return
    main = threading.main_thread().ident
    again = threading.Timer(AGAIN_S, signal.pthread_kill, (main, signal.SIGINT))
    again.daemon = True
    again.start()
