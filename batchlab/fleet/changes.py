"""Every change a group's state can go through, each with its activity, without input or output.

Invariant: no change leaves a trace in one place only. Each opens or settles exactly one activity,
and marks the state as unsaved.
"""

from __future__ import annotations

from dataclasses import replace

from batchlab.fleet.decisions import CRASH_LOOP, victims, wait_s
from batchlab.fleet.state import ActivityLog, Group, Member
from batchlab.model import Instance, LifecycleState, Pool
from batchlab.ports import Clock, Ids

KEEP_TERMINATED_S = 60.0

_OUT = "an instance was taken out of service in response to"
_DIFFERENCE = "a difference between desired and actual capacity"


class Changes:
    """The only writer of groups and their log. `dead` collects who ended, `unsaved` says whether
    anything changed; the caller empties both."""

    def __init__(self, log: ActivityLog, clock: Clock, ids: Ids) -> None:
        self.log = log
        self.dead: list[Instance] = []
        self.unsaved = False
        self._clock = clock
        self._ids = ids

    def found(self, pool: Pool) -> Group:
        """A new group."""
        limits = f"min: {pool.min_size}, max: {pool.max_size}, desired: {pool.min_size}"
        self._note(pool.name, "Creating group", f"a user request created the group with {limits}")
        return Group(pool, pool.min_size)

    def want(self, group: Group, desired: int, cause: str) -> None:
        """Set desired capacity, and choose at once who leaves: I5 does not wait for a tick."""
        before = group.desired
        if desired != before:
            group.desired = desired
            change = f"{cause} changed desired capacity from {before} to {desired}"
            self._note(group.pool.name, f"Setting desired capacity to {desired}", change)
        self.scale_in(group)

    def scale_in(self, group: Group) -> None:
        """Take out whom `victims` names; say so once where protection leaves too many."""
        size = len(group.counted())
        for member in victims(group):
            shrinking = f"{_DIFFERENCE}, shrinking the capacity from {size} to {size - 1}"
            self.retire(group, member, why=shrinking, note="terminated: scale-in")
            size -= 1
        stuck = max(0, size - group.desired)
        if stuck and stuck != group.stuck:
            self._note(
                group.pool.name,
                "Could not scale to desired capacity because all remaining instances are"
                " protected from scale-in",
                f"{size} instances are protected and desired capacity is {group.desired}",
                "Cancelled",
            )
        group.stuck = stuck

    def admit(self, group: Group, size: int, now_s: float) -> Member:
        """A new Pending member, to be launched, in a group that counts `size` without it."""
        name = self._ids.fresh("w")
        note = ""
        if group.failures >= CRASH_LOOP:
            note = f"the last {group.failures} ended before they were ready: {group.reason}"
        growing = f"{_DIFFERENCE}, increasing the capacity from {size} to {size + 1}"
        launch = self._note(
            group.pool.name,
            f"Launching a new instance: {name}",
            f"an instance was started in response to {growing}",
            "InProgress",
        )
        instance = Instance(
            name, group.pool.name, LifecycleState.PENDING, self._clock.now_s(), note=note
        )
        member = group.members[name] = Member(instance, launch, since_s=now_s)
        return member

    def arrive(self, group: Group, member: Member) -> None:
        """Into service, once the instance runs and its worker has reported."""
        if member.state is LifecycleState.PENDING and member.running and member.ready:
            member.move(LifecycleState.IN_SERVICE, note="")
            self._settle(group, member.launch, "Successful")
            group.calm()

    def fail(self, group: Group, member: Member, how: str, *, note: str) -> None:
        """Out of service for its health."""
        self._stumble(group, member, how)
        member.instance = replace(member.instance, healthy=False)
        self.retire(group, member, why=f"a health check: {how}", note=note)

    def fail_launch(self, group: Group, member: Member, how: str) -> None:
        """It never came to be, so there is no termination to record."""
        self._stumble(group, member, how)
        member.move(LifecycleState.TERMINATING, note=how)

    def retire(self, group: Group, member: Member, *, why: str, note: str) -> None:
        """Begin to terminate. Protection guards against scale-in only, so it is not asked here."""
        if member.state is LifecycleState.PENDING:
            self._settle(group, member.launch, "Cancelled")
        member.move(LifecycleState.TERMINATING, note=note)
        member.end = self._note(
            group.pool.name,
            f"Terminating instance: {member.instance.id}",
            f"{_OUT} {why}",
            "InProgress",
        )

    def bury(self, group: Group, member: Member, *, note: str, now_s: float) -> None:
        """It has ended."""
        member.move(LifecycleState.TERMINATED, note=note)
        member.running, member.since_s = False, now_s
        self._settle(group, member.end, "Successful")
        self.dead.append(member.instance)

    def disown(self, instance: str) -> None:
        """An instance lives that the state does not know."""
        why = "no group knowing it"
        self._note("", f"Terminating orphaned instance: {instance}", f"{_OUT} {why}")

    def protect(self, member: Member, *, on: bool) -> None:
        member.instance = replace(member.instance, protected=on)
        self.unsaved = True

    def back_off(self, group: Group, now_s: float) -> None:
        """Begin the next wait of a crash loop that has got longer."""
        if group.failed and group.failures >= CRASH_LOOP:
            pause_s = wait_s(group.waits)
            group.waits += 1
            group.retry_s = now_s + pause_s
            cause = f"{group.failures} instances in a row ended before they were ready, the last: "
            what = f"Waiting {pause_s:g} s before the next launch"
            self._note(group.pool.name, what, cause + group.reason, "Failed")
        group.failed = False

    def forget(self, group: Group, now_s: float) -> None:
        """Drop who has been Terminated for more than a minute."""
        old = [
            name
            for name, member in group.members.items()
            if member.state is LifecycleState.TERMINATED
            and now_s - member.since_s > KEEP_TERMINATED_S
        ]
        for name in old:
            del group.members[name]
            self.unsaved = True

    def _stumble(self, group: Group, member: Member, how: str) -> None:
        if member.state is LifecycleState.PENDING:
            group.failures += 1
            group.reason, group.failed = how, True
            self._settle(group, member.launch, "Failed", more=f"; {how}")

    def _note(self, pool: str, description: str, cause: str, status: str = "Successful") -> int:
        self.unsaved = True
        return self.log.add(pool, self._clock.now_s(), description, cause, status)

    def _settle(self, group: Group, activity: int, status: str, *, more: str = "") -> None:
        self.unsaved = True
        self.log.settle(group.pool.name, activity, status, more=more)
