"""Named substreams of one seed.

Invariant: a number follows from the seed, the stream's name and its own index, never from what
was drawn before it. So one part of a scenario can change without changing what another draws, and
a task takes the same time in the simulator and in a replay.

The generator is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), whose n-th output needs no state.
"""

from __future__ import annotations

import random as _random
from hashlib import blake2b
from struct import unpack

_STEP = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_MASK = 2**64 - 1
_UNIT = 2.0**-53

# Many numbers at once: one large integer holds them in lanes of 128 bits, wide enough for the
# product of two 64-bit numbers. So one multiplication in C does the work of `_LANES` in Python.
_LANES = 256
_ONES = sum(1 << (128 * lane) for lane in range(_LANES))
_STEPS = sum((lane * _STEP & _MASK) << (128 * lane) for lane in range(_LANES))
_MASKS = _MASK * _ONES
_MASKS_53 = (2**53 - 1) * _ONES
_FEW = 8
"""Up to here one by one is faster."""


class Stream:
    """The stream of `seed` with these names; the same arguments are the same stream everywhere."""

    __slots__ = ("_key",)

    def __init__(self, seed: int, *names: str | int) -> None:
        text = "/".join([str(seed), *map(str, names)])
        self._key = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")

    def unit(self, i: int = 0) -> float:
        """The number of index `i` ≥ 0, uniform in [0, 1)."""
        z = self._key + i * _STEP & _MASK
        z = (z ^ z >> 30) * _FIRST & _MASK
        z = (z ^ z >> 27) * _SECOND & _MASK
        return ((z ^ z >> 31) >> 11) * _UNIT

    def units(self, start: int, stop: int) -> list[float]:
        """`unit(i)` for every i from `start` up to but not including `stop`, about ten times as
        fast."""
        if stop - start <= _FEW:
            return [self.unit(i) for i in range(start, stop)]
        found: list[float] = []
        for at in range(start, stop, _LANES):
            found += self._lanes(at, min(_LANES, stop - at))
        return found

    def _lanes(self, start: int, count: int) -> list[float]:
        ones, steps, masks, masks_53 = _ONES, _STEPS, _MASKS, _MASKS_53
        if count < _LANES:
            cut = (1 << (128 * count)) - 1
            ones, steps, masks, masks_53 = ones & cut, steps & cut, masks & cut, masks_53 & cut
        z = ones * (self._key + start * _STEP & _MASK) + steps & masks
        # A shift lets bits of a lane fall into its lower neighbour's upper half, which the masks
        # clear.
        z = (z ^ z >> 30 & masks) * _FIRST & masks
        z = (z ^ z >> 27 & masks) * _SECOND & masks
        z = (z ^ z >> 31 & masks) >> 11 & masks_53
        lanes = unpack(f"<{2 * count}Q", z.to_bytes(16 * count, "little"))[::2]
        return [lane * _UNIT for lane in lanes]

    def random(self) -> _random.Random:
        """A generator that starts from this stream, for what is drawn in order."""
        return _random.Random(self._key)  # noqa: S311 - simulation
