"""The promise that a manager stops in time when it loses the lease.

Invariant: this module uses only the effects of port calls, and the times when processes thaw.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from batchlab.sim.actors import Actor

Require = Callable[[bool, str, str], None]
"""A check with the arguments (holds, promise, facts)."""

SLACK_S = 1.0
"""Allowance for the latency of calls."""
FREE = ("ledger.lease", "ledger.release")
"""Calls that a manager without the lease may make."""


@dataclass(slots=True)
class Leads:
    """When each manager renewed the lease, and when it learned of another holder."""

    require: Require
    ttl_s: float
    thawed_s: Callable[[Actor], float]
    """When a process was last thawed."""
    _renewed_s: dict[Actor, float] = field(default_factory=dict)
    _led_s: dict[Actor, float] = field(default_factory=dict)
    """When each manager took the lease."""
    _told_s: dict[Actor, float] = field(default_factory=dict)
    """When the ledger first answered a former leader that another manager has the lease."""

    def led_s(self, actor: Actor) -> float:
        """Return when the manager took the lease, or infinity if it never did."""
        return self._led_s.get(actor, math.inf)

    def leased(self, actor: Actor, owner: str, now_s: float) -> None:
        """Record the ledger's answer to a manager that `owner` holds the lease."""
        if owner == actor.name:
            self._renewed_s[actor] = now_s
            self._led_s.setdefault(actor, now_s)
        elif actor in self._renewed_s:
            self._told_s.setdefault(actor, now_s)

    def called(self, actor: Actor, label: str, now_s: float, *, disturbed: bool) -> None:
        """Check a call of a manager. If a fault has `disturbed` the manager, it may receive the
        answer about its lease later."""
        renewed_s = self._renewed_s.get(actor)
        if renewed_s is None or label in FREE:
            return
        patience_s = self.ttl_s * 2 / 3 + SLACK_S
        # A thawed process asks for the lease once before it stops.
        is_thawed = now_s - self.thawed_s(actor) < patience_s
        self.require(
            now_s - renewed_s <= self.ttl_s + SLACK_S or is_thawed,
            "lead",
            f"{actor.name} calls {label} {now_s - renewed_s:.1f} s after it last renewed its lease",
        )
        told_s = self._told_s.get(actor, now_s)
        self.require(
            now_s - told_s <= (patience_s if disturbed else SLACK_S),
            "lead",
            f"{actor.name} calls {label} {now_s - told_s:.1f} s after it learned that another "
            "manager has the lease",
        )
