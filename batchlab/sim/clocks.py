"""Clocks and ids of the simulated processes.

Invariant: time is the loop's, and ids come from a seed; nothing here looks at the machine.
"""

from __future__ import annotations

import asyncio
import random


class SimClock:
    """The Clock of the world and its services: virtual time, with a wall clock that may jump."""

    def __init__(self, loop: asyncio.AbstractEventLoop, epoch_s: float) -> None:
        """`epoch_s` is the wall-clock time at the loop's time 0, in epoch seconds."""
        self._loop = loop
        self._epoch_s = epoch_s
        self.monotonic_s = loop.time
        """Virtual seconds since the loop was made; jumps do not touch it. Asked at every turn, so
        without a detour."""

    def now_s(self) -> float:
        """Epoch seconds."""
        return self._epoch_s + self._loop.time()

    def jump(self, seconds: float) -> None:
        """Set the wall clock forward, or back if negative."""
        self._epoch_s += seconds


class SkewedClock:
    """One actor's Clock: the world's, but its wall clock is off, and may jump by itself."""

    def __init__(self, world: SimClock, off_s: float = 0.0) -> None:
        self._world = world
        self.off_s = off_s
        """By how much it is ahead of the world's."""
        self.monotonic_s = world.monotonic_s
        """As the world's."""

    def now_s(self) -> float:
        """Epoch seconds as this actor believes them."""
        return self._world.now_s() + self.off_s


class SimIds:
    """Ids drawn from a seeded source; hand each actor its own, or interleavings change ids."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def fresh(self, kind: str) -> str:
        """A new id with the prefix `kind`."""
        return f"{kind}-{self._rng.getrandbits(64):016x}"
