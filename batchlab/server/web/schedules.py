"""Pages of schedules: the list, one schedule with its runs, and the actions on it."""

from __future__ import annotations

import secrets

from fastapi import Request
from fastapi.responses import Response
from pydantic import ValidationError

from batchlab.core import api_usage_types
from batchlab.core.errors import UsageError
from batchlab.core.schedules import due_times
from batchlab.server.http import schedules as api
from batchlab.server.http.common import Leader, Timetable
from batchlab.server.web import text
from batchlab.server.web.rendering import live, render
from batchlab.server.web.shared import field_of, form_of, guarded, is_sure, to

router = guarded()

COMING = 5


@router.get("/schedules")
async def schedules(request: Request, manager: Leader) -> Response:
    """Show all schedules, each with its last run."""
    found: api_usage_types.SchedulesView | None = None
    if manager.scheduler is not None:
        found = await api.list_schedules(manager.scheduler)
    return live(request, "schedules", here="schedules", found=found, shown=_shown)


@router.get("/schedules/{name}")
async def schedule(request: Request, manager: Leader, schedules: Timetable, name: str) -> Response:
    """Show one schedule with its runs and its next due times."""
    view = await api.schedule(schedules, name)
    coming = await api.coming(schedules, manager, name, COMING)
    return live(
        request,
        "schedule",
        here="schedules",
        schedule=view,
        coming=coming["times"],
        shown=_shown,
        ask_token=secrets.token_urlsafe(16),
    )


def _shown(view: api_usage_types.ScheduleView, at_s: float) -> str:
    """Return a time in the schedule's own time zone, as the command line writes it."""
    return due_times.shown(at_s, due_times.zone_of(view["timezone"]))


@router.post("/schedules/{name}/pause")
async def pause(request: Request, schedules: Timetable, name: str) -> Response:
    """Pause the schedule."""
    await api.pause_schedule(schedules, name)
    return to(request, _path(name))


@router.post("/schedules/{name}/resume")
async def resume(request: Request, schedules: Timetable, name: str) -> Response:
    """Resume the schedule."""
    await api.resume_schedule(schedules, name)
    return to(request, _path(name))


@router.post("/schedules/{name}/run")
async def run(request: Request, schedules: Timetable, name: str) -> Response:
    """Run the job of the schedule now. The form contains a token, so a repeated submission is the
    same run."""
    token = field_of(await form_of(request), "token") or secrets.token_urlsafe(16)
    try:
        asking = api.Asking(token=token)
    except ValidationError as error:
        raise UsageError("The form is none of this page's.", remedy="Load it anew.") from error
    await api.run_schedule(schedules, name, asking)
    return to(request, _path(name))


@router.get("/schedules/{name}/remove")
async def ask_remove(request: Request, schedules: Timetable, name: str) -> Response:
    """Ask for a confirmation of the removal."""
    view = await api.schedule(schedules, name)
    return render(request, "ask_remove.html", here="schedules", schedule=view)


@router.post("/schedules/{name}/remove")
async def remove(request: Request, schedules: Timetable, name: str) -> Response:
    """Remove the schedule if the form contains the confirmation."""
    if not is_sure(await form_of(request)):
        return to(request, f"{_path(name)}/remove")
    await api.remove_schedule(schedules, name)
    return to(request, "/schedules")


def _path(name: str) -> str:
    return f"/schedules/{text.path(name)}"
