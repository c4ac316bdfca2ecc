"""HTTP API of the manager, with JSON endpoints below /v1 and the OpenAPI document at /openapi.json.

Invariant: the endpoints do not contain business rules. An endpoint of the API calls the manager and returns a view of
the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Scope

from batchlab import __version__
from batchlab.core.capabilities import NO_CAPABILITIES, Capabilities
from batchlab.core.errors import BatchlabError
from batchlab.core.users import Caller
from batchlab.manager.audit_log import REFUSED
from batchlab.manager.manager import Manager
from batchlab.manager.user_directory import UserDirectory
from batchlab.server import metrics
from batchlab.server.http import (
    downloads,
    failures,
    grid,
    job_files,
    jobs,
    logs,
    schedules,
    shares,
    task_list,
    tasks,
    users,
)
from batchlab.server.http.authentication import LOCAL_NAMES, AccessCheck, Sessions, SessionStore
from batchlab.server.http.common import OutcomeRecorder, ServerState, error_response

_ANY_ADDRESS = frozenset({"0.0.0.0", "::", ""})  # noqa: S104 - addresses for a comparison


def create_app(
    manager: Manager,
    *,
    token: str,
    backend_name: str,
    capabilities: Capabilities = NO_CAPABILITIES,
    on_shutdown: Callable[[], None],
    sessions: SessionStore | None = None,
    hosts: Iterable[str] = (),
) -> tuple[FastAPI, ServerState]:
    """Return the ASGI application of the API, and the state that the endpoints share. `on_shutdown` is called in the
    event loop after the answer to a shutdown request was sent. `sessions` stores the sessions of the web page. The Host
    header of a request without the token must be a name of this machine or in `hosts`.
    """
    app = _app_with_routes()
    page_sessions, directory = Sessions(token, manager.ports.clock, sessions), UserDirectory(manager.ports, token)
    names = LOCAL_NAMES | {host.lower() for host in hosts} - _ANY_ADDRESS
    served = ServerState(manager, token, backend_name, capabilities, on_shutdown, page_sessions, directory, names)
    app.state.served = served
    for kind in (BatchlabError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _handle_error)

    def on_error(scope: Scope, error: Exception) -> JSONResponse:
        return error_response(Request(scope), error)

    def on_refused(caller: Caller, state: str, request: str) -> None:
        if audit := served.manager.audit:
            reason = f"the token is {state}"
            audit.note_refusal(audit.record(caller.name, caller.role, request, outcome=REFUSED, reason=reason))

    app.add_middleware(OutcomeRecorder)
    app.add_middleware(
        AccessCheck,
        token=token,
        users=directory,
        on_refused=on_refused,
        now_s=manager.ports.clock.now_s,
        hosts=names,
        on_error=on_error,
    )
    return app, served


async def _handle_error(request: Request, error: Exception) -> JSONResponse:
    """Return the response for an error. The function is a coroutine, because the audit log needs the event loop."""
    return error_response(request, error)


def description() -> dict[str, Any]:
    """Return the OpenAPI document of the API. The document does not depend on a running manager."""
    return _app_with_routes().openapi()


def _app_with_routes() -> FastAPI:
    app = FastAPI(
        title="batchlab",
        version=__version__,
        # FastAPI's documentation pages load scripts from the internet, so these pages do not work offline.
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
    )
    app.include_router(jobs.submission_router)
    for module in (
        grid,
        job_files,
        tasks,
        task_list,
        downloads,
        jobs,
        failures,
        logs,
        schedules,
        shares,
        users,
        metrics,
    ):
        app.include_router(module.router)
    app.include_router(grid.public)
    return app
