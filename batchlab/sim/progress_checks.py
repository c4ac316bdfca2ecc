"""Checks of managers and workers over time: the lease, lost bundles, start times, and needless work.

The checks use only the effects of port calls, the starts of tasks, and the times when processes thaw. The checks skip
each job that a lying worker has touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from batchlab.core.job_definition import Condition, JobDef, task_name
from batchlab.core.model import Bundle, FailureKind, JobState, Outcome, StageName
from batchlab.core.ports import Cut
from batchlab.sim.actors import Actor
from batchlab.sim.event_log import Name, name_of_bundle

Check = Callable[[bool, str, str, str | None], None]
"""Function that checks a promise, with the arguments (holds, promise, facts, job)."""

SLACK_S = 1.0
"""Tolerance in seconds for the latency of calls."""
MIN_RUN_TIMES = 5
"""Number of tasks of a stage that justify an expected run time."""
ROUNDING_S = 0.001
FREE = ("ledger.lease", "ledger.release")
"""Ledger calls that a manager without the lease may make."""


@dataclass(slots=True)
class LeadershipChecks:
    """Checks that a manager stops in time when it loses the lease.

    LeadershipChecks stores when each manager renewed the lease, and when each manager learned of another holder.
    """

    check: Check
    ttl_s: float
    thawed_s: Callable[[Actor], float]
    """Function that returns the time when a process was last thawed."""
    _renewed_s: dict[Actor, float] = field(default_factory=dict)
    _led_s: dict[Actor, float] = field(default_factory=dict)
    _deposed_s: dict[Actor, float] = field(default_factory=dict)
    last_s: float = 0.0
    """Time when a manager last took the lease, or got it back after a pause."""
    _leader: Actor | None = None

    def led_s(self, actor: Actor) -> float:
        """Return the time when the manager took the lease, or infinity if the manager never took it."""
        return self._led_s.get(actor, math.inf)

    def on_lease(self, actor: Actor, owner: str, now_s: float) -> None:
        """Record that the ledger told a manager that `owner` holds the lease."""
        if owner == actor.name:
            if actor is not self._leader or now_s - self._renewed_s[actor] > self.ttl_s / 2:
                self._leader, self.last_s = actor, now_s
            self._renewed_s[actor] = now_s
            self._led_s.setdefault(actor, now_s)
            self._deposed_s.pop(actor, None)
        elif actor in self._renewed_s:
            self._deposed_s.setdefault(actor, now_s)

    def check_call(self, actor: Actor, label: str, now_s: float, *, disturbed: bool) -> None:
        """Check a call of a manager. A `disturbed` manager may receive the answer about its lease late."""
        renewed_s = self._renewed_s.get(actor)
        if renewed_s is None or label in FREE:
            return
        patience_s = self.ttl_s * 2 / 3 + SLACK_S
        # A manager process that was frozen requests the lease once after the thaw, before the process stops.
        is_thawed = now_s - self.thawed_s(actor) < patience_s
        age_s = now_s - renewed_s
        facts = f"{actor.name} calls {label} {age_s:.1f} s after it last renewed its lease"
        self.check(age_s <= self.ttl_s + SLACK_S or is_thawed, "lead", facts, None)
        age_s = now_s - self._deposed_s.get(actor, now_s)
        facts = f"{actor.name} calls {label} {age_s:.1f} s after it learned that another manager has the lease"
        self.check(age_s <= (patience_s if disturbed else SLACK_S), "lead", facts, None)


BUNDLE_SILENCES, INSTANCE_SILENCES = 14.0, 3.75
"""Time limits for a new copy of a lost bundle, and for the end of a stopped instance, in units of `silence_s`."""
INSTANCE_S = 375.0
"""Lower bound in seconds of the time limit for the end of a stopped instance."""
SILENCE_STEPS = 10
"""Number of steps of a worker's silence. A new leader knows the silence rounded down to a step, and only from 3 steps
on (see `manager.unresponsive_workers`)."""
SILENCE_SLACK_S = 60.0


@dataclass(slots=True)
class SilenceChecks:
    """Checks that managers find lost bundles and stopped workers, even if no queue becomes empty.

    The time limits count only time in which a manager leads.
    """

    check: Check
    silence_s: float
    """Seconds without news of a bundle after which a manager looks for the bundle."""
    stopped: dict[Actor, float] = field(default_factory=dict)
    """Seconds for which managers have led since each worker stopped."""
    _lost_s: dict[Name, float] = field(default_factory=dict)
    _checked_s: float = 0.0
    _leader_s: float = 0.0

    def on_stop(self, actor: Actor) -> None:
        """Record that a worker stops forever."""
        self.stopped[actor] = 0.0

    def on_send(self, name: Name) -> None:
        """Record that a bundle is sent, whether or not its message arrives."""
        self._lost_s.pop(name, None)

    def check_progress(self, lost: Collection[Name], since_s: float | None, now_s: float, leader_s: float) -> None:
        """Check the stopped workers and the `lost` bundles.

        A lost bundle is not committed, and neither a queue nor a worker has the bundle. `since_s` is the time since
        which a manager has led without a fault, or None without a leader. `leader_s` is the time when a manager last
        took the lease.
        """
        step_s, self._checked_s = now_s - self._checked_s, now_s
        self._lost_s = {name: self._lost_s.get(name, now_s) for name in lost}
        if since_s is None:
            return
        limit_s = BUNDLE_SILENCES * self.silence_s + SILENCE_SLACK_S
        for name, lost_s in self._lost_s.items():
            facts = f"{name} is lost since {lost_s:.0f} s, and nobody has sent it again"
            self.check(now_s - max(lost_s, since_s) <= limit_s, "silence", facts, name[0])
        limit_s = max(INSTANCE_S, INSTANCE_SILENCES * self.silence_s)
        if leader_s != self._leader_s:
            self._leader_s = leader_s
            self._lose_steps(limit_s / SILENCE_STEPS)
        limit_s += SILENCE_SLACK_S
        for actor in [actor for actor in self.stopped if actor.alive]:
            self.stopped[actor] += min(step_s, now_s - since_s)
            stopped_s = self.stopped[actor]
            facts = f"{actor.name} has stopped for ever, and keeps its instance after {stopped_s:.0f} s"
            self.check(stopped_s <= limit_s, "silence", facts, None)

    def _lose_steps(self, part_s: float) -> None:
        """Subtract the silence that a new leader does not know. `part_s` is the length of a step in seconds."""
        # The rounding loses up to one step. One more step allows for the last silences that were not stored.
        for actor, stopped_s in self.stopped.items():
            self.stopped[actor] = stopped_s - 2 * part_s if stopped_s > 4 * part_s else 0.0


EARLY_S = 0.6
"""Seconds by which a worker may start a task before the task's start time."""

Attempt = tuple[str, str, int, int, int]
"""Identity of an attempt of a task, as (job, stage, round, attempt, task)."""


@dataclass(slots=True)
class StartTimeChecks:
    """Checks that no task starts before the start time of its job or the end of its backoff.

    The checks compute the earliest start of each attempt from definitions and outcomes, in seconds since the epoch.
    """

    check: Check
    jobs: Mapping[str, JobDef]
    is_exact: bool = False
    """Whether the clocks of all processes agree. The checks skip all starts if the clocks differ."""
    _due_s: dict[Attempt, float] = field(default_factory=dict)

    def on_commit(self, outcome: Outcome) -> None:
        """Record the next attempts that follow from an outcome."""
        bundle = outcome.bundle
        job = self.jobs.get(bundle.job)
        retries = [
            follow.bundle
            for follow in outcome.follows
            if follow.bundle.stage == bundle.stage and follow.bundle.attempt == bundle.attempt + 1
        ]
        if job is None or not retries:
            return
        rule = job.stage(bundle.stage).retry
        backoff_s = min(rule.max_backoff_s, rule.backoff_s * rule.factor ** (bundle.attempt - 1))
        due_s = outcome.ended_s + backoff_s * (1 - rule.jitter)
        for retry in retries:
            for task in retry.tasks:
                self._due_s[retry.job, retry.stage, retry.round, retry.attempt, task] = due_s

    def check_start(self, bundle: Bundle, task: int, now_s: float) -> None:
        """Check that a task does not start too early."""
        if not self.is_exact:
            return
        job = self.jobs.get(bundle.job)
        # The start time of a job applies only to round 0, because a retried job begins immediately.
        start_s = (job.start_at_s or 0.0) if job and not bundle.round else 0.0
        name = bundle.job, bundle.stage, bundle.round, bundle.attempt, task
        due_s = max(start_s, self._due_s.get(name, 0.0))
        facts = (
            f"{task_name(bundle.stage, task)} of {bundle.job} starts {due_s - now_s:.1f} s early "
            f"(attempt {bundle.attempt}, round {bundle.round})"
        )
        self.check(now_s >= due_s - EARLY_S, "start times", facts, bundle.job)


WAITS_S = 10.0
"""Seconds for which work may wait in a queue when a manager sends a speculative copy to this queue."""
TASKS_PER_COPY = 10
"""A stage of n tasks has at most n / TASKS_PER_COPY speculative copies of one manager, and always at least one."""


@dataclass(slots=True)
class CopyChecks:
    """Checks of speculative copies: which bundles are copied, how often, and where the copies run."""

    check: Check
    jobs: Mapping[str, JobDef]
    _sent: dict[tuple[str, str, str, int], dict[str, set[float]]] = field(default_factory=dict)
    """Run time limits of the copies by bundle, for each manager and stage. A repeated request has the same limit."""

    def check_send(self, sender: str, bundle: Bundle, copy_s: float, waiting: Collection[Name]) -> None:
        """Check the send of a copy. `waiting` has the bundles that have waited in the queue for WAITS_S seconds."""
        name = f"{bundle.stage}/{bundle.id} of {bundle.job}"
        job = self.jobs[bundle.job]
        stage = job.stage(bundle.stage)
        is_allowed = stage.speculative_copies and not stage.side_effects
        self.check(is_allowed, "copies", f"{sender} sends a copy of {name}, which must not be copied", bundle.job)
        self.check(sender.startswith("manager"), "copies", f"{sender} sends a copy of {name} again", bundle.job)
        self.check(not waiting, "copies", f"{sender} sends a copy of {name} while {waiting} wait", bundle.job)
        copies = self._sent.setdefault((sender, bundle.job, bundle.stage, bundle.round), {})
        limits_s = copies.setdefault(bundle.id, set())
        limits_s.add(copy_s)
        facts = f"{sender} sends {len(limits_s)} copies of {name}"
        self.check(len(limits_s) == 1, "copies", facts, bundle.job)
        if job.items is not None:  # The definition of a job with an input does not contain the number of tasks.
            facts = f"{sender} sends copies of {len(copies)} bundles of {bundle.stage} of {bundle.job}"
            self.check(len(copies) <= max(1, job.items // TASKS_PER_COPY), "copies", facts, bundle.job)

    def check_commit(self, actor: Actor, outcome: Outcome) -> None:
        """Check the outcome of a copy. A copy leaves failures to the original run."""
        has_failed = any(failure.kind is not FailureKind.LOST for failure in outcome.failed)
        facts = f"{actor.name} commits a failure of a copy of {outcome.bundle.stage}/{outcome.bundle.id}"
        self.check(not has_failed, "copies", facts, outcome.bundle.job)

    def check_start(self, actor: Actor, bundle: Bundle, is_original: bool, is_copy: bool) -> None:
        """Check that a worker that runs a bundle does not also run its copy."""
        facts = f"{actor.name} runs {bundle.stage}/{bundle.id} and also its copy"
        self.check(not (is_original and is_copy), "copies", facts, bundle.job)


@dataclass(slots=True)
class TimeoutChecks:
    """Checks of the expected run times in task messages, from which workers choose visibility timeouts."""

    check: Check
    leadership: LeadershipChecks
    _samples_s: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    """Seconds per task of each outcome with tasks that succeeded, once for each task, by job and stage."""
    _planned_s: dict[tuple[str, str], float] = field(default_factory=dict)
    """Time when the first bundle was planned, by job and stage."""

    def on_plan(self, bundle: Bundle, now_s: float) -> None:
        self._planned_s.setdefault((bundle.job, bundle.stage), now_s)

    def on_commit(self, outcome: Outcome) -> None:
        if outcome.run_s:
            samples_s = self._samples_s.setdefault((outcome.bundle.job, outcome.bundle.stage), [])
            samples_s += [sum(outcome.run_s) / len(outcome.run_s)] * len(outcome.run_s)

    def check_send(self, sender: str, bundle: Bundle, expected_s: Mapping[str, float], now_s: float) -> None:
        """Check the expected run times in a manager's message. Enough tasks have run, one of them for at least as
        long. A manager that has planned the stage has waited for the stage for at least this time. After a change of
        the leader, or a retry, the manager believes the mean run time in the ledger."""
        job = bundle.job
        for stage, task_s in expected_s.items():
            samples_s = self._samples_s.get((job, stage), [])
            facts = f"{sender} expects {task_s} s for a task of {stage} of {job}"
            is_measured = len(samples_s) >= MIN_RUN_TIMES and task_s <= max(samples_s) + ROUNDING_S
            self.check(is_measured, "timeouts", f"{facts}, after {len(samples_s)} tasks", job)
            # A lying worker that has touched a job cannot cause a longer timeout, either.
            planned_s = self._planned_s.get((job, stage), now_s)
            is_adopted = bundle.round > 0 or self.leadership.last_s > planned_s
            passed_s = math.inf if is_adopted else now_s - planned_s
            self.check(task_s <= passed_s + SLACK_S, "timeouts", f"{facts}, which was planned {passed_s} s ago", None)


@dataclass(slots=True)
class DependencyChecks:
    """Checks that no task starts before the conditions of its job's dependencies have held.

    The bucket has the end of each round of a job before the manager may act on the end.
    """

    check: Check
    jobs: Mapping[str, JobDef]
    _ends: dict[str, set[JobState]] = field(default_factory=dict)
    """States in which rounds of each job have ended."""

    def on_end(self, job: str, state: JobState) -> None:
        self._ends.setdefault(job, set()).add(state)

    def check_start(self, job: str) -> None:
        for dependency in self.jobs[job].after if job in self.jobs else ():
            ends = self._ends.get(dependency.job, set())
            has_held = ends if dependency.condition is Condition.ENDED else JobState.SUCCEEDED in ends
            facts = f"a task of {job} starts, which depends on {dependency}, whose rounds ended {sorted(ends)}"
            self.check(bool(has_held), "dependencies", facts, job)

    def may_fail(self, job: JobDef) -> bool:
        """Return whether a round of a dependency has ended without the success that the job requires."""
        return any(
            dependency.condition is Condition.SUCCEEDED and self._ends.get(dependency.job, set()) - {JobState.SUCCEEDED}
            for dependency in job.after
        )


LEAVING_S = 0.2
"""Seconds after the start of a drain in which the worker may still begin a bundle."""
SETTLED_S = 5.0
"""Age in seconds of a commit after which a manager must not send the committed bundle as new work."""
DISTURBED_S = 120.0
"""Value of SETTLED_S for a manager that a fault has delayed or frozen."""
GIVE_BACK_S = 1.0
"""Seconds within which a draining worker returns each message whose tasks have not begun."""
KNOWN_S = 10.0
"""Age in seconds of uncut tasks after which a manager must not cut bundles with a lower priority."""


@dataclass(slots=True)
class WasteChecks:
    """Checks of drains, dead letters, priorities, and needless work."""

    check: Check
    jobs: Mapping[str, JobDef]
    _committed_s: dict[Name, float] = field(default_factory=dict)
    _leaves_s: dict[Actor, float] = field(default_factory=dict)
    _begun: set[tuple[Actor, Name]] = field(default_factory=set)
    _dead: dict[str, tuple[Name, float]] = field(default_factory=dict)
    """Dead letters that a manager has received, by receipt."""
    _last_dead_s: float = -1.0
    _sent_s: dict[Name, float] = field(default_factory=dict)
    """Time of the last send of each bundle."""
    _uncut_s: dict[tuple[str, StageName], float] = field(default_factory=dict)
    """Time since which each stage of each job has tasks that are in no bundle."""
    has_share_policy: bool = False
    """Whether the grid has a fair-share policy, with which priorities order only the jobs of the same share."""

    def on_commit(self, name: Name, now_s: float) -> None:
        self._committed_s[name] = now_s

    def on_undo(self, name: Name) -> None:
        """Record that a power cut has removed the outcome of a bundle."""
        self._committed_s.pop(name, None)

    def on_drain(self, actor: Actor, now_s: float) -> None:
        """Record the time at which a worker starts to drain."""
        self._leaves_s.setdefault(actor, now_s)

    def check_start(self, bundle: Bundle, now_s: float, actor: Actor | None, *, disturbed: bool) -> None:
        """Check the start of a task of the bundle. A `disturbed` worker may start the task late."""
        name = name_of_bundle(bundle)
        if actor is None or (actor, name) in self._begun:
            return
        self._begun.add((actor, name))
        late_s = now_s - self._leaves_s.get(actor, now_s)
        facts = f"{actor.name} begins {name} {late_s:.1f} s after it was told to drain"
        self.check(disturbed or late_s <= LEAVING_S, "I6", facts, bundle.job)

    def check_rerun(self, actor: Actor, bundle: Bundle, received_s: float, deliveries: int) -> None:
        """Check that a worker looks for an outcome before the worker begins a retry or a repeated delivery."""
        name = name_of_bundle(bundle)
        is_open = self._committed_s.get(name, received_s) >= received_s
        facts = f"{actor.name} begins {name}, which was committed before it received the message"
        self.check(is_open or not (deliveries or bundle.attempt > 1), "waste", facts, bundle.job)

    def is_draining(self, actor: Actor, now_s: float) -> bool:
        """Return whether the worker has been draining for more than LEAVING_S."""
        return now_s - self._leaves_s.get(actor, now_s) > LEAVING_S

    def has_begun(self, actor: Actor, name: Name) -> bool:
        """Return whether the worker has begun a task of the bundle."""
        return (actor, name) in self._begun

    def check_cut(self, cut: Cut, now_s: float, since_s: float, live_since_s: Callable[[str], float]) -> None:
        """Check that a manager without faults since `since_s` cuts bundles in the order of priority.

        `live_since_s` returns the time when a job began or was last resumed.
        """
        job = self.jobs[cut.job]
        if cut.bundles:
            pool = job.stage(cut.stage).pool
            for (name, stage), uncut_s in self._uncut_s.items():
                rival = self.jobs[name]
                known_s = max(uncut_s, since_s, live_since_s(name))
                is_allowed = (
                    rival.priority <= job.priority
                    or rival.stage(stage).pool != pool
                    or rival.start_at_s is not None
                    or (self.has_share_policy and rival.share != job.share)
                    or now_s - known_s < KNOWN_S
                )
                facts = f"{cut.job}/{cut.stage} is cut while {name}/{stage} has tasks left, whose priority is higher"
                self.check(is_allowed, "priority", facts, cut.job)
        self._uncut_s.pop((cut.job, cut.stage), None)
        if cut.left:
            self._uncut_s[cut.job, cut.stage] = now_s

    def on_dead_letter(self, receipt: str, bundle: Bundle, now_s: float) -> None:
        """Record that a manager has received a dead letter."""
        self._dead[receipt] = name_of_bundle(bundle), now_s
        self._last_dead_s = now_s

    def has_dead_letters(self, since_s: float) -> bool:
        """Return whether a manager has received a dead letter after `since_s`."""
        return self._last_dead_s >= since_s

    def check_deletes(self, receipts: Iterable[str], *, is_live: Callable[[str], bool]) -> None:
        """Check that the bundle of each deleted dead letter was committed or sent again."""
        for receipt in receipts:
            name, since_s = self._dead.pop(receipt, (None, 0.0))
            if name is not None and is_live(name[0]):
                is_settled = name in self._committed_s or self._sent_s.get(name, -1.0) >= since_s
                facts = f"{name} is deleted from the dead letters, and neither committed nor sent"
                self.check(is_settled, "dead letters", facts, name[0])

    def check_send(self, sender: str, bundle: Bundle, now_s: float, *, disturbed: bool) -> None:
        """Check the send of a task message. A `disturbed` sender has a longer time limit."""
        name = name_of_bundle(bundle)
        self._sent_s[name] = now_s
        if bundle.losses or not sender.startswith("manager"):
            return
        age_s = now_s - self._committed_s.get(name, now_s)
        facts = f"{sender} sends {name} as new work {age_s:.1f} s after its commit"
        self.check(age_s <= (DISTURBED_S if disturbed else SETTLED_S), "waste", facts, bundle.job)
