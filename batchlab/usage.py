"""What the API shows of what the grid uses: typed dicts, filled by the manager, read by clients.

Invariant: as in views. No price is in here; whoever reads it has a price book.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING

from typing_extensions import TypedDict  # pydantic refuses the standard one before Python 3.12

if TYPE_CHECKING:
    from collections.abc import Iterable

    from batchlab.costs.meter import Account
    from batchlab.jobdef import JobDef
    from batchlab.manager.spending import Spending
    from batchlab.model import Pool


class BilledView(TypedDict):
    """Instance seconds as AWS bills them, of instances of one kind. `type` is empty where machines
    do not differ."""

    pool: str
    type: str
    market: str
    seconds: float


class AccountView(TypedDict):
    """What was used. `failed_s` (attempts that failed) and `lost_s` (runs whose instance died) are
    slot seconds by pool; `requests` those that SQS and S3 bill, all 0 on a backend that has
    neither. Not `is_whole`: some of it was not counted."""

    billed: list[BilledView]
    failed_s: dict[str, float]
    lost_s: dict[str, float]
    requests: dict[str, float]
    bundles: int
    is_whole: bool


class LivingView(TypedDict):
    """Instances of one kind that are billed now."""

    pool: str
    type: str
    market: str
    instances: int


class UseView(TypedDict):
    """What the grid has used since its account was opened, `nobody` for no job; `capped` says by
    pool why no more is launched. The cap is in USD."""

    total: AccountView
    nobody: AccountView
    living: list[LivingView]
    max_cost_usd: float | None
    capped: dict[str, str]


class JobUseView(TypedDict):
    """What a job has used, None where nobody has counted. `pools` are the slots of an instance,
    `types` its type, `slots` those of a task by stage; `capped` which cap has held it back
    and does not pay for all that is left of it, empty where none."""

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
        "requests": asdict(account.requests),
        "bundles": account.bundles,
        "is_whole": account.is_whole,
    }


def account_of(view: AccountView) -> Account:
    """What the manager shows, as it is reckoned with."""
    from batchlab.costs.meter import Account, Kind
    from batchlab.model import Market
    from batchlab.tally import Requests

    return Account(
        {Kind(b["pool"], b["type"], Market(b["market"])): b["seconds"] for b in view["billed"]},
        dict(view["failed_s"]),
        dict(view["lost_s"]),
        Requests(**view["requests"]),
        view["bundles"],
        view["is_whole"],
    )


def use_view(spending: Spending) -> UseView:
    """The grid's account as it is."""
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
    job: JobDef,
    account: Account | None,
    pools: Iterable[Pool],
    *,
    max_cost_usd: float | None,
    capped: str = "",
) -> JobUseView:
    known = list(pools)
    return {
        "job": job.id,
        "account": account_view(account) if account else None,
        "max_cost_usd": max_cost_usd,
        "capped": capped,
        "pools": {pool.name: pool.slots for pool in known},
        "types": {pool.name: pool.instance_type for pool in known},
        "slots": {str(stage.name): stage.slots for stage in job.stages},
    }
