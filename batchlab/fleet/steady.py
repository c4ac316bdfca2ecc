"""Moments that survive a restart and still never go back.

The monotonic clock starts anew with every process, the wall clock may jump. So this one is the
wall clock as it stood at the start, carried on by the monotonic clock.
"""

from __future__ import annotations

from batchlab.ports import Clock


class SteadyClock:
    """Seconds of the epoch that grow by the monotonic clock alone."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._ahead_s = clock.now_s() - clock.monotonic_s()

    def now_s(self) -> float:
        """May differ from the wall clock by as much as that was set since the start."""
        return self._clock.monotonic_s() + self._ahead_s
