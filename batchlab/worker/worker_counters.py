"""What a worker has done since its start, in numbers, as it tells its manager along with its beats.

Invariant: a number never goes down, so that the last one heard is the whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from batchlab.core.model import Outcome


class Deeds:
    """Of one worker."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._told: Mapping[str, int] = {}

    def committed(self, draft: Outcome, counts: Outcome) -> None:
        """It has tried to commit `draft`; `counts` is the outcome that does, another's perhaps."""
        if counts is not draft and counts.execution != draft.execution:
            self._counts["duplicate"] += 1
            return
        for one in draft.failed:
            self._counts[f"{'failed' if one.final else 'retried'}.{one.kind.value}"] += 1

    def news(self) -> Mapping[str, int]:
        """All of it, where there is something that was not told before."""
        return {} if self._counts == self._told else dict(self._counts)

    def told(self, news: Mapping[str, int]) -> None:
        """That has reached the manager's queue."""
        self._told = news
