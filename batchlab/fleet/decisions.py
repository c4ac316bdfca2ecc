"""What an Auto Scaling group decides, as pure functions: whom to take out, how many to launch.

Invariant (I5): carrying a decision out never takes a group above its desired capacity, and
never takes a protected instance.
"""

from __future__ import annotations

from batchlab.fleet.state import Group, Member
from batchlab.model import LifecycleState, Pool

CRASH_LOOP = 3
"""So many instances in a row that end before they are ready make a crash loop."""
MAX_WAIT_S = 60.0


def clamp(pool: Pool, desired: int) -> int:
    """The nearest desired capacity that the pool's limits allow."""
    return max(pool.min_size, min(pool.max_size, desired))


def victims(group: Group) -> list[Member]:
    """Whom scale-in takes, first come first: unprotected ones, Pending before InService, newest
    before oldest.

    EC2's default policy takes the oldest launch template and then the oldest instance; here all
    are of one template, and the newest has the least warm state (code, child processes) to lose.
    """
    counted = group.counted()
    excess = len(counted) - group.desired
    if excess <= 0:
        return []
    unprotected = [member for member in reversed(counted) if not member.instance.protected]
    # The sort is stable, so the order by age survives within each state.
    unprotected.sort(key=lambda member: member.state is not LifecycleState.PENDING)
    return unprotected[:excess]


def shortfall(group: Group, now_s: float) -> int:
    """How many instances to launch now.

    In a crash loop that is one probe at a time, after its wait: the rest follow when it is ready.
    """
    counted = group.counted()
    missing = max(0, group.desired - len(counted))
    if group.failures < CRASH_LOOP or not missing:
        return missing
    probing = any(member.state is LifecycleState.PENDING for member in counted)
    return 0 if probing or now_s < group.retry_s else 1


def wait_s(waits: int) -> float:
    """Seconds a crash loop waits after `waits` waits before: 1, 2, 4, … 60."""
    # The exponent is bounded because 2.0**1024 overflows.
    return float(min(MAX_WAIT_S, 2.0 ** min(waits, 10)))
