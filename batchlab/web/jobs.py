"""Views of jobs: all of them, and one."""

from __future__ import annotations

from fastapi import Request
from fastapi.responses import Response

from batchlab import usage, views
from batchlab.api import archive as api_archive
from batchlab.api import failures as api_failures
from batchlab.api import jobs as api
from batchlab.api import spending as api_spending
from batchlab.api.common import Given, Leader
from batchlab.costs.bill import spent_usd
from batchlab.manager.manager import Manager
from batchlab.model import ENDED, JobId
from batchlab.web import words
from batchlab.web.rendering import live
from batchlab.web.shared import Page, State, guarded

router = guarded()

A_PAGE = 25
LARGEST_GROUPS = 3


@router.get("/")
async def jobs(
    request: Request, manager: Leader, active: bool = False, before: str | None = None
) -> Response:
    """Jobs, newest first."""
    found = (await api.jobs(manager, limit=A_PAGE + 1, before=before, active=active))["jobs"]
    now_s = manager.ports.clock.now_s()
    rows = [
        {"job": one, "took_s": words.took_s(one, now_s), "eta": await _eta(manager, one)}
        for one in found[:A_PAGE]
    ]
    older = found[A_PAGE - 1]["id"] if len(found) > A_PAGE else None
    return live(request, "jobs", here="jobs", rows=rows, active=active, before=before, older=older)


async def _eta(manager: Manager, job: views.JobView) -> views.EtaView | None:
    return None if job["state"] in ENDED else await api.eta(manager, JobId(job["id"]))


@router.get("/jobs/{job}")
async def job(request: Request, manager: Leader, served: Given, page: Page, job: JobId) -> Response:
    """One job."""
    view = await api.job(manager, job)
    groups = None
    if any(stage["failed"] for stage in view["stages"]):
        groups = await api_failures.failure_groups(manager, served, job)
    return live(
        request,
        "job",
        here="jobs",
        job=view,
        progress=words.of_job(view),
        why=(await api.explain(manager, job))["why"],
        eta=await _eta(manager, view),
        took_s=words.took_s(view, manager.ports.clock.now_s()),
        groups=groups,
        shown_groups=LARGEST_GROUPS,
        cost=await _cost(manager, page, job),
        is_final=view["state"] in ENDED,
    )


async def _cost(manager: Manager, page: State, job: JobId) -> dict[str, object] | None:
    """What the job has used and may use; None where nobody counts or no price is known."""
    if manager.spending is None or page.prices is None:
        return None
    use = await api_spending.job_use(manager.spending, manager, job)
    spent = "–", ""
    if use["account"]:
        usd = spent_usd(usage.account_of(use["account"]), use["types"], page.prices)
        spent = words.amount(usd)
    return {"spent": spent, "cap": use["max_cost_usd"], "capped": use["capped"]}


@router.get("/jobs/{job}/results.zip")
async def results(manager: Leader, served: Given, job: JobId) -> Response:
    """The job's results as an archive."""
    return await api_archive.archive(manager, served, job)
