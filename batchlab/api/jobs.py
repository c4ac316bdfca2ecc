"""Endpoints of jobs: submit them, watch them, steer them.

Invariant: an answer shows the job as it is once the request has taken effect.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import Body, Response
from fastapi.responses import StreamingResponse
from pydantic import BeforeValidator

from batchlab import facts, views
from batchlab.api.common import MOST, Leader, Limit, Wait, guarded
from batchlab.api.waiting import news, page
from batchlab.errors import NotFound, UsageError
from batchlab.jobdef import JobDef
from batchlab.manager.manager import Manager
from batchlab.model import JobId
from batchlab.ports import JobRecord
from batchlab.protocol import wire
from batchlab.why import why

router = guarded()

NDJSON = "application/x-ndjson"


def _of_our_version(doc: Any) -> Any:
    if isinstance(doc, dict) and doc.get("v") != wire.VERSION:
        raise ValueError(f"this manager reads version {wire.VERSION} of a job, not {doc.get('v')}")
    return doc


PostedJob = Annotated[JobDef, BeforeValidator(_of_our_version), Body(embed=True)]
Items = Annotated[list[Any] | None, Body(embed=True)]


@router.post("/jobs", status_code=201, response_model=views.JobView)
async def submit(
    manager: Leader,
    job: PostedJob,
    response: Response,
    items: Items = None,
    wait_s: Wait = 0.0,
) -> Any:
    """Accept a job: 201 where it is new, 200 where the id or client token is known already.

    A job without an input brings its items: a few here, encoded as in a plan; more in the bucket.
    With `wait_s` the answer has two lines of JSON: the job at once, and its first outcomes, as
    from /outcomes, as soon as there are some.
    """
    try:
        views.admit(job, {name: pool.slots for name, pool in manager.pools.items()})
    except UsageError as error:
        # A job that is known stays accepted, though this grid would not accept it today.
        try:
            await manager.ports.ledger.job(job.id)
        except NotFound:
            raise error from None
    if items is not None and (job.items != len(items) or job.input is not None):
        raise UsageError(
            f"Job {job.id} comes with {len(items)} items, but says otherwise.",
            remedy="Let `items` of the job be their number, and give it no input.",
        )
    written = await manager.requests.submit(job, items)
    status = 201 if written.is_new else 200
    view = await _view(manager, written.rows.job)
    if wait_s:
        return StreamingResponse(_lines(manager, view, wait_s), status, media_type=NDJSON)
    response.status_code = status
    return view


async def _lines(manager: Manager, view: views.JobView, wait_s: float) -> AsyncIterator[str]:
    yield wire.dumps(view) + "\n"
    outcomes = await page(manager, JobId(view["id"]), None, None, MOST, wait_s)
    yield wire.dumps(outcomes) + "\n"


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
