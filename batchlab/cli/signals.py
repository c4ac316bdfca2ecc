"""Ctrl-C and SIGTERM as an exception that nothing in between takes for its own."""

from __future__ import annotations

import signal
from types import FrameType

INTERRUPTED = 130


class Stopped(SystemExit):
    """Somebody asked this command to end.

    A SystemExit, because asyncio hands only that and KeyboardInterrupt on from wherever the
    signal hits it; Typer would turn the latter into exit code 1.
    """


def install() -> None:
    """From now on both signals raise Stopped in the main thread."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise Stopped(INTERRUPTED)
