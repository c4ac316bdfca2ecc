"""Endpoints of jobs: submission, state, control, deletion, and outcomes.

Invariant: the answer to a request shows the job after the request has taken effect. The ledger lists the outcomes, and
the endpoints read the outcomes from the bucket. A change of a job wakes the requests that wait for a change of the job.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

from fastapi import Body, Header, Request, Response
from pydantic import Base64Bytes, BaseModel, BeforeValidator, ConfigDict, Field
from starlette.types import Receive, Scope, Send

from batchlab.core import api_types
from batchlab.core.errors import Forbidden, UsageError
from batchlab.core.job_definition import JobDef, task_name
from batchlab.core.model import JobId, StageName, TaskSet
from batchlab.core.ports import BundleRecord
from batchlab.core.protocol import json_format, settlement
from batchlab.core.users import Role
from batchlab.manager.manager import Manager
from batchlab.server import job_facts, job_views
from batchlab.server.answers import (
    MAX_LISTED,
    accept,
    changed_view,
    current_view,
    jobs_page,
    outcomes_page,
    wait_for_change,
)
from batchlab.server.http.common import CallerDep, Leader, Limit, StateDep, Wait, guarded_router, without_version
from batchlab.server.http.failures import chosen_tasks
from batchlab.server.http.history import eta_of
from batchlab.server.http.permissions import store_record
from batchlab.server.wait_reasons import why


async def first_outcomes(manager: Manager, job: JobId, wait_s: float) -> api_types.OutcomesView:
    """Return the first outcomes of a new job as soon as workers have committed outcomes.

    The ledger may not have folded the first outcomes yet.
    """
    loop = asyncio.get_running_loop()
    end_s = loop.time() + wait_s
    if live := manager.lives.get(job):
        live.listeners += 1
        try:
            while not (live.first_outcomes or live.folds or live.record.state.ended or loop.time() >= end_s):
                await wait_for_change(live, live.version, end_s - loop.time())
            if live.first_outcomes and not live.folds:
                key = await manager.ports.keys.key_of(live.job)
                uncounted = [
                    (BundleRecord(outcome.bundle, settlement.completion(outcome), api_types.UNCOUNTED), outcome)
                    for outcome in live.first_outcomes
                ]
                views = [job_views.outcome_view(record, key, outcome) for record, outcome in uncounted]
                return {"outcomes": views, "ended": False}
        finally:
            live.listeners -= 1
            if not live.listeners:
                live.early_outcomes.clear()
    return await outcomes_page(manager, job, None, None, MAX_LISTED, end_s - loop.time())


submission_router = guarded_router()
"""Router of the endpoint that accepts jobs.

The application tries the submission router before all other routers, because the latency of short jobs depends on the
submission.
"""
router = guarded_router()

NDJSON = "application/x-ndjson"

PostedJob = Annotated[JobDef, BeforeValidator(without_version), Body(embed=True)]
Edge = Annotated[int, Field(ge=0, le=2**53)]
Range = tuple[Edge, Edge]
Items = Annotated[list[Any] | None, Body(embed=True)]


@submission_router.post(
    "/jobs",
    status_code=201,
    response_model=api_types.JobView,
    responses={200: {"model": api_types.JobView}, 201: {"content": {NDJSON: {}}}},
)
async def submit(
    manager: Leader,
    caller: CallerDep,
    job: PostedJob,
    response: Response,
    items: Items = None,
    is_sent: Annotated[bool, Body(embed=True)] = False,
    wait_s: Wait = 0.0,
    traceparent: Annotated[str, Header(max_length=200)] = "",
) -> Any:
    """Accept a job. The status is 201 for a new job. The status is 200 if a job with the same id or client token
    exists.

    A job without an input has its own items. The request contains the items if the job has few items, encoded as in a
    plan. The items of a larger job must be in the bucket. If the request has the parameter `wait_s`, the answer has two
    lines of JSON. The first line of the answer is the job, and the manager sends this line at once. The second line of
    the answer has the first outcomes, in the format of /outcomes. The manager sends the second line when outcomes
    exist. The seq of an outcome is 0 if the outcome is committed but not counted yet. The endpoint /outcomes lists an
    outcome with the seq 0 again after the outcome was counted. `is_sent` means that the client has committed the job
    with its only task and has sent the task's message, so the manager does not send the message. Only an administrator
    may send a request with `is_sent`. If the grid records traces, the W3C header `traceparent` names the parent of the
    job's trace. The manager sets the owner of the job to the user of the request.
    """
    if is_sent and not caller.role.includes(Role.ADMINISTER):
        raise Forbidden("Only an administrator may send a direct call.", remedy="Leave out `is_sent`.")
    written = await accept(manager, replace(job, trace=traceparent), items, caller, is_sent=is_sent)
    status = 201 if written.is_new else 200
    view = await current_view(manager, written.rows.id)
    if wait_s:
        job_id = JobId(view["id"])
        read_outcomes = partial(first_outcomes, manager, job_id, wait_s)
        if not written.is_new:
            read_outcomes = partial(outcomes_page, manager, job_id, None, None, MAX_LISTED, wait_s)
        return _JobAndOutcomes(view, read_outcomes, status)
    response.status_code = status
    return view


@router.post("/calls")
async def report_calls(
    manager: Leader, jobs: Annotated[list[JobId], Body(embed=True, max_length=10_000)]
) -> api_types.CallsView:
    """Report completed single calls that the manager did not receive as submissions.

    The manager adds the calls that the ledger lacks. The answer has the number of these calls.
    """
    return {"added": await manager.job_commands.add_calls(jobs)}


class _JobAndOutcomes(Response):
    """Response with the job, followed by the job's first outcomes.

    A StreamingResponse would start an asyncio task that detects a disconnected client, which takes 10% of the time of a
    short call. A _JobAndOutcomes response waits for the outcomes even if the client has disconnected.
    """

    media_type = NDJSON

    def __init__(
        self, view: api_types.JobView, read_outcomes: Callable[[], Awaitable[api_types.OutcomesView]], status: int
    ) -> None:
        super().__init__(_line(view), status)
        del self.headers["content-length"]
        self._read_outcomes = read_outcomes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        await send({"type": "http.response.body", "body": _line(await self._read_outcomes())})


def _line(view: api_types.JobView | api_types.OutcomesView) -> bytes:
    return json_format.dumps(view).encode() + b"\n"


@router.get("/jobs", name="jobs")
async def list_jobs(
    manager: Leader, limit: Limit = 100, before: str | None = None, active: bool = False
) -> api_types.JobsView:
    """Return a page of jobs, with the newest job first. `before` is the id of the last job of the previous page."""
    return await jobs_page(manager, limit, before, active=active)


@router.get("/jobs/{job}")
async def job(manager: Leader, job: JobId, version: int | None = None, wait_s: Wait = 0.0) -> api_types.JobView:
    """Return one job. With `version`, the manager waits until the job's version differs from `version`."""
    return await changed_view(manager, job, version, wait_s)


@router.post("/jobs/{job}/cancel")
async def cancel(manager: Leader, job: JobId) -> api_types.JobView:
    """Cancel a job. The manager answers the request when no further task of the job can start."""
    await manager.job_record(job)
    await manager.job_commands.cancel(job)
    return await current_view(manager, job)


@router.post("/jobs/{job}/pause")
async def pause(manager: Leader, job: JobId) -> api_types.JobView:
    """Pause a job. Running tasks of a paused job continue, but no further task starts."""
    await manager.job_record(job)
    await manager.job_commands.pause(job)
    return await current_view(manager, job)


@router.post("/jobs/{job}/resume")
async def resume(manager: Leader, job: JobId) -> api_types.JobView:
    """Resume a paused job."""
    await manager.ports.ledger.job(job)
    await manager.job_commands.resume(job)
    return await current_view(manager, job)


@router.delete("/jobs/{job}")
async def delete(manager: Leader, served: StateDep, job: JobId) -> api_types.DeletedView:
    """Delete an ended job: its input, logs, results, and reports in the bucket, and its rows in the ledger.

    The id of a deleted job cannot be used again. A repeated request deletes the objects that workers have written late.
    """
    objects = await manager.job_deletion.delete(job)
    served.groups.pop(job, None)
    return {"id": job, "objects": objects}


MAX_NEW_INPUTS = 100
"""Maximum number of new inputs in a request. The limit of the request's size also limits the new inputs."""


class NewInput(BaseModel):
    """New input of a failed task: the content of a file, or one JSON value in UTF-8. `data` is base64."""

    model_config = ConfigDict(extra="forbid")

    stage: StageName
    task: Annotated[int, Field(ge=0, le=2**40)]
    data: Base64Bytes


class Choice(BaseModel):
    """Selection of failed tasks to run again, by fingerprint, and by stage as ranges of tasks.

    A range of tasks includes its first task and excludes its end. The tasks in `inputs` are also selected, and run with
    a new input.
    """

    model_config = ConfigDict(extra="forbid")

    fingerprints: Annotated[list[str], Field(max_length=1000)] = []
    tasks: dict[StageName, Annotated[list[Range], Field(max_length=100_000)]] = {}
    inputs: Annotated[list[NewInput], Field(max_length=MAX_NEW_INPUTS)] = []


@router.post("/jobs/{job}/retry")
async def retry(
    manager: Leader, served: StateDep, request: Request, job: JobId, choice: Choice | None = None
) -> api_types.JobView:
    """Run all tasks of a job again that did not succeed.

    If the request selects failed tasks, run only the selected tasks and the canceled tasks again. A new input replaces
    the input of a failed task in this retry and in later retries.
    """
    chosen = None
    inputs = {(new.stage, new.task): new.data for new in choice.inputs} if choice else {}
    if choice and len(inputs) < len(choice.inputs):
        raise UsageError("The request has two new inputs for one task.", remedy="Give one new input for each task.")
    await store_record(request.scope, job, *map(_input_record, inputs.items()))
    if choice is not None and (choice.fingerprints or choice.tasks or not inputs):
        sets = {stage: TaskSet.union(TaskSet.span(*ends) for ends in ranges) for stage, ranges in choice.tasks.items()}
        chosen = await chosen_tasks(manager, served, job, choice.fingerprints, sets)
    await manager.job_commands.retry(job, chosen, inputs)
    return await current_view(manager, job)


def _input_record(new: tuple[tuple[StageName, int], bytes]) -> str:
    """Return the text of the audit record of a new input."""
    (stage, task), data = new
    return f"{task_name(stage, task)}: new input of {len(data)} bytes, SHA-256 {hashlib.sha256(data).hexdigest()}"


@router.get("/jobs/{job}/eta")
async def eta(manager: Leader, job: JobId) -> api_types.EtaView:
    """Return an estimate of the job's remaining time."""
    await manager.ports.ledger.job(job)
    return eta_of(manager, job)


@router.get("/jobs/{job}/why")
async def explain(manager: Leader, job: JobId) -> api_types.WhyView:
    """Explain in one line why the job has not progressed further."""
    return {"why": why(await job_facts.gather(manager, job))}


@router.get("/jobs/{job}/outcomes")
async def outcomes(
    manager: Leader,
    job: JobId,
    stage: StageName | None = None,
    after: int | None = None,
    limit: Limit = MAX_LISTED,
    wait_s: Wait = 0.0,
) -> api_types.OutcomesView:
    """Return outcomes with a seq above `after`, in the order of their seq.

    The manager waits up to `wait_s` seconds until at least one outcome exists.
    """
    return await outcomes_page(manager, job, stage, after, limit, wait_s)
