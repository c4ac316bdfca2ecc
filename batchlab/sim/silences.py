"""The promise that a manager finds lost bundles and stopped workers, even if no queue gets empty.

Invariant: only the time in which a manager leads counts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from batchlab.sim.actors import Actor
from batchlab.sim.told import Name

BUNDLE_SILENCES, INSTANCE_SILENCES = 14.0, 3.75
"""Limits for a new copy of a lost bundle, and the end of a stopped instance, in `silence_s`."""
INSTANCE_S = 375.0
"""Seconds for which an instance may be silent, however short `silence_s` is."""
SLACK_S = 60.0


@dataclass(slots=True)
class Silences:
    """The bundles that are lost, and the workers that have stopped for ever."""

    require: Callable[[bool, str, str, str | None], None]
    silence_s: float
    """Seconds for which a bundle may be silent before a manager looks for it."""
    stopped: dict[Actor, float] = field(default_factory=dict)
    """Seconds for which a manager has led since each worker stopped."""
    _lost_s: dict[Name, float] = field(default_factory=dict)
    _looked_s: float = 0.0

    def stops(self, actor: Actor) -> None:
        """Record that a worker stops for ever."""
        self.stopped[actor] = 0.0

    def sent(self, name: Name) -> None:
        """Record that a bundle is sent, whether or not its message arrives."""
        self._lost_s.pop(name, None)

    def look(self, lost: Collection[Name], since_s: float | None, now_s: float) -> None:
        """Check the stopped workers and the `lost` bundles.

        A lost bundle is not committed, in no queue, and in no worker. A manager has led since
        `since_s`, which is None if no manager leads."""
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
