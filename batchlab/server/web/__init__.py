"""Web page of the manager in HTML, rendered from the same data as the API below /v1.

Invariant: the web page does not contain business rules. A view shows the answers of endpoints below /v1, and an action
calls one endpoint below /v1. The page shows only data that the API also returns.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from batchlab.core.errors import BatchlabError
from batchlab.core.pricing.price_book import PriceBook
from batchlab.core.pricing.request_costs import Pace
from batchlab.server.http.authentication import PAGE
from batchlab.server.http.common import ServerState
from batchlab.server.report_writer import HtmlReports
from batchlab.server.web.security import Guard


def mount(
    app: FastAPI,
    served: ServerState,
    *,
    prices: PriceBook | None = None,
    reports: HtmlReports | None = None,
    pace: Pace = Pace(),  # noqa: B008 - a Pace does not change
) -> None:
    """Add the web page to `app` below the path PAGE.

    If `prices` is None, the page does not show costs. If `reports` is None, the page does not show reports. `pace` are
    the intervals of the grid's requests, which a bill without counted requests needs.
    """

    async def redirect_to_page() -> RedirectResponse:
        return RedirectResponse(f"{PAGE}/", 303)

    app.add_api_route("/", redirect_to_page, include_in_schema=False)
    # The Guard is not a middleware, because the application answers an unhandled error outside of its middlewares.
    page = _LazyPage(partial(page_of, served, prices, reports, pace))
    app.mount(PAGE, Guard(page, served.sessions, served.users, served.hosts))


def page_of(
    served: ServerState,
    prices: PriceBook | None = None,
    reports: HtmlReports | None = None,
    pace: Pace = Pace(),  # noqa: B008
) -> FastAPI:
    """Return the application of the web page, which the Guard protects."""
    from batchlab.server.web import actions, views
    from batchlab.server.web.rendering import Assets, PageState, problem_page

    page = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    page.state.served = served
    page.state.page = PageState(prices, reports, pace)
    for kind in (BatchlabError, RequestValidationError, HTTPException, Exception):
        page.add_exception_handler(kind, problem_page)
    for router in (views.login_router, views.router, actions.router):
        page.include_router(router)
    page.mount("/static", Assets())
    return page


class _LazyPage:
    """Application of the web page that the first request creates, so that a grid starts faster."""

    def __init__(self, create: Callable[[], ASGIApp]) -> None:
        self._create = create
        self._page: ASGIApp | None = None
        self._lock = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._lock:
            if self._page is None:
                self._page = await asyncio.to_thread(self._create)
            page = self._page
        await page(scope, receive, send)
