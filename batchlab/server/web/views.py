"""Pages of jobs, costs, failures, and the grid.

Sign-in page, and the end of a session.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response

from batchlab.core import api_types, api_usage_types
from batchlab.core.model import ENDED, JobId, Market, StageName
from batchlab.core.pricing.bill import burn_usd_h, spent_usd
from batchlab.core.pricing.price_book import PriceBook
from batchlab.core.pricing.usage import Account, Kind
from batchlab.manager.manager import Manager
from batchlab.manager.spending import Spending
from batchlab.server.http import failures as api_failures
from batchlab.server.http import grid as api_costs
from batchlab.server.http import grid as api_fleet
from batchlab.server.http import grid as spending
from batchlab.server.http import jobs as api_jobs
from batchlab.server.http import tasks
from batchlab.server.http.authentication import PAGE, SESSION_S
from batchlab.server.http.common import Leader, StateDep
from batchlab.server.web import text
from batchlab.server.web.rendering import PageDep, PageState, field_of, form_of, guarded, live, redirect, render
from batchlab.server.web.security import SESSION, below

router = guarded()

JOBS_PER_PAGE = 25
SHOWN_GROUPS = 3


@router.get("/")
async def jobs(request: Request, manager: Leader, active: bool = False, before: str | None = None) -> Response:
    """Show the jobs, newest first."""
    found = (await api_jobs.list_jobs(manager, limit=JOBS_PER_PAGE + 1, before=before, active=active))["jobs"]
    now_s = manager.ports.clock.now_s()
    rows = [
        {"job": one, "took_s": text.took_s(one, now_s), "eta": await _eta(manager, one)}
        for one in found[:JOBS_PER_PAGE]
    ]
    older = found[JOBS_PER_PAGE - 1]["id"] if len(found) > JOBS_PER_PAGE else None
    return live(request, "jobs", here="jobs", rows=rows, active=active, before=before, older=older)


async def _eta(manager: Manager, job: api_types.JobView) -> api_types.EtaView | None:
    return None if job["state"] in ENDED else await api_jobs.eta(manager, JobId(job["id"]))


@router.get("/jobs/{job}")
async def job(request: Request, manager: Leader, served: StateDep, page: PageDep, job: JobId) -> Response:
    """Show one job."""
    view = await api_jobs.job(manager, job)
    groups = None
    if any(stage["failed"] for stage in view["stages"]):
        groups = await api_failures.failure_groups(manager, served, job)
    return live(
        request,
        "job",
        here="jobs",
        job=view,
        progress=text.of_job(view),
        why=(await api_jobs.explain(manager, job))["why"],
        eta=await _eta(manager, view),
        took_s=text.took_s(view, manager.ports.clock.now_s()),
        groups=groups,
        shown_groups=SHOWN_GROUPS,
        cost=await _cost(manager, page, job),
        is_final=view["state"] in ENDED,
    )


async def _cost(manager: Manager, page: PageState, job: JobId) -> dict[str, object] | None:
    """Return the costs and the cap of the job. Return None if the account or the prices are
    missing."""
    if manager.spending is None or page.prices is None:
        return None
    use = await spending.job_use(manager.spending, manager, job)
    spent = "–", ""
    if use["account"]:
        usd = spent_usd(api_usage_types.account_of(use["account"]), use["types"], page.prices)
        spent = text.amount(usd)
    return {"spent": spent, "cap": use["max_cost_usd"], "capped": use["capped"]}


@router.get("/jobs/{job}/results.zip")
async def results(manager: Leader, served: StateDep, job: JobId) -> Response:
    """Return the job's results as an archive."""
    return await tasks.archive(manager, served, job)


SHOWN_JOBS = 10


@router.get("/costs")
async def costs(request: Request, manager: Leader, served: StateDep, page: PageDep) -> Response:
    """Show the billed usage by pool and by job."""
    found = None
    if manager.spending is not None and page.prices is not None:
        found = await _found(manager, manager.spending, page.prices)
    is_aws = served.capabilities.billed
    return live(request, "costs", here="costs", found=found, is_aws=is_aws)


async def _found(manager: Manager, books: Spending, prices: PriceBook) -> dict[str, object]:
    use = await api_costs.use(books)
    types = {pool.name: pool.instance_type for pool in manager.pools.values()}
    living = {Kind(one["pool"], one["type"], Market(one["market"])): one["instances"] for one in use["living"]}
    total = api_usage_types.account_of(use["total"])
    recent = (await api_jobs.list_jobs(manager, limit=SHOWN_JOBS))["jobs"]
    return {
        "now": text.amount(burn_usd_h(living, types, prices)),
        "spent": text.amount(spent_usd(total, types, prices)),
        "cap": use["max_cost_usd"],
        "capped": use["capped"],
        "requests": total.requests,
        "billed": [
            {"kind": kind, "seconds": seconds, "usd": text.amount(spent_usd(Account({kind: seconds}), types, prices))}
            for kind, seconds in sorted(total.billed_s.items(), key=str)
        ],
        "jobs": [{"job": one, "spent": await _of_job(manager, books, prices, JobId(one["id"]))} for one in recent],
        "region": prices.region,
        "as_of": prices.blocks["on_demand"].date.isoformat(),
    }


async def _of_job(manager: Manager, books: Spending, prices: PriceBook, job: JobId) -> tuple[str, str]:
    use = await api_costs.job_use(books, manager, job)
    if use["account"] is None:
        return "–", ""
    return text.amount(spent_usd(api_usage_types.account_of(use["account"]), use["types"], prices))


CHECKED_JOBS = 200
"""Number of recent jobs that the page checks for failures."""
FAILURES_PER_PAGE = 50


@router.get("/failures")
async def failures(request: Request, manager: Leader, served: StateDep, page: PageDep) -> Response:
    """Show the jobs with failed tasks, and the depths of the dead-letter queues."""
    found = (await api_jobs.list_jobs(manager, limit=CHECKED_JOBS))["jobs"]
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
async def of_job(request: Request, manager: Leader, served: StateDep, job: JobId) -> Response:
    """Show a job's failures by fingerprint."""
    view = await api_jobs.job(manager, job)
    return render(
        request,
        "job_failures.html",
        here="failures",
        job=view,
        found=await api_failures.failure_groups(manager, served, job),
        may_retry=view["state"] in ENDED - {"SUCCEEDED"},
    )


@router.get("/jobs/{job}/failures/{fingerprint}")
async def of_group(
    request: Request, manager: Leader, served: StateDep, job: JobId, fingerprint: str, after: str | None = None
) -> Response:
    """Show the tasks of one group, page by page."""
    view = await api_jobs.job(manager, job)
    groups = (await api_failures.failure_groups(manager, served, job))["groups"]
    found = await api_failures.failures(
        manager, served, job, limit=FAILURES_PER_PAGE, after=after, fingerprint=fingerprint
    )
    return render(
        request,
        "group.html",
        here="failures",
        job=view,
        fingerprint=fingerprint,
        group=next((group for group in groups if group["fingerprint"] == fingerprint), None),
        failures=found["failures"],
        next=found["next"],
        is_first=after is None,
        may_retry=view["state"] in ENDED - {"SUCCEEDED"},
    )


@router.get("/jobs/{job}/task")
async def to_task(
    request: Request, manager: Leader, job: JobId, stage: StageName, task: Annotated[int, Query(ge=0, le=2**53)]
) -> Response:
    """Redirect to the task that the form names."""
    await api_jobs.job(manager, job)
    path = f"/jobs/{text.path(job)}/stages/{text.path(stage)}/tasks/{task}"
    return redirect(request, path)


@router.get("/jobs/{job}/stages/{stage}/tasks/{task}")
async def task(
    request: Request, manager: Leader, job: JobId, stage: StageName, task: tasks.Index, seq: tasks.Seq = None
) -> Response:
    """Show one task: its end, its input, and its log."""
    view = await api_jobs.job(manager, job)
    found = await tasks.task(manager, job, stage, task, seq)
    return render(
        request,
        "task.html",
        here="failures" if found["failure"] else "jobs",
        job=view,
        task=found,
        may_retry=view["state"] in ENDED - {"SUCCEEDED"} and found["state"] == "failed",
    )


SHOWN_ACTIVITIES = 20


@router.get("/grid")
async def grid(request: Request, manager: Leader, served: StateDep, page: PageDep) -> Response:
    """Show the current fleet."""
    return live(
        request,
        "grid",
        here="grid",
        grid=await page.grid(manager, served),
        activities=(await api_fleet.activities(manager, limit=SHOWN_ACTIVITIES))["activities"],
        now_s=manager.ports.clock.now_s(),
    )


@router.get("/history.json")
async def history(manager: Leader, served: StateDep) -> Response:
    """Return the data of the curves."""
    return JSONResponse(await api_fleet.history(manager, served))


login_router = APIRouter()
"""Routes without a form token, because a visitor gets a session only by signing in."""
inside = guarded()

MAX_WORD_CHARS = 200


@login_router.get("/login")
async def login_page(request: Request) -> Response:
    """Ask for the token. The address that `grid open` shows contains a code in its fragment."""
    return render(request, "login.html", refused=False)


@login_router.post("/login")
async def log_in(request: Request, served: StateDep) -> Response:
    """Start a session."""
    word = field_of(await form_of(request), "word")
    if not word or len(word) > MAX_WORD_CHARS or not served.sessions.opens(word):
        return render(request, "login.html", status=403, refused=True)
    session, value = served.sessions.begin()
    place = served.sessions.place(session)
    answer = RedirectResponse(f"{below(place)}/", 303)
    answer.set_cookie(
        served.sessions.cookie(place),
        value,
        max_age=int(SESSION_S),
        path=below(place),
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )
    return answer


@inside.post("/logout")
async def log_out(request: Request, served: StateDep) -> Response:
    """End the session. Its cookie becomes invalid in every browser."""
    session = request.scope[SESSION]
    place = served.sessions.place(session)
    served.sessions.close(session)
    answer = RedirectResponse(f"{PAGE}/login", 303)
    name = served.sessions.cookie(place)
    answer.delete_cookie(name, path=below(place), httponly=True, samesite="strict")
    return answer


login_router.include_router(inside)
