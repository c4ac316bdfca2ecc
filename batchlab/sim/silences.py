"""The promise that a manager finds what is silent, also while the queues do not become empty.

Invariant: only time counts in which a manager leads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from batchlab.sim.actors import Actor
from batchlab.sim.told import Name

BUNDLE_SILENCES, INSTANCE_SILENCES = 14.0, 3.75
"""A lost bundle is sent again, and a stopped worker's instance ended, after so many silences."""
INSTANCE_S = 375.0
"""An instance may always be silent for so long."""
SLACK_S = 60.0


@dataclass(slots=True)
class Silences:
    """The bundles that are lost, and the workers that have stopped for ever."""

    require: Callable[[bool, str, str, str | None], None]
    silence_s: float
    """For how long a bundle may be silent before a manager looks for it."""
    stopped: dict[Actor, float] = field(default_factory=dict)
    """For how long a manager has led since each worker stopped."""
    _lost_s: dict[Name, float] = field(default_factory=dict)
    _looked_s: float = 0.0

    def stops(self, actor: Actor) -> None:
        """A worker stops for ever."""
        self.stopped[actor] = 0.0

    def sent(self, name: Name) -> None:
        """A bundle is sent, whether or not the message arrives."""
        self._lost_s.pop(name, None)

    def look(self, lost: Collection[Name], since_s: float | None, now_s: float) -> None:
        """Check the bundles that are `lost`: not committed, in no queue, and in no worker.

        A manager leads since `since_s`, None if none does."""
        step_s, self._looked_s = now_s - self._looked_s, now_s
        self._lost_s = {name: self._lost_s.get(name, now_s) for name in lost}
        if since_s is None:
            return
        limit_s = BUNDLE_SILENCES * self.silence_s + SLACK_S
        for name, lost_s in self._lost_s.items():
            self.require(
                now_s - max(lost_s, since_s) <= limit_s,
                "silence",
                f"{name} is lost since {lost_s:.0f} s, and nobody has sent it again",
                name[0],
            )
        limit_s = max(INSTANCE_S, INSTANCE_SILENCES * self.silence_s) + SLACK_S
        for actor in [one for one in self.stopped if one.alive]:
            self.stopped[actor] += min(step_s, now_s - since_s)
            self.require(
                self.stopped[actor] <= limit_s,
                "silence",
                f"{actor.name} has stopped for ever, and keeps its instance after "
                f"{self.stopped[actor]:.0f} s",
                None,
            )
