"""Templates become answers, and so do errors.

Invariant: everything is escaped where it is put into a page; a template that asks for what it was
not given is an error, not a gap.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from fastapi import Request
from fastapi.responses import HTMLResponse

from batchlab import __version__
from batchlab.api.common import Served, problem_of
from batchlab.api.door import PAGE
from batchlab.errors import BatchlabError
from batchlab.web.guard import SESSION

if TYPE_CHECKING:
    from jinja2 import Environment

_FILTERS = (
    *("span", "number", "count", "when", "ticks", "path", "tone"),
    *("of_stage", "of_job", "to_go"),
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

    from batchlab.costs.money import shown
    from batchlab.web import words

    made = Environment(
        loader=PackageLoader("batchlab.web"),
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
