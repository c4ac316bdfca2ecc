"""Rendering of templates and errors, the static files, and the forms of the web page.

Invariant: every value is escaped on insertion into a page. The rendering of a template that uses a missing value fails.
Only files of this package's `static` folder can be downloaded. A form is used only after a check of the form's token.
The web page reads the fleet and the queues at most once in GRID_CACHE_S seconds, regardless of the number of browsers.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated, Any, cast
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse, RedirectResponse
from starlette.datastructures import FormData, UploadFile
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from batchlab import __version__
from batchlab.core import api_types
from batchlab.core.errors import BatchlabError, Refused, Unauthorized
from batchlab.core.pricing.price_book import PriceBook
from batchlab.core.pricing.request_costs import Pace
from batchlab.core.protocol.mended_inputs import MAX_INPUT_BYTES
from batchlab.core.text import size
from batchlab.manager.manager import Manager
from batchlab.server.http import grid, permissions
from batchlab.server.http.authentication import PAGE, SAFE_METHODS
from batchlab.server.http.common import CallerDep, ServerState, StateDep, problem_of
from batchlab.server.http.job_files import check_length, form_with_files, read_form
from batchlab.server.http.permissions import PAGE_RULES, authorize, caller_of, record_change
from batchlab.server.report_writer import HtmlReports
from batchlab.server.web.security import SESSION

if TYPE_CHECKING:
    from jinja2 import Environment

_FILTERS = (
    *("span", "size", "number", "count", "when", "ticks", "path", "visible"),
    *("tone", "of_stage", "of_job", "to_go"),
)
NAVIGATION = (
    ("jobs", "", "Jobs"),
    ("failures", "failures", "Failures"),
    ("schedules", "schedules", "Schedules"),
    ("grid", "grid", "Grid"),
    ("costs", "costs", "Costs"),
    ("submit", "submit", "Submit"),
)


@cache
def _templates() -> Environment:
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    from batchlab.core.pricing.price_book import shown
    from batchlab.server.web import text

    environment = Environment(
        loader=ChoiceLoader([PackageLoader("batchlab.server.web"), PackageLoader("batchlab.reports.html", ".")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in _FILTERS:
        environment.filters[name] = getattr(text, name)
    environment.filters["usd"] = shown
    environment.globals.update(static=f"{PAGE}/static", version=__version__, navigation=NAVIGATION)
    return environment


def render(request: Request, template: str, *, status: int = 200, here: str = "", **values: Any) -> HTMLResponse:
    """Render the template as an answer. `here` is the active entry of the navigation."""
    served = cast(ServerState, request.app.state.served)
    session, caller = request.scope.get(SESSION), caller_of(request.scope)
    text = _templates().get_template(template)
    return HTMLResponse(
        text.render(
            here=here,
            root=_root(request),
            session=session,
            caller=caller,
            may=partial(permissions.may, caller),
            form_token=served.sessions.form_token(session) if session else "",
            backend=served.backend_name,
            leads=served.manager.is_leader.is_set(),
            asked_by_part=is_part(request),
            **values,
        ),
        status,
    )


def is_part(request: Request) -> bool:
    """Return whether the browser requests only a part of a page, to insert the part into the open page."""
    return "hx-request" in request.headers


STOP_POLLING = 286
"""Status of an update after which htmx stops the updates of the page."""


def live(request: Request, page: str, *, here: str, is_over: bool = False, **values: Any) -> HTMLResponse:
    """Return a page that updates itself, or only the changing part of the page.

    The template of the changing part is named `page` with the suffix `_live`. A page does not update itself any more
    if `is_over` is true.
    """
    url = request.url.include_query_params(part="live")
    values["live_url"] = f"{url.path}?{url.query}"
    values["live_part"] = f"{page}_live.html"
    values["is_over"] = is_over
    if request.query_params.get("part") == "live" and is_part(request):
        return render(request, values["live_part"], status=STOP_POLLING if is_over else 200, here=here, **values)
    return render(request, f"{page}.html", here=here, **values)


def _root(request: Request) -> str:
    """Return the path of the page's root, which contains the session's place."""
    return str(request.scope["root_path"])


async def problem_page(request: Request, error: Exception) -> HTMLResponse:
    """Return the page for an error, with one sentence and a remedy."""
    status, problem = problem_of(request, error)
    # The attribute `errors` is read only from batchlab's errors, because FastAPI's errors have a method of the same
    # name.
    mistakes = getattr(error, "errors", ()) if isinstance(error, BatchlabError) else ()
    return render(
        request,
        "problem.html",
        status=status,
        heading="Not found" if status == 404 else "The request failed",
        problem=problem,
        several=[str(mistake) for mistake in mistakes],
        back=_previous_page(request),
    )


def _previous_page(request: Request) -> str:
    """Return the page that sent the request, according to the `Referer` header.

    If the header is missing, return the root of the web page.
    """
    referer, root = urlsplit(request.headers.get("referer", "")), f"{_root(request)}/"
    if referer.netloc != request.url.netloc or not referer.path.startswith(root):
        return root
    return referer._replace(scheme="", netloc="", fragment="").geturl()


_TYPES = {"css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8", "svg": "image/svg+xml"}


class Assets:
    """Application that serves the static files from memory."""

    def __init__(self) -> None:
        self._responses: dict[str, Response] = {}
        root = files("batchlab.server.web") / "static"
        for prefix, folder in (("", root), ("vendor/", root / "vendor")):
            for file in folder.iterdir():
                kind = _TYPES.get(file.name.rpartition(".")[2])
                if kind and file.is_file():
                    # The header is no-cache, so that a page never uses the script of an earlier release.
                    headers = {"Cache-Control": "no-cache", "Content-Type": kind}
                    self._responses[prefix + file.name] = Response(file.read_bytes(), headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = scope["path"].removeprefix(scope.get("root_path", "")).lstrip("/")
        response = self._responses.get(name) if scope["method"] in ("GET", "HEAD") else None
        await (response or PlainTextResponse("This file does not exist.\n", 404))(scope, receive, send)


GRID_CACHE_S = 1.0
MAX_FORM_BYTES = 1024 * 1024
TOKEN = "form_token"  # noqa: S105 - the name of a form field


@dataclass(slots=True)
class PageState:
    """State that the web page keeps between requests."""

    prices: PriceBook | None
    reports: HtmlReports | None = None
    pace: Pace = field(default_factory=Pace)
    _grid: tuple[float, api_types.GridView] | None = None
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def grid(self, manager: Manager, served: ServerState) -> api_types.GridView:
        """Return the pools, instances, and queues. The returned view is at most GRID_CACHE_S seconds old."""
        async with self._lock:
            now_s = manager.ports.clock.monotonic_s()
            if self._grid is None or now_s - self._grid[0] > GRID_CACHE_S:
                self._grid = (now_s, await grid.grid(manager, served))
            return self._grid[1]


async def _state(request: Request) -> PageState:
    return cast(PageState, request.app.state.page)


PageDep = Annotated[PageState, Depends(_state)]


async def form_of(request: Request) -> FormData:
    """Return the request's form. The function reads the form of an upload once and stores the form in the request."""
    length = request.headers.get("content-length")
    read = _UPLOADS.get(request.scope["route"].path)
    if read is None or not request.headers.get("content-type", "").startswith("multipart/"):
        check_length(length, MAX_FORM_BYTES)
        return await request.form(max_files=0, max_fields=10_000)
    if not hasattr(request.state, "form"):
        request.state.form = await read(request, length)
    return cast(FormData, request.state.form)


async def _job_form(request: Request, length: str | None) -> FormData:
    return await read_form(request, check_length(length))


async def _input_form(request: Request, length: str | None) -> FormData:
    """Return the form with the new input of a task."""
    remedy = f"Select a file of at most {size(MAX_INPUT_BYTES)}, or submit a job of its own for larger input."
    size_bytes = check_length(length, MAX_INPUT_BYTES + MAX_FORM_BYTES, remedy=remedy)
    return await form_with_files(request, size_bytes, max_files=1, max_fields=10, remedy=remedy)


_UPLOADS = {"/submit": _job_form, "/jobs/{job}/retry": _input_form}
"""Function that reads a form with files, for each path that accepts files."""


CONFIRMED = ("/jobs/{job}/cancel", "/grid/drain", "/schedules/{name}/remove")
"""Actions that need a confirmation. Without the confirmation, the request leads to the question."""


async def _check_role(request: Request, served: StateDep) -> None:
    caller = caller_of(request.scope)
    if caller is None:
        raise Unauthorized("The request does not have a session.", remedy="Log in first.")
    route = request.method, request.scope["route"].path
    await authorize(served.manager, caller, PAGE_RULES, route, request.path_params)


async def _record_change(request: Request, served: StateDep, caller: CallerDep) -> None:
    path = request.scope["route"].path
    if request.method in SAFE_METHODS:
        return
    if path not in CONFIRMED or is_confirmed(await form_of(request)):
        await record_change(served.manager, caller, PAGE_RULES[request.method, path], request.path_params)


async def _check_form_token(request: Request, served: StateDep) -> None:
    if request.method in SAFE_METHODS:
        return
    session, form = request.scope[SESSION], await form_of(request)
    token = form.get(TOKEN)
    if session is None or not isinstance(token, str):
        problem = "The form does not contain a token."
    elif not served.sessions.is_form_token(session, token):
        problem = "The form belongs to another session."
    else:
        return
    await form.close()  # a refused upload does not stay on the disk
    raise Refused(problem, remedy="Open the page again.")


def guarded_router() -> APIRouter:
    """Return a router that checks the role of the user, and the form token of each request that changes data."""
    # The role is checked before the form is read, because a form may be large.
    return APIRouter(dependencies=[Depends(_check_role), Depends(_check_form_token), Depends(_record_change)])


def redirect(request: Request, path: str) -> Response:
    """Return a redirect to a path of the web page in the same session."""
    return RedirectResponse(f"{request.scope['root_path']}{path}", 303)


def field_of(form: FormData, name: str) -> str:
    """Return the value of a text field of the form, or "" if the field is missing."""
    value = form.get(name)
    return "" if value is None or isinstance(value, UploadFile) else value.strip()


def is_confirmed(form: FormData) -> bool:
    """Return whether the form contains the user's confirmation."""
    return field_of(form, "sure") == "yes"
