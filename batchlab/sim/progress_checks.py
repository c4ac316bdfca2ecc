"""The promise that a manager stops in time when it loses the lease.

Invariant: this module uses only the effects of port calls, and the times when processes thaw.

The promise that a manager finds lost bundles and stopped workers, even if no queue gets empty.

Invariant: only the time in which a manager leads counts.

The promise that no task starts before its time: the start time of its job, or a backoff's end.

Invariant: this module computes the earliest start itself, from definitions and outcomes.

Checks against waste: drains, dead letters, and needless work.

Invariant: each check uses only the effects of port calls and the starts of tasks. A job that a
lying worker has touched is not checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from batchlab.core.job_definition import JobDef, task_name
from batchlab.core.model import Bundle, Outcome, StageName
from batchlab.core.ports import Cut
from batchlab.sim.actors import Actor
from batchlab.sim.event_log import Name, name_of_bundle

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
            f"{actor.name} calls {label} {now_s - told_s:.1f} s after it learned that another manager has the lease",
        )


BUNDLE_SILENCES, INSTANCE_SILENCES = 14.0, 3.75
"""Limits for a new copy of a lost bundle, and the end of a stopped instance, in `silence_s`."""
INSTANCE_S = 375.0
"""Seconds for which an instance may be silent, however short `silence_s` is."""
SILENCE_SLACK_S = 60.0


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
        limit_s = BUNDLE_SILENCES * self.silence_s + SILENCE_SLACK_S
        for name, lost_s in self._lost_s.items():
            self.require(
                now_s - max(lost_s, since_s) <= limit_s,
                "silence",
                f"{name} is lost since {lost_s:.0f} s, and nobody has sent it again",
                name[0],
            )
        limit_s = max(INSTANCE_S, INSTANCE_SILENCES * self.silence_s) + SILENCE_SLACK_S
        for actor in [one for one in self.stopped if one.alive]:
            self.stopped[actor] += min(step_s, now_s - since_s)
            self.require(
                self.stopped[actor] <= limit_s,
                "silence",
                f"{actor.name} has stopped for ever, and keeps its instance after {self.stopped[actor]:.0f} s",
                None,
            )


RequireForJob = Callable[[bool, str, str, str], None]
"""A check with the arguments (holds, promise, facts, job)."""

EARLY_S = 0.6
"""Seconds by which a worker may start a task before its time."""

Try = tuple[str, str, int, int, int]
"""One attempt of a task: (job, stage, round, attempt, task)."""


@dataclass(slots=True)
class StartTimes:
    """The earliest start of each further attempt. All times are seconds since the epoch."""

    require: RequireForJob
    is_exact: bool = False
    """Whether the clocks of all processes agree. If not, starts are not checked."""
    _jobs: dict[str, JobDef] = field(default_factory=dict)
    _due_s: dict[Try, float] = field(default_factory=dict)

    def defined(self, job: JobDef) -> None:
        """Record the definition of a job."""
        self._jobs[job.id] = job

    def committed(self, outcome: Outcome) -> None:
        """Record the further attempts that follow from an outcome."""
        bundle = outcome.bundle
        job = self._jobs.get(bundle.job)
        again = [
            follow.bundle
            for follow in outcome.follows
            if follow.bundle.stage == bundle.stage and follow.bundle.attempt == bundle.attempt + 1
        ]
        if job is None or not again:
            return
        shortest_s, _ = job.stage(bundle.stage).retry.wait_range_s(bundle.attempt)
        due_s = outcome.ended_s + shortest_s
        for one in again:
            for task in one.tasks:
                self._due_s[one.job, one.stage, one.round, one.attempt, task] = due_s

    def started(self, bundle: Bundle, task: int, now_s: float) -> None:
        """Check the start of a task."""
        if not self.is_exact:
            return
        job = self._jobs.get(bundle.job)
        # The start time applies to round 0 only: a job that its user retries begins at once.
        start_s = (job.start_at_s or 0.0) if job and not bundle.round else 0.0
        name = bundle.job, bundle.stage, bundle.round, bundle.attempt, task
        due_s = max(start_s, self._due_s.get(name, 0.0))
        self.require(
            now_s >= due_s - EARLY_S,
            "start times",
            f"{task_name(bundle.stage, task)} of {bundle.job} starts {due_s - now_s:.1f} s early "
            f"(attempt {bundle.attempt}, round {bundle.round})",
            bundle.job,
        )


RequireOracle = Callable[[bool, str, str, str], None]
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

    require: RequireOracle
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

    def started(self, bundle: Bundle, now_s: float, actor: Actor | None, *, disturbed: bool) -> None:
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

    def begins_again(self, actor: Actor, bundle: Bundle, received_s: float, deliveries: int) -> None:
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

    def cut(self, cut: Cut, now_s: float, since_s: float, live_since_s: Callable[[str], float]) -> None:
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
                    f"{cut.job}/{cut.stage} is cut while {name}/{stage} has tasks left, whose priority is higher",
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
