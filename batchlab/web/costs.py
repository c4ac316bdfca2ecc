"""The view of costs: what the grid costs now, has cost, and may cost."""

from __future__ import annotations

from fastapi import Request
from fastapi.responses import Response

from batchlab import usage
from batchlab.api import jobs as api_jobs
from batchlab.api import spending as api
from batchlab.api.common import Given, Leader
from batchlab.costs.bill import burn_usd_h, spent_usd
from batchlab.costs.meter import Account, Kind
from batchlab.costs.prices import PriceBook
from batchlab.manager.manager import Manager
from batchlab.manager.spending import Spending
from batchlab.model import JobId, Market
from batchlab.web import words
from batchlab.web.rendering import live
from batchlab.web.shared import Page, guarded

router = guarded()

JOBS = 10


@router.get("/costs")
async def costs(request: Request, manager: Leader, served: Given, page: Page) -> Response:
    """What is billed, by pool and by job."""
    found = None
    if manager.spending is not None and page.prices is not None:
        found = await _found(manager, manager.spending, page.prices)
    is_aws = served.capabilities.billed
    return live(request, "costs", here="costs", found=found, is_aws=is_aws)


async def _found(manager: Manager, books: Spending, prices: PriceBook) -> dict[str, object]:
    use = await api.use(books)
    types = {pool.name: pool.instance_type for pool in manager.pools.values()}
    living = {
        Kind(one["pool"], one["type"], Market(one["market"])): one["instances"]
        for one in use["living"]
    }
    total = usage.account_of(use["total"])
    recent = (await api_jobs.jobs(manager, limit=JOBS))["jobs"]
    return {
        "now": words.amount(burn_usd_h(living, types, prices)),
        "spent": words.amount(spent_usd(total, types, prices)),
        "cap": use["max_cost_usd"],
        "capped": use["capped"],
        "requests": total.requests,
        "billed": [
            {
                "kind": kind,
                "seconds": seconds,
                "usd": words.amount(spent_usd(Account({kind: seconds}), types, prices)),
            }
            for kind, seconds in sorted(total.billed_s.items(), key=str)
        ],
        "jobs": [
            {"job": one, "spent": await _of_job(manager, books, prices, JobId(one["id"]))}
            for one in recent
        ],
        "region": prices.region,
        "as_of": prices.blocks["on_demand"].date.isoformat(),
    }


async def _of_job(
    manager: Manager, books: Spending, prices: PriceBook, job: JobId
) -> tuple[str, str]:
    use = await api.job_use(books, manager, job)
    if use["account"] is None:
        return "–", ""
    return words.amount(spent_usd(usage.account_of(use["account"]), use["types"], prices))
