"""Endpoints of jobs: submit them, watch them, steer them.

Invariant: whoever waits for news is woken by it, not by polling.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Annotated, Any

from fastapi import Body, Response
from pydantic import BeforeValidator

from batchlab import facts, views
from batchlab.api.common import Leader, Limit, Wait, guarded
from batchlab.errors import NotFound, UsageError
from batchlab.jobdef import JobDef
from batchlab.manager.live import LiveJob
from batchlab.manager.manager import Manager
from batchlab.model import JobId
from batchlab.ports import JobRecord
from batchlab.protocol import wire
from batchlab.why import why

router = guarded()


def _of_our_version(doc: Any) -> Any:
    if isinstance(doc, dict) and doc.get("v") != wire.VERSION:
        raise ValueError(f"this manager reads version {wire.VERSION} of a job, not {doc.get('v')}")
    return doc


PostedJob = Annotated[JobDef, BeforeValidator(_of_our_version), Body()]


@router.post("/jobs", status_code=201)
async def submit(manager: Leader, job: PostedJob, response: Response) -> views.JobView:
    """Accept a job: 201 where it is new, 200 where the id or client token is known already."""
    try:
        views.admit(job, {name: pool.slots for name, pool in manager.pools.items()})
    except UsageError as error:
        # A job that is known stays accepted, though this grid would not accept it today.
        try:
            await manager.ports.ledger.job(job.id)
        except NotFound:
            raise error from None
    written = await manager.requests.submit(job)
    if not written.is_new:
        response.status_code = 200
    return await _view(manager, written.rows.job)


@router.get("/jobs")
async def jobs(
    manager: Leader, limit: Limit = 100, before: str | None = None, active: bool = False
) -> views.JobsView:
    """Jobs, newest first; `before` is the id of the last one of the previous page."""
    records = await manager.ports.ledger.jobs(active=active, limit=limit, before=before)
    return {"jobs": [await _view(manager, record) for record in records]}


@router.get("/jobs/{job}")
async def job(
    manager: Leader, job: JobId, version: int | None = None, wait_s: Wait = 0.0
) -> views.JobView:
    """One job; with `version` the answer waits until the job's version is another."""
    live = manager.lives.get(job)
    if live and version is not None:
        await news(live, version, wait_s)
    return await _view(manager, await manager.ports.ledger.job(job))


@router.post("/jobs/{job}/cancel")
async def cancel(manager: Leader, job: JobId) -> views.JobView:
    """Answers once no task of the job can start any more."""
    record = await manager.ports.ledger.job(job)
    await manager.requests.cancel(job)
    return await _view(manager, record)


@router.post("/jobs/{job}/pause")
async def pause(manager: Leader, job: JobId) -> views.JobView:
    """Running tasks end, no further one starts."""
    record = await manager.ports.ledger.job(job)
    await manager.requests.pause(job)
    return await _view(manager, record)


@router.post("/jobs/{job}/resume")
async def resume(manager: Leader, job: JobId) -> views.JobView:
    """Go on with a paused job."""
    record = await manager.ports.ledger.job(job)
    await manager.requests.resume(job)
    return await _view(manager, record)


@router.post("/jobs/{job}/retry")
async def retry(manager: Leader, job: JobId) -> views.JobView:
    """Run again what did not succeed."""
    return await _view(manager, await manager.requests.retry(job))


@router.get("/jobs/{job}/why")
async def explain(manager: Leader, job: JobId) -> views.WhyView:
    """Why the job is not further than it is, in one line."""
    return {"why": why(await facts.gather(manager, job))}


async def _view(manager: Manager, record: JobRecord) -> views.JobView:
    """The job as it is now; `record` may be older."""
    job = record.job.id
    live = manager.lives.get(job)
    if live:
        workers = manager.registry.workers.values()
        return views.job_view(live.record, list(live.stages.values()), live, workers)
    rows = await manager.ports.ledger.rows(job)
    return views.job_view(rows.job, rows.stages)


async def news(live: LiveJob, version: int, wait_s: float) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(live.news(version), wait_s)
