"""Views of what has failed: where there is something, why, one task in full, and what to do."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Request
from fastapi.responses import Response

from batchlab.api import failures as api
from batchlab.api import jobs as api_jobs
from batchlab.api import tasks as api_tasks
from batchlab.api.common import Given, Leader
from batchlab.model import ENDED, JobId, StageName
from batchlab.web import words
from batchlab.web.rendering import live, render
from batchlab.web.shared import Page, guarded, to

router = guarded()

LOOKED_AT = 200
"""Jobs, the newest ones, among which those with failures are shown."""
A_PAGE = 50


@router.get("/failures")
async def failures(request: Request, manager: Leader, served: Given, page: Page) -> Response:
    """Jobs with failed tasks, and what lies in the dead-letter queues."""
    found = (await api_jobs.jobs(manager, limit=LOOKED_AT))["jobs"]
    grid = await page.grid(manager, served)
    return live(
        request,
        "failures",
        here="failures",
        jobs=[one for one in found if any(stage["failed"] for stage in one["stages"])],
        looked_at=len(found),
        dead=[queue for queue in grid["queues"] if queue["name"].endswith("-dead")],
    )


@router.get("/jobs/{job}/failures")
async def of_job(request: Request, manager: Leader, served: Given, job: JobId) -> Response:
    """A job's failures by fingerprint."""
    view = await api_jobs.job(manager, job)
    return render(
        request,
        "job_failures.html",
        here="failures",
        job=view,
        found=await api.failure_groups(manager, served, job),
        may_retry=view["state"] in ENDED - {"SUCCEEDED"},
    )


@router.get("/jobs/{job}/failures/{fingerprint}")
async def of_group(
    request: Request,
    manager: Leader,
    served: Given,
    job: JobId,
    fingerprint: str,
    after: str | None = None,
) -> Response:
    """The tasks of one group, page by page."""
    view = await api_jobs.job(manager, job)
    groups = (await api.failure_groups(manager, served, job))["groups"]
    found = await api.failures(
        manager, served, job, limit=A_PAGE, after=after, fingerprint=fingerprint
    )
    return render(
        request,
        "group.html",
        here="failures",
        job=view,
        fingerprint=fingerprint,
        group=next((one for one in groups if one["fingerprint"] == fingerprint), None),
        failures=found["failures"],
        next=found["next"],
        is_first=after is None,
        may_retry=view["state"] in ENDED - {"SUCCEEDED"},
    )


@router.get("/jobs/{job}/task")
async def to_task(
    request: Request,
    manager: Leader,
    job: JobId,
    stage: StageName,
    task: Annotated[int, Query(ge=0, le=2**53)],
) -> Response:
    """The task that a form names."""
    await api_jobs.job(manager, job)
    path = f"/jobs/{words.path(job)}/stages/{words.path(stage)}/tasks/{task}"
    return to(request, path)


@router.get("/jobs/{job}/stages/{stage}/tasks/{task}")
async def task(
    request: Request,
    manager: Leader,
    job: JobId,
    stage: StageName,
    task: api_tasks.Index,
    seq: api_tasks.Seq = None,
) -> Response:
    """One task: how it ended, its input, its log."""
    view = await api_jobs.job(manager, job)
    found = await api_tasks.task(manager, job, stage, task, seq)
    return render(
        request,
        "task.html",
        here="failures" if found["failure"] else "jobs",
        job=view,
        task=found,
        may_retry=view["state"] in ENDED - {"SUCCEEDED"} and found["state"] == "failed",
    )
