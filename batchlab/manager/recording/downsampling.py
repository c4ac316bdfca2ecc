"""Measurements over time that stay few: the older they are, the longer the time one stands for.

Invariant: the steps of a series follow one another without a gap that was not there, and no step is
longer than a `FINE`-th of its age, or than it was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from batchlab.core.model import Json
from batchlab.core.pricing.usage_meter import Account

FINE = 256
"""A job that has just ended is seen in at least so many steps, each alike to within a factor of
two; over a month they are fewer than five thousand."""
EVERY = 64
"""Points that come in between two looks at what can be merged."""

Point = list[Json]
"""When it was looked at (seconds of the epoch), for how long it stands (seconds), values."""


class Series:
    """Points in order. `merge` makes one point of two that follow one another; it need not care
    for their times."""

    def __init__(
        self, merge: Callable[[Point, Point], Point], points: Sequence[Point] = ()
    ) -> None:
        self._merge = merge
        self.points: list[Point] = [list(point) for point in points]
        self._new = 0

    def add(self, point: Point) -> None:
        """Take the next point."""
        self.points.append(point)
        self._new += 1
        if self._new >= EVERY:
            self.thin()

    def thin(self) -> None:
        """Merge what is old enough."""
        self._new = 0
        if not self.points:
            return
        now_s = self.points[-1][0]
        kept: list[Point] = []
        for point in self.points:
            if kept and kept[-1][1] + point[1] <= (now_s - point[0]) / FINE:
                merged = self._merge(kept[-1], point)
                kept[-1] = [point[0], kept[-1][1] + point[1], *merged[2:]]
            else:
                kept.append(point)
        self.points = kept

    def since(self, moment_s: float) -> list[Point]:
        """The points whose time is after that moment."""
        return [point for point in self.points if point[0] > moment_s]

    def forget(self, moment_s: float) -> None:
        """Drop what is not after that moment."""
        self.points = self.since(moment_s)


def of_pool(a: Point, b: Point) -> Point:
    """Queue and backlog as deep as they were, the fleet as it was last, busy slots on average."""
    all_s = a[1] + b[1]
    mean = (a[-1] * a[1] + b[-1] * b[1]) / all_s if all_s else b[-1]
    return [*b[:2], *(max(x, y) for x, y in zip(a[2:6], b[2:6], strict=True)), *b[6:-1], mean]


def latest(_a: Point, b: Point) -> Point:
    """Of counts that only grow."""
    return b


def asked(account: Account, now_s: float, step_s: float) -> Point:
    """How many requests an account has by now, as a point of a series that keeps the latest."""
    made = account.requests
    return [
        round(now_s, 3),
        round(step_s, 3),
        made.sqs,
        made.sqs_empty,
        made.s3_puts,
        made.s3_gets,
        made.s3_deletes,
    ]
