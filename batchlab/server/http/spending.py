"""Endpoints of the usage and the cost caps of the grid and its jobs."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from batchlab.core import api_usage_types
from batchlab.core.model import JobId
from batchlab.manager.manager import Manager
from batchlab.manager.spending import Spending
from batchlab.server.http.common import Books, Leader, guarded

router = guarded()


class Cap(BaseModel):
    """Cap in USD. null removes the cap."""

    model_config = ConfigDict(extra="forbid")

    max_cost_usd: Annotated[float | None, Field(ge=0, allow_inf_nan=False)]


@router.get("/use")
async def use(books: Books) -> api_usage_types.UseView:
    """Return the grid's usage, as AWS bills it, and the instances that are billed now."""
    return api_usage_types.use_view(books)


@router.post("/use/cap")
async def cap_grid(books: Books, manager: Leader, cap: Cap) -> api_usage_types.UseView:
    """Set the cap on the grid's cost since its account was opened."""
    books.set_cap(None, cap.max_cost_usd)
    manager.wake()
    return api_usage_types.use_view(books)


@router.get("/jobs/{job}/use")
async def job_use(books: Books, manager: Leader, job: JobId) -> api_usage_types.JobUseView:
    """Return the usage of a job."""
    return await _job_use(books, manager, job)


@router.post("/jobs/{job}/cap")
async def cap_job(
    books: Books, manager: Leader, job: JobId, cap: Cap
) -> api_usage_types.JobUseView:
    """Set the cap on the cost of a job that has not ended."""
    manager.requests.running(job, "capped")
    books.set_cap(job, cap.max_cost_usd)
    manager.wake()
    return await _job_use(books, manager, job)


async def _job_use(books: Spending, manager: Manager, job: JobId) -> api_usage_types.JobUseView:
    record = await manager.ports.ledger.job(job)
    live = manager.lives.get(job)
    return api_usage_types.job_use_view(
        record.job,
        await books.account(job),
        manager.pools.values(),
        max_cost_usd=books.cap_of(live) if live else record.job.max_cost_usd,
        capped=live.capped if live else "",
    )
