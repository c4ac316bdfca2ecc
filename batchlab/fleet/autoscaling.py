"""AWS's Auto Scaling API over a launcher, with AWS's names, defaults, and errors.

Requests only change the state. `tick`, the only coroutine, applies the changes. Call it about every
second, and immediately after a request. A request raises a Fault (see `errors`) if AWS would answer
400. Lists are complete, because the server does the paging.
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
    """All requests, with AWS's names in snake case."""
