"""AWS's Auto Scaling API over a launcher: its vocabulary, its defaults, its errors.

Requests change the state and return; `tick`, the only coroutine, carries it out. Call it about
every second, and at once after a request. Every request raises a Fault (see `faults`) where AWS
would answer 400. Lists come whole: paging belongs to the wire.
"""

from __future__ import annotations

from batchlab.fleet.requests.groups import GroupRequests
from batchlab.fleet.requests.instances import HookRequests, InstanceRequests
from batchlab.fleet.requests.policies import PolicyRequests, ScheduleRequests
from batchlab.fleet.requests.refresh import RefreshRequests, WarmPoolRequests


class AutoScaling(
    GroupRequests,
    InstanceRequests,
    HookRequests,
    PolicyRequests,
    ScheduleRequests,
    RefreshRequests,
    WarmPoolRequests,
):
    """Every request by AWS's own name in snake case."""
