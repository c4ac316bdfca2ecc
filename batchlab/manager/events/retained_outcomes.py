"""Outcomes that stay in memory for clients that wait for results.

Invariant: they take no more than MOST_BYTES of the whole grid, whatever workers send. The oldest is
released first. A client reads a released outcome from the bucket.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from batchlab.core.model import Outcome

MOST_BYTES = 16 * 1024**2
"""Limit for all jobs together, in bytes of JSON."""
LEAST_BYTES = 1024
"""Counted for each outcome, so their number is bounded as well."""


@dataclass(slots=True)
class Retained:
    """An outcome, or None once it is released."""

    outcome: Outcome | None
    size_bytes: int

    def release(self) -> None:
        """Remove the outcome from memory."""
        self.outcome = None


class RetainedOutcomes:
    """The outcomes of all jobs of a grid, the oldest first."""

    def __init__(self) -> None:
        self._order: deque[Retained] = deque()
        self.size_bytes = 0

    def add(self, outcome: Outcome, size_bytes: int) -> Retained:
        """Retain an outcome whose JSON has about so many bytes, and release the oldest ones."""
        made = Retained(outcome, max(size_bytes, LEAST_BYTES))
        self._order.append(made)
        self.size_bytes += made.size_bytes
        while self.size_bytes > MOST_BYTES:
            oldest = self._order.popleft()
            oldest.release()
            self.size_bytes -= oldest.size_bytes
        return made
