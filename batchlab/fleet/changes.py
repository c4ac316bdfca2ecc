"""Changes to the in-memory state of groups, and the record of all changes. The module does no I/O.

Invariant: each change starts or ends exactly one activity, and marks the state as unsaved. Activities of a pool of the
Fleet port have a short text. Activities of an Auto Scaling group have AWS's wording, with sentences that begin with a
time and are separated by two spaces.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

from batchlab.core.model import Instance, LifecycleState, Pool
from batchlab.core.ports import KEEP_TERMINATED_S, Clock, Ids
from batchlab.fleet import lifecycle_hooks, warm_pool
from batchlab.fleet.api_types import LAUNCHING, TERMINATING, LifecycleNotification, Process
from batchlab.fleet.group_state import ENDING, ON_STANDBY, STARTING, WARMING, ActivityLog, Asg, Group, Member, weigh
from batchlab.fleet.placement import Placement
from batchlab.fleet.termination import CRASH_LOOP, crash_loop_wait_s, victims


class SteadyClock:
    """Clock in seconds since the epoch that never goes back while the process runs. The SteadyClock adds the monotonic
    clock's progress to the wall clock's value at the start of the process, so saved times stay valid after a
    restart."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._ahead_s = clock.now_s() - clock.monotonic_s()

    def now_s(self) -> float:
        return self._clock.monotonic_s() + self._ahead_s


KEEP_NOTICES = 1_000
KEEP_REASONS = 4
"""Maximum number of reasons in a cause. AWS limits causes to 1,023 characters."""


def stamp(at_s: float) -> str:
    """Return a time in the format of AWS's causes."""
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Record:
    """Activities and other records of changes. `dead` has the instances that ended, `notices` has the newest 1,000
    lifecycle notifications, and `unsaved` is true after a change. The caller resets `dead`, `notices`, and
    `unsaved`."""

    def __init__(self, log: ActivityLog, clock: Clock, ids: Ids) -> None:
        self.log = log
        self.dead: list[Instance] = []
        self.notices: deque[LifecycleNotification] = deque(maxlen=KEEP_NOTICES)
        self.unsaved = False
        self.steady = SteadyClock(clock)
        self.ids = ids
        self._clock = clock

    def now_s(self) -> float:
        return self._clock.now_s()

    def note(self, pool: str, description: str, cause: str, status: str = "Successful") -> int:
        """Record an activity and return its id."""
        self.unsaved = True
        return self.log.add(pool, self.now_s(), description, cause, status)

    def settle(self, group: Group, activity: int, status: str, *, more: str = "", message: str = "") -> None:
        self.unsaved = True
        name, now_s = group.pool.name, self.now_s()
        self.log.settle(name, activity, status, now_s, more=more, message=message)

    def mark(self, group: Group, activity: int, status: str) -> None:
        self.unsaved = True
        self.log.mark(group.pool.name, activity, status)

    def cause_text(self, asg: Asg, *sentences: str) -> str:
        """Return a cause in AWS's wording, with the reasons of the desired capacity followed by `sentences`."""
        at = stamp(self.now_s())
        return "  ".join([asg.cause] * bool(asg.cause) + [f"At {at} {s}." for s in sentences])

    def explain(self, asg: Asg, sentence: str) -> None:
        """Add a reason for a change of desired capacity. The group stores the latest KEEP_REASONS reasons until the
        group reaches desired capacity."""
        reasons = self.cause_text(asg, sentence).split("  ")
        asg.cause = "  ".join(reasons[-KEEP_REASONS:])
        self.unsaved = True


_OUT = "an instance was taken out of service in response to"
_DIFFERENCE = "a difference between desired and actual capacity"
_STUCK = "Could not scale to desired capacity because all remaining instances are protected from"


class Changes(Record):
    """Writer of all changes to groups and their activity log."""

    def create_group(self, pool: Pool) -> Group:
        """Return a new group for a pool of the Fleet port."""
        limits = f"min: {pool.min_size}, max: {pool.max_size}, desired: {pool.min_size}"
        self.note(pool.name, "Creating group", f"a user request created the group with {limits}")
        return Group(pool, pool.min_size)

    def set_desired(self, group: Group, desired: int, cause: str, *, cooldown: int | None = None) -> None:
        """Set desired capacity. The same call terminates surplus instances, so that invariant I5 of the module `engine`
        holds. `cooldown` replaces the group's default cooldown. The cooldown starts when the group reaches desired
        capacity."""
        before = group.desired
        if desired != before:
            group.desired = desired
            if group.asg is None:
                change = f"{cause} changed desired capacity from {before} to {desired}"
                self.note(group.pool.name, f"Setting desired capacity to {desired}", change)
            else:
                change = f"{cause} changing the desired capacity from {before} to {desired}"
                self.explain(group.asg, change)
                default = group.asg.config.default_cooldown
                group.asg.cooling = default if cooldown is None else cooldown
        self.scale_in(group)

    def end(self, group: Group) -> None:
        """Perform the scheduled action that ends the instances of a pool of the Fleet port."""
        group.end_s, self.unsaved = None, True
        group.pool = replace(group.pool, min_size=0, max_size=0)
        self.set_desired(group, 0, "a scheduled action")

    def scale_in(self, group: Group) -> None:
        """Terminate the instances chosen by `victims`, or return the chosen instances to the warm pool. If too many
        instances have scale-in protection, record one activity."""
        if group.suspended(Process.TERMINATE):
            return
        size = weigh(group.staying())
        for member in victims(group, self.steady.now_s()):
            remaining = size - member.asg.weight
            shrinking = f"{_DIFFERENCE}, shrinking the capacity from {size} to {remaining}"
            if warm_pool.takes_back(group, member):
                warm_pool.take_back(self, group, member, shrinking)
            else:
                self.retire(group, member, why=shrinking, note="terminated: scale-in")
            size = remaining
        all_protected = all(member.instance.protected for member in group.staying())
        stuck = max(0, size - group.desired) if all_protected else 0
        if stuck and stuck != group.stuck:
            self.note(
                group.pool.name,
                f"{_STUCK} scale-in",
                f"{size} instances are protected and desired capacity is {group.desired}",
                "Cancelled",
            )
        group.stuck = stuck

    def admit(self, group: Group, size: int, now_s: float, place: Placement | None) -> Member:
        """Add a Pending member to a group whose other members have `size` units of capacity."""
        if group.asg is not None and place is not None:
            return self._admit_to_asg(group, size, now_s, place)
        name = self.ids.fresh("w")
        note = self._loop_note(group)
        growing = f"{_DIFFERENCE}, increasing the capacity from {size} to {size + 1}"
        launch = self.note(
            group.pool.name,
            f"Launching a new instance: {name}",
            f"an instance was started in response to {growing}",
            "InProgress",
        )
        instance = Instance(name, group.pool.name, LifecycleState.PENDING, self._clock.now_s(), note=note)
        member = group.members[name] = Member(instance, launch, since_s=now_s)
        return member

    def _admit_to_asg(self, group: Group, size: int, now_s: float, place: Placement) -> Member:
        assert group.asg is not None
        asg, name = group.asg, self.ids.fresh("i")
        reason = (
            "an instance was started in response to "
            f"{_DIFFERENCE}, increasing the capacity from {size} to {size + place.asg.weight}"
        )
        if place.asg.warm:
            reason = "an instance was started to be added to the warm pool"
        elif asg.replacing:
            reason = asg.replacing.pop(0)
        launch = self.note(
            group.pool.name, f"Launching a new EC2 instance: {name}", self.cause_text(asg, reason), "PreInService"
        )
        instance = Instance(
            name,
            group.pool.name,
            LifecycleState.WARMED_PENDING if place.asg.warm else LifecycleState.PENDING,
            self.now_s(),
            protected=asg.config.new_instances_protected_from_scale_in,
            note=self._loop_note(group),
            machine=place.machine,
        )
        member = Member(instance, launch, since_s=now_s, asg=place.asg)
        group.members[name] = member
        return member

    def _loop_note(self, group: Group) -> str:
        if group.failures < CRASH_LOOP:
            return ""
        return f"the last {group.failures} ended before they were ready: {group.reason}"

    def arrive(self, group: Group, member: Member) -> None:
        """Put an instance into service if the instance is ready. In a pool of the Fleet port, the instance's worker
        must have reported readiness. In an Auto Scaling group, the launch hooks of the instance must be completed."""
        if not member.running or member.asg.asleep:
            return
        if member.state in WARMING:
            warm_pool.arrive(self, group, member)
        if member.state not in STARTING:
            return
        if group.asg is None:
            if member.ready:
                self.put_in_service(group, member)
                group.reset_failures()
        elif (
            member.state is LifecycleState.PENDING
            # Launch hooks do not run for an instance that returns from Standby.
            and not member.asg.moving
            and lifecycle_hooks.begin(self, group, member, LAUNCHING)
        ):
            self.move(member, LifecycleState.PENDING_WAIT)
            self.mark(group, member.launch, "MidLifecycleAction")
        elif member.state is not LifecycleState.PENDING_WAIT:
            self.put_in_service(group, member)

    def put_in_service(self, group: Group, member: Member) -> None:
        member.move(LifecycleState.IN_SERVICE, note="")
        member.asg.in_service_s = self.steady.now_s() if group.asg else None
        self.settle(group, member.asg.moving or member.launch, "Successful")
        member.asg.moving, member.asg.warm = 0, False

    def move(self, member: Member, state: LifecycleState) -> None:
        """Change the state of a member. The note and the activity of the member stay unchanged."""
        member.move(state, note=member.instance.note)
        self.unsaved = True

    def fail(self, group: Group, member: Member, how: str, *, note: str, why: str = "", dead: bool = False) -> None:
        """Start the termination of an unhealthy instance. Termination hooks do not run for a dead instance."""
        self._count_failed_start(group, member, how, dead=dead)
        member.instance = replace(member.instance, healthy=False)
        if group.asg is not None and member.staying:
            group.asg.replacing.append(
                "an instance was launched in response to an unhealthy instance needing to be replaced"
            )
        self.retire(group, member, why=why or f"a health check: {how}", note=note, hooked=not dead)

    def fail_launch(self, group: Group, member: Member, how: str) -> None:
        """Record a failed launch. The call does not record a termination activity, because the instance does not
        exist."""
        self._count_failed_start(group, member, how)
        member.move(LifecycleState.TERMINATING, note=how)

    def abandon(self, group: Group, member: Member, how: str) -> None:
        """Terminate an instance whose launch hook was abandoned, and count the launch as a failed start."""
        self.settle(group, member.launch, "Cancelled", message=how)
        self._count_failed_start(group, member, how)
        why = "a lifecycle action that was abandoned"
        self.retire(group, member, why=why, note=f"terminated: {how}")

    def retire(self, group: Group, member: Member, *, why: str, note: str, hooked: bool = True) -> None:
        """Start the termination of an instance, even if the instance has scale-in protection. Termination hooks run
        only for instances in state InService, EnteringStandby, or Standby."""
        if member.asg.moving:
            self.settle(group, member.asg.moving, "Cancelled")
            member.asg.moving = 0
        elif member.state in STARTING or member.state in WARMING:
            self.settle(group, member.launch, "Cancelled")
        worked = member.state is LifecycleState.IN_SERVICE or member.state in ON_STANDBY
        member.asg.waits.clear()
        member.asg.resting = False
        member.move(LifecycleState.TERMINATING, note=note)
        if group.asg is None:
            self._open_end(group, member, f"{_OUT} {why}", "instance")
            return
        chosen = [f"instance {member.instance.id} was selected for termination"]
        sentences = [f"{_OUT} {why}", *chosen * (_DIFFERENCE in why)]
        self._open_end(group, member, self.cause_text(group.asg, *sentences), "EC2 instance")
        if hooked and worked and lifecycle_hooks.begin(self, group, member, TERMINATING):
            self.move(member, LifecycleState.TERMINATING_WAIT)
            self.mark(group, member.end, "MidLifecycleAction")

    def _open_end(self, group: Group, member: Member, cause: str, noun: str) -> None:
        what = f"Terminating {noun}: {member.instance.id}"
        member.end = self.note(group.pool.name, what, cause, "InProgress")

    def record_end(self, group: Group, member: Member, *, note: str, now_s: float) -> None:
        member.asg.waits.clear()
        member.move(LifecycleState.TERMINATED, note=note)
        member.running, member.since_s = False, now_s
        self.settle(group, member.end, "Successful")
        self.dead.append(member.instance)

    def disown(self, instance: str) -> None:
        """Record the termination of a running instance that does not belong to a group."""
        why = "no group knowing it"
        self.note("", f"Terminating orphaned instance: {instance}", f"{_OUT} {why}")

    def resize(self, group: Group, by: int) -> None:
        """Change desired capacity by `by` as part of another activity."""
        group.desired += by
        self.unsaved = True

    def launch_replacement(self, group: Group, member: Member, why: str) -> None:
        """Request a replacement of the instance. The group terminates the replaced instance after the replacement is
        InService."""
        if member.staying and group.asg is not None:
            member.asg.leaving = why
            group.asg.replacing.append(f"an instance was launched in response to {why}")
            self.unsaved = True

    def mark_healthy(self, member: Member) -> None:
        """Mark an instance as healthy, unless the termination of the instance has started."""
        if member.end == 0 and not member.instance.healthy:
            member.instance = replace(member.instance, healthy=True)
            self.unsaved = True

    def protect(self, member: Member, *, on: bool) -> None:
        member.instance = replace(member.instance, protected=on)
        self.unsaved = True

    def back_off(self, group: Group, now_s: float) -> None:
        """If another launch has failed, start the next wait of the group's crash loop."""
        if group.failed and group.failures >= CRASH_LOOP:
            pause_s = crash_loop_wait_s(group.waits)
            group.waits += 1
            group.retry_s = now_s + pause_s
            cause = f"{group.failures} instances in a row ended before they were ready, the last: "
            what = f"Waiting {pause_s:g} s before the next launch"
            self.note(group.pool.name, what, cause + group.reason, "Failed")
        group.failed = False

    def wait_for_gpus(self, group: Group, users: Sequence[Member]) -> None:
        """Record a failed activity if the next launch of the group waits for the instances `users`, which use the GPUs.

        Each wait for the same instances is recorded once. If one of the instances is ending, the wait is short and is
        not recorded. If `users` is empty, the group does not wait.
        """
        is_short = any(member.state in ENDING for member in users)
        names = ", ".join(f"{member.instance.id} ({member.state})" for member in users)
        reason = f"the GPUs of this machine are in use by {names}" if users and not is_short else ""
        if reason and reason != group.waits_for:
            cause, noun = f"an instance was not started, because {reason}", "instance"
            if group.asg is not None:
                cause, noun = self.cause_text(group.asg, cause), "EC2 instance"
            what = f"Launching a new {noun}.  Status Reason: {reason[:1].upper()}{reason[1:]}."
            self.note(group.pool.name, what, cause, "Failed")
        group.waits_for = reason

    def forget_terminated(self, group: Group, now_s: float) -> None:
        """Remove instances that have been Terminated for more than KEEP_TERMINATED_S."""
        old = [
            name
            for name, member in group.members.items()
            if member.state is LifecycleState.TERMINATED and now_s - member.since_s > KEEP_TERMINATED_S
        ]
        for name in old:
            del group.members[name]
            self.unsaved = True

    def count_failure(self, group: Group, how: str) -> None:
        group.failures += 1
        group.reason, group.failed = how, True
        group.last_failure_s = self.steady.now_s()

    def _count_failed_start(self, group: Group, member: Member, how: str, *, dead: bool = False) -> None:
        served = member.asg.in_service_s is not None
        young = dead and served and not lifecycle_hooks.has_started(member, self.steady.now_s())
        warming = member.state in WARMING and not served
        if member.state in STARTING or warming or young:
            self.count_failure(group, how)
            self.settle(group, member.launch, "Failed", more=f"; {how}", message=how)
