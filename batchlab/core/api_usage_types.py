"""Typed dicts for the responses of the HTTP API about usage and schedules.

The manager creates the responses of the HTTP API, and clients read the responses. Responses about usage do not contain
prices, because the clients have a price book.

Invariant: the module is pure and cheap to import.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, NotRequired

from typing_extensions import TypedDict  # pydantic refuses typing.TypedDict before Python 3.12

from batchlab.core import due_times

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from batchlab.core.job_definition import JobDef
    from batchlab.core.model import Pool
    from batchlab.core.pricing.usage import Account
    from batchlab.core.schedules import Schedule, ScheduledRun
    from batchlab.manager.spending import Spending


class BilledView(TypedDict):
    """Billed seconds of the instances with the same pool, type, and market, as AWS counts billed seconds.

    `type` is the instance type of the instances, or "" if the backend does not have instance types.
    """

    pool: str
    type: str
    market: str
    seconds: float


class AccountView(TypedDict):
    """Recorded usage of a job or of the grid.

    `failed_s` maps each pool to the slot seconds of failed attempts. `lost_s` maps each pool to the slot seconds of
    work that was lost because an instance died. `repeated_s` maps each pool to the slot seconds of speculative copies
    that were not committed, and of runs whose speculative copy was committed first. `requests` contains the numbers of
    requests that AWS bills for SQS and S3. `requests` contains only zeros on a backend without SQS and S3. `is_whole`
    is false if the manager did not count some of the usage.
    """

    billed: list[BilledView]
    failed_s: dict[str, float]
    lost_s: dict[str, float]
    repeated_s: NotRequired[dict[str, float]]
    requests: dict[str, float]
    bundles: int
    is_whole: bool


class LivingView(TypedDict):
    """Number of instances with the same pool, type, and market that AWS bills now."""

    pool: str
    type: str
    market: str
    instances: int


class UseView(TypedDict):
    """Usage of the grid since the beginning of the grid's account.

    The field `nobody` contains the usage that is not attributed to a job. `capped` maps a pool to the reason why a cap
    prevents the launch of more instances in the pool. `max_cost_usd` is the cap of the grid in USD.
    """

    total: AccountView
    nobody: AccountView
    living: list[LivingView]
    max_cost_usd: float | None
    capped: dict[str, str]


class ShareEntryView(TypedDict):
    """Entry of the fair-share policy. An identifier that ends in `*` applies to each share with the prefix."""

    identifier: str
    weight: float
    max_slots: int | None


class SharePolicyView(TypedDict):
    """Fair-share policy of the grid. `reservation` is the compute reservation in percent. With `only_listed`, a job may
    name only a share to which an entry applies."""

    decay_s: float
    reservation: int
    only_listed: bool
    shares: list[ShareEntryView]


class ShareView(TypedDict):
    """State of one share in one pool.

    `part` is the share's part of the pool while all active shares have work. `use_s` is the decayed use in slot
    seconds. `bundles` counts the outstanding bundles. `slots` counts the slots of the bundles that neither belong to a
    paused job nor wait for a backoff, and `places` is the number of such bundles that the share may have outstanding.
    `jobs` counts the jobs with work, and `waiting_tasks` counts their tasks that are not sent. `running_slots` counts
    the slots of the outstanding bundles that workers run according to their heartbeats, and `waiting_bundles` counts
    the other outstanding bundles. A bundle that several workers run counts once.
    """

    share: str
    pool: str
    weight: float
    max_slots: int | None
    part: float
    use_s: float
    bundles: int
    slots: int
    places: int
    jobs: int
    waiting_tasks: int
    running_slots: NotRequired[int]
    waiting_bundles: NotRequired[int]


class SharesView(TypedDict):
    """Fair-share policy of the grid, or null without a policy, and the state of each share in each pool. `problem` is
    the reason why the manager cannot read the stored policy, or "". The last policy that the manager has read stays in
    force."""

    policy: SharePolicyView | None
    shares: list[ShareView]
    problem: str


class JobUseView(TypedDict):
    """Usage of a job. `account` is None if the manager did not record the usage of the job.

    `pools` maps each pool to the task slots of its instances, `types` maps each pool to its instance type, and `slots`
    maps each stage to the task slots of one task. `capped` names the cap that does not cover the remaining work of the
    job. If every cap covers the remaining work, `capped` is "".
    """

    job: str
    account: AccountView | None
    max_cost_usd: float | None
    capped: str
    pools: dict[str, int]
    types: dict[str, str]
    slots: dict[str, int]


def account_view(account: Account) -> AccountView:
    return {
        "billed": [
            {"pool": k.pool, "type": k.type, "market": k.market.value, "seconds": seconds}
            for k, seconds in account.billed_s.items()
        ],
        "failed_s": dict(account.failed_s),
        "lost_s": dict(account.lost_s),
        "repeated_s": dict(account.repeated_s),
        "requests": asdict(account.requests),
        "bundles": account.bundles,
        "is_whole": account.is_whole,
    }


def account_of(view: AccountView) -> Account:
    """Return the Account in a response of the manager."""
    from batchlab.core.model import Market
    from batchlab.core.pricing.request_costs import Requests
    from batchlab.core.pricing.usage import Account, Kind

    return Account(
        {Kind(b["pool"], b["type"], Market(b["market"])): b["seconds"] for b in view["billed"]},
        dict(view["failed_s"]),
        dict(view["lost_s"]),
        Requests(**view["requests"]),
        view["bundles"],
        view["is_whole"],
        dict(view.get("repeated_s", {})),
    )


def use_view(spending: Spending) -> UseView:
    """Return the current usage of the grid as a response."""
    kinds = Counter(life.kind for life in spending.meter.lives.values())
    return {
        "total": account_view(spending.meter.total),
        "nobody": account_view(spending.meter.nobody),
        "living": [
            {"pool": k.pool, "type": k.type, "market": k.market.value, "instances": number}
            for k, number in kinds.items()
        ],
        "max_cost_usd": spending.caps.max_cost_usd,
        "capped": dict(spending.caps.capped),
    }


def job_use_view(
    job: JobDef, account: Account | None, pools: Iterable[Pool], *, max_cost_usd: float | None, capped: str = ""
) -> JobUseView:
    pool_list = list(pools)
    return {
        "job": job.id,
        "account": account_view(account) if account else None,
        "max_cost_usd": max_cost_usd,
        "capped": capped,
        "pools": {pool.name: pool.slots for pool in pool_list},
        "types": {pool.name: pool.instance_type for pool in pool_list},
        "slots": {str(stage.name): stage.slots for stage in job.stages},
    }


class RunView(TypedDict):
    """A run of a schedule. `due` is the due time of the run in the time zone of the schedule.

    The `state` of a run is waiting, running, ended, or skipped. `result` is the final state of the run's job. `tasks`
    is the number of the job's tasks, or None if the manager did not record the number of tasks.
    """

    due_s: float
    due: str
    by_hand: bool
    state: str
    result: str
    reason: str
    job: str | None
    started_s: float | None
    ended_s: float | None
    peak: dict[str, int]
    tasks: int | None


class ScheduleView(TypedDict):
    """A schedule with its runs from new to old.

    The `state` of a schedule is active, paused, or done. A schedule with the state done does not run again. Every
    schedule has a value in either `cron` or `at_s`. `next` is the next due time of the schedule in the schedule's time
    zone. `after` lists the schedules whose latest runs must have succeeded before a run begins, or must have ended,
    such as `nightly:ended`.
    """

    name: str
    job: str
    state: str
    cron: str
    timezone: str
    at_s: float | None
    next_s: float | None
    next: str
    missed: str
    missed_within_s: float | None
    overlap: str
    prewarm_s: float
    capacity: int | None
    due_param: str
    after: list[str]
    source: str
    source_digest: str
    input: list[str]
    added_s: float
    runs: list[RunView]


class SchedulesView(TypedDict):
    """All schedules of the grid. `notes` describe the runs that the grid missed before the current manager began to
    lead.
    """

    schedules: list[ScheduleView]
    notes: list[str]


class DueView(TypedDict):
    """A due time of a schedule in three forms: in seconds since 1970, in the schedule's time zone, and in UTC."""

    at_s: float
    local: str
    utc: str


class ComingView(TypedDict):
    times: list[DueView]


def schedule_view(schedule: Schedule, *, runs: int, input: Sequence[str] = ()) -> ScheduleView:  # noqa: A002 - the name is a field of the view
    """Return a schedule with its last `runs` runs. `input` lists the key prefixes of the job's input, under which each
    run looks for objects.
    """
    definition = schedule.definition
    when, next_s = definition.when, schedule.next_s()
    state = "paused" if schedule.paused else "done" if next_s is None else "active"
    return {
        "name": definition.name,
        "job": definition.job,
        "state": state,
        "cron": when.cron,
        "timezone": when.zone,
        "at_s": when.at_s,
        "next_s": next_s,
        "next": "" if next_s is None else due_times.iso(next_s, when.tz),
        "missed": definition.missed.value,
        "missed_within_s": definition.missed_within_s,
        "overlap": definition.overlap.value,
        "prewarm_s": definition.prewarm_s,
        "capacity": definition.capacity,
        "due_param": definition.due_param,
        "after": list(definition.after),
        "source": definition.source,
        "source_digest": definition.source_digest,
        "input": list(input),
        "added_s": schedule.added_s,
        "runs": [run_view(schedule, run) for run in reversed(schedule.runs[-runs:])],
    }


def run_view(schedule: Schedule, run: ScheduledRun) -> RunView:
    return {
        "due_s": run.due_s,
        "due": due_times.iso(run.due_s, schedule.definition.when.tz),
        "by_hand": bool(run.asked),
        "state": run.state.value,
        "result": run.result,
        "reason": run.reason,
        "job": run.job,
        "started_s": run.started_s,
        "ended_s": run.ended_s,
        "peak": dict(run.peak),
        "tasks": run.tasks,
    }


def coming(schedule: Schedule, now_s: float, count: int) -> list[DueView]:
    """Return the next `count` due times of a schedule, whether or not the schedule is paused."""
    when = schedule.definition.when
    times: list[DueView] = []
    due_s = when.next_after(max(now_s, schedule.through_s))
    while due_s is not None and len(times) < count:
        times.append({"at_s": due_s, "local": due_times.iso(due_s, when.tz), "utc": due_times.iso(due_s)})
        due_s = when.next_after(due_s)
    return times
