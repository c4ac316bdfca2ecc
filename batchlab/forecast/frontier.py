"""The frontier of cost against time, and how sure a share of seeds is.

Invariant: no point of a frontier is as dear as another one and as slow, or worse in either.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

Z_95 = 1.959964
"""The normal distribution's quantile of a two-sided 95% interval."""


class Priced(Protocol):
    """What has a cost and takes a time."""

    @property
    def usd(self) -> float: ...

    @property
    def finish_s(self) -> float: ...


P = TypeVar("P", bound=Priced)


def frontier(points: Iterable[P]) -> list[P]:
    """Those that no other point beats, from the cheapest to the fastest; of points that are alike
    the first. What never ends or has no price is on no frontier."""
    found: list[P] = []
    able = (one for one in points if math.isfinite(one.usd) and math.isfinite(one.finish_s))
    for one in sorted(able, key=lambda one: (one.usd, one.finish_s)):
        if not found or one.finish_s < found[-1].finish_s:
            found.append(one)
    return found


@dataclass(frozen=True, slots=True)
class Share:
    """`met` of `of` seeds, with the 95% interval of the share that all seeds would give."""

    met: int
    of: int

    @property
    def value(self) -> float:
        return self.met / self.of if self.of else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval, which is of use also where all or none met it (E. B. Wilson,
        J. Am. Stat. Assoc. 22 (1927) 209-212)."""
        if not self.of:
            return 0.0, 1.0
        n, p, z2 = self.of, self.value, Z_95**2
        middle = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
        return max(0.0, middle - half), min(1.0, middle + half)

    def to_json(self) -> dict[str, object]:
        low, high = self.interval
        return {"met": self.met, "of": self.of, "share": self.value, "low": low, "high": high}
