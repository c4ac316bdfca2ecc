"""Actions of the web page: each is one request of the API.

Invariant: an irreversible action needs a confirmation, which the server checks. A form without the
confirmation leads to the question. The submission accepts a job's folder, or its parts, from the
browser.
"""

from __future__ import annotations

import secrets

from fastapi import Request
from fastapi.responses import Response
from starlette.datastructures import FormData

from batchlab.core.errors import NotFound, UsageError
from batchlab.core.model import JobId, StageName
from batchlab.core.pricing import money
from batchlab.core.task_names import parse_tasks
from batchlab.server.http import grid as api_grid
from batchlab.server.http import jobs, spending
from batchlab.server.http.common import Books, Given, Leader
from batchlab.server.http.job_files import MOST_BYTES, MOST_FILES, submit_form
from batchlab.server.web import text as words
from batchlab.server.web.rendering import render
from batchlab.server.web.shared import Page, field_of, form_of, guarded, is_sure, to

router = guarded()

LARGEST = 100_000


def _job(job: str) -> str:
    return f"/jobs/{words.path(job)}"


# --- Jobs -----------------------------------------------------------------------------------------


@router.get("/jobs/{job}/cancel")
async def ask_cancel(request: Request, manager: Leader, job: JobId) -> Response:
    """Ask for a confirmation of the cancellation."""
    view = await jobs.job(manager, job)
    return render(request, "ask_cancel.html", here="jobs", job=view, progress=words.of_job(view))


@router.post("/jobs/{job}/cancel")
async def cancel(request: Request, manager: Leader, job: JobId) -> Response:
    """Cancel the job if the form contains the confirmation."""
    if not is_sure(await form_of(request)):
        return to(request, f"{_job(job)}/cancel")
    await jobs.cancel(manager, job)
    return to(request, _job(job))


@router.post("/jobs/{job}/pause")
async def pause(request: Request, manager: Leader, job: JobId) -> Response:
    """Pause the job."""
    await jobs.pause(manager, job)
    return to(request, _job(job))


@router.post("/jobs/{job}/resume")
async def resume(request: Request, manager: Leader, job: JobId) -> Response:
    """Resume the job."""
    await jobs.resume(manager, job)
    return to(request, _job(job))


@router.post("/jobs/{job}/retry")
async def retry(request: Request, manager: Leader, served: Given, job: JobId) -> Response:
    """Run tasks again: all that did not succeed, or the selected groups and tasks."""
    form = await form_of(request)
    choice = _choice(form) if field_of(form, "which") != "all" else None
    await jobs.retry(manager, served, job, choice)
    return to(request, _job(job))


def _choice(form: FormData) -> jobs.Choice:
    fingerprints = [one for one in form.getlist("fingerprint") if isinstance(one, str)]
    tasks: dict[StageName, list[tuple[int, int]]] = {}
    for one in form.getlist("task"):
        stage, ranges = parse_tasks(str(one))
        tasks.setdefault(stage, []).extend(ranges)
    if not fingerprints and not tasks:
        raise UsageError("Nothing was ticked.", remedy="Tick what to run again.")
    return jobs.Choice(fingerprints=fingerprints, tasks=tasks)


@router.get("/jobs/{job}/cap")
async def ask_cap(request: Request, manager: Leader, books: Books, job: JobId) -> Response:
    """Ask for the cost cap of the job."""
    use = await spending.job_use(books, manager, job)
    return render(
        request,
        "ask_cap.html",
        here="jobs",
        action=f"{_job(job)}/cap",
        back=_job(job),
        of=f"job {job}",
        cap=use["max_cost_usd"],
    )


@router.post("/jobs/{job}/cap")
async def cap(request: Request, manager: Leader, books: Books, job: JobId) -> Response:
    """Set the cost cap of the job."""
    await spending.cap_job(books, manager, job, _cap(await form_of(request)))
    return to(request, _job(job))


@router.get("/costs/cap")
async def ask_grid_cap(request: Request, books: Books) -> Response:
    """Ask for the cost cap of the grid."""
    use = await spending.use(books)
    return render(
        request,
        "ask_cap.html",
        here="costs",
        action="/costs/cap",
        back="/costs",
        of="the whole grid",
        cap=use["max_cost_usd"],
    )


@router.post("/costs/cap")
async def grid_cap(request: Request, manager: Leader, books: Books) -> Response:
    """Set the cost cap of the grid."""
    await spending.cap_grid(books, manager, _cap(await form_of(request)))
    return to(request, "/costs")


def _cap(form: FormData) -> spending.Cap:
    text = field_of(form, "amount")
    if not text:
        return spending.Cap(max_cost_usd=None)
    plain = text if text.upper().endswith(money.CURRENCY) else f"{text} {money.CURRENCY}"
    return spending.Cap(max_cost_usd=money.parse(plain))


# --- The grid -------------------------------------------------------------------------------------


@router.get("/grid/pools/{pool}")
async def ask_scale(
    request: Request, manager: Leader, served: Given, page: Page, pool: str
) -> Response:
    """Ask for the size of a pool."""
    grid = await page.grid(manager, served)
    for one in grid["pools"]:
        if one["name"] == pool:
            return render(request, "ask_scale.html", here="grid", pool=one)
    raise NotFound(f"There is no pool {pool!r}.", remedy="The grid's view lists those there are.")


@router.post("/grid/pools/{pool}")
async def scale(request: Request, manager: Leader, pool: str) -> Response:
    """Set the limits of a pool, and whether its capacity is set manually or by the autoscaler."""
    form = await form_of(request)
    by_hand = field_of(form, "by") == "hand"
    scaling = api_grid.Scaling(
        min=_number(form, "min"),
        max=_number(form, "max"),
        desired=_number(form, "desired") if by_hand else None,
        auto=None if by_hand else True,
    )
    await api_grid.scale(manager, pool, scaling)
    return to(request, "/grid")


def _number(form: FormData, name: str) -> int | None:
    text = field_of(form, name)
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and int(text[:9]) <= LARGEST and len(text) < 9):
        raise UsageError(
            f"{text[:40]!r} is no number of instances.", remedy=f"Write one up to {LARGEST:,}."
        )
    return int(text)


@router.get("/grid/drain")
async def ask_drain(
    request: Request, manager: Leader, served: Given, page: Page, pool: str | None = None
) -> Response:
    """Ask for a confirmation of the drain."""
    grid = await page.grid(manager, served)
    pools = [one for one in grid["pools"] if pool in (None, one["name"])]
    return render(request, "ask_drain.html", here="grid", pools=pools, pool=pool)


@router.post("/grid/drain")
async def drain(request: Request, manager: Leader, served: Given) -> Response:
    """Drain one pool or all pools if the form contains the confirmation."""
    form = await form_of(request)
    pool = field_of(form, "pool") or None
    if not is_sure(form):
        return to(request, f"/grid/drain?pool={words.path(pool)}" if pool else "/grid/drain")
    await api_grid.drain(manager, api_grid.Draining(pool=pool), served)
    return to(request, "/grid")


@router.get("/submit")
async def submit_page(request: Request) -> Response:
    """Show the submission form. It contains a client token, so a repeated submission creates only
    one job."""
    return render(
        request,
        "submit.html",
        here="submit",
        client_token=secrets.token_urlsafe(16),
        most_gib=MOST_BYTES // 2**30,
        most_files=MOST_FILES,
    )


@router.post("/submit")
async def submit(request: Request, manager: Leader) -> Response:
    """Submit the job in the form, and redirect to it."""
    form = await form_of(request)
    try:
        view = await submit_form(manager, form)
    finally:
        await form.close()
    return to(request, f"/jobs/{words.path(view['id'])}")
