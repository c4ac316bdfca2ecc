"""Distributions of task times and job sizes, and named streams of random numbers.

A number of a Stream depends only on the seed, the stream's name, and the number's index. Because of named streams, a
change of one part of a scenario does not change the random numbers of another part. A task takes the same time in the
simulator and in a replay. The random numbers come from SplitMix64 (Steele, Lea, and Flood, OOPSLA 2014). SplitMix64
computes its n-th number directly, without the numbers before.
"""

from __future__ import annotations

import random as _random
from bisect import bisect_right
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import accumulate
from math import exp, gamma, isfinite, log, log1p
from statistics import NormalDist, fmean
from struct import unpack

from batchlab.scenarios.model.values import Distribution

_normal = NormalDist().inv_cdf


def _positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not (isfinite(number) and number > 0):
            raise ValueError(f"{name} must be a number above 0, not {number}")


def _not_negative(**numbers: float) -> None:
    for name, number in numbers.items():
        if not (isfinite(number) and number >= 0):
            raise ValueError(f"{name} must be a number of at least 0, not {number}")


@dataclass(frozen=True, slots=True)
class Constant:
    """Distribution that has only one value."""

    value: float

    def __post_init__(self) -> None:
        _not_negative(value=self.value)

    @property
    def mean(self) -> float:
        return self.value

    def at(self, unit: float) -> float:  # noqa: ARG002 - a draw without chance
        return self.value

    def multiply(self, factor: float) -> Constant:
        return Constant(self.value * factor)


@dataclass(frozen=True, slots=True)
class Uniform:
    """Uniform distribution from `least` to `most`."""

    least: float
    most: float

    def __post_init__(self) -> None:
        _not_negative(least=self.least, most=self.most)
        if self.most < self.least:
            raise ValueError(f"most ({self.most}) must not be below least ({self.least})")

    @property
    def mean(self) -> float:
        return (self.least + self.most) / 2

    def at(self, unit: float) -> float:
        return self.least + (self.most - self.least) * unit

    def multiply(self, factor: float) -> Uniform:
        return Uniform(self.least * factor, self.most * factor)


@dataclass(frozen=True, slots=True)
class Exponential:
    """Exponential distribution with a given mean."""

    mean: float

    def __post_init__(self) -> None:
        _positive(mean=self.mean)

    def at(self, unit: float) -> float:
        return -self.mean * log1p(-unit)

    def multiply(self, factor: float) -> Exponential:
        return Exponential(self.mean * factor)


@dataclass(frozen=True, slots=True)
class Lognormal:
    """Lognormal distribution with the median `median`. `sigma` is the standard deviation of the logarithm."""

    median: float
    sigma: float

    def __post_init__(self) -> None:
        _positive(median=self.median)
        _not_negative(sigma=self.sigma)

    @property
    def mean(self) -> float:
        return self.median * exp(self.sigma**2 / 2)

    def at(self, unit: float) -> float:
        return self.median * exp(self.sigma * _normal(unit)) if unit else 0.0

    def multiply(self, factor: float) -> Lognormal:
        return Lognormal(self.median * factor, self.sigma)


@dataclass(frozen=True, slots=True)
class Weibull:
    """Weibull distribution.

    A `shape` below 1 gives a heavier tail than the exponential distribution, and a `shape` above 1 gives a lighter
    tail.
    """

    scale: float
    shape: float

    def __post_init__(self) -> None:
        _positive(scale=self.scale, shape=self.shape)

    @property
    def mean(self) -> float:
        return self.scale * gamma(1 + 1 / self.shape)

    def at(self, unit: float) -> float:
        power: float = (-log1p(-unit)) ** (1 / self.shape)
        return self.scale * power

    def multiply(self, factor: float) -> Weibull:
        return Weibull(self.scale * factor, self.shape)


@dataclass(frozen=True, slots=True)
class Pareto:
    """Pareto distribution from `least` on. The probability of values above x falls as x^-alpha. `most` optionally
    limits the values.

    Without `most`, `alpha` must be above 1, because the mean is infinite for a smaller `alpha`.
    """

    least: float
    alpha: float
    most: float | None = None

    def __post_init__(self) -> None:
        _positive(least=self.least, alpha=self.alpha)
        if self.most is None and self.alpha <= 1:
            raise ValueError(f"alpha must be above 1 without most, not {self.alpha}")
        if self.most is not None and not (isfinite(self.most) and self.most > self.least):
            raise ValueError(f"most ({self.most}) must be above least ({self.least})")

    @property
    def mean(self) -> float:
        if self.most is None:
            return self.least * self.alpha / (self.alpha - 1)
        share = self.least / self.most
        if self.alpha == 1:
            return self.least / (1 - share) * -log(share)
        above = self.alpha - 1
        truncation: float = (1 - share**above) / (1 - share**self.alpha)
        return self.least * self.alpha / above * truncation

    def at(self, unit: float) -> float:
        if self.most is not None:
            unit *= 1 - (self.least / self.most) ** self.alpha
        power: float = (1 - unit) ** (-1 / self.alpha)
        return self.least * power

    def multiply(self, factor: float) -> Pareto:
        most = None if self.most is None else self.most * factor
        return Pareto(self.least * factor, self.alpha, most)


@dataclass(frozen=True, slots=True)
class Empirical:
    """Distribution of measured values, which all have the same probability."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("there must be at least one value")
        for value in self.values:
            _not_negative(value=value)
        object.__setattr__(self, "values", tuple(sorted(self.values)))

    @property
    def mean(self) -> float:
        return fmean(self.values)

    def at(self, unit: float) -> float:
        return self.values[int(unit * len(self.values))]

    def multiply(self, factor: float) -> Empirical:
        return Empirical(tuple(value * factor for value in self.values))


@dataclass(frozen=True, slots=True)
class Mixture:
    """Weighted mixture of distributions.

    The results of the method `at` follow the mixture, but `at` is not monotonic. The argument `unit` selects both a
    part of the mixture and a position within the part.
    """

    parts: tuple[tuple[float, Distribution], ...]
    """Pairs of (weight, distribution)."""
    _ends: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("there must be at least one part")
        for weight, _ in self.parts:
            _positive(weight=weight)
        sums = list(accumulate(weight for weight, _ in self.parts))
        object.__setattr__(self, "_ends", tuple(end / sums[-1] for end in sums))

    @property
    def mean(self) -> float:
        return sum(weight * part.mean for weight, part in self.parts) / sum(weight for weight, _ in self.parts)

    def at(self, unit: float) -> float:
        part = bisect_right(self._ends, unit)
        start = self._ends[part - 1] if part else 0.0
        # `min` keeps the share in the range [0, 1), because rounding could make the share 1.
        share = min((unit - start) / (self._ends[part] - start), 1 - 2**-53)
        return self.parts[part][1].at(share)

    def multiply(self, factor: float) -> Mixture:
        return replace(self, parts=tuple((w, draw.multiply(factor)) for w, draw in self.parts))


_STEP = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_MASK = 2**64 - 1
_UNIT = 2.0**-53

# One large integer contains many numbers in lanes of 128 bits, which are wide enough for the product of two 64-bit
# numbers. One multiplication in C replaces `_LANES` multiplications in Python.
_LANES = 256
_ONES = sum(1 << (128 * lane) for lane in range(_LANES))
_STEPS = sum((lane * _STEP & _MASK) << (128 * lane) for lane in range(_LANES))
_MASKS = _MASK * _ONES
_MASKS_53 = (2**53 - 1) * _ONES
_MIN_LANES = 9
"""Smallest count of random numbers for which lanes in one large integer are faster than a loop."""


class Stream:
    """Stream of random numbers for a seed and names. Equal seeds and names give the same stream on every machine."""

    __slots__ = ("_key",)

    def __init__(self, seed: int, *names: str | int) -> None:
        text = "/".join([str(seed), *map(str, names)])
        self._key = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")

    def unit(self, i: int = 0) -> float:
        """Return random number `i` of the stream, which is uniform in [0, 1)."""
        z = self._key + i * _STEP & _MASK
        z = (z ^ z >> 30) * _FIRST & _MASK
        z = (z ^ z >> 27) * _SECOND & _MASK
        return ((z ^ z >> 31) >> 11) * _UNIT

    def units(self, start: int, stop: int) -> list[float]:
        """Return `unit(i)` for i from `start` to `stop` - 1, about ten times as fast as single calls of `unit`."""
        if stop - start < _MIN_LANES:
            return [self.unit(i) for i in range(start, stop)]
        numbers: list[float] = []
        for at in range(start, stop, _LANES):
            numbers += self._lanes(at, min(_LANES, stop - at))
        return numbers

    def _lanes(self, start: int, count: int) -> list[float]:
        ones, steps, masks, masks_53 = _ONES, _STEPS, _MASKS, _MASKS_53
        if count < _LANES:
            cut = (1 << (128 * count)) - 1
            ones, steps, masks, masks_53 = ones & cut, steps & cut, masks & cut, masks_53 & cut
        z = ones * (self._key + start * _STEP & _MASK) + steps & masks
        # The shift of `z` moves bits of each lane into the upper half of the next lower lane. The masks clear the moved
        # bits.
        z = (z ^ z >> 30 & masks) * _FIRST & masks
        z = (z ^ z >> 27 & masks) * _SECOND & masks
        z = (z ^ z >> 31 & masks) >> 11 & masks_53
        lanes = unpack(f"<{2 * count}Q", z.to_bytes(16 * count, "little"))[::2]
        return [lane * _UNIT for lane in lanes]

    def random(self) -> _random.Random:
        """Return a random generator for sequential draws, seeded by this stream."""
        return _random.Random(self._key)  # noqa: S311 - simulation
