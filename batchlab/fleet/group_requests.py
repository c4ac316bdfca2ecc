"""Requests for groups, desired capacity, tags, activities, and processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from batchlab.core.model import LifecycleState, Pool
from batchlab.fleet import placement, request_base
from batchlab.fleet.api_types import (
    ActivityDetails,
    AlreadyExists,
    GroupConfig,
    GroupDetails,
    InstanceDetails,
    LifecycleHook,
    Process,
    ResourceInUse,
    ScalingActivityInProgress,
    Tag,
    ValidationError,
)
from batchlab.fleet.changes import stamp
from batchlab.fleet.group_state import ENDING, WARM, Asg, Group, activity_details, instance_details
from batchlab.fleet.request_base import Requests
from batchlab.fleet.scaling_policies import set_limits
from batchlab.fleet.termination import clamp

_LAUNCHED_FROM = ("launch_template", "mixed_instances_policy", "launch_configuration_name")
_NEVER = {"launch_template": None, "mixed_instances_policy": None, "launch_configuration_name": ""}


class GroupRequests(Requests):
    def create_auto_scaling_group(
        self,
        config: GroupConfig,
        *,
        desired_capacity: int | None = None,
        tags: Sequence[Tag] = (),
        lifecycle_hooks: Sequence[LifecycleHook] = (),
    ) -> None:
        """Create a group. A desired capacity of None means min. Raise AlreadyExists or ValidationError."""
        name = config.auto_scaling_group_name
        if name in self._groups:
            raise AlreadyExists(
                f"AutoScalingGroup by this name already exists - A group with the name {name} already exists"
            )
        config = self._checked(config)
        desired = config.min_size if desired_capacity is None else desired_capacity
        request_base.check_desired(config, desired)
        for hook in lifecycle_hooks:
            request_base.check_hook(hook)
        asg = Asg(config, self._changes.now_s())
        asg.tags = {tag.key: tag for tag in tags}
        asg.hooks = {hook.lifecycle_hook_name: hook for hook in lifecycle_hooks}
        group = Group(Pool(name, config.min_size, config.max_size), 0, asg=asg)
        self._groups[name] = group
        self._changes.unsaved = True
        self._changes.set_desired(group, desired, "a user request created an AutoScalingGroup", cooldown=0)
        self._save()

    def update_auto_scaling_group(
        self, name: str, changes: Mapping[str, Any], *, desired_capacity: int | None = None
    ) -> None:
        """Change the fields of GroupConfig in `changes`. Keep desired capacity in the limits."""
        group, asg = self._changeable(name)
        cleared = _NEVER if any(key in changes for key in _LAUNCHED_FROM) else {}
        config = self._checked(replace(asg.config, **{**cleared, **changes}))
        pool = replace(group.pool, min_size=config.min_size, max_size=config.max_size)
        desired = clamp(pool, group.desired) if desired_capacity is None else desired_capacity
        request_base.check_desired(config, desired)
        asg.config = config
        group.reset_failures()
        set_limits(
            changes=self._changes,
            group=group,
            min_size=config.min_size,
            max_size=config.max_size,
            desired=desired,
            cause="a user request",
        )
        self._save()

    def _checked(self, config: GroupConfig) -> GroupConfig:
        config = request_base.checked_group(config, self._data_sources.zones, self._shortest_lifetime_s)
        placement.check(config, self._data_sources)
        return config

    def delete_auto_scaling_group(self, name: str, *, force_delete: bool = False) -> None:
        """Delete a group. If it has instances, raise ResourceInUse or ScalingActivityInProgress. With `force_delete`,
        end the instances without their hooks, and remove the group when all have ended."""
        group, asg = self._asg_group(name)
        here = [m for m in group.members.values() if m.state is not LifecycleState.TERMINATED]
        if here and not force_delete:
            if all(member.state in ENDING for member in here):
                raise ScalingActivityInProgress(
                    "You cannot delete an AutoScalingGroup while there are scaling activities in"
                    " progress for that group."
                )
            raise ResourceInUse(
                "You cannot delete an AutoScalingGroup while there are instances or pending Spot"
                " instance request(s) still in the group."
            )
        asg.deleting, self._changes.unsaved = True, True
        for member in here:
            if member.state is LifecycleState.TERMINATING_WAIT:
                member.asg.waits.clear()
                self._changes.move(member, LifecycleState.TERMINATING_PROCEED)
            elif member.state not in ENDING:
                why = "a user request to delete the group"
                note = "terminated: the group is deleted"
                self._changes.retire(group, member, why=why, note=note, hooked=False)
        if not here:
            del self._groups[name]
        self._save()

    def describe_auto_scaling_groups(self, names: Sequence[str] = ()) -> Sequence[GroupDetails]:
        """Return all groups, or the existing groups in `names`, sorted by name."""
        wanted = sorted(set(names) & set(self._groups)) if names else sorted(self._groups)
        return [
            self._details(group, group.asg)
            for group in (self._groups[name] for name in wanted)
            if group.asg is not None
        ]

    def _details(self, group: Group, asg: Asg) -> GroupDetails:
        name = group.pool.name
        members = [m for m in group.members.values() if m.state is not LifecycleState.TERMINATED]
        warm = [member for member in members if member.state in WARM]
        return GroupDetails(
            config=asg.config,
            auto_scaling_group_arn=self._arn("autoScalingGroup", name, ""),
            desired_capacity=group.desired,
            created_time=asg.created_s,
            instances=tuple(instance_details(group, m) for m in members if m.state not in WARM),
            suspended_processes=tuple(sorted(asg.suspended.items())),
            tags=tuple(asg.tags[key] for key in sorted(asg.tags)),
            status="Delete in progress" if asg.deleting else None,
            warm_pool_configuration=asg.warm_pool,
            warm_pool_size=len(warm) if asg.warm_pool else None,
        )

    def describe_auto_scaling_instances(self, instance_ids: Sequence[str] = ()) -> Sequence[InstanceDetails]:
        """Return all instances, including warm ones, or the existing ones with these ids."""
        return [
            instance_details(group, member)
            for group, member in self._members()
            if group.asg is not None
            and member.state is not LifecycleState.TERMINATED
            and (not instance_ids or member.instance.id in instance_ids)
        ]

    def set_desired_capacity(self, name: str, desired_capacity: int, *, honor_cooldown: bool = False) -> None:
        """Set desired capacity. Raise ScalingActivityInProgress if a cooldown applies."""
        group, asg = self._changeable(name)
        limits = (("above max", asg.config.max_size), ("below min", asg.config.min_size))
        for which, bound in limits:
            over = desired_capacity - bound
            if over > 0 if which == "above max" else over < 0:
                raise ValidationError(
                    f"New SetDesiredCapacity value {desired_capacity} is {which} value {bound}"
                    " for the AutoScalingGroup."
                )
        if honor_cooldown:
            self._check_cooldown(group, asg)
        cause = "a user request explicitly set group desired capacity"
        self._changes.set_desired(group, desired_capacity, cause)
        self._save()

    def create_or_update_tags(self, name: str, tags: Sequence[Tag]) -> None:
        """Create or replace tags. Raise ValidationError if the group does not exist."""
        _, asg = self._changeable(name)
        asg.tags |= {tag.key: tag for tag in tags}
        self._save(changed=True)

    def delete_tags(self, name: str, keys: Sequence[str]) -> None:
        """Delete tags. Ignore keys that do not exist."""
        _, asg = self._changeable(name)
        asg.tags = {key: tag for key, tag in asg.tags.items() if key not in keys}
        self._save(changed=True)

    def describe_scaling_activities(
        self, name: str | None = None, *, activity_ids: Sequence[str] = (), include_deleted_groups: bool = False
    ) -> Sequence[ActivityDetails]:
        """Return the last 200 activities of each group, newest first."""
        if name is not None and not include_deleted_groups:
            self._asg_group(name)
        log = self._changes.log
        details = [
            activity_details(activity, self._groups.get(activity.pool))
            for activity in log.newest(name, log.following)
            if include_deleted_groups or activity.pool in self._groups
        ]
        return [detail for detail in details if not activity_ids or detail.activity_id in activity_ids]

    def suspend_processes(self, name: str, processes: Sequence[str] = ()) -> None:
        """Suspend the named processes, or all if none is named."""
        _, asg = self._changeable(name)
        at = self._changes.now_s()
        for process in request_base.parse_processes(processes):
            reason = f"User suspended at {stamp(at)}"
            asg.suspended.setdefault(process, reason)
        self._save(changed=True)

    def resume_processes(self, name: str, processes: Sequence[str] = ()) -> None:
        group, asg = self._changeable(name)
        chosen = request_base.parse_processes(processes)
        asg.suspended = {p: reason for p, reason in asg.suspended.items() if p not in chosen}
        if Process.LAUNCH in chosen:
            group.reset_failures()
        self._changes.unsaved = True
        self._changes.scale_in(group)
        self._save()
