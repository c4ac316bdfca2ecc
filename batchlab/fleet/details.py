"""A group's state as AWS's answers show it."""

from __future__ import annotations

import json
from uuid import NAMESPACE_URL, uuid5

from batchlab.fleet.api import HEALTHY, UNHEALTHY, ActivityDetails, InstanceDetails
from batchlab.fleet.state import FINAL, Group, Member
from batchlab.model import Activity

_PROGRESS = {"PreInService": 30, "InProgress": 50, "MidLifecycleAction": 60}
"""AWS gives no rule; these are what it is seen to answer."""


def instance_details(group: Group, member: Member) -> InstanceDetails:
    instance, bond = member.instance, member.bond
    return InstanceDetails(
        instance_id=instance.id,
        auto_scaling_group_name=group.pool.name,
        instance_type=instance.machine.type,
        availability_zone=instance.machine.zone,
        lifecycle_state=instance.state,
        health_status=HEALTHY if instance.healthy else UNHEALTHY,
        protected_from_scale_in=instance.protected,
        launch_template=bond.template,
        launch_configuration_name=bond.launch_configuration,
        weighted_capacity=bond.weight if bond.weighted else None,
        market=instance.machine.market,
        launched_s=instance.launched_s,
        note=instance.note,
    )


def activity_id(activity: Activity) -> str:
    """Derived, hence the same after a restart."""
    return str(uuid5(NAMESPACE_URL, f"{activity.pool}/{activity.id}"))


def activity_details(activity: Activity, group: Group | None) -> ActivityDetails:
    """AWS's details are the zone of the instance, as JSON text."""
    instance = activity.description.rpartition(": ")[2]
    member = group.members.get(instance) if group else None
    zone = member.instance.machine.zone if member else ""
    description = activity.description
    if activity.message:
        description += f".  Status Reason: {activity.message}"
    return ActivityDetails(
        activity_id=activity_id(activity),
        auto_scaling_group_name=activity.pool,
        description=description,
        cause=activity.cause,
        start_time=activity.at_s,
        status_code=activity.status,
        end_time=activity.ended_s,
        status_message=activity.message,
        progress=100 if activity.status in FINAL else _PROGRESS[activity.status],
        details=json.dumps({"Availability Zone": zone} if zone else {}),
    )
