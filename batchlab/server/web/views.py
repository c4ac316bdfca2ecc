"""Pages of jobs, costs, failures, and the grid, and the sign-in page."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from batchlab.core import api_types, api_usage_types
from batchlab.core.errors import Refused
from batchlab.core.model import ENDED, JobId, Market, StageName
from batchlab.core.pricing.bill import burn_usd_h, job_bill, spent_usd
from batchlab.core.pricing.price_book import PriceBook
from batchlab.core.pricing.request_costs import Pace
from batchlab.core.pricing.usage import Account, Kind
from batchlab.core.protocol.mended_inputs import MAX_INPUT_BYTES
from batchlab.manager.audit_log import OUTCOMES
from batchlab.manager.manager import Manager
from batchlab.manager.spending import Spending
from batchlab.reports.html.stage_graph import Stage, graph
from batchlab.server.http import downloads, failures, grid, jobs, shares, task_list, tasks, users
from batchlab.server.http.authentication import PAGE, SESSION_S
from batchlab.server.http.common import CallerDep, Leader, ServerState, StateDep
from batchlab.server.http.permissions import RULES, permits
from batchlab.server.task_index import TaskState
from batchlab.server.web import text, timeline
from batchlab.server.web.rendering import (
    PageDep,
    PageState,
    field_of,
    form_of,
    guarded_router,
    is_part,
    live,
    redirect,
    render,
)
from batchlab.server.web.security import POLICY, SESSION, below, report_policy

router = guarded_router()

JOBS_PER_PAGE = 25
SHOWN_GROUPS = 3


@router.get("/")
async def jobs_page(request: Request, manager: Leader, active: bool = False, before: str | None = None) -> Response:
    """Show a page of the list of jobs, with the newest job first."""
    views = (await jobs.list_jobs(manager, limit=JOBS_PER_PAGE + 1, before=before, active=active))["jobs"]
    now_s = manager.ports.clock.now_s()
    rows = [
        {"job": view, "took_s": text.took_s(view, now_s), "eta": await _eta(manager, view)}
        for view in views[:JOBS_PER_PAGE]
    ]
    older = views[JOBS_PER_PAGE - 1]["id"] if len(views) > JOBS_PER_PAGE else None
    return live(request, "jobs", here="jobs", rows=rows, active=active, before=before, older=older)


async def _eta(manager: Manager, job: api_types.JobView) -> api_types.EtaView | None:
    return None if job["state"] in ENDED else await jobs.eta(manager, JobId(job["id"]))


@router.get("/jobs/{job}")
async def job_page(request: Request, manager: Leader, served: StateDep, page: PageDep, job: JobId) -> Response:
    """Show one job with its stages."""
    view = await jobs.job(manager, job)
    groups = None
    if any(stage["failed"] for stage in view["stages"]):
        groups = await failures.failure_groups(manager, served, job)
    return live(
        request,
        "job",
        here="jobs",
        job=view,
        progress=text.of_job(view),
        why=(await jobs.explain(manager, job))["why"],
        eta=await _eta(manager, view),
        took_s=text.took_s(view, manager.ports.clock.now_s()),
        groups=groups,
        shown_groups=SHOWN_GROUPS,
        cost=await _cost(manager, page, view),
        graph=graph([Stage(stage["name"], stage["after"], text.of_stage(stage)) for stage in view["stages"]]),
        has_report=page.reports is not None,
        is_final=view["state"] in ENDED,
    )


async def _cost(manager: Manager, page: PageState, view: api_types.JobView) -> dict[str, object] | None:
    """Return the costs and the cost cap of the job. Return None if the grid has no accounts or no prices."""
    if manager.spending is None or page.prices is None:
        return None
    use = await grid.job_use(manager.spending, manager, JobId(view["id"]))
    spent = job_bill(view, use, page.prices, pace=page.pace).usd
    return {"spent": text.exactly(spent), "cap": use["max_cost_usd"], "capped": use["capped"]}


@router.get("/jobs/{job}/results.zip")
async def results(manager: Leader, served: StateDep, job: JobId) -> Response:
    """Return the job's results as an archive."""
    return await tasks.archive(manager, served, job)


@router.get("/jobs/{job}/report.html")
async def report(manager: Leader, page: PageDep, job: JobId) -> Response:
    """Return the report of an ended job, as `batchlab report html` writes it."""
    view = await jobs.job(manager, job)
    if page.reports is None:
        raise Refused("This manager does not write reports.", remedy="Use a manager that `batchlab grid up` starts.")
    if view["state"] not in ENDED:
        raise Refused(f"The report of job {job} does not exist yet.", remedy="Open the report when the job has ended.")
    from batchlab.reports.html.page import style_hash

    html = await page.reports.page(job, view["round"])
    return HTMLResponse(html, headers={POLICY: report_policy(style_hash())})


RECORDS_PER_PAGE = 50
_SPANS = {"3600": "Last hour", "86400": "Last day", "604800": "Last 7 days", "2592000": "Last 30 days"}
"""Choices of the page of the audit log, by their seconds."""


@router.get("/audit")
async def audit_page(
    request: Request,
    manager: Leader,
    caller: CallerDep,
    user: users.Text = "",
    action: users.Text = "",
    outcome: users.Text = "",
    within: Literal["", "3600", "86400", "604800", "2592000"] = "",
    before: users.Before = "",
) -> Response:
    """Show a page of the audit log, with the newest record first. The page does not update itself."""
    found = None
    if manager.audit is not None:
        since_s = manager.ports.clock.now_s() - float(within) if within else 0.0
        found = await users.audit(
            manager, caller, user, action, outcome, max(0.0, since_s), before=before, limit=RECORDS_PER_PAGE
        )
    fields = {"user": user, "action": action, "outcome": outcome, "within": within}
    actions = {rule.action for rule in RULES.values() if rule.action}
    return render(
        request,
        "audit.html",
        here="audit",
        found=found,
        reads_all=users.may_administer(caller),
        fields=fields,
        is_filtered=any(fields.values()),
        actions=sorted(actions | {one.partition(" ")[0] for one in actions} | ({action} if action else set())),
        outcomes=OUTCOMES,
        spans=_SPANS,
        first=text.query(fields) or "?" if before else "",
        next=text.query(fields, before=found["next"]) if found and found["next"] else "",
    )


SHOWN_JOBS = 10


@router.get("/costs")
async def costs_page(request: Request, manager: Leader, served: StateDep, page: PageDep) -> Response:
    """Show the billed usage by pool and by job."""
    figures = None
    if manager.spending is not None and page.prices is not None:
        figures = await _costs(manager, manager.spending, page.prices, page.pace)
    return live(request, "costs", here="costs", found=figures, is_aws=served.capabilities.billed)


async def _costs(manager: Manager, spending: Spending, prices: PriceBook, pace: Pace) -> dict[str, object]:
    use = await grid.use(spending)
    types = {pool.name: pool.instance_type for pool in manager.pools.values()}
    living = {Kind(row["pool"], row["type"], Market(row["market"])): row["instances"] for row in use["living"]}
    total = api_usage_types.account_of(use["total"])
    recent = (await jobs.list_jobs(manager, limit=SHOWN_JOBS))["jobs"]
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
        "jobs": [
            {
                "job": view,
                "spent": text.amount(
                    job_bill(view, await grid.job_use(spending, manager, JobId(view["id"])), prices, pace=pace).usd
                ),
            }
            for view in recent
        ],
        "region": prices.region,
        "mismatch": prices.mismatch,
        "as_of": prices.blocks["on_demand"].date.isoformat(),
    }


CHECKED_JOBS = 200
"""Number of recent jobs that the page of failures checks."""
FAILURES_PER_PAGE = 50


@router.get("/failures")
async def failures_page(request: Request, manager: Leader, served: StateDep, page: PageDep) -> Response:
    """Show the jobs with failed tasks, and the depths of the dead-letter queues."""
    views = (await jobs.list_jobs(manager, limit=CHECKED_JOBS))["jobs"]
    grid_view = await page.grid(manager, served)
    return live(
        request,
        "failures",
        here="failures",
        jobs=[view for view in views if any(stage["failed"] for stage in view["stages"])],
        looked_at=len(views),
        dead=[queue for queue in grid_view["queues"] if queue["name"].endswith("-dead")],
    )


@router.get("/jobs/{job}/failures")
async def job_failures_page(request: Request, manager: Leader, served: StateDep, job: JobId) -> Response:
    """Show a job's failures by fingerprint."""
    view = await jobs.job(manager, job)
    return render(
        request,
        "job_failures.html",
        here="failures",
        job=view,
        found=await failures.failure_groups(manager, served, job),
        may_retry=view["state"] in ENDED - {"SUCCEEDED"},
    )


@router.get("/jobs/{job}/failures/{fingerprint}")
async def group_page(
    request: Request, manager: Leader, served: StateDep, job: JobId, fingerprint: str, after: str | None = None
) -> Response:
    """Show the tasks of one failure group, page by page."""
    view = await jobs.job(manager, job)
    groups = (await failures.failure_groups(manager, served, job))["groups"]
    page = await failures.failures(manager, served, job, limit=FAILURES_PER_PAGE, after=after, fingerprint=fingerprint)
    return render(
        request,
        "group.html",
        here="failures",
        job=view,
        fingerprint=fingerprint,
        group=next((group for group in groups if group["fingerprint"] == fingerprint), None),
        failures=page["failures"],
        next=page["next"],
        is_first=after is None,
        may_retry=view["state"] in ENDED - {"SUCCEEDED"},
    )


@router.get("/jobs/{job}/task")
async def to_task(
    request: Request, manager: Leader, job: JobId, stage: StageName, task: Annotated[int, Query(ge=0, le=2**53)]
) -> Response:
    """Redirect to the task that the form names."""
    await jobs.job(manager, job)
    return redirect(request, f"/jobs/{text.path(job)}/stages/{text.path(stage)}/tasks/{task}")


async def _read_some(
    request: Request, manager: Manager, served: ServerState, view: api_types.JobView
) -> Response | None:
    """Read a part of the job's bundles. A job with many bundles needs several requests after a start of the manager.

    Return None if all bundles are read, or else a page that shows the number of bundles, and that loads itself again.
    """
    read = await task_list.read_some(manager, served, JobId(view["id"]))
    if read is None:
        return None
    if is_part(request):
        return Response(status_code=204)  # the open page stays as it is until its next update
    return render(request, "reading.html", here="jobs", job=view, read=read)


@router.get("/jobs/{job}/stages/{stage}/tasks/{task}")
async def task_page(
    request: Request,
    manager: Leader,
    served: StateDep,
    job: JobId,
    stage: StageName,
    task: tasks.Index,
    seq: tasks.Seq = None,
) -> Response:
    """Show one task with its result, input, and log. The page of a task that has not ended shows its live log."""
    view = await jobs.job(manager, job)
    if (answer := await _read_some(request, manager, served, view)) is not None:
        return answer
    is_update = request.query_params.get("part") == "live"
    task_view = await tasks.read_task(manager, served, job, stage, task, seq, with_input=not is_update)
    last_seq = 0
    if task_view["attempt"] > 1 and seq is None:
        index = (await task_list.list_of(manager, served, job)).index
        last_seq = index.attempt_seq(stage, task, task_view["attempt"] - 1)
    return live(
        request,
        "task",
        here="failures" if task_view["failure"] else "jobs",
        is_over=task_view["seq"] > 0 or view["state"] in ENDED,
        job=view,
        task=task_view,
        last_seq=last_seq,
        now_s=manager.ports.clock.now_s(),
        every_s=manager.live_logs.every_s,
        may_retry=view["state"] in ENDED - {"SUCCEEDED"} and task_view["state"] == "failed",
        max_input_bytes=MAX_INPUT_BYTES,
    )


TASKS_PER_PAGE = 50
_TABS = (
    ("", "All"),
    ("waiting", "Waiting"),
    ("running", "Running"),
    ("succeeded", "Succeeded"),
    ("failed", "Failed"),
    ("cancelled", "Canceled"),
)


@router.get("/jobs/{job}/tasks")
async def tasks_page(
    request: Request,
    manager: Leader,
    served: StateDep,
    job: JobId,
    stage: str = "",
    state: TaskState | Literal[""] = "",
    search: task_list.SearchText = "",
    after: str = "",
) -> Response:
    """Show a page of the list of a job's tasks, which the user filters by state, stage, and a search text."""
    view = await jobs.job(manager, job)
    if (answer := await _read_some(request, manager, served, view)) is not None:
        return answer
    shown = [one for one in view["stages"] if stage in ("", one["name"])]
    page = await task_list.tasks(
        manager,
        served,
        job,
        stage=StageName(stage) if stage else None,
        state=TaskState(state) if state else None,
        search=search,
        after=after or None,
        limit=TASKS_PER_PAGE,
    )
    fields = {"state": state, "stage": stage, "search": search}
    progress = text.of_stages(shown)
    return live(
        request,
        "tasks",
        here="jobs",
        is_over=view["state"] in ENDED,
        job=view,
        stage=stage,
        state=state,
        search=search,
        rows=page["tasks"],
        now_s=manager.ports.clock.now_s(),
        tabs=[
            {"state": name, "name": label, "count": progress.of(name), "query": text.query(fields, state=name)}
            for name, label in _TABS
        ],
        first=text.query(fields) or "?" if after else "",
        next=text.query(fields, after=page["next"]) if page["next"] else "",
        csv=text.query(fields),
    )


@router.get("/jobs/{job}/tasks.csv")
async def tasks_csv(
    manager: Leader,
    served: StateDep,
    job: JobId,
    stage: str = "",
    state: TaskState | Literal[""] = "",
    search: task_list.SearchText = "",
) -> Response:
    """Return the tasks of a list as a CSV file."""
    chosen = StageName(stage) if stage else None
    return await downloads.tasks_csv(manager, served, job, chosen, TaskState(state) if state else None, search)


@router.get("/jobs/{job}/stages/{stage}/tasks/{task}/log")
async def task_log(
    manager: Leader, served: StateDep, job: JobId, stage: StageName, task: tasks.Index, seq: tasks.Seq = None
) -> Response:
    """Return the complete log of an ended task as a text file."""
    return await downloads.task_log(manager, served, job, stage, task, seq)


@router.get("/jobs/{job}/timeline")
async def timeline_page(request: Request, manager: Leader, served: StateDep, job: JobId) -> Response:
    """Show the bundles of a job by worker and time."""
    view = await jobs.job(manager, job)
    if (answer := await _read_some(request, manager, served, view)) is not None:
        return answer
    found = await task_list.timeline(manager, served, job)
    drawing = timeline.draw(found)
    over = view["state"] in ENDED
    return live(request, "timeline", here="jobs", is_over=over, job=view, drawing=drawing, start_s=found["start_s"])


SHOWN_ACTIVITIES = 20
SHOWN_SHARES = 50


@router.get("/grid")
async def grid_page(request: Request, manager: Leader, served: StateDep, page: PageDep, caller: CallerDep) -> Response:
    """Show the pools, instances, shares, and queues of the grid."""
    return live(
        request,
        "grid",
        here="grid",
        grid=await page.grid(manager, served),
        activities=(await grid.activities(manager, limit=SHOWN_ACTIVITIES))["activities"],
        fair_share=await _fair_share(manager) if permits(caller, RULES["GET", "/v1/shares"]) else None,
        now_s=manager.ports.clock.now_s(),
    )


async def _fair_share(manager: Manager) -> dict[str, object]:
    """Return the policy and at most SHOWN_SHARES shares: first those with work, and of those the most used.

    Users choose the identifiers of shares, so the page limits their number. `hidden` is the number of other shares.
    """
    view = await shares.list_shares(manager)

    def rank(one: api_usage_types.ShareView) -> tuple[bool, float, str]:
        return not (one["bundles"] or one["waiting_tasks"]), -one["use_s"], one["share"]

    shown = sorted(sorted(view["shares"], key=rank)[:SHOWN_SHARES], key=lambda one: (one["pool"], one["share"]))
    return {**view, "shares": shown, "hidden": len(view["shares"]) - len(shown)}


@router.get("/history.json")
async def history(manager: Leader, served: StateDep) -> Response:
    """Return the data of the curves on the page of the grid."""
    return JSONResponse(await grid.history(manager, served))


login_router = APIRouter()
"""Routes that do not check a form token, because a visitor gets a session only by signing in."""
session_router = guarded_router()

MAX_SECRET_CHARS = 200


@login_router.get("/login")
async def login_page(request: Request) -> Response:
    """Show the page that asks for the token.

    The fragment of the address may contain a one-time code, which `grid open` adds.
    """
    return render(request, "login.html", refused=False)


@login_router.post("/login")
async def log_in(request: Request, served: StateDep) -> Response:
    """Start a session for a visitor with the grid's token, the token of an active user, or a one-time code."""
    secret = field_of(await form_of(request), "word")
    key = served.sessions.sign_in(secret) if 0 < len(secret) <= MAX_SECRET_CHARS else None
    if key is None or await served.users.caller(key) is None:
        return render(request, "login.html", status=403, refused=True)
    session, value = served.sessions.start(key)
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


@session_router.post("/logout")
async def log_out(request: Request, served: StateDep) -> Response:
    """End the session. The cookie of an ended session is invalid in every browser."""
    session = request.scope[SESSION]
    place = served.sessions.place(session)
    served.sessions.close(session)
    answer = RedirectResponse(f"{PAGE}/login", 303)
    name = served.sessions.cookie(place)
    answer.delete_cookie(name, path=below(place), httponly=True, samesite="strict")
    return answer


login_router.include_router(session_router)
