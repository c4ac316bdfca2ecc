"""Checks of promises about waste: drains, dead letters, and needless work.

Invariant: each check knows only the effects of port calls and the starts of tasks, and a job that a
lying worker has touched is not checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from batchlab.model import Bundle
from batchlab.sim.actors import Actor
from batchlab.sim.told import Name, name_of_bundle

Require = Callable[[bool, str, str, str], None]
"""(holds, promise, facts, job)."""

LEAVING_S = 0.2
"""A bundle may begin so long after its worker was told to drain."""
SETTLED_S = 5.0
"""A manager that sends a bundle which was committed so long ago has not looked for its outcome."""


@dataclass(slots=True)
class Oracles:
    """What has been committed, sent, and given up, and the workers that drain."""

    require: Require
    _committed_s: dict[Name, float] = field(default_factory=dict)
    _leaves_s: dict[Actor, float] = field(default_factory=dict)
    _begun: set[tuple[Actor, Name]] = field(default_factory=set)
    _dead: dict[str, tuple[Name, float]] = field(default_factory=dict)
    """Dead letters that a manager has received, by receipt."""
    _sent_s: dict[Name, float] = field(default_factory=dict)
    """When each bundle was last sent."""

    def committed(self, name: Name, now_s: float) -> None:
        """An outcome has been committed."""
        self._committed_s[name] = now_s

    def uncommitted(self, name: Name) -> None:
        """A power cut has taken the outcome away."""
        self._committed_s.pop(name, None)

    def leaves(self, actor: Actor, now_s: float) -> None:
        """A worker has been told to drain."""
        self._leaves_s.setdefault(actor, now_s)

    def started(
        self, bundle: Bundle, now_s: float, actor: Actor | None, *, disturbed: bool
    ) -> None:
        """A task of the bundle begins. A `disturbed` worker may have been on its way to it."""
        if actor is not None and not disturbed:
            self._begins(actor, bundle, now_s)

    def _begins(self, actor: Actor, bundle: Bundle, now_s: float) -> None:
        name = name_of_bundle(bundle)
        if (actor, name) in self._begun:
            return
        self._begun.add((actor, name))
        leaves_s = self._leaves_s.get(actor, now_s)
        self.require(
            now_s - leaves_s <= LEAVING_S,
            "I6",
            f"{actor.name} begins {name} {now_s - leaves_s:.1f} s after it was told to drain",
            bundle.job,
        )

    def dead_letter(self, receipt: str, bundle: Bundle, now_s: float) -> None:
        """A manager has received a dead letter."""
        self._dead[receipt] = name_of_bundle(bundle), now_s

    def deleted(self, receipts: Iterable[str], *, is_live: Callable[[str], bool]) -> None:
        """A manager has deleted dead letters: each is committed, or was sent again."""
        for receipt in receipts:
            name, since_s = self._dead.pop(receipt, (None, 0.0))
            if name is not None and is_live(name[0]):
                self.require(
                    name in self._committed_s or self._sent_s.get(name, -1.0) >= since_s,
                    "dead letters",
                    f"{name} is deleted from the dead letters, and neither committed nor sent",
                    name[0],
                )

    def sent(self, who: str, bundle: Bundle, now_s: float, *, disturbed: bool) -> None:
        """A task message has been sent. A sender that was `disturbed` may have looked before."""
        self._sent_s[name_of_bundle(bundle)] = now_s
        if bundle.losses or disturbed or not who.startswith("manager"):
            return
        name = name_of_bundle(bundle)
        since_s = self._committed_s.get(name, now_s)
        self.require(
            now_s - since_s <= SETTLED_S,
            "waste",
            f"{who} sends {name} as new work {now_s - since_s:.1f} s after its commit",
            bundle.job,
        )
