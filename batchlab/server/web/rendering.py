"""Templates become answers, and so do errors.

Invariant: everything is escaped where it is put into a page; a template that asks for what it was
not given is an error, not a gap.

The page's static files, as they were shipped.

Invariant: what is served is a file of this package's `static` folder, and nothing else.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from fastapi import Request
from fastapi.responses import HTMLResponse
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from batchlab import __version__
from batchlab.core.errors import BatchlabError
from batchlab.server.http.authentication import PAGE
from batchlab.server.http.common import Served, problem_of
from batchlab.server.web.security import SESSION

if TYPE_CHECKING:
    from jinja2 import Environment

_FILTERS = (
    "span",
    "number",
    "count",
    "when",
    "ticks",
    "path",
    "tone",
    "of_stage",
    "of_job",
    "to_go",
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
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from batchlab.core.pricing.money import shown
    from batchlab.server.web import text as words

    made = Environment(
        loader=PackageLoader("batchlab.server.web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in _FILTERS:
        made.filters[name] = getattr(words, name)
    made.filters["usd"] = shown
    made.globals.update(static=f"{PAGE}/static", version=__version__, navigation=NAVIGATION)
    return made


def render(
    request: Request, template: str, *, status: int = 200, here: str = "", **values: Any
) -> HTMLResponse:
    """The template as an answer; `here` is the place in the navigation."""
    served = cast(Served, request.app.state.served)
    session = request.scope.get(SESSION)
    text = (
        _templates()
        .get_template(template)
        .render(
            here=here,
            root=_root(request),
            session=session,
            form_token=served.sessions.form_token(session) if session else "",
            backend=served.backend_name,
            leads=served.manager.is_leader.is_set(),
            asked_by_part=_is_part(request),
            **values,
        )
    )
    return HTMLResponse(text, status)


def _is_part(request: Request) -> bool:
    """Whether only a part of a page is asked for, to be put into one that is there."""
    return "hx-request" in request.headers


def live(request: Request, page: str, *, here: str, **values: Any) -> HTMLResponse:
    """A page that keeps itself up to date: whole, or what changes of it, `page` with `_live`."""
    url = request.url.include_query_params(part="live")
    values["live_url"] = f"{url.path}?{url.query}"
    values["live_part"] = f"{page}_live.html"
    if request.query_params.get("part") == "live" and _is_part(request):
        return render(request, values["live_part"], here=here, **values)
    return render(request, f"{page}.html", here=here, **values)


def _root(request: Request) -> str:
    """Return the path below which the page is, with the session's place."""
    return str(request.scope["root_path"])


async def problem_page(request: Request, error: Exception) -> HTMLResponse:
    """Any error as a page, with one sentence and what to do."""
    status, problem = problem_of(request, error)
    # A job file's mistakes; what FastAPI raises has a method of that name.
    mistakes = getattr(error, "errors", ()) if isinstance(error, BatchlabError) else ()
    several = [str(one) for one in mistakes]
    return render(
        request,
        "problem.html",
        status=status,
        heading="Not found" if status == 404 else "Something is not right",
        problem=problem,
        several=several,
        back=_asked_from(request),
    )


def _asked_from(request: Request) -> str:
    """The page of ours that has asked for this, by the browser's word; the first one without."""
    said, first = urlsplit(request.headers.get("referer", "")), f"{_root(request)}/"
    if said.netloc != request.url.netloc or not said.path.startswith(first):
        return first
    return said._replace(scheme="", netloc="", fragment="").geturl()


_TYPES = {
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}


class Assets:
    """Serves them, read once."""

    def __init__(self) -> None:
        self._known: dict[str, Response] = {}
        root = files("batchlab.server.web") / "static"
        for prefix, folder in (("", root), ("vendor/", root / "vendor")):
            for one in folder.iterdir():
                kind = _TYPES.get(one.name.rpartition(".")[2])
                if kind and one.is_file():
                    # No cache: after an upgrade the page must not meet yesterday's script.
                    headers = {"Cache-Control": "no-cache", "Content-Type": kind}
                    self._known[prefix + one.name] = Response(one.read_bytes(), headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = scope["path"].removeprefix(scope.get("root_path", "")).lstrip("/")
        found = self._known.get(name) if scope["method"] in ("GET", "HEAD") else None
        await (found or PlainTextResponse("There is no such file.\n", 404))(scope, receive, send)
