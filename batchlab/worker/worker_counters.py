"""Counters of a worker since its start, sent to the manager with its heartbeats.

Invariant: a counter never decreases, so the last value received is the total.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from batchlab.core.model import Outcome


class WorkerCounters:
    """Counters of one worker."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._told: Mapping[str, int] = {}

    def committed(self, draft: Outcome, counts: Outcome) -> None:
        """Count a commit of `draft`. `counts` is the outcome that was committed first."""
        if counts is not draft and counts.execution != draft.execution:
            self._counts["duplicate"] += 1
            return
        for one in draft.failed:
            self._counts[f"{'failed' if one.final else 'retried'}.{one.kind.value}"] += 1

    def news(self) -> Mapping[str, int]:
        """Return all counters if any changed since the last report, else {}."""
        return {} if self._counts == self._told else dict(self._counts)

    def told(self, news: Mapping[str, int]) -> None:
        """Record that these counters have been sent."""
        self._told = news
