"""What an Auto Scaling group decides, as pure functions: whom to take out, how many to launch.

Invariant (I5): carrying a decision out never takes a group above its desired capacity, and
never takes a protected instance.
"""

from __future__ import annotations

from collections.abc import Sequence

from batchlab.fleet import hooks, termination
from batchlab.fleet.state import STARTING, Group, Member, weigh
from batchlab.model import LifecycleState, Pool
from batchlab.waits import doubled_s

CRASH_LOOP = 3
"""So many instances in a row that end before they are ready make a crash loop."""
MAX_WAIT_S = 60.0


def clamp(pool: Pool, desired: int) -> int:
    """The nearest desired capacity that the pool's limits allow."""
    return max(pool.min_size, min(pool.max_size, desired))


def victims(group: Group, now_s: float) -> Sequence[Member]:
    """Whom scale-in takes, first come first; `now_s` by the SteadyClock."""
    if group.asg is None:
        excess = len(group.counted()) - group.desired
        return termination.pending_then_newest(group.counted())[: max(0, excess)]
    return termination.choose(group, group.asg, now_s)


def shortfall(group: Group, now_s: float, steady_s: float) -> int:
    """How many units of capacity to launch now; `now_s` is monotonic.

    In a crash loop that is one probe at a time, after its wait: the rest follow when it is ready.
    """
    staying = group.staying()
    missing = max(0, group.desired - weigh(staying))
    if group.failures < CRASH_LOOP or not missing:
        return missing
    probing = any(_on_trial(group, member, steady_s) for member in staying)
    return 0 if probing or now_s < group.retry_s else 1


def _on_trial(group: Group, member: Member, steady_s: float) -> bool:
    if member.state in STARTING:
        return True
    new = group.asg is not None and member.state is LifecycleState.IN_SERVICE
    return new and not hooks.settled(member, steady_s)


def wait_s(waits: int) -> float:
    """Seconds a crash loop waits after `waits` waits before: 1, 2, 4, … 60."""
    return doubled_s(1.0, MAX_WAIT_S, waits)
