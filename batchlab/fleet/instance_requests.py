"""Requests for single instances, Spot notices, instance metadata, and lifecycle hooks."""

from __future__ import annotations

from collections.abc import Sequence

from batchlab.core.model import LifecycleState, Market
from batchlab.fleet import group_requests, health, lifecycle_hooks, placement
from batchlab.fleet.api_types import (
    CONTINUE,
    HEALTHY,
    LAUNCHING,
    UNHEALTHY,
    ActivityDetails,
    LifecycleHook,
    LimitExceeded,
    Metadata,
    Process,
    ValidationError,
)
from batchlab.fleet.group_requests import Requests
from batchlab.fleet.group_state import ENDING, ON_STANDBY, STARTING, WARM, Asg, Group, Member, Wait, weigh

_USER = "a user request"


class InstanceRequests(Requests):
    def terminate_instance_in_auto_scaling_group(
        self, instance_id: str, *, should_decrement_desired_capacity: bool
    ) -> ActivityDetails:
        """Terminate an instance, even a protected instance, and return the termination activity. If the instance is
        already ending, return its existing termination activity."""
        group, asg, member = self._instance(instance_id)
        if member.state in WARM:
            raise ValidationError(f"The instance {instance_id} is in a warm pool.")
        if member.state not in ENDING:
            lower = should_decrement_desired_capacity and member.staying
            least = asg.config.min_size
            if lower and group.desired - member.asg.weight < least:
                raise ValidationError(
                    f"Currently, desiredSize equals minSize ({least}). Terminating instance"
                    " without replacement will violate group's min size constraint. Either set"
                    " shouldDecrementDesiredCapacity flag to false or lower group's min size."
                )
            size = weigh(group.staying())
            change = f", shrinking the capacity from {size} to {size - member.asg.weight}"
            why = _USER + change * lower
            self._changes.retire(group, member, why=why, note=f"terminated: {_USER}")
            if lower:
                self._changes.resize(group, -member.asg.weight)
            self._save()
        return self._activity(group, member.end)

    def _activity(self, group: Group, number: int) -> ActivityDetails:
        activity = self._changes.log.get(group.pool.name, number)
        assert activity is not None, "an activity that was just added is kept"
        return self._activity_details(activity)

    def set_instance_health(
        self, instance_id: str, health_status: str, *, should_respect_grace_period: bool = True
    ) -> None:
        """Set the health of an instance. The next tick replaces an unhealthy instance. With
        `should_respect_grace_period`, Unhealthy is ignored during the group's grace period after the instance became
        InService."""
        _, asg, member = self._instance(instance_id)
        if health_status not in (HEALTHY, UNHEALTHY):
            raise ValidationError(f"Valid instance health states are: [{HEALTHY}, {UNHEALTHY}]")
        if health_status == HEALTHY:
            self._changes.mark_healthy(member)
        elif not (should_respect_grace_period and self._in_grace(asg, member)):
            health.mark_unhealthy(self._changes, member)
        self._save()

    def _in_grace(self, asg: Asg, member: Member) -> bool:
        since_s = member.asg.in_service_s
        grace_s = asg.config.health_check_grace_period
        if since_s is None:
            return grace_s > 0
        return self._changes.steady.now_s() - since_s < grace_s

    def set_instance_protection(self, name: str, instance_ids: Sequence[str], *, protected_from_scale_in: bool) -> None:
        """Set the scale-in protection of instances. All instances must be InService, EnteringStandby, or Standby."""
        group, _ = self._changeable(name)
        members = self._instances(group, instance_ids)
        for member in members:
            if member.state is not LifecycleState.IN_SERVICE and member.state not in ON_STANDBY:
                raise ValidationError(
                    f"The instance {member.instance.id} is not in InService or EnteringStandby or Standby."
                )
        for member in members:
            self._changes.protect(member, on=protected_from_scale_in)
        self._changes.scale_in(group)
        self._save()

    def enter_standby(
        self, name: str, instance_ids: Sequence[str], *, should_decrement_desired_capacity: bool
    ) -> Sequence[ActivityDetails]:
        """Move instances into Standby. All instances must be InService."""
        group, asg = self._changeable(name)
        members = self._instances(group, instance_ids)
        for member in members:
            if member.state is not LifecycleState.IN_SERVICE:
                raise ValidationError(f"The instance {member.instance.id} is not in InService state.")
        lower = should_decrement_desired_capacity
        if lower and group.desired - weigh(members) < asg.config.min_size:
            raise ValidationError(_sizes(group, "place into", len(members)))
        moved = [health.enter_standby(self._changes, group, member, lower=lower) for member in members]
        self._changes.scale_in(group)
        self._save()
        return [self._activity(group, number) for number in moved]

    def exit_standby(self, name: str, instance_ids: Sequence[str]) -> Sequence[ActivityDetails]:
        """Move instances out of Standby. Desired capacity grows by the weights of the instances."""
        group, asg = self._changeable(name)
        members = self._instances(group, instance_ids)
        for member in members:
            if member.state is not LifecycleState.STANDBY:
                raise ValidationError(f"The instance {member.instance.id} is not in Standby state.")
        if group.suspended(Process.LAUNCH):
            raise ValidationError("An instance cannot leave Standby while the Launch process is suspended.")
        if group.desired + weigh(members) > asg.config.max_size:
            raise ValidationError(_sizes(group, "bring out of", len(members)))
        moved = [health.leave_standby(self._changes, group, member) for member in members]
        self._save()
        return [self._activity(group, number) for number in moved]

    def attach_instances(self, name: str, instance_ids: Sequence[str]) -> None:
        """Raise ValidationError, because all instances of this endpoint belong to groups."""
        self._changeable(name)
        raise ValidationError(
            f"Invalid Instance ID(s): {list(instance_ids)}. This endpoint has no instances but those its groups launch."
        )

    def detach_instances(
        self, name: str, instance_ids: Sequence[str], *, should_decrement_desired_capacity: bool
    ) -> Sequence[ActivityDetails]:
        """Raise ValidationError, because an instance without a group is terminated as an orphan."""
        del should_decrement_desired_capacity
        group, _ = self._changeable(name)
        self._instances(group, instance_ids)
        raise ValidationError(
            "DetachInstances is not supported by this endpoint: an instance lives with its group."
            " Use EnterStandby, or TerminateInstanceInAutoScalingGroup."
        )

    # Requests for Spot notices and instance metadata

    def interrupt(self, instance_id: str, *, notice_s: float = 120.0) -> None:
        """Interrupt a Spot Instance, which is killed after `notice_s`. A group with capacity rebalancing launches a
        replacement at once."""
        group, asg, member = self._spot(instance_id)
        now_s = self._changes.steady.now_s()
        member.asg.interrupted_by_s = now_s + notice_s
        placement.avoid(asg, member.instance.machine, now_s)
        self._changes.unsaved = True
        if asg.config.capacity_rebalance:
            self._changes.launch_replacement(group, member, "a Spot interruption notice")
        self._save()

    def rebalance(self, instance_id: str) -> None:
        """Send a rebalance recommendation for a Spot Instance. Only a group with capacity rebalancing replaces the
        instance after the recommendation."""
        group, asg, member = self._spot(instance_id)
        member.asg.rebalance_s = self._changes.now_s()
        self._changes.unsaved = True
        if asg.config.capacity_rebalance:
            self._changes.launch_replacement(group, member, "an EC2 instance rebalance recommendation")
        self._save()

    def _spot(self, instance_id: str) -> tuple[Group, Asg, Member]:
        group, asg, member = self._instance(instance_id)
        if member.instance.machine.market is not Market.SPOT:
            raise ValidationError(f"The instance {instance_id} is not a Spot Instance; only those are interrupted.")
        return group, asg, member

    def metadata(self, instance_id: str) -> Metadata:
        """Return an instance's metadata. Raise ValidationError if the instance is unknown."""
        _, asg, member = self._instance(instance_id)
        machine, bond = member.instance.machine, member.asg
        return Metadata(
            instance_id=instance_id,
            instance_type=machine.type,
            availability_zone=machine.zone,
            instance_life_cycle=machine.market,
            target_lifecycle_state=_target(asg, member),
            spot_action="terminate" if bond.interrupted_by_s is not None else "",
            spot_time=bond.interrupted_by_s,
            rebalance_time=bond.rebalance_s,
            tags=tuple((t.key, t.value) for t in asg.tags.values() if t.propagate_at_launch),
        )


def _target(asg: Asg, member: Member) -> str:
    state = member.state
    if state in STARTING or state is LifecycleState.IN_SERVICE:
        return "InService"
    if state in ON_STANDBY:
        return "Standby"
    if state in WARM:
        return f"Warmed:{asg.warm_pool.pool_state}" if asg.warm_pool else "Warmed:Terminated"
    return "Terminated"


def _sizes(group: Group, move: str, count: int) -> str:
    pool = group.pool
    return (
        f"AutoScalingGroup {pool.name} has min-size={pool.min_size}, max-size={pool.max_size}, and"
        f" desired-size={group.desired}. To {move} standby {count} instance, please update the"
        " AutoScalingGroup sizes appropriately."
    )


MAX_HOOKS = 50


class HookRequests(Requests):
    def put_lifecycle_hook(self, hook: LifecycleHook) -> None:
        """Create or replace a lifecycle hook. Instances that already wait in the hook keep the old timeouts."""
        _, asg = self._changeable(hook.auto_scaling_group_name)
        group_requests.check_hook(hook)
        if hook.lifecycle_hook_name not in asg.hooks and len(asg.hooks) >= MAX_HOOKS:
            raise LimitExceeded(f"A group may have {MAX_HOOKS} lifecycle hooks.")
        asg.hooks[hook.lifecycle_hook_name] = hook
        self._save(changed=True)

    def delete_lifecycle_hook(self, name: str, lifecycle_hook_name: str) -> None:
        """Delete a lifecycle hook. The actions of waiting instances are completed with ABANDON on launch and CONTINUE
        on termination."""
        group, asg = self._changeable(name)
        hook = asg.hooks.pop(lifecycle_hook_name, None)
        if hook is None:
            raise ValidationError(
                f"No Lifecycle Hook found with name: {lifecycle_hook_name} and AutoScalingGroup: {name}"
            )
        self._changes.unsaved = True
        lifecycle_hooks.drop(self._changes, group, hook)
        self._save()

    def describe_lifecycle_hooks(self, name: str, hook_names: Sequence[str] = ()) -> Sequence[LifecycleHook]:
        """Return the group's lifecycle hooks, sorted by name, and ignore names that do not exist."""
        _, asg = self._asg_group(name)
        return [asg.hooks[hook] for hook in sorted(asg.hooks) if not hook_names or hook in hook_names]

    def complete_lifecycle_action(
        self,
        name: str,
        lifecycle_hook_name: str,
        lifecycle_action_result: str,
        *,
        instance_id: str | None = None,
        lifecycle_action_token: str | None = None,
    ) -> None:
        """Complete a lifecycle action, given by its instance or its token."""
        group_requests.check_result("LifecycleActionResult", lifecycle_action_result)
        group, member, wait = self._action(name, lifecycle_hook_name, instance_id, lifecycle_action_token)
        how = f"Lifecycle Action Completed with {lifecycle_action_result} Result"
        if lifecycle_action_result == CONTINUE and wait.hook.lifecycle_transition == LAUNCHING:
            member.asg.vouched = True
        lifecycle_hooks.complete(self._changes, group, member, wait, lifecycle_action_result, how)
        self._save()

    def record_lifecycle_action_heartbeat(
        self,
        name: str,
        lifecycle_hook_name: str,
        *,
        instance_id: str | None = None,
        lifecycle_action_token: str | None = None,
    ) -> None:
        """Restart the heartbeat timeout of a lifecycle action, within the global timeout."""
        _, member, wait = self._action(name, lifecycle_hook_name, instance_id, lifecycle_action_token)
        lifecycle_hooks.heartbeat(self._changes, member, wait)
        self._save()

    def _action(self, name: str, hook: str, instance_id: str | None, token: str | None) -> tuple[Group, Member, Wait]:
        group, _ = self._asg_group(name)
        if not instance_id and not token:
            raise ValidationError("Valid requests must contain either InstanceId or LifecycleActionToken parameter.")
        action = lifecycle_hooks.find(group, hook, instance=instance_id, token=token)
        if action is None:
            by = f"token {token}" if token else f"instance ID {instance_id}"
            raise ValidationError(f"No active Lifecycle Action found with {by}")
        return group, *action
