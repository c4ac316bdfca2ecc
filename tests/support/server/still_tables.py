"""The clock, fleet, queues, jobs, and history of `still_grid`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from batchlab.core.fair_share import ShareAttributes, SharePolicy
from batchlab.core.job_definition import InputDef, JobDef, StageDef
from batchlab.core.model import (
    Activity,
    Failure,
    FailureKind,
    GroupView,
    Instance,
    LifecycleState,
    Machine,
    Market,
    Pool,
    StageName,
    TaskMetrics,
)
from batchlab.core.ports import Depth
from batchlab.core.protocol import object_keys
from batchlab.core.retry_rule import RetryRule

NOW_S = 1_774_864_800.0
"""2026-03-30 10:00:00 UTC, a Monday. Summer time in Berlin began on the day before."""
PRICES, TOTAL = StageName("prices"), StageName("total")
POOLS = (
    Pool("default", max_size=8, slots=2, instance_type="c7g.large"),
    Pool("large-memory", max_size=2, slots=4, instance_type="r7g.2xlarge"),
)
POLICY = SharePolicy(
    (ShareAttributes("research", 0.5, max_slots=12), ShareAttributes("stocktakingOfTheThirdQuarter")),
    reservation=10,
    only_listed=True,
)
LARGE = 100_000
"""The number of tasks in the running job."""
DONE, BAD = 61_240, 12
"""The number of ended tasks in the running job, and the number of failed tasks among them."""
MEMORY = "the process was killed for using 4.2 GiB of memory, more than the 4 GiB that a slot of c7g.large has"
TRACEBACK = """Traceback (most recent call last):
  File "handlers.py", line 12, in prices
    return price_of(row)
  File "handlers.py", line 31, in price_of
    raise KeyError(f"row {row} has no price")
KeyError: 'row %d has no price'
"""


class StandingClock:
    """A clock that always returns NOW_S."""

    def now_s(self) -> float:
        return NOW_S

    def monotonic_s(self) -> float:
        return 100_000.0


class StillFleet:
    """The methods of a fleet that the page uses."""

    async def describe(self) -> Sequence[GroupView]:
        return GROUPS

    async def activities(self, pool: str | None = None, *, limit: int = 50) -> Sequence[Activity]:
        return [one for one in ACTIVITIES if pool in (None, one.pool)][:limit]


class StillQueue:
    """The methods of a queue that the page uses."""

    async def depth(self, queue: str) -> Depth:
        return DEPTHS.get(queue, Depth(0, 0, 0))


def _instance(name: str, state: LifecycleState, age_s: float, **more: object) -> Instance:
    zone = f"eu-central-1{'abc'[len(name) % 3]}"
    market = Market.SPOT if name.endswith("7") else Market.ON_DEMAND
    made = Instance(f"i-{name}", "default", state, NOW_S - age_s, machine=Machine("c7g.large", zone, market))
    return replace(made, **more)  # type: ignore[arg-type]


GROUPS = (
    GroupView(
        POOLS[0],
        5,
        (
            _instance("0b3f9c2a41d6e8f07", LifecycleState.IN_SERVICE, 1500, protected=True),
            _instance("0c91d2e5f7a8b3c41", LifecycleState.IN_SERVICE, 1490, protected=True),
            _instance("0d72e8a1b4c5f6d92", LifecycleState.IN_SERVICE, 420),
            _instance("0e15f3b6c9d0a7e83", LifecycleState.PENDING, 12),
            _instance(
                name="0f48a9c7d2e1b6f57",
                state=LifecycleState.TERMINATING,
                age_s=1485,
                note="terminated: Spot interruption, at the latest in 2 min",
            ),
            _instance(
                name="0a83b7d5e9f2c1a64",
                state=LifecycleState.TERMINATED,
                age_s=1480,
                healthy=False,
                note="killed by SIGKILL, exit -9",
            ),
        ),
    ),
    GroupView(POOLS[1], 0, ()),
)
DEPTHS = {
    object_keys.EVENTS: Depth(3, 1, 0),
    object_keys.tasks_queue("default"): Depth(18, 6, 4),
    object_keys.dead_letters("default"): Depth(1, 0, 0),
}
ACTIVITIES = (
    Activity(
        id=41,
        pool="default",
        at_s=NOW_S - 12,
        description="Launching a new EC2 instance: i-0e15f3b6c9d0a7e83",
        cause="a backlog of 38,760 tasks drains in 120 s on 5 instances: desired capacity from 4 to 5",
        status="InProgress",
    ),
    Activity(
        id=40,
        pool="default",
        at_s=NOW_S - 75,
        description="Terminating EC2 instance: i-0f48a9c7d2e1b6f57",
        cause="an EC2 Spot interruption notice",
        ended_s=NOW_S - 60,
    ),
    Activity(
        id=39,
        pool="default",
        at_s=NOW_S - 300,
        description="Launching a new EC2 instance",
        cause="there was not sufficient c7g.large capacity in eu-central-1c",
        status="Failed",
        ended_s=NOW_S - 299,
    ),
    Activity(
        id=38,
        pool="default",
        at_s=NOW_S - 1500,
        description="Launching a new EC2 instance: i-0b3f9c2a41d6e8f07",
        cause="a backlog of 100,000 tasks drains in 120 s on 4 instances: desired capacity from 0 to 4",
        ended_s=NOW_S - 1440,
    ),
)


# --- Jobs ----------------------------------------------------------------------------------------


def _job(name: str, age_s: float, tasks: int, **more: object) -> JobDef:
    made = object_keys.job_id(name, f"still {name}")
    job = JobDef(
        made,
        name,
        (
            StageDef(PRICES, handler="handlers:prices", bundle=1, retry=RetryRule(attempts=1)),
            StageDef(TOTAL, after=(PRICES,), gather="*", handler="handlers:total"),
        ),
        NOW_S - age_s,
        input=InputDef(keys=tuple(f"{object_keys.raw(made)}{n:04}.txt" for n in range(min(tasks, 50)))),
        max_failures=100,
        tags=(("owner", "pricing"), ("month", "2026-03")),
    )
    return replace(job, **more)  # type: ignore[arg-type]


RUNS = _job("resize-images", 1_510, LARGE, priority=5, max_cost_usd=2.5, share="research")
FAILED = _job("month-end", 5_400, 24, share="stocktakingOfTheThirdQuarter")
OK = _job("nightly-prices", 28_800, 40)
PAUSED = _job("catalogue", 900, 60)
CANCELLED = _job("retouch", 90_000, 60)


def _stage(name: str, *after: str) -> StageDef:
    gather = None if len(after) < 2 else "*"
    return StageDef(StageName(name), handler="handlers:f", after=tuple(map(StageName, after)), gather=gather)


WAITS = replace(
    _job("quarterly", 60, 60, start_at_s=NOW_S + 7_200, tags=()),
    stages=(
        _stage("extract"),
        _stage("rates"),
        _stage("parse-the-statements-of-accounts", "extract"),
        _stage("validate", "parse-the-statements-of-accounts"),
        _stage("convert", "rates"),
        _stage("price", "validate", "convert"),
        _stage("risk", "price"),
        _stage("tax", "price"),
        _stage("report", "risk", "tax", "extract"),
    ),
)
"""A job that waits for its start, with nine stages."""
LONG = _job("the-import-of-everything-that-came-in-by-mail-in-the-year", 200_000, 10)


def failure(task: int) -> Failure:
    if task % 3 == 0:
        return Failure(task, FailureKind.MEMORY, MEMORY, exit_code=-9, run_s=2.0)
    reason = f"KeyError: 'row {task} has no price'"
    return Failure(
        task=task, kind=FailureKind.EXCEPTION, reason=reason, error="KeyError", traceback=TRACEBACK % task, run_s=0.4
    )


def metrics(task: int, run_s: float) -> TaskMetrics:
    return TaskMetrics(run_s * 0.8, (48 + task % 9) * 1024**2, 25, 4, f"{task % 50:04}.txt")


def moments() -> list[tuple[float, dict[str, tuple[int, ...]]]]:
    """Return half an hour of history in which the fleet grows, works, and shrinks by one instance."""
    found: list[tuple[float, dict[str, tuple[int, ...]]]] = []
    for number in range(900):
        at_s = NOW_S - 1_798 + 2 * number
        age = number - 150
        size = 0 if age < 0 else 4 if age < 700 else 5
        up = 0 if age < 30 else 4 if age < 690 else 3
        waiting = max(0, round(30 + 10 * math.sin(age / 60))) if age > 0 else 0
        busy = 2 * up if waiting else 0
        found.append(
            (
                at_s,
                {
                    "default": (size, up, size - up if size > up else 0, busy, waiting, busy),
                    "large-memory": (0, 0, 0, 0, 0, 0),
                },
            )
        )
    return found
