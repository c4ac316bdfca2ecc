"""Checks against waste: drains, dead letters, and needless work.

Invariant: each check uses only the effects of port calls and the starts of tasks. A job that a
lying worker has touched is not checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from batchlab.core.job_definition import JobDef
from batchlab.core.model import Bundle, StageName
from batchlab.core.ports import Cut
from batchlab.sim.actors import Actor
from batchlab.sim.event_log import Name, name_of_bundle

Require = Callable[[bool, str, str, str], None]
"""A check with the arguments (holds, promise, facts, job)."""

LEAVING_S = 0.2
"""Seconds after the start of its drain within which a worker may still begin a bundle."""
SETTLED_S = 5.0
"""A manager that sends a bundle which was committed this many seconds ago has not looked for its
outcome."""
DISTURBED_S = 120.0
"""The same limit for a manager that a fault has delayed, or that was frozen."""
GIVE_BACK_S = 1.0
"""Seconds within which a draining worker gives back each message whose tasks it has not begun."""
KNOWN_S = 10.0
"""Seconds for which a manager that cuts bundles has known which jobs have tasks left."""


@dataclass(slots=True)
class Oracles:
    """Record of commits, sends, dead letters, and draining workers."""

    require: Require
    _committed_s: dict[Name, float] = field(default_factory=dict)
    _leaves_s: dict[Actor, float] = field(default_factory=dict)
    _begun: set[tuple[Actor, Name]] = field(default_factory=set)
    _dead: dict[str, tuple[Name, float]] = field(default_factory=dict)
    """Dead letters that a manager has received, by receipt."""
    _dead_s: float = -1.0
    """When the last dead letter was received."""
    _sent_s: dict[Name, float] = field(default_factory=dict)
    """When each bundle was last sent."""
    _left_s: dict[tuple[str, StageName], float] = field(default_factory=dict)
    """Since when each stage of each job has tasks that are in no bundle."""
    _jobs: dict[str, JobDef] = field(default_factory=dict)

    def defined(self, job: JobDef) -> None:
        """Record the definition of a job."""
        self._jobs[job.id] = job

    def committed(self, name: Name, now_s: float) -> None:
        """Record a committed outcome."""
        self._committed_s[name] = now_s

    def uncommitted(self, name: Name) -> None:
        """Record that a power cut has removed the outcome."""
        self._committed_s.pop(name, None)

    def leaves(self, actor: Actor, now_s: float) -> None:
        """Record that a worker starts to drain."""
        self._leaves_s.setdefault(actor, now_s)

    def started(
        self, bundle: Bundle, now_s: float, actor: Actor | None, *, disturbed: bool
    ) -> None:
        """Check the start of a task of the bundle. A `disturbed` worker may have been about to
        start it."""
        name = name_of_bundle(bundle)
        if actor is None or (actor, name) in self._begun:
            return
        self._begun.add((actor, name))
        leaves_s = self._leaves_s.get(actor, now_s)
        self.require(
            disturbed or now_s - leaves_s <= LEAVING_S,
            "I6",
            f"{actor.name} begins {name} {now_s - leaves_s:.1f} s after it was told to drain",
            bundle.job,
        )

    def begins_again(
        self, actor: Actor, bundle: Bundle, received_s: float, deliveries: int
    ) -> None:
        """Check that a worker begins a bundle, received at `received_s`, rightly. After earlier
        deliveries, or for a retry, it must have looked for an outcome."""
        name = name_of_bundle(bundle)
        committed_s = self._committed_s.get(name, received_s)
        self.require(
            committed_s >= received_s or not (deliveries or bundle.attempt > 1),
            "waste",
            f"{actor.name} begins {name}, which was committed before it received the message",
            bundle.job,
        )

    def is_draining(self, actor: Actor, now_s: float) -> bool:
        """Return whether the worker has been draining for longer than the limit."""
        return now_s - self._leaves_s.get(actor, now_s) > LEAVING_S

    def has_begun(self, actor: Actor, name: Name) -> bool:
        """Return whether the worker has begun a task of the bundle."""
        return (actor, name) in self._begun

    def cut(
        self, cut: Cut, now_s: float, since_s: float, live_since_s: Callable[[str], float]
    ) -> None:
        """Check the cut of bundles by a manager that is undisturbed since `since_s`. Jobs of a
        higher priority in the same pool come first. `live_since_s` gives when a job began or was
        last resumed."""
        job = self._jobs[cut.job]
        if cut.bundles:
            pool = job.stage(cut.stage).pool
            for (name, stage), left_s in self._left_s.items():
                rival = self._jobs[name]
                known_s = max(left_s, since_s, live_since_s(name))
                self.require(
                    rival.priority <= job.priority
                    or rival.stage(stage).pool != pool
                    or rival.start_at_s is not None
                    or now_s - known_s < KNOWN_S,
                    "priority",
                    f"{cut.job}/{cut.stage} is cut while {name}/{stage} has tasks left, whose "
                    "priority is higher",
                    cut.job,
                )
        self._left_s.pop((cut.job, cut.stage), None)
        if cut.left:
            self._left_s[cut.job, cut.stage] = now_s

    def dead_letter(self, receipt: str, bundle: Bundle, now_s: float) -> None:
        """Record that a manager has received a dead letter."""
        self._dead[receipt] = name_of_bundle(bundle), now_s
        self._dead_s = now_s

    def has_dead_letters(self, since_s: float) -> bool:
        """Return whether a manager has received a dead letter since then."""
        return self._dead_s >= since_s

    def deleted(self, receipts: Iterable[str], *, is_live: Callable[[str], bool]) -> None:
        """Check dead letters that a manager deletes: each bundle is committed, or was sent
        again."""
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
        """Check the send of a task message. A sender that was `disturbed` may have looked
        before."""
        self._sent_s[name_of_bundle(bundle)] = now_s
        if bundle.losses or not who.startswith("manager"):
            return
        name = name_of_bundle(bundle)
        since_s = self._committed_s.get(name, now_s)
        self.require(
            now_s - since_s <= (DISTURBED_S if disturbed else SETTLED_S),
            "waste",
            f"{who} sends {name} as new work {now_s - since_s:.1f} s after its commit",
            bundle.job,
        )
