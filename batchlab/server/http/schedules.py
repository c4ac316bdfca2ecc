"""Endpoints that add, list, pause, resume, run, and remove schedules.

Invariant: the answer to a request shows the schedule as changed by the request.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from fastapi import Query, Request, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from batchlab.core import api_usage_types
from batchlab.core.errors import UsageError
from batchlab.core.job_definition import MAX_DEPENDENCIES, JobDef
from batchlab.core.schedules import Definition, Missed, Overlap, Schedule, When
from batchlab.manager.schedule_commands import ScheduleCommands
from batchlab.server.http.common import CallerDep, Leader, SchedulesDep, guarded_router, without_version
from batchlab.server.http.permissions import store_record

router = guarded_router()

MAX_TIME_S = 253_000_000_000
"""Latest allowed time of a schedule in epoch seconds. The time is in the year 9987, because Python's calendar ends in
the year 9999.
"""
MAX_MISSED_WITHIN_S = 10 * 366 * 86_400.0
MAX_PREWARM_S = 86_400.0
MAX_DUE_TIMES = 1000

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=40)]


class Timed(BaseModel):
    """Due times of a schedule, and policies for missed and overlapping runs.

    Durations of a schedule are in seconds, and `at_s` is in epoch seconds. A schedule has either `at_s` or `cron`.
    """

    model_config = ConfigDict(extra="forbid")

    name: Name
    cron: Annotated[str, Field(max_length=200)] = ""
    timezone: Annotated[str, Field(max_length=60)] = "UTC"
    at_s: Annotated[float | None, Field(ge=0, le=MAX_TIME_S, allow_inf_nan=False)] = None
    missed: Missed = Missed.RUN_ONCE
    missed_within_s: Annotated[float | None, Field(ge=0, le=MAX_MISSED_WITHIN_S)] = None
    overlap: Overlap = Overlap.SKIP
    prewarm_s: Annotated[float, Field(ge=0, le=MAX_PREWARM_S)] = 0.0
    capacity: Annotated[int | None, Field(ge=1, le=99_999)] = None
    due_param: Annotated[str, Field(max_length=200)] = ""
    after: Annotated[tuple[Annotated[str, Field(max_length=60)], ...], Field(max_length=MAX_DEPENDENCIES)] = ()
    source: Annotated[str, Field(max_length=4096)] = ""
    source_digest: Annotated[str, Field(max_length=100)] = ""


class Adding(BaseModel):
    """A schedule and its job. With `replace`, the new schedule replaces an existing schedule with the same name."""

    model_config = ConfigDict(extra="forbid")

    schedule: Timed
    job: Annotated[JobDef, BeforeValidator(without_version)]
    replace: bool = False


class Asking(BaseModel):
    """Request to run a schedule. Repeated requests to run a schedule with the same `token` return the same run."""

    model_config = ConfigDict(extra="forbid")

    token: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", max_length=64)]


@router.post("/schedules", status_code=201)
async def add_schedule(
    schedules: SchedulesDep, caller: CallerDep, request: Request, adding: Adding, response: Response
) -> api_usage_types.ScheduleView:
    """Add a schedule. The jobs of its runs belong to the user of the request.

    The status is 201 if the schedule is new or changed, and 200 if an equal schedule already exists.
    """
    timed = adding.schedule
    if bool(timed.cron) == (timed.at_s is not None):
        raise UsageError(
            "A schedule needs either a cron expression or a time.",
            remedy="Set either `cron` (--cron) or `at_s` (--at).",
        )
    when = When(" ".join(timed.cron.split()), timed.timezone, timed.at_s)
    policies = timed.model_dump(exclude={"name", "cron", "timezone", "at_s"})
    definition = Definition(timed.name, adding.job.name, when, template="", **policies)
    job = replace(adding.job, owner=caller.as_owner)
    await store_record(request.scope, timed.name)
    schedule, is_new = await schedules.add(definition, job, replacing=adding.replace)
    response.status_code = 201 if is_new else 200
    return await _view(schedules, schedule)


@router.get("/schedules")
async def list_schedules(schedules: SchedulesDep) -> api_usage_types.SchedulesView:
    """Return all schedules by name, each with its last run."""
    views = [api_usage_types.schedule_view(schedule, runs=1) for schedule in await schedules.all()]
    return {"schedules": views, "notes": schedules.notes}


@router.get("/schedules/{name}")
async def schedule(schedules: SchedulesDep, name: str) -> api_usage_types.ScheduleView:
    """Return one schedule with its runs."""
    return await _view(schedules, await schedules.get(name))


@router.get("/schedules/{name}/next")
async def coming(
    schedules: SchedulesDep, manager: Leader, name: str, count: Annotated[int, Query(ge=1, le=MAX_DUE_TIMES)] = 10
) -> api_usage_types.ComingView:
    """Return the next due times of a schedule."""
    schedule = await schedules.get(name)
    return {"times": api_usage_types.coming(schedule, manager.ports.clock.now_s(), count)}


@router.post("/schedules/{name}/pause")
async def pause_schedule(schedules: SchedulesDep, name: str) -> api_usage_types.ScheduleView:
    """Pause a schedule. Due times during the pause do not start a run."""
    return await _view(schedules, await schedules.pause(name))


@router.post("/schedules/{name}/resume")
async def resume_schedule(schedules: SchedulesDep, name: str) -> api_usage_types.ScheduleView:
    """Resume a schedule. A resumed schedule runs at its next due time."""
    return await _view(schedules, await schedules.resume(name))


@router.post("/schedules/{name}/remove")
async def remove_schedule(schedules: SchedulesDep, name: str) -> api_usage_types.ScheduleView:
    """Remove a schedule. A running job of the schedule continues."""
    return await _view(schedules, await schedules.remove(name))


@router.post("/schedules/{name}/run")
async def run_schedule(schedules: SchedulesDep, name: str, asking: Asking) -> api_usage_types.RunView:
    """Run the job of a schedule now, in addition to its due times."""
    return api_usage_types.run_view(*await schedules.run_now(name, asking.token))


async def _view(schedules: ScheduleCommands, schedule: Schedule) -> api_usage_types.ScheduleView:
    prefixes = await schedules.prefixes(schedule)
    return api_usage_types.schedule_view(schedule, runs=len(schedule.runs) or 1, input=prefixes)
