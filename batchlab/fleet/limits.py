"""A group's min, max and desired capacity: changed together, and what a fleet refuses of them.

Invariant: a fleet over a launcher and one of EC2 refuse the same, in the same words.
"""

from __future__ import annotations

from dataclasses import replace

from batchlab.errors import Refused
from batchlab.fleet.changes import Changes
from batchlab.fleet.decisions import clamp
from batchlab.fleet.state import Group
from batchlab.model import Pool

MOST_INSTANCES = 99_999
"""Of one group: more is a slip."""


def check_limits(pool: Pool, *, most: int = MOST_INSTANCES) -> str:
    """The pool's limits in words; Refused unless 0 ≤ min ≤ max ≤ `most`."""
    limits = f"min: {pool.min_size}, max: {pool.max_size}"
    if not 0 <= pool.min_size <= pool.max_size <= most:
        raise Refused(
            f"The pool {pool.name!r} cannot have the limits {limits}.",
            remedy=f"Give it 0 ≤ min ≤ max ≤ {most}.",
        )
    return limits


def check_desired(pool: Pool, desired: int) -> None:
    """Refused outside of the pool's limits."""
    if clamp(pool, desired) != desired:
        raise Refused(
            f"desired capacity {desired} of pool {pool.name!r} is outside"
            f" [{pool.min_size}, {pool.max_size}]",
            remedy="`batchlab grid scale --min N --max N` changes the limits.",
        )


def check_decrement(pool: Pool, desired: int, leaving: int) -> None:
    """Refused where `leaving` less than `desired` is below the pool's min."""
    if desired - leaving < pool.min_size:
        raise Refused(
            f"terminating {leaving} of pool {pool.name!r} would take its desired capacity"
            f" from {desired} below its min of {pool.min_size}"
        )


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
