"""The cores of a machine that manager, workers and tasks share, as far as a forecast needs them.

Invariant: what a bundle costs is a function of the bundles before it; no clock, no chance.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Cores:
    """`count` cores (0: as many as one likes), of each of which a bundle takes `bundle_s`: sent,
    received, run, committed and counted. First come, first served.

    A task that computes holds a core whenever it can. The kernel is fair to processes: the manager
    and the workers that are at work have their share beside such tasks, and so a bundle takes
    longer.
    """

    count: int
    bundle_s: float
    _free_s: list[float] = field(default_factory=list)
    """Monotonic; when each core has done what was asked of it."""
    _at_work: Counter[str] = field(default_factory=Counter)
    _computing: int = 0

    def begin(self, now_s: float, worker: str, *, computes: bool) -> float:
        """A bundle begins in this worker; the seconds until the machine has done its part of it."""
        if not (self.count and self.bundle_s):
            return 0.0
        if not self._free_s:
            self._free_s = [now_s] * self.count
        shared = 1.0 + self._computing / (1 + len(self._at_work))
        self._at_work[worker] += 1
        self._computing += computes
        core = min(range(self.count), key=self._free_s.__getitem__)
        self._free_s[core] = max(now_s, self._free_s[core]) + self.bundle_s * shared
        return self._free_s[core] - now_s

    def end(self, worker: str, *, computes: bool) -> None:
        """It is over."""
        if not (self.count and self.bundle_s):
            return
        self._computing -= computes
        self._at_work[worker] -= 1
        if not self._at_work[worker]:
            del self._at_work[worker]
