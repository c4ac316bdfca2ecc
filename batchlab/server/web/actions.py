"""Actions of the web page on jobs, the grid, and schedules, and the pages of schedules.

Invariant: an action of the web page calls one endpoint of the API. An irreversible action needs a confirmation, which
the server checks. A form without the necessary confirmation leads to a page that asks for the confirmation.
"""

from __future__ import annotations

import secrets

from fastapi import Request
from fastapi.responses import Response
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile

from batchlab.core import api_usage_types, due_times
from batchlab.core.errors import NotFound, UsageError
from batchlab.core.job_definition import parse_task, parse_tasks
from batchlab.core.model import JobId, StageName
from batchlab.core.pricing import price_book
from batchlab.server.http import grid, jobs, schedules
from batchlab.server.http.common import CallerDep, Leader, SchedulesDep, SpendingDep, StateDep
from batchlab.server.http.job_files import MAX_BYTES, MAX_FILES, submit_form
from batchlab.server.web import text
from batchlab.server.web.rendering import (
    PageDep,
    field_of,
    form_of,
    guarded_router,
    is_confirmed,
    live,
    redirect,
    render,
)

router = guarded_router()

MAX_INSTANCES = 100_000


def _job(job: str) -> str:
    return f"/jobs/{text.path(job)}"


# --- Jobs -----------------------------------------------------------------------------------------


@router.get("/jobs/{job}/cancel")
async def ask_cancel(request: Request, manager: Leader, job: JobId) -> Response:
    """Ask for a confirmation of the cancellation of the job."""
    view = await jobs.job(manager, job)
    return render(request, "ask_cancel.html", here="jobs", job=view, progress=text.of_job(view))


@router.post("/jobs/{job}/cancel")
async def cancel(request: Request, manager: Leader, job: JobId) -> Response:
    """Cancel the job if the form contains the confirmation."""
    if not is_confirmed(await form_of(request)):
        return redirect(request, f"{_job(job)}/cancel")
    await jobs.cancel(manager, job)
    return redirect(request, _job(job))


@router.post("/jobs/{job}/pause")
async def pause(request: Request, manager: Leader, job: JobId) -> Response:
    """Pause the job."""
    await jobs.pause(manager, job)
    return redirect(request, _job(job))


@router.post("/jobs/{job}/resume")
async def resume(request: Request, manager: Leader, job: JobId) -> Response:
    """Resume the job."""
    await jobs.resume(manager, job)
    return redirect(request, _job(job))


@router.post("/jobs/{job}/retry")
async def retry(request: Request, manager: Leader, served: StateDep, caller: CallerDep, job: JobId) -> Response:
    """Run the selected failure groups and tasks again, or one task with the uploaded file as its new input. If the
    form does not have a selection, run all tasks that did not succeed.
    """
    form = await form_of(request)
    try:
        choice = None
        if "input" in form:
            choice = await _new_input(form)
        elif field_of(form, "which") != "all":
            choice = _choice(form)
    finally:
        await form.close()
    await jobs.retry(manager, served, caller, job, choice)
    return redirect(request, _job(job))


async def _new_input(form: FormData) -> jobs.Choice:
    """Return the choice of the form's task, whose new input is the uploaded file."""
    file = form["input"]
    # A browser sends an empty file without a name if the user did not select a file.
    if not isinstance(file, UploadFile) or not (file.filename or file.size):
        raise UsageError("No file with the new input is selected.", remedy="Select the file with the corrected input.")
    stage, task = parse_task(field_of(form, "task"))
    if stage is None or len(form.getlist("task")) > 1:
        raise UsageError("A new input is for one task of a stage.", remedy="Open the page of the failed task again.")
    # The file is not text in base64, so the model must not decode it.
    new = jobs.NewInput.model_construct(stage=stage, task=task, data=await file.read())
    return jobs.Choice(inputs=[new])


def _choice(form: FormData) -> jobs.Choice:
    fingerprints = [value for value in form.getlist("fingerprint") if isinstance(value, str)]
    tasks: dict[StageName, list[tuple[int, int]]] = {}
    for value in form.getlist("task"):
        stage, ranges = parse_tasks(str(value))
        tasks.setdefault(stage, []).extend(ranges)
    if not fingerprints and not tasks:
        raise UsageError("No cause and no task is selected.", remedy="Select the causes or tasks to run again.")
    return jobs.Choice(fingerprints=fingerprints, tasks=tasks)


@router.get("/jobs/{job}/cap")
async def ask_cap(request: Request, manager: Leader, spending: SpendingDep, job: JobId) -> Response:
    """Ask for the cost cap of the job."""
    use = await grid.job_use(spending, manager, job)
    return render(
        request,
        "ask_cap.html",
        here="jobs",
        action=f"{_job(job)}/cap",
        back=_job(job),
        of=f"job {job}",
        cap=text.entered(use["max_cost_usd"]),
    )


@router.post("/jobs/{job}/cap")
async def cap(request: Request, manager: Leader, spending: SpendingDep, job: JobId) -> Response:
    """Set the cost cap of the job."""
    await grid.cap_job(spending, manager, job, _cap(await form_of(request)))
    return redirect(request, _job(job))


@router.get("/costs/cap")
async def ask_grid_cap(request: Request, spending: SpendingDep) -> Response:
    """Ask for the cost cap of the grid."""
    use = await grid.use(spending)
    return render(
        request,
        "ask_cap.html",
        here="costs",
        action="/costs/cap",
        back="/costs",
        of="the whole grid",
        cap=text.entered(use["max_cost_usd"]),
    )


@router.post("/costs/cap")
async def grid_cap(request: Request, manager: Leader, spending: SpendingDep) -> Response:
    """Set the cost cap of the grid."""
    await grid.cap_grid(spending, manager, _cap(await form_of(request)))
    return redirect(request, "/costs")


def _cap(form: FormData) -> grid.Cap:
    value = field_of(form, "amount")
    if not value:
        return grid.Cap(max_cost_usd=None)
    plain = value if value.upper().endswith(price_book.CURRENCY) else f"{value} {price_book.CURRENCY}"
    return grid.Cap(max_cost_usd=price_book.parse(plain))


# --- The grid -------------------------------------------------------------------------------------


@router.get("/grid/pools/{pool}")
async def ask_scale(request: Request, manager: Leader, served: StateDep, page: PageDep, pool: str) -> Response:
    """Ask for the size of a pool."""
    view = await page.grid(manager, served)
    for pool_view in view["pools"]:
        if pool_view["name"] == pool:
            return render(request, "ask_scale.html", here="grid", pool=pool_view)
    raise NotFound(f"The pool {pool!r} does not exist.", remedy="The page Grid lists the pools.")


@router.post("/grid/pools/{pool}")
async def scale(request: Request, manager: Leader, pool: str) -> Response:
    """Set the limits of a pool, and select whether the autoscaler or the user sets the pool's capacity."""
    form = await form_of(request)
    by_hand = field_of(form, "by") == "hand"
    scaling = grid.Scaling(
        min=_number(form, "min"),
        max=_number(form, "max"),
        desired=_number(form, "desired") if by_hand else None,
        auto=None if by_hand else True,
    )
    await grid.scale(manager, pool, scaling)
    return redirect(request, "/grid")


def _number(form: FormData, name: str) -> int | None:
    value = field_of(form, name)
    if not value:
        return None
    if not (value.isascii() and value.isdigit() and int(value[:9]) <= MAX_INSTANCES and len(value) < 9):
        raise UsageError(
            f"{value[:40]!r} is not a number of instances.", remedy=f"Write a number from 0 to {MAX_INSTANCES:,}."
        )
    return int(value)


@router.get("/grid/drain")
async def ask_drain(
    request: Request, manager: Leader, served: StateDep, page: PageDep, pool: str | None = None
) -> Response:
    """Ask for a confirmation of the drain of pools."""
    view = await page.grid(manager, served)
    pools = [pool_view for pool_view in view["pools"] if pool in (None, pool_view["name"])]
    return render(request, "ask_drain.html", here="grid", pools=pools, pool=pool)


@router.post("/grid/drain")
async def drain(request: Request, manager: Leader, served: StateDep) -> Response:
    """Drain one pool or all pools if the form contains the confirmation."""
    form = await form_of(request)
    pool = field_of(form, "pool") or None
    if not is_confirmed(form):
        return redirect(request, f"/grid/drain?pool={text.path(pool)}" if pool else "/grid/drain")
    await grid.drain(manager, grid.Draining(pool=pool), served)
    return redirect(request, "/grid")


@router.get("/submit")
async def submit_page(request: Request) -> Response:
    """Show the submission form.

    The form contains a client token, so a repeated submission of the form creates only one job.
    """
    return render(
        request,
        "submit.html",
        here="submit",
        client_token=secrets.token_urlsafe(16),
        most_gib=MAX_BYTES // 2**30,
        most_files=MAX_FILES,
    )


@router.post("/submit")
async def submit(request: Request, manager: Leader, caller: CallerDep) -> Response:
    """Submit the job in the form, and redirect to the page of the job."""
    form = await form_of(request)
    try:
        view = await submit_form(manager, form, caller)
    finally:
        await form.close()
    return redirect(request, f"/jobs/{text.path(view['id'])}")


SHOWN_DUE_TIMES = 5


@router.get("/schedules")
async def schedules_page(request: Request, manager: Leader) -> Response:
    """Show all schedules, each with its last run."""
    view = await schedules.list_schedules(manager.scheduler) if manager.scheduler is not None else None
    return live(request, "schedules", here="schedules", found=view, shown=_format_form_value)


@router.get("/schedules/{name}")
async def schedule_page(request: Request, manager: Leader, scheduler: SchedulesDep, name: str) -> Response:
    """Show one schedule with its runs and its next due times."""
    view = await schedules.schedule(scheduler, name)
    coming = await schedules.coming(scheduler, manager, name, SHOWN_DUE_TIMES)
    return live(
        request,
        "schedule",
        here="schedules",
        schedule=view,
        coming=coming["times"],
        shown=_format_form_value,
        ask_token=secrets.token_urlsafe(16),
    )


def _format_form_value(view: api_usage_types.ScheduleView, at_s: float) -> str:
    """Return a time in the time zone of the schedule, in the format of the command line."""
    return due_times.text_of_time(at_s, due_times.zone_of(view["timezone"]))


@router.post("/schedules/{name}/pause")
async def pause_schedule(request: Request, scheduler: SchedulesDep, name: str) -> Response:
    """Pause the schedule."""
    await schedules.pause_schedule(scheduler, name)
    return redirect(request, _schedule(name))


@router.post("/schedules/{name}/resume")
async def resume_schedule(request: Request, scheduler: SchedulesDep, name: str) -> Response:
    """Resume the schedule."""
    await schedules.resume_schedule(scheduler, name)
    return redirect(request, _schedule(name))


@router.post("/schedules/{name}/run")
async def run(request: Request, scheduler: SchedulesDep, name: str) -> Response:
    """Run the job of the schedule now.

    The form contains a token, so a repeated submission of the form starts only one run.
    """
    token = field_of(await form_of(request), "token") or secrets.token_urlsafe(16)
    try:
        asking = schedules.Asking(token=token)
    except ValidationError as error:
        raise UsageError(
            "The form has an invalid token.", remedy="Reload the page, and send the form again."
        ) from error
    await schedules.run_schedule(scheduler, name, asking)
    return redirect(request, _schedule(name))


@router.get("/schedules/{name}/remove")
async def ask_remove(request: Request, scheduler: SchedulesDep, name: str) -> Response:
    """Ask for a confirmation of the removal of the schedule."""
    view = await schedules.schedule(scheduler, name)
    return render(request, "ask_remove.html", here="schedules", schedule=view)


@router.post("/schedules/{name}/remove")
async def remove(request: Request, scheduler: SchedulesDep, name: str) -> Response:
    """Remove the schedule if the form contains the confirmation."""
    if not is_confirmed(await form_of(request)):
        return redirect(request, f"{_schedule(name)}/remove")
    await schedules.remove_schedule(scheduler, name)
    return redirect(request, "/schedules")


def _schedule(name: str) -> str:
    return f"/schedules/{text.path(name)}"
