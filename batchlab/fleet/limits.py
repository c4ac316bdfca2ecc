"""A group's min, max and desired capacity, changed together."""

from __future__ import annotations

from dataclasses import replace

from batchlab.fleet.changes import Changes
from batchlab.fleet.decisions import clamp
from batchlab.fleet.state import Group

MOST_INSTANCES = 99_999
"""Of one group: more is a slip."""


def set_limits(
    changes: Changes,
    group: Group,
    min_size: int | None,
    max_size: int | None,
    desired: int | None,
    *,
    cause: str,
) -> None:
    """What is None stays, and desired capacity is moved into the limits. Limits that contradict
    each other change nothing and leave a failed activity, since nobody is there to be told."""
    asg = group.asg
    assert asg is not None
    low = asg.config.min_size if min_size is None else min_size
    high = asg.config.max_size if max_size is None else max_size
    if low > high:
        what = f"Could not set min: {low}, max: {high}: min is above max"
        changes.note(group.pool.name, what, changes.told(asg, cause), "Failed")
        return
    asg.config = replace(asg.config, min_size=low, max_size=high)
    group.pool = replace(group.pool, min_size=low, max_size=high)
    changes.unsaved = True
    wanted = clamp(group.pool, group.desired if desired is None else desired)
    limits = f"min: {low}, max: {high}, desired: {wanted}"
    changes.want(group, wanted, f"{cause} update of AutoScalingGroup constraints to {limits}")
