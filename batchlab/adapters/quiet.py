"""How long a queue has been quiet, by which its receivers choose how often they ask.

Invariant: a message now and then is quiet too. An idle grid's workers tell once a minute that they
live; had each of these words the manager look as often as while a job runs, idleness would be paid.
"""

from __future__ import annotations

MOST_S = 60.0
"""Longer than this it has not been quiet for what follows a message, however long it was."""


class Quiet:
    """Of one queue, from `now_s` on: times are the loop's, in seconds."""

    def __init__(self, now_s: float) -> None:
        self._since_s = now_s

    def of_s(self, now_s: float) -> float:
        """The seconds that it has been quiet."""
        return now_s - self._since_s

    def broken(self, now_s: float) -> None:
        """A receive has found something. Half of the quiet is left: one message leaves much of it,
        and a few in a row, as a job sends them, leave next to nothing."""
        self._since_s = now_s - min(self.of_s(now_s), MOST_S) / 2
