"""Implementation of the Fleet port on a launcher. All workers of a pool are equal and report their readiness."""

from __future__ import annotations

from collections.abc import Sequence

from batchlab.core.errors import Refused
from batchlab.core.model import Activity, GroupView, LifecycleState, Pool, ScheduledEnd
from batchlab.fleet.engine import Engine
from batchlab.fleet.group_state import Group, Member
from batchlab.fleet.scaling_policies import check_decrement, check_desired, check_limits
from batchlab.fleet.termination import clamp


class ManagedFleet(Engine):
    """Implementation of the Fleet port on a launcher. As on AWS, each launch, each termination, and each change of
    desired capacity has one activity."""

    is_managed_service = False

    async def ensure(self, pool: Pool) -> None:
        """Create the pool's group with the minimum size as desired capacity, or change the limits of an existing group.
        Raise Refused unless 0 ≤ min ≤ max ≤ MAX_INSTANCES."""
        limits = check_limits(pool)
        group = self._groups.get(pool.name)
        if group is None:
            self._groups[pool.name] = self._changes.create_group(pool)
        elif group.pool != pool:
            group.pool = pool
            group.reset_failures()
            cause = f"a user request that set limits to {limits}"
            self._changes.set_desired(group, clamp(pool, group.desired), cause)
        self._save()

    async def describe(self) -> Sequence[GroupView]:
        return [group.view() for group in self._groups.values()]

    async def set_desired(self, pool: str, desired: int, *, cause: str) -> None:
        """Set desired capacity (see the Fleet port). The call chooses the instances to terminate, and the next tick of
        the engine ends the chosen instances."""
        group = self._group(pool)
        check_desired(group.pool, desired)
        self._changes.set_desired(group, desired, cause)
        self._save()

    async def terminate(self, pool: str, instances: Sequence[str], *, decrement: bool, cause: str) -> None:
        """Terminate instances, including protected instances (see the Fleet port). Raise Refused, without any change,
        if an instance is unknown, or if `decrement` would lower desired capacity below the minimum. Instances that are
        already ending are ignored."""
        group = self._group(pool)
        named = {name: self._member(group, name) for name in instances}
        leaving = [member for member in named.values() if member.counted_members]
        if decrement:
            check_decrement(group.pool, group.desired, len(leaving))
        for member in leaving:
            self._changes.retire(group, member, why=cause, note=f"terminated: {cause}")
        if decrement:
            self._changes.set_desired(group, group.desired - len(leaving), cause)
        self._save()

    async def protect(self, pool: str, instances: Sequence[str], *, on: bool) -> None:
        """Set scale-in protection (see the Fleet port). Raise Refused, without any change, unless all instances are
        InService, as on EC2. The next tick saves the new protection, because protection may change with every
        bundle."""
        group = self._group(pool)
        members = [self._member(group, name) for name in instances]
        for member in members:
            if member.state is not LifecycleState.IN_SERVICE:
                raise Refused(f"instance {member.instance.id} is {member.state}, not InService")
        for member in members:
            self._changes.protect(member, on=on)
        if group.stuck:
            self._changes.scale_in(group)

    async def set_health(self, instance: str, *, healthy: bool, cause: str) -> None:
        """Set the health of an instance (see the Fleet port). Raise Refused if the instance is unknown. The health of
        an ending instance stays unchanged."""
        group_and_member = self._find(instance)
        if group_and_member is None:
            raise Refused(f"the instance {instance!r} does not exist")
        group, member = group_and_member
        if member.counted_members and not healthy:
            self._changes.fail(group, member, cause, note=f"terminated: unhealthy: {cause}")
            self._save()

    async def ready(self, instance: str) -> None:
        """Record that the worker on `instance` is ready. An unknown or ending instance is ignored, because a heartbeat
        may arrive late."""
        group_and_member = self._find(instance)
        if group_and_member is not None:
            group, member = group_and_member
            member.ready = True
            self._changes.arrive(group, member)

    async def activities(self, pool: str | None = None, *, limit: int = 50) -> Sequence[Activity]:
        """Return activities of a pool or of all pools (see the Fleet port). The pool name "" selects the activities
        that do not belong to a group, such as terminations of instances without a group."""
        return self._changes.log.newest(pool, limit)

    async def schedule_end(self, pool: str, after_s: float | None) -> ScheduledEnd:
        """Schedule the end of the pool's instances (see the Fleet port). The first tick after the scheduled time
        performs the action, because a pool of the Fleet port does not have a service of its own."""
        group = self._group(pool)
        before = group.end_s
        group.end_s = None if after_s is None else self._schedule_clock_s() + after_s
        self._save(changed=group.end_s != before)
        return ScheduledEnd(before is not None)

    def _group(self, pool: str) -> Group:
        if pool not in self._groups:
            raise Refused(f"the pool {pool!r} does not exist", remedy="`batchlab grid status` lists the pools.")
        return self._groups[pool]

    def _member(self, group: Group, instance: str) -> Member:
        if instance not in group.members:
            raise Refused(f"the pool {group.pool.name!r} does not have an instance {instance!r}")
        return group.members[instance]
