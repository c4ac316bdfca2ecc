"""What the simulator's loop runs: asyncio's handles, without what those pay for debugging.

Invariant: a handle's fields are those of asyncio's own, which the loop and asyncio's futures read.
They are made and run a hundred times for each simulated bundle.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextvars import Context, copy_context
from typing import Any


class SimHandle(asyncio.Handle):
    """A callback that is to run."""

    __slots__ = ()
    _callback: Any
    _args: Any
    _loop: Any
    # Only debugging sets them.
    _repr = None
    _source_traceback = None

    def __init__(
        self,
        callback: Callable[..., object],
        args: Sequence[Any],
        loop: asyncio.AbstractEventLoop,
        context: Context | None,
    ) -> None:
        self._callback = callback
        self._args = args
        self._loop = loop
        self._context = copy_context() if context is None else context
        self._cancelled = False


class SimTimer(SimHandle, asyncio.TimerHandle):
    """A callback that is to run at `when`, seconds of its loop. The loop says `_scheduled`."""

    __slots__ = ()
    _when: float
    _scheduled: bool

    def __init__(
        self,
        when: float,
        callback: Callable[..., object],
        args: Sequence[Any],
        loop: asyncio.AbstractEventLoop,
        context: Context | None,
    ) -> None:
        # Not by way of the base's, which takes as long again.
        self._callback = callback
        self._args = args
        self._loop = loop
        self._context = copy_context() if context is None else context
        self._cancelled = False
        self._when = when
        self._scheduled = True

    def cancel(self) -> None:
        """As asyncio's; the loop is told only of one that has not fired yet."""
        if not self._cancelled:
            self._cancelled = True
            self._callback = self._args = None
            if self._scheduled:
                self._loop._timer_handle_cancelled(self)
