"""Shared parts of the endpoints: authorization, dependencies, errors, groups of failures, and reads of outcomes.

Invariant: every error becomes a status, a sentence, and a remedy.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, cast

from fastapi import APIRouter, Depends, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from typing_extensions import is_typeddict

from batchlab.core import api_types
from batchlab.core.api_types import FailureView
from batchlab.core.capabilities import Capabilities
from batchlab.core.commit import committed
from batchlab.core.errors import BackendError, BatchlabError, JobFileError, Refused, Unauthorized, status_of
from batchlab.core.model import JobId, Outcome
from batchlab.core.port_retries import set_within
from batchlab.core.ports import BundleRecord
from batchlab.core.protocol import json_format
from batchlab.core.users import Caller
from batchlab.manager.manager import Manager
from batchlab.manager.notifier import Notifier
from batchlab.manager.schedule_commands import ScheduleCommands
from batchlab.manager.spending import Spending
from batchlab.manager.user_directory import UserDirectory
from batchlab.server.answers import LEADER_WAIT_S as LEADER_WAIT_S
from batchlab.server.answers import MAX_LISTED, MAX_WAIT_S
from batchlab.server.http.authentication import SAFE_METHODS, Sessions
from batchlab.server.http.history import History
from batchlab.server.http.permissions import RULES, authorize, caller_of, note_outcome, record_change
from batchlab.server.task_index import TaskIndex

Cause = tuple[str, str]
"""Stage and fingerprint of a failure group."""

MAX_CAUSES = 500
"""Maximum number of failure groups of a job. All failures with further causes form one group for each stage."""
OTHERS = "others"
"""Fingerprint of the failure group with all causes beyond MAX_CAUSES."""


@dataclass(slots=True)
class Groups:
    """Failures of one round, grouped by cause: the tasks of each group, and the first failure of each group.

    `seq` is the seq of the last outcome that was read. If a failure is added to a group twice, the second addition does
    not have an effect.
    """

    round: int
    seq: int = 0
    tasks: dict[Cause, set[int]] = field(default_factory=dict)
    first: dict[Cause, FailureView] = field(default_factory=dict)

    @property
    def others(self) -> Mapping[str, set[int]]:
        """Return the tasks of all causes beyond MAX_CAUSES, by stage."""
        return {stage: tasks for (stage, cause), tasks in self.tasks.items() if cause == OTHERS}

    def add(self, failure: FailureView) -> None:
        cause = failure["stage"], failure["fingerprint"]
        if cause not in self.first and len(self.first) >= MAX_CAUSES:
            cause = failure["stage"], OTHERS
            reason = f"other causes, the first: {failure['reason'] or failure['error']}"
            failure = {**failure, "fingerprint": OTHERS, "reason": reason}
        self.tasks.setdefault(cause, set()).add(failure["task"])
        self.first.setdefault(cause, failure)


# Each view defers its validator, which Pydantic then builds on first use. Building the validators of all views at once
# took 4% of a manager's start-up time.
for _view in vars(api_types).values():
    if is_typeddict(_view):
        _view.__pydantic_config__ = ConfigDict(defer_build=True)

MAX_ERROR_CHARS = 10_000
MAX_MISTAKES = 10
"""Number of mistakes in a job file that an error lists after the first mistake."""


_FULL_MANAGER = "Use a manager that `batchlab grid up` starts."


@dataclass(slots=True)
class ServerState:
    """Arguments of `create_app`, and the state that all endpoints share."""

    manager: Manager
    """Manager object that currently serves the API.

    After a loss of the lease, a new manager object replaces the old manager object.
    """
    token: str
    backend_name: str
    capabilities: Capabilities
    on_shutdown: Callable[[], None]
    sessions: Sessions
    users: UserDirectory
    hosts: frozenset[str]
    """Host names by which a request without the token may address the manager."""
    groups: dict[JobId, Groups] = field(default_factory=dict)
    """Failure groups of the most recently requested jobs."""
    indexes: dict[JobId, tuple[int, TaskIndex]] = field(default_factory=dict)
    """Round and task index of the most recently requested jobs."""
    history: History = field(default_factory=History)
    archiving: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Lock that an endpoint holds while the endpoint creates or sends an archive of results."""


# All dependencies are coroutines, because FastAPI runs a plain function on a thread, which takes longer. Each
# dependency uses only the request and not another dependency, because each nested dependency takes 1% of the time of a
# short call.
async def _state(request: Request) -> ServerState:
    return cast(ServerState, request.app.state.served)


StateDep = Annotated[ServerState, Depends(_state)]
_bearer = HTTPBearer(auto_error=False)


async def require_role(
    request: Request,
    sent: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],  # noqa: ARG001 - for /openapi.json
) -> None:
    """Raise an error unless the sender of the request is authenticated and has the role that the route needs."""
    caller = caller_of(request.scope)
    if caller is None:
        raise Unauthorized(
            "The bearer token is missing or wrong.",
            remedy="Send `Authorization: Bearer TOKEN` with the token in the grid's folder, or with a user's token.",
        )
    manager = (await _state(request)).manager
    route = request.method, request.scope["route"].path
    rule = await authorize(manager, caller, RULES, route, request.path_params)
    await record_change(manager, request.scope, rule, request.path_params)


async def _caller(request: Request) -> Caller:
    caller = caller_of(request.scope)
    assert caller, "a route without authentication does not have a caller"
    return caller


CallerDep = Annotated[Caller, Depends(_caller)]


async def _leader(request: Request) -> Manager:
    manager = (await _state(request)).manager
    if not manager.is_leader.is_set():
        # The request waits, because a manager that has just started is about to become the leader.
        await set_within(manager.is_leader, LEADER_WAIT_S)
    if not manager.is_leader.is_set():
        raise BackendError(
            "This manager is not the leader.", remedy="Try again in some seconds, or send the request to the leader."
        )
    return manager


async def _spending(manager: Annotated[Manager, Depends(_leader)]) -> Spending:
    if manager.spending is None:
        raise Refused("This manager does not record the usage of its grid.", remedy=_FULL_MANAGER)
    return manager.spending


async def _scheduler(manager: Annotated[Manager, Depends(_leader)]) -> ScheduleCommands:
    if manager.scheduler is None:
        raise Refused("This manager does not run schedules.", remedy=_FULL_MANAGER)
    return manager.scheduler


async def _notifier(manager: Annotated[Manager, Depends(_leader)]) -> Notifier:
    if manager.notifier is None:
        raise Refused("This manager does not send notifications.", remedy=_FULL_MANAGER)
    return manager.notifier


SpendingDep = Annotated[Spending, Depends(_spending)]
Leader = Annotated[Manager, Depends(_leader)]
NotifierDep = Annotated[Notifier, Depends(_notifier)]
SchedulesDep = Annotated[ScheduleCommands, Depends(_scheduler)]
Limit = Annotated[int, Query(ge=1, le=MAX_LISTED)]
Wait = Annotated[float, Query(ge=0, le=MAX_WAIT_S, description="Maximum waiting time of the long poll in seconds")]

# Only the response with status 422 has the model of an error. All other error responses refer to the schema of the
# model. FastAPI creates a validator for every model of every endpoint. Validators for the models of all error responses
# took 10% of a manager's start-up time.
_PROBLEM = {"schema": {"$ref": f"#/components/schemas/{api_types.ProblemView.__name__}"}}
_PROBLEMS: dict[int | str, dict[str, Any]] = {422: {"model": api_types.ProblemView}}
for _code in (400, 401, 403, 404, 409, 413, 503):
    _PROBLEMS[_code] = {"content": {"application/json": _PROBLEM}}


def guarded_router() -> APIRouter:
    """Return a new router whose endpoints require a token, and the role in `permissions.RULES`."""
    return APIRouter(prefix="/v1", dependencies=[Depends(require_role)], responses=_PROBLEMS)


def without_version(doc: Any) -> Any:
    """Return the document of a posted job without its format version. Raise ValueError if the manager does not support
    the format version.
    """
    if not isinstance(doc, dict):
        return doc
    if doc.get("v") != json_format.VERSION:
        raise ValueError(f"this manager reads jobs of version {json_format.VERSION}, not {doc.get('v')!r:.40}")
    return {key: value for key, value in doc.items() if key != "v"}


class OutcomeRecorder:
    """ASGI middleware that notes the outcome of each permitted change in the audit log."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in SAFE_METHODS:
            await self._app(scope, receive, send)
            return

        async def send_noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                note_outcome(scope, message["status"])
            await send(message)

        await self._app(scope, receive, send_noted)


def change_text(changes: BaseModel, *without: str) -> str:
    """Return the values of a change, except the fields `without`, as the reason of the change's audit record."""
    values = changes.model_dump(exclude={*without}, exclude_none=True)
    return ", ".join(f"{name} {json_format.dumps(value)}" for name, value in values.items())


# --- Errors --------------------------------------------------------------------------------------


def error_response(request: Request, error: Exception) -> JSONResponse:
    """Return the HTTP response for an error: a status, a sentence, and a remedy."""
    status, problem = problem_of(request, error)
    return JSONResponse(problem, status, {"WWW-Authenticate": "Bearer"} if status == 401 else None)


def problem_of(request: Request, error: Exception) -> tuple[int, api_types.ProblemView]:
    """Return the status and the description of an error.

    The description may contain text of the request, so the function cuts the description to MAX_ERROR_CHARS. A lone
    surrogate in the description becomes a question mark. If the request is a permitted change, the audit log gets the
    error.
    """
    status, problem = _problem_of(request, error)
    problem["error"] = problem["error"].encode(errors="replace").decode()[:MAX_ERROR_CHARS]
    note_outcome(request.scope, status, problem["error"])
    return status, problem


def _problem_of(request: Request, error: Exception) -> tuple[int, api_types.ProblemView]:
    status = 500
    problem: api_types.ProblemView = {
        "error": f"The manager failed: {type(error).__name__}: {error}",
        "remedy": "This is a bug. The manager's log has the details.",
    }
    if isinstance(error, BatchlabError):
        status = status_of(error)
        problem = {"error": _text(error), "remedy": error.remedy}
    elif isinstance(error, RequestValidationError):
        status = 422
        first, *others = error.errors()
        where = ".".join(str(part) for part in first["loc"])
        more = f" (and {len(others)} more)" if others else ""
        problem = {
            "error": f"The request is not valid at {where}: {first['msg']}{more}.",
            "remedy": "/openapi.json describes every request.",
        }
    elif isinstance(error, HTTPException):
        status = error.status_code
        what = f"{request.method} {request.url.path}"
        why = "cannot be read" if status in (400, 413) else "is not an endpoint"
        problem = {
            "error": f"{what} {why}: {str(error.detail).rstrip('.')}.",
            "remedy": "/openapi.json describes every request.",
        }
    return status, problem


def _text(error: BatchlabError) -> str:
    """Return the text of an error.

    The error text of an invalid job file contains the first mistake and up to MAX_MISTAKES other mistakes, with their
    lines.
    """
    if not isinstance(error, JobFileError):
        return error.message
    first, *others = getattr(error, "errors", (error,))
    where = f"{first.file}:{first.line}: " if first.line else ""
    more = "".join(f" Also in line {other.line}: {other.message}" for other in others[:MAX_MISTAKES])
    return f"{where}{first.message}{more}"


MAX_PARALLEL_READS = 16

NOT_STORED = "(The log is stored when the following tasks of the bundle have ended.)\n"
"""Text in place of a log that is not stored yet.

A worker stores the log of a bundle after the bundle's last task. The outcome of earlier tasks of a bundle may already
exist while a long task of the bundle runs.
"""


async def outcomes_of(manager: Manager, records: Sequence[BundleRecord]) -> AsyncIterator[tuple[BundleRecord, Outcome]]:
    """Yield each bundle in `records` with its outcome, in the order of `records`. All bundles belong to one job.

    Up to MAX_PARALLEL_READS reads run in parallel.
    """
    if not records:
        return
    objects, patience = manager.ports.objects, manager.ports.patience
    key = await manager.ports.keys.key_of((await manager.ports.ledger.job(records[0].bundle.job)).job)
    for first in range(0, len(records), MAX_PARALLEL_READS):
        batch = records[first : first + MAX_PARALLEL_READS]
        outcomes = await asyncio.gather(*(committed(objects, r.bundle, patience, key) for r in batch))
        for record, outcome in zip(batch, outcomes, strict=True):
            if outcome:
                yield record, outcome
